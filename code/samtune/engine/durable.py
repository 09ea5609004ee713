"""Files that are whole or not there: written aside, read back, and only then given their name.

A crash, a kill or a full disk at any moment leaves the file that was there before. What disks,
networks and copies do to a file later is found by a checksum of its content that lies in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from samtune.activity import now
from samtune.errors import UserError


def write_atomically(
    path: str | Path, write: Callable[[BinaryIO], Any], check: Callable[[Path], Any] | None = None
) -> None:
    """Let `write` fill the file; it appears under `path` whole or not at all.

    check: reads the written file back, under another name of the same extension, and raises
    UserError if it is not what it should be. Raises UserError too if the system refuses (a full
    disk, a folder without permission).
    """
    path = Path(path)
    now.turns_to(f"the writing of {path}")
    temporary = path.with_name(f".part.{path.name}")
    refusals: list[OSError] = []
    try:
        try:
            with io.BufferedWriter(Disk(temporary, refusals)) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                _forget(file.fileno())
            if check:
                check(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except Exception as error:
        if isinstance(error, OSError):
            refusals.append(error)
        if not refusals:
            raise
        reason = refusals[0].strerror or refusals[0]
        raise UserError(
            f"{path} could not be written: {reason}; the previous file is unchanged"
        ) from error
    sync_folder(path.parent)


class Disk(io.FileIO):
    """A file to write that notes why the system refused: `torch.save` makes an error of its own of
    that, a RuntimeError without the reason."""

    def __init__(self, path: Path, refusals: list[OSError]):
        super().__init__(path, "wb")
        self._refusals = refusals

    def write(self, content) -> int | None:
        try:
            return super().write(content)
        except OSError as error:
            self._refusals.append(error)
            raise


def write_text(path: Path, text: str) -> None:
    """The same for text."""
    write_atomically(path, lambda file: file.write(text.encode()))


def sync_folder(folder: Path) -> None:
    """Let names that were given in a folder outlast a loss of power, where the system can."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _forget(number: int) -> None:
    """Let the next reader of this file ask the disk, not the memory that it was written from."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)


def require_written(path: Path, found: str, expected: str) -> None:
    """Raise UserError if the checksum of what was read back is not that of what was written."""
    if found != expected:
        name = path.with_name(path.name.removeprefix(".part."))
        raise UserError(
            f"{name} could not be written: it does not read back as it was, so the disk or the way "
            "to it is faulty; the previous file is unchanged"
        )


def checksum(content: Any) -> str:
    """SHA-256, in hexadecimal, of nested dicts, lists, tensors and plain values.

    The same for what was in memory and for what a file gave back, whatever the file's format; the
    order of a dict's keys does not matter.
    """
    digest = hashlib.sha256()
    _add(digest, content)
    return digest.hexdigest()


def _add(digest, content: Any) -> None:
    if isinstance(content, Tensor):
        flat = content.detach().cpu().contiguous().reshape(-1)  # () -> (1,), which has a byte view
        digest.update(f"{content.dtype} {tuple(content.shape)};".encode())
        digest.update(flat.view(torch.uint8).numpy())
    elif isinstance(content, Mapping):
        digest.update(f"{len(content)} names;".encode())
        for name in sorted(content, key=repr):
            digest.update(f"{name!r};".encode())
            _add(digest, content[name])
    elif isinstance(content, (list, tuple)):
        digest.update(f"{len(content)} values;".encode())
        for value in content:
            _add(digest, value)
    else:
        digest.update(f"{content!r};".encode())
