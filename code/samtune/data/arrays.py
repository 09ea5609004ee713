"""Pictures inside files of arrays: .npy stacks, .npz slices, .h5 volumes. Pickles stay closed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from samtune.data.limits import check_bytes, check_pixels
from samtune.errors import OutOfMemory, UserError


class ArraySlice(NamedTuple):
    """The address of one picture in a file of arrays; stands where a `Path` may stand.

    array: the array's name in a .npz or .h5 file, "" in a .npy. index: its place along the first
    axis; None: the array is the picture.
    """

    file: Path
    array: str = ""
    index: int | None = None

    def __str__(self) -> str:
        array = f"[{self.array}]" if self.array else ""
        return f"{self.file}{array}" + ("" if self.index is None else f"[{self.index}]")


def read_slice(address: ArraySlice) -> np.ndarray:
    """The picture at an address: (H, W) or (H, W, channels), of the file's own number type.

    Raises UserError if the file is missing or damaged, has no such array, holds Python objects, or
    what is there has another number of axes or is too large, which is looked up before it is read.
    """
    return _open(address, lambda found: np.array(_pick(found, address)))


def count_slices(file: Path, array: str = "") -> int:
    """The length of an array's first axis. Raises UserError as `read_slice` does."""
    address = ArraySlice(file, array)
    shape = _open(address, lambda found: found.shape or ())
    if len(shape) < 3:
        raise UserError(f"{address}: an array of shape {shape}; expected one of (slices, H, W)")
    return shape[0]


def _pick(found, address: ArraySlice):
    """The picture's numbers, not yet read where the file need not be."""
    shape = found.shape or ()
    if address.index is not None:
        if not 0 <= address.index < shape[0]:
            raise UserError(f"{address}: the array has {shape[0]} slices only")
        shape = shape[1:]
    if len(shape) not in (2, 3) or found.dtype.kind not in "buif":
        raise UserError(
            f"{address}: an array of shape {shape} and type {found.dtype}; a picture has the "
            "shape (H, W) or (H, W, channels) and numbers"
        )
    check_pixels(shape[1], shape[0], address)
    check_bytes(found.dtype.itemsize * math.prod(shape), address)
    return found[() if address.index is None else address.index]


def _open(address: ArraySlice, look):
    """`look` at the array, while its file is open; slices are read without what lies beside."""
    file = address.file
    try:
        return _look_into(address, look)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file") from None
    except MemoryError:
        raise OutOfMemory(f"{address}: reading it takes more memory than there is") from None
    except Exception as error:  # a damaged file makes a reader stumble over anything
        raise UserError(f"{file}: cannot be read as arrays ({error}); replace it") from None


def _look_into(address: ArraySlice, look):
    file, name = address.file, address.array
    if file.suffix == ".h5":
        with h5py.File(file, "r") as arrays:
            if not isinstance(arrays.get(name), h5py.Dataset):
                raise _no_array(address, arrays)
            return look(arrays[name])
    loaded = np.load(file, mmap_mode="r", allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return look(loaded)
    with loaded as arrays:
        if name not in arrays.files:
            raise _no_array(address, arrays)
        for member in (name, f"{name}.npy"):  # a zip says how large what it holds is
            if member in arrays.zip.namelist():
                check_bytes(arrays.zip.getinfo(member).file_size, address)
        return look(arrays[name])


def _no_array(address: ArraySlice, arrays) -> UserError:
    names = ", ".join(sorted(arrays)) or "none"
    return UserError(f"{address.file}: no array named {address.array!r} in it; it has {names}")
