"""Files of tensors: read without running anything in them, and every failure in words."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from samtune.errors import OutOfMemory, UserError

# Common keys around a state dict, and common beginnings of all its names (the last two are
# torch_em's and micro-sam's).
_WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state")
_PREFIXES = ("module.", "sam.")
_MOST_WRAPPERS = 8
CHUNK = 1 << 20  # bytes


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a .pth, .pt or .safetensors file, by name, on the CPU.

    A surrounding {"model": ...} (or another of `_WRAPPERS`) and the prefixes `module.` and `sam.`,
    where all names have them, are taken off. Nothing in the file is executed. Raises UserError when
    it is no such file.
    """
    state = read_tensors(path)
    for _ in range(_MOST_WRAPPERS):  # a pickle can hold itself
        if not isinstance(state, dict) or not (inner := [k for k in _WRAPPERS if k in state]):
            break
        state = state[inner[0]]
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} does not hold tensors by name, so it is no checkpoint")
    for name, value in state.items():
        if not (isinstance(name, str) and name.isprintable()):  # it stands in tables and logs
            raise UserError(f"{path} is no checkpoint: one of its names is {name!r}")
        if not isinstance(value, Tensor):
            raise UserError(f"{path} is no checkpoint: its entry {name!r} is not a tensor")
        if value.is_meta or value.is_quantized or value.layout != torch.strided:
            raise UserError(f"{path} is no checkpoint: its tensor {name!r} holds no plain numbers")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def existing_file(path: str | Path) -> Path:
    """The path; raises UserError if there is no such file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file")
    return Path(path)


def read_tensors(path: str | Path) -> Any:
    """Whatever a .pth, .pt or .safetensors file holds, on the CPU, nothing in it executed.

    Raises UserError when it is missing, damaged, a web page, or more than tensors and plain values.
    """
    path = existing_file(path)
    try:
        with open(path, "rb") as file:
            head = file.read(256).lstrip()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if head.startswith(b"<"):
        raise UserError(f"{path} is a web page, not a checkpoint: download the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} only points to a checkpoint: fetch the file with `git lfs pull`")
    damaged = UserError(f"{path} is damaged or not whole: fetch it again")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mmap = zipfile.is_zipfile(path)  # torch's format since 1.6; an older one is read whole
        if mmap:
            _refuse_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UserError:
        raise
    except MemoryError:
        raise OutOfMemory(f"{path}: reading it takes more memory than there is") from None
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise damaged from None
        raise UserError(
            f"{path} holds more than tensors, which could run code when read: save its state dict "
            "alone and use that"
        ) from None
    except Exception:  # a damaged file makes a reader stumble over anything
        raise damaged from None


def _refuse_compressed(path: Path) -> None:
    """Raise UserError for a zip whose members are compressed, as torch never writes one.

    Little can unpack to more than memory holds, and torch would map the packed bytes as numbers.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{path} is a compressed zip, not a checkpoint: unpack it")


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
