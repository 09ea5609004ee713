"""Augmentation of samples, and the fit of a picture into the model's frame."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image

from samtune.data.randomness import stream
from samtune.structures import IGNORE, Frame, Sample

MEAN_COLOUR = (124, 116, 104)  # of ImageNet, and so zero once SAM has normalised it


def augment(sample: Sample, name: str, seed: int | Sequence[int]) -> Sample:
    """A random variant of a sample, the same one for the same seed whatever was drawn before.

    name: 'none'; 'flip': left-right, for half of the seeds; 'standard': for half of the seeds
    exactly one of left-right flip, up-down flip, turn by k * 90 degrees (k in 0..3), and shift
    (+-6.25 %), scale (+-10 %) and rotation (+-45 degrees) together. Pixels that come from outside
    the picture get the mean colour and are `IGNORE` in the mask. A variant that has lost its object
    is given up for the sample as it is. Global random state is neither read nor changed.
    """
    if name == "none":
        return sample
    transform = prepare(name)
    seeds = stream("augment", [seed] if isinstance(seed, int) else seed)
    # Not `set_random_seed`: it gives every part of the composition the same seed, so that the draw
    # that decides whether to augment is also the draw of the shift, which then is never positive.
    transform.set_random_state(
        np.random.default_rng(seeds),
        random.Random(int.from_bytes(seeds.generate_state(4).tobytes(), "little")),
    )
    layers = {"masks": list(sample.layers)} if sample.layers else {}
    variant = transform(image=sample.image, mask=sample.mask, **layers)
    if _shows_object(sample.mask) and not _shows_object(variant["mask"]):
        return sample
    layers = tuple(variant["masks"]) if sample.layers else ()
    return replace(sample, image=variant["image"], mask=variant["mask"], layers=layers)


def _shows_object(mask: np.ndarray) -> bool:
    return bool(((mask != 0) & (mask != IGNORE)).any())


@lru_cache
def prepare(name: str):
    """The composition of albumentations of this name; None for 'none'. Made once per process."""
    if name == "none":
        return None
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network on import
    import albumentations as A

    if name == "flip":
        return A.Compose([A.HorizontalFlip(p=0.5)])
    shift_scale_rotate = A.Affine(
        translate_percent=(-0.0625, 0.0625),
        scale=(0.9, 1.1),
        keep_ratio=True,
        rotate=(-45, 45),
        interpolation=cv2.INTER_LINEAR,
        mask_interpolation=cv2.INTER_NEAREST,
        border_mode=cv2.BORDER_CONSTANT,
        fill=MEAN_COLOUR,
        fill_mask=IGNORE,
        p=1,
    )
    parts = [A.HorizontalFlip(p=1), A.VerticalFlip(p=1), A.RandomRotate90(p=1), shift_scale_rotate]
    return A.Compose([A.OneOf(parts, p=0.5)])


def fit_size(size: tuple[int, int], image_size: int, resize: str) -> tuple[int, int]:
    """The size (h, w) that a picture of `size` (H, W) has in a square of side `image_size`.

    'pad': the longest side becomes image_size, each side rounded half up, and at least 1.
    """
    if resize == "squash":
        return image_size, image_size
    scale = image_size / max(size)
    return max(int(size[0] * scale + 0.5), 1), max(int(size[1] * scale + 0.5), 1)


def fit_image(image: np.ndarray, image_size: int, resize: str) -> tuple[np.ndarray, Frame]:
    """(H, W, 3) uint8 -> (S, S, 3) uint8, zero below and right of the picture, and its Frame.

    Resized as SAM was trained: Pillow's bilinear filter on bytes, antialiased when it shrinks.
    """
    frame = Frame(image.shape[:2], fit_size(image.shape[:2], image_size, resize))
    height, width = frame.valid_size
    padded = np.zeros((image_size, image_size, 3), np.uint8)
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    padded[:height, :width] = np.asarray(picture)
    return padded, frame


def fit_mask(mask: np.ndarray, frame: Frame, image_size: int) -> np.ndarray:
    """(H, W) uint8 -> (S, S) uint8 by nearest pixel centre; `IGNORE` outside the picture."""
    height, width = frame.valid_size
    padded = np.full((image_size, image_size), IGNORE, np.uint8)
    picture = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    padded[:height, :width] = np.asarray(picture)
    return padded
