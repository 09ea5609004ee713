"""Mask files as (H, W) uint8: 0 background, 1 object, or a class id per pixel.

What is the object is decided only where it cannot be mistaken: values 0 and 1, values 0 and 255, or
a JPEG of black and white. Anything else is an error that names the values, never a guess.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from samtune.config import ReadOptions
from samtune.data.arrays import ArraySlice
from samtune.data.codings import coding_of, unknown_values
from samtune.data.decoding import Decoded, decode
from samtune.data.tar_files import TarMember
from samtune.errors import UserError
from samtune.structures import IGNORE

_JPEG_GREY = (64, 192)  # a black-and-white JPEG has values between these only at a few edges
_JPEG_GREY_SHARE = 0.05
_JPEG_CONSTANT = 4  # how far a picture of one value strays from it
_JPEG_CHROMA = 8  # how far the channels of a grey picture stray from each other


def read_mask(path: str | Path | ArraySlice | TarMember, read: ReadOptions) -> np.ndarray:
    """A mask file as (H, W) uint8, 0 background and 1 object, or class ids.

    Palette files by index (by colour, if the coding is one of colours), 1-bit files by bit,
    coloured-but-grey files by one channel, masks drawn in the alpha channel by alpha. Raises
    UserError if the object cannot be told.
    """
    return mask_from(decode_mask(path, read), read, path)[0]


def decode_mask(path: str | Path | ArraySlice | TarMember, read: ReadOptions) -> Decoded:
    """Decode a mask file; a palette gives the indices or colours that its coding is about."""
    coding = coding_of(read)
    return decode(path, palette_indices=not (coding and coding.coloured))


def mask_from(
    decoded: Decoded, read: ReadOptions, path: str | Path | ArraySlice | TarMember
) -> tuple[np.ndarray, str | None]:
    """What was decoded, as (H, W) uint8, and the remark "lossy" or None.

    Values are 0 and 1, or class ids below `read.num_classes` where that is 2 or more, and `IGNORE`.
    """
    if decoded.array.dtype.kind == "f" and not np.isfinite(decoded.array).all():
        raise UserError(f"{path}: holds NaN or infinite values; replace them")
    if coding := coding_of(read):
        if decoded.lossy and coding.num_classes > 1:
            raise UserError(f"{path}: JPEG does not keep class ids; save masks as PNG")
        values = decoded.array
        if not coding.coloured:
            values = _one_channel(values, decoded.lossy, path)
        return coding.ids(values, path), None
    values = _one_channel(decoded.array, decoded.lossy, path)
    if read.num_classes > 1:
        return _class_ids(values, decoded.lossy, read, path), None
    if values.dtype == bool:  # one bit per pixel: there is nothing to decide
        above, remark = values, None
    elif read.mask_threshold >= 0:
        above, remark = values >= read.mask_threshold, None
    elif decoded.lossy:
        above, remark = _decide_lossy(values, path)
    else:
        above, remark = _decide_exact(values, path), None
    is_object = above if read.foreground == "above" else ~above
    return is_object.astype(np.uint8), remark


def numbers_from(decoded: Decoded, path: str | Path) -> np.ndarray:
    """A mask file that numbers its objects, as (H, W) int64: 0 background, any other one object."""
    if decoded.lossy:
        raise UserError(f"{path}: JPEG does not keep the numbers of objects; save masks as PNG")
    values = _one_channel(decoded.array, decoded.lossy, path)
    numbers = values.astype(np.int64)
    if (numbers != values).any() or (numbers < 0).any():
        raise UserError(f"{path}: numbers of objects are whole and not negative")
    return numbers


def _class_ids(values: np.ndarray, lossy: bool, read: ReadOptions, path: str | Path) -> np.ndarray:
    """(H, W) uint8 class ids; what the file marks as ignored becomes `IGNORE`."""
    if lossy:
        raise UserError(f"{path}: JPEG does not keep class ids; save masks as PNG")
    ignored = values == read.ignore_index
    unknown = ~ignored & ((values < 0) | (values >= read.num_classes) | (values % 1 != 0))
    if unknown.any():
        rule = (
            f"no class id below --num_classes {read.num_classes} and not --ignore_index "
            f"{read.ignore_index}"
        )
        raise unknown_values(values[unknown], values.size, "{:g}".format, rule, path)
    return np.where(ignored, IGNORE, values).astype(np.uint8)


def _one_channel(array: np.ndarray, lossy: bool, path: str | Path) -> np.ndarray:
    """The (H, W) values that code the mask."""
    if array.ndim == 2:
        return array
    if array.shape[2] not in (1, 2, 3, 4):
        raise UserError(f"{path}: has {array.shape[2]} channels; a mask has one")
    if array.shape[2] in (2, 4):
        array, alpha = array[..., :-1], array[..., -1]
        drawn_in_alpha = (array == array[:1, :1]).all() and (alpha != alpha[0, 0]).any()
        if drawn_in_alpha:
            return alpha
    high, low = array.max(axis=2), array.min(axis=2)
    if (high.astype(int) - low > _JPEG_CHROMA if lossy else high != low).any():
        colours = np.unique(array.reshape(-1, array.shape[2]), axis=0)
        raise UserError(
            f"{path}: the mask is coloured ({len(colours)} colours: "
            f"{_listing(tuple(colour.tolist()) for colour in colours[:4])}); save it as grey, 0 "
            "for background and 255 for the object, or say with --class_colours what they mean"
        )
    return array[..., 0]


def _decide_exact(values: np.ndarray, path: str | Path) -> np.ndarray:
    for high in (1, 255):
        above = values == high
        if np.count_nonzero(values) == np.count_nonzero(above):  # there is but 0 and this value
            return above
    raise _undecidable(_distinct(values), "neither 0 and 1 nor 0 and 255", path)


def _decide_lossy(values: np.ndarray, path: str | Path) -> tuple[np.ndarray, str | None]:
    low, high = int(values.min()), int(values.max())
    grey = np.mean((values >= _JPEG_GREY[0]) & (values < _JPEG_GREY[1]))
    empty, full = high <= _JPEG_CONSTANT and low == high, low >= 255 - _JPEG_CONSTANT
    two_sided = low < _JPEG_GREY[0] and high >= _JPEG_GREY[1] and grey <= _JPEG_GREY_SHARE
    if not (empty or full or two_sided):
        raise _undecidable(_distinct(values), "not those of a black and white JPEG", path)
    return values >= 128, "lossy" if two_sided else None


def _undecidable(found: list, what: str, path: str | Path) -> UserError:
    low, high = found[0], found[-1]
    ids = ""
    if low >= 0 and 2 <= high < IGNORE and high % 1 == 0 and len(found) > 2:
        ids = f"; if they are class ids, set --num_classes, here at least {high + 1:g}"
    number = f"{len(found)} different" if len(found) > 1 else "the only one"
    return UserError(
        f"{path}: the mask's values {_listing(found[:12])} ({number}, {low:g} to {high:g}) are "
        f"{what}; set --mask_threshold N, and values of at least N are one side, the others the "
        f"other (--foreground says which is the object){ids}"
    )


def _distinct(values: np.ndarray) -> list:
    if values.dtype.kind in "ui" and values.min() >= 0 and values.max() < 2**16:
        return np.flatnonzero(np.bincount(values.ravel())).tolist()  # far faster than sorting
    return np.unique(values).astype(float if values.dtype.kind == "f" else int).tolist()


def _listing(items) -> str:
    return ", ".join(f"{item:g}" if isinstance(item, (int, float)) else str(item) for item in items)
