"""An image file and a mask file as one `Sample`: the scan and the training read through this."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from samtune.config import ReadOptions
from samtune.data.decoding import decode
from samtune.data.files import Pair
from samtune.data.images import image_from
from samtune.data.masks import decode_mask, mask_from
from samtune.errors import UserError
from samtune.structures import Sample

NOTES = {
    "lossy": "masks are JPEG and were cut at 128; PNG keeps them exact",
    "resized": "masks have another size than their image, at the same aspect, and were resized",
    "turned": "images were turned as their EXIF tag says, and their masks, without one, were not",
}


class Reading(NamedTuple):
    """A sample, and which of `NOTES` apply to its files."""

    sample: Sample
    notes: tuple[str, ...]


def read_sample(pair: Pair, read: ReadOptions) -> Reading:
    """Read both files of a pair. Raises UserError if one is unreadable or they do not fit."""
    image_file = decode(pair.image_path)
    mask_file = decode_mask(pair.mask_path, read)
    image = image_from(image_file, read, pair.image_path)
    mask, note = mask_from(mask_file, read, pair.mask_path)
    notes = [note] if note else []
    if image_file.turned and not mask_file.turned:
        notes.append("turned")
    if mask.shape != image.shape[:2]:
        mask = _to_size_of_image(mask, image.shape[:2], pair)
        notes.append("resized")
    sample = Sample(image, mask, pair.id, str(pair.image_path), str(pair.mask_path))
    return Reading(sample, tuple(notes))


def _to_size_of_image(mask: np.ndarray, size: tuple[int, int], pair: Pair) -> np.ndarray:
    """Resize a mask of the image's aspect, nearest pixel centre; refuse any other."""
    (height, width), (mask_height, mask_width) = size, mask.shape
    sizes = f"{mask_width} x {mask_height} pixels, its image {pair.image_path} {width} x {height}"
    if mask.shape == (width, height):
        raise UserError(
            f"{pair.mask_path}: {sizes}: one of them lies on its side, probably by an EXIF tag "
            "that a tool obeyed or lost; save both upright"
        )
    # Compared at the smaller of the two sizes, where rounding to whole pixels is at most one off.
    scale = min(1.0, mask_width / width), min(1.0, width / mask_width)
    if abs(height * scale[0] - mask_height * scale[1]) >= 1:
        raise UserError(f"{pair.mask_path}: {sizes}: not of the same shape; make them equal")
    resized = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized)
