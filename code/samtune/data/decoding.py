"""One door from a picture's file to numbers: what a library would change silently is caught here.

Pillow decodes, because it refuses a truncated file where OpenCV returns a grey-filled one. Two
kinds are beyond it: it cuts 16-bit colour down to 8 bits and does not know float colour; OpenCV
reads those. Of Pillow's formats only those of pictures are open: some of the others start programs
(EPS runs Ghostscript).
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin

from samtune.data.arrays import ArraySlice, read_slice
from samtune.data.limits import MOST_PIXELS, check_pixels
from samtune.data.tar_files import TarMember, read_bytes
from samtune.errors import OutOfMemory, UserError

_ORIENTATION = 0x0112  # the EXIF and TIFF tag that says how a picture is to be turned
_KEPT_MODES = {"1", "L", "LA", "RGB", "RGBA", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"}
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "DIB", "WEBP", "GIF", "JPEG2000", "PPM")
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257  # tags


class Decoded(NamedTuple):
    """A decoded file.

    array: (H, W) or (H, W, 2 grey + alpha, 3 RGB or 4 RGBA), of the file's own number type.
    lossy: JPEG, so values are not exact. turned: an orientation tag was followed.
    """

    array: np.ndarray
    lossy: bool
    turned: bool


def decode(path: str | Path | ArraySlice | TarMember, palette_indices: bool = False) -> Decoded:
    """Decode a file as it is, turned upright if it carries an orientation tag.

    palette_indices: a palette file gives its indices instead of its colours. Raises UserError for a
    file that is missing, no picture, truncated, a stack of pages, or too large, which its header
    says before anything is decoded.
    """
    if isinstance(path, ArraySlice):
        return Decoded(read_slice(path), lossy=False, turned=False)
    try:
        return _decode_file(path, palette_indices)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except Image.DecompressionBombError as error:  # Pillow's own bound is twice the one it is given
        pixels = int(re.search(r"\d+", str(error))[0])
        raise UserError(
            f"{path}: {pixels:,} pixels are more than the {MOST_PIXELS:,} that are read at once; "
            "cut it into tiles"
        ) from None
    except MemoryError:
        raise OutOfMemory(f"{path}: decoding it takes more memory than there is") from None
    except Exception as error:  # a damaged file makes a reader stumble over anything
        if getattr(error, "errno", None):  # a folder, no permission, a dead disk
            raise UserError(f"{path}: {error.strerror}") from None
        raise UserError(f"{path}: truncated or damaged ({error}); replace or remove it") from None


def _decode_file(path: str | Path | TarMember, palette_indices: bool) -> Decoded:
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # else it warns far below
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]  # a build may lack one
    source = io.BytesIO(read_bytes(path)) if isinstance(path, TarMember) else path
    try:
        with Image.open(source, formats=formats) as picture:
            check_pixels(*picture.size, path)
            return _decode(picture, path, palette_indices)
    except Image.UnidentifiedImageError:
        return Decoded(_float_colour(path), lossy=False, turned=False)


def _decode(picture: Image.Image, path: str | Path | TarMember, palette_indices: bool) -> Decoded:
    lossy = picture.format in ("JPEG", "MPO")
    # A phone's JPEG (MPO) has its preview as a second picture: only the first is meant.
    if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
        raise UserError(f"{path}: holds {picture.n_frames} pages; save each as a file of its own")
    deep_colour = picture.mode in ("RGB", "RGBA", "LA") and any(
        ";16" in str(tile[3]) for tile in picture.tile
    )
    stored_size = picture.size
    turned = picture.getexif().get(_ORIENTATION, 1) not in (0, 1)
    picture.load()  # also before OpenCV reads the file: OpenCV does not say that it is truncated
    orientation = picture.getexif().get(_ORIENTATION, 1)  # Pillow has turned a TIFF already
    if deep_colour:
        if turned and picture.format == "TIFF":
            raise UserError(f"{path}: 16-bit colour TIFF with an orientation tag; save it upright")
        array = _by_opencv(path, stored_size)
    elif picture.mode in (_KEPT_MODES | {"P", "PA"} if palette_indices else _KEPT_MODES):
        array = np.asarray(picture)
    else:  # palette, CMYK, YCbCr, ...
        transparent = picture.mode == "PA" or "transparency" in picture.info
        array = np.asarray(picture.convert("RGBA" if transparent else "RGB"))
    return Decoded(_turn(array.astype(array.dtype.newbyteorder("=")), orientation), lossy, turned)


def _float_colour(path: str | Path | TarMember) -> np.ndarray:
    """A TIFF of float colour, (H, W, 3 or 4); its size is looked up before it is decoded."""
    try:
        size = _tiff_size(read_bytes(path))
        check_pixels(*size, path)
        array = _by_opencv(path, size)
    except (UserError, OSError):
        raise
    except Exception:
        array = None
    if array is None or array.dtype == np.uint8:
        raise UserError(f"{path}: not a readable image; replace or remove it")
    return array


def _tiff_size(content: bytes) -> tuple[int, int]:
    """(W, H) as the first directory of a TIFF says."""
    tags = TiffImagePlugin.ImageFileDirectory_v2(content[: 16 if content[2] == 43 else 8])
    with io.BytesIO(content) as file:
        file.seek(tags.next)
        tags.load(file)
    return int(tags[_TIFF_WIDTH]), int(tags[_TIFF_HEIGHT])


def _by_opencv(path: str | Path | TarMember, size: tuple[int, int]) -> np.ndarray:
    """What OpenCV decodes, if it is of the (W, H) that the header says; raises ValueError."""
    # imdecode instead of imread: it ignores no orientation tag on its own, and any path works
    content = read_bytes(path) or b"\0"
    if content.startswith(_PNG):
        _check_chunks(content)
    array = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None or array.shape[1::-1] != size:
        raise ValueError("no pixels of its size in it")
    return _to_rgb_order(array)


def _check_chunks(content: bytes) -> None:
    """Raise ValueError for a PNG chunk longer than the file: OpenCV would make room for it."""
    at = len(_PNG)
    while at + 8 <= len(content):
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        at += 12 + length
        if kind == b"IEND":  # what may follow is none of the picture's
            break
    if at > len(content):
        raise ValueError("a part of it is longer than the file")


def _to_rgb_order(array: np.ndarray) -> np.ndarray:
    """OpenCV's BGR or BGRA to RGB or RGBA."""
    if array.ndim == 3 and array.shape[2] in (3, 4):
        return array[..., [2, 1, 0, 3][: array.shape[2]]]
    return array


def _turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation: 2 to 4 mirror or half-turn, 5 to 8 also swap rows and columns."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)
