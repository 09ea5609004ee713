"""Augmentation of samples, and the fit of a picture into the model's frame."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version

import cv2
import numpy as np
from PIL import Image

from samtune.data.randomness import stream
from samtune.structures import IGNORE, Frame, Sample

MEAN_COLOUR = (124, 116, 104)  # of ImageNet, and so zero once SAM has normalised it
_DRAWING = ("albumentations", "numpy", "pillow")
_CROP_DRAWS = 10  # windows that may miss the object before one is put around it


def augment(sample: Sample, name: str, seed: int | Sequence[int]) -> Sample:
    """A random variant of a sample, the same one for the same seed whatever was drawn before.

    name: 'none'; 'flip': left-right, for half of the seeds; 'rotate': rotation (+-90 degrees), then
    'flip' (usagisukisuki/G-SAM 31dfd1c); 'standard': for half of the seeds exactly one of
    left-right flip, up-down flip, turn by k * 90 degrees (k in 0..3), and shift (+-6.25 %), scale
    (+-10 %) and rotation (+-45 degrees) together. Pixels that come from outside the picture get the
    mean colour and are `IGNORE` in the mask. A variant that has lost its object is given up for the
    sample as it is. Global random state is neither read nor changed.
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
    image = np.ascontiguousarray(sample.image)  # a blank one is not
    variant = transform(image=image, mask=sample.mask, **layers)
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

    outside = {
        "interpolation": cv2.INTER_LINEAR,
        "mask_interpolation": cv2.INTER_NEAREST,
        "border_mode": cv2.BORDER_CONSTANT,
        "fill": MEAN_COLOUR,
        "fill_mask": IGNORE,
        "p": 1,
    }
    flip = A.HorizontalFlip(p=0.5)
    if name == "flip":
        return A.Compose([flip])
    if name == "rotate":
        return A.Compose([A.Affine(rotate=(-90, 90), **outside), flip])
    shift_scale_rotate = A.Affine(
        translate_percent=(-0.0625, 0.0625),
        scale=(0.9, 1.1),
        keep_ratio=True,
        rotate=(-45, 45),
        **outside,
    )
    parts = [A.HorizontalFlip(p=1), A.VerticalFlip(p=1), A.RandomRotate90(p=1), shift_scale_rotate]
    return A.Compose([A.OneOf(parts, p=0.5)])


def augmentation_versions() -> str:
    """The releases of what draws and moves pixels: another one may draw another variant."""
    releases = [f"{name} {version(name)}" for name in _DRAWING]
    return " ".join([f"cv2 {cv2.__version__}", *releases])


def random_crop(
    sample: Sample,
    frame_size: tuple[int, int],
    crop: tuple[int, int],
    resize: str,
    seed: Sequence[int],
    hold_object: bool,
) -> Sample:
    """A random window of a picture as it lies in the frame: a picture of its own.

    The picture gets its size in a frame of (S_h, S_w), see `fit_size`; the window has the size
    `crop` (h, w), or all of the picture on an axis where that is shorter. The same window for the
    same seed, whatever was drawn before. hold_object: a window without object is drawn again, ten
    times in all, then it is put around one of the object's pixels.
    """
    size = fit_size(sample.image.shape[:2], frame_size, resize)
    image = _resize(sample.image, size, Image.Resampling.BILINEAR)
    fitted = sample.moved(image, lambda plane: _resize(plane, size, Image.Resampling.NEAREST))
    if hold_object and not _objects(fitted).any():
        fitted = _with_a_pixel_of(sample, fitted)
    held = _objects(fitted)
    extent = np.minimum(size, crop)
    room = np.subtract(size, extent)  # how far the window can move on each axis
    rng = np.random.default_rng(stream("crop", seed))
    for _ in range(_CROP_DRAWS):
        window = _window(rng.integers(0, room + 1), extent)
        if not hold_object or held[window].any():
            break
    else:
        if len(pixels := np.argwhere(held)):
            centred = np.clip(rng.choice(pixels) - extent // 2, 0, room)
            window = _window(centred, extent)
    return fitted.moved(image[window], lambda plane: plane[window])


def _window(corner: np.ndarray, extent: np.ndarray) -> tuple[slice, slice]:
    return tuple(slice(a, a + n) for a, n in zip(corner, extent, strict=True))


def _is_object(mask: np.ndarray) -> np.ndarray:
    return (mask != 0) & (mask != IGNORE)


def _objects(sample: Sample) -> np.ndarray:
    """(H, W) bool: the single objects where there are some, else all that the mask shows."""
    return np.any([_is_object(plane) for plane in sample.layers or (sample.mask,)], axis=0)


def _with_a_pixel_of(original: Sample, fitted: Sample) -> Sample:
    """`fitted`, in which resizing lost the object of `original`, with one pixel of it: a box needs
    one. Without any object, `fitted` as it is.
    """
    if not len(pixels := np.argwhere(_objects(original))):
        return fitted
    kept = pixels[len(pixels) // 2]
    planes = [fitted.mask.copy(), *(layer.copy() for layer in fitted.layers)]
    for plane, source in zip(planes, (original.mask, *original.layers), strict=True):
        plane[tuple(kept * plane.shape // source.shape)] = source[tuple(kept)]
    return replace(fitted, mask=planes[0], layers=tuple(planes[1:]))


def fit_scale(size: tuple[int, int], frame_size: tuple[int, int]) -> float:
    """The factor that makes a picture of `size` (H, W) as large as the frame (S_h, S_w) allows."""
    return min(frame / side for frame, side in zip(frame_size, size, strict=True))


def fit_size(size: tuple[int, int], frame_size: tuple[int, int], resize: str) -> tuple[int, int]:
    """The size (h, w) that a picture of `size` (H, W) has in a frame of (S_h, S_w).

    'pad': the largest with its aspect, each side rounded half up, and at least 1. 'squash': the
    frame's. 'keep': its own, for a picture that is no larger than the frame.
    """
    if resize == "squash":
        return tuple(frame_size)
    scale = 1 if resize == "keep" else fit_scale(size, frame_size)
    return max(int(size[0] * scale + 0.5), 1), max(int(size[1] * scale + 0.5), 1)


def fit_image(
    image: np.ndarray, frame_size: tuple[int, int], resize: str
) -> tuple[np.ndarray, Frame]:
    """(H, W, 3) uint8 -> (S_h, S_w, 3) uint8, zero below and right of the picture, and its Frame.

    Resized as SAM was trained: Pillow's bilinear filter on bytes, antialiased when it shrinks.
    """
    frame = Frame(image.shape[:2], fit_size(image.shape[:2], frame_size, resize))
    height, width = frame.valid_size
    padded = np.zeros((*frame_size, 3), np.uint8)
    padded[:height, :width] = _resize(image, frame.valid_size, Image.Resampling.BILINEAR)
    return padded, frame


def fit_mask(mask: np.ndarray, frame: Frame, frame_size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 -> (S_h, S_w) uint8 by nearest pixel centre; `IGNORE` outside the picture."""
    height, width = frame.valid_size
    padded = np.full(frame_size, IGNORE, np.uint8)
    padded[:height, :width] = _resize(mask, frame.valid_size, Image.Resampling.NEAREST)
    return padded


def _resize(pixels: np.ndarray, size: tuple[int, int], filter: Image.Resampling) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 -> a new array of (h, w)."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return np.array(picture.resize((size[1], size[0]), filter))
