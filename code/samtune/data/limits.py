"""How large a file may be, judged by what its header says before anything in it is decoded.

A few bytes can stand for gigabytes: a PNG of one colour, a zip of zeros, a polygon with far
corners. These bounds are generous; what is beyond them is a mistake or an attack.
"""

from __future__ import annotations

from samtune.errors import UserError

MOST_PIXELS = 2**28  # of a picture: 16,384 x 16,384
MOST_BYTES = 2**31  # of a file, or of a part of one, that is read as a whole


def check_pixels(width: int, height: int, path) -> None:
    """Raise UserError for a picture without a pixel, or with more than `MOST_PIXELS`."""
    if width < 1 or height < 1:
        raise UserError(f"{path}: {width} x {height} pixels: there is no picture in it; remove it")
    if width * height > MOST_PIXELS:
        raise UserError(
            f"{path}: {width} x {height} pixels are more than the {MOST_PIXELS:,} that are read at "
            "once; cut it into tiles"
        )


def check_bytes(size: int, path) -> None:
    """Raise UserError for what would take more than `MOST_BYTES`."""
    if size > MOST_BYTES:
        raise UserError(
            f"{path}: {size:,} bytes are more than the {MOST_BYTES:,} that are read at once; split "
            "it"
        )
