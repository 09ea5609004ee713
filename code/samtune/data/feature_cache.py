"""Features of pictures on disk: a file per picture and view, which is never trusted blindly.

A file is named by the SHA-256 of all that its numbers follow from, and says that name itself. It is
written under another name and renamed when it is whole, so that several runs may write at once and
a crash leaves nothing that looks like a result. What is truncated, foreign or of another shape
counts as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from samtune.data.decoding import decode
from samtune.data.files import Pair
from samtune.data.samples import is_annotations
from samtune.errors import UserError
from samtune.tensor_files import file_sha256

_TENSOR = "features"
_CODES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of safetensors
_LEFT_OVER = 24 * 3600  # seconds after which a file that was never finished is one of a crash
_OTHERS = 2**30  # bytes on the disk that are left to everybody else


class Form(NamedTuple):
    """What a picture's features look like. shape: without the batch. stored, given: number formats
    on disk and of the model."""

    shape: tuple[int, ...]
    stored: torch.dtype
    given: torch.dtype

    @property
    def file_bytes(self) -> int:
        """About the size of a file."""
        return torch.Size(self.shape).numel() * self.stored.itemsize + 1024


@dataclass(frozen=True)
class FeatureFiles:
    """The files of one model in `folder`. key: what all of them follow from."""

    folder: Path
    key: str
    form: Form

    def name(self, facts: Sequence) -> str:
        """The name of what follows from the key and these facts."""
        return hashlib.sha256(json.dumps([self.key, *facts]).encode()).hexdigest()

    def path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def holds(self, name: str) -> bool:
        """Whether a file is there and whole; if so, it counts as just used."""
        if not self._open(name, lambda file, metadata: True):
            return False
        with contextlib.suppress(OSError):  # another user's
            os.utime(self.path(name))
        return True

    def read(self, name: str) -> tuple[Tensor, tuple[int, int]] | None:
        """Features as the model gave them, and (H, W) of the picture's file; None if missing."""
        return self._open(name, self._read)

    def _read(self, file, metadata: dict) -> tuple[Tensor, tuple[int, int]]:
        height, width = map(int, json.loads(metadata["picture_size"]))
        features = file.get_tensor(_TENSOR).to(self.form.given)  # memory-mapped
        order = json.loads(metadata["order"])
        return features.permute([order.index(axis) for axis in range(len(order))]), (height, width)

    def _open(self, name: str, look):
        try:
            with safe_open(self.path(name), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("name") != name or list(file.keys()) != [_TENSOR]:
                    return None
                header = file.get_slice(_TENSOR)
                order = json.loads(metadata["order"])
                shape = tuple(self.form.shape[axis] for axis in order)
                if tuple(header.get_shape()) != shape or sorted(order) != list(range(len(shape))):
                    return None
                if _CODES.get(header.get_dtype()) != self.form.stored:
                    return None
                return look(file, metadata)
        except MemoryError:
            raise
        except Exception:  # a damaged file makes a reader stumble over anything
            return None

    def write(self, name: str, features: Tensor, picture_size: tuple[int, int]) -> None:
        """Keep one picture's features, on the CPU. Raises UserError if the disk does not take them.

        Numbers are laid out on disk as they were in memory, so that who reads them computes alike.
        """
        order = memory_order(features)
        facts = {"name": name, "order": json.dumps(order), "picture_size": json.dumps(picture_size)}
        laid_out = features.to(self.form.stored).permute(order).contiguous()
        data = save({_TENSOR: laid_out}, facts)
        path = self.path(name)
        temporary = path.with_name(f".{name}.{os.uname().nodename}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # else a power cut may leave a whole file of zeros
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"--cache_dir {self.folder}: {error.strerror}") from None


def memory_order(tensor: Tensor) -> list[int]:
    """The axes of a tensor as they lie in memory, the slowest first."""
    return sorted(range(tensor.ndim), key=lambda axis: -tensor.stride(axis))


@dataclass(frozen=True)
class KeptViews:
    """A dataset's features: see `datasets.Keeper`.

    digests: of each pair's files, see `digest`. drawn: how views are drawn, see the dataset.
    """

    files: FeatureFiles
    digests: list[str]
    drawn: str
    needs_image: bool

    def name(self, view: int, index: int) -> str:
        """Pictures that nothing is drawn for are known by their content alone."""
        place = [self.drawn, view, index] if self.drawn else []
        return self.files.name([self.digests[index], *place])

    def read(self, view: int, index: int) -> tuple[Tensor, tuple[int, int]] | None:
        return self.files.read(self.name(view, index))


def digest(pair: Pair, with_mask: bool) -> str:
    """The SHA-256 of a picture's content, and of its mask's where a view depends on it.

    Raises UserError if a file cannot be read.
    """
    return _digest(pair.image_path) + (_digest(pair.mask_path) if with_mask else "")


def _digest(address) -> str:
    if isinstance(address, Path):
        return _of_many(address) if is_annotations(address) else _of_file(address)
    array = decode(address).array  # a part of a file: its numbers
    head = f"{array.dtype} {array.shape}".encode()
    return hashlib.sha256(head + array.tobytes()).hexdigest()


def _of_file(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


_of_many = lru_cache(maxsize=4)(_of_file)  # one that describes many pictures is read once


def make_room(folder: Path, mine: Collection[Path], missing: int, limit: int, advice: str) -> int:
    """Remove what other runs left and used longest ago until this run's files fit; how many files.

    mine: the files of this run, there or not, which stay. missing: bytes that it will write.
    limit: bytes that `folder` may hold. Raises UserError, which ends with `advice`, if the run
    alone is larger than that or than the disk.
    """
    mine = set(mine)
    others = sorted(_entries(folder, mine))
    own = sum(path.stat().st_size for path in mine if path.exists())
    if own + missing > limit:
        raise UserError(
            f"--cache_features: this run keeps {_gigabytes(own + missing)} GB of features, "
            f"--cache_limit is {_gigabytes(limit)}: {advice}"
        )
    free = shutil.disk_usage(_existing(folder)).free - _OTHERS
    kept, removed = sum(size for _, size, _ in others), 0
    if missing > free + kept:
        raise UserError(
            f"--cache_dir {folder}: {_gigabytes(missing)} GB of features do not fit on this disk, "
            f"which has {_gigabytes(free)} GB left for them: {advice}"
        )
    for _, size, path in others:
        if own + missing + kept <= limit and missing <= free:
            break
        path.unlink(missing_ok=True)
        kept, free, removed = kept - size, free + size, removed + 1
    return removed


def _entries(folder: Path, but: Collection[Path]) -> Iterable[tuple[float, int, Path]]:
    """(last use, bytes, path) of each other file of features; a crash's left-overs are removed."""
    for path in folder.glob("??/*"):
        try:
            status = path.stat()
        except OSError:  # another run removed it
            continue
        if path.suffix == ".safetensors":
            if path not in but:
                yield status.st_mtime, status.st_size, path
        elif path.name.startswith(".") and time.time() - status.st_mtime > _LEFT_OVER:
            path.unlink(missing_ok=True)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.2f}"
