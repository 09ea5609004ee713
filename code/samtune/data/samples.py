"""An image file and a mask file as one `Sample`: the scan and the training read through this."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from samtune.config import ReadOptions
from samtune.data.coco import read_annotations
from samtune.data.decoding import Decoded, decode
from samtune.data.files import Pair
from samtune.data.images import blank, image_from
from samtune.data.masks import decode_mask, mask_from, numbers_from
from samtune.data.objects import with_components, with_instances, with_masks
from samtune.errors import UserError
from samtune.structures import IGNORE, Sample

NOTES = {
    "lossy": "masks are JPEG and were cut at 128; PNG keeps them exact",
    "resized": "masks have another size than their image, at the same aspect, and were resized",
    "turned": "images were turned as their EXIF tag says, and their masks, without one, were not",
}


class Reading(NamedTuple):
    """A sample, and which of `NOTES` apply to its files."""

    sample: Sample
    notes: tuple[str, ...]


def read_sample(
    pair: Pair, read: ReadOptions, picture_size: tuple[int, int] | None = None
) -> Reading:
    """Read both files of a pair. Raises UserError if one is unreadable or they do not fit.

    picture_size: (H, W) of the picture where only that is asked for: its file is not read then, and
    a blank one, which takes no memory, stands for it.
    """
    if picture_size:
        image, turned = blank(picture_size), False
    else:
        image_file = decode(pair.image_path)
        image, turned = image_from(image_file, read, pair.image_path), image_file.turned
    described = is_annotations(pair.mask_path)
    mask_file = None if described else decode_mask(pair.mask_path, read)
    return sample_of(pair, read, image, mask_file, turned)


def sample_of(
    pair: Pair, read: ReadOptions, image: np.ndarray, mask_file: Decoded | None, turned: bool
) -> Reading:
    """The sample of an image (H, W, 3) and what its mask file holds. Raises as `read_sample` does.

    mask_file: None where annotations stand for one. turned: the image's orientation tag was
    followed.
    """
    sample = Sample(image, image[..., 0], pair.id, str(pair.image_path), str(pair.mask_path))
    if mask_file is None:
        return Reading(_annotated(sample, pair, read), ())
    if read.objects == "instance":
        mask, note = numbers_from(mask_file, pair.mask_path), None
    else:
        mask, note = mask_from(mask_file, read, pair.mask_path)
    notes = [note] if note else []
    if turned and not mask_file.turned:
        notes.append("turned")
    if mask.shape != image.shape[:2]:
        mask = _to_size_of_image(mask, image.shape[:2], pair)
        notes.append("resized")
    return Reading(_with_objects(sample, mask, read), tuple(notes))


def is_annotations(path: Path) -> bool:
    """Whether a "mask" is a COCO .json, which describes many images."""
    return str(path).lower().endswith(".json")


def _with_objects(sample: Sample, mask: np.ndarray, read: ReadOptions) -> Sample:
    """The sample with its mask, and the single objects in it where they are asked about."""
    if read.objects == "instance":
        shown = replace(sample, mask=(mask > 0).astype(np.uint8))
        return with_instances(shown, mask, read)
    sample = replace(sample, mask=mask)
    return with_components(sample, read) if read.objects == "component" else sample


def _annotated(sample: Sample, pair: Pair, read: ReadOptions) -> Sample:
    """The sample with what a COCO .json says about it."""
    if read.num_classes > 1:
        raise UserError(f"{pair.mask_path}: shows objects, not classes: drop --num_classes")
    found = read_annotations(pair.mask_path, pair.id)
    if found.unread.shape != sample.image.shape[:2]:
        raise UserError(f"{pair.mask_path}: gives another size of {pair.id} than its file has")
    mask = np.where(found.unread, IGNORE, 0).astype(np.uint8)
    for one in found.masks:
        mask[one] = 1
    if read.objects == "instance":
        return with_masks(replace(sample, mask=mask), found.masks, found.names, read)
    return _with_objects(sample, mask, read)


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
    values = mask if mask.dtype == np.uint8 else mask.astype(np.int32)
    resized = Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized)
