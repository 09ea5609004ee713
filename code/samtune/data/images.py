"""Image files as (H, W, 3) uint8 RGB."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np

from samtune.config import ReadOptions
from samtune.data.arrays import ArraySlice
from samtune.data.decoding import Decoded, decode
from samtune.data.tar_files import TarMember
from samtune.errors import UserError


def read_image(path: str | Path | ArraySlice | TarMember, read: ReadOptions) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB.

    Turned as its orientation tag says; alpha dropped; grey repeated; CMYK and palettes converted;
    16-bit and float values scaled by `read.intensity_range`. Raises UserError if it cannot be read.
    """
    return image_from(decode(path), read, path)


def image_from(
    decoded: Decoded, read: ReadOptions, path: str | Path | ArraySlice | TarMember
) -> np.ndarray:
    """What was decoded, as (H, W, 3) uint8 RGB."""
    pixels = decoded.array
    if pixels.ndim == 3 and pixels.shape[2] not in (2, 3, 4):
        raise UserError(f"{path}: has {pixels.shape[2]} channels; an image has 1, 3 or alpha")
    if pixels.ndim == 3:
        pixels = pixels[..., : 1 if pixels.shape[2] == 2 else 3]  # without alpha
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    if pixels.dtype != np.uint8:
        pixels = _to_eight_bits(pixels, read.intensity_range, path)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def blank(size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 zeros that take no memory and cannot be written to."""
    return np.broadcast_to(np.uint8(0), (*size, 3))


def _to_eight_bits(pixels: np.ndarray, intensity_range: str, path: str | Path) -> np.ndarray:
    """Scale a range of intensities to 0..255 and clip what lies outside it."""
    if not np.isfinite(pixels).all():
        raise UserError(f"{path}: holds NaN or infinite values; replace them")
    if intensity_range == "auto":
        low, high = np.percentile(pixels, (0.5, 99.5))
    else:
        low, high = parse_range(intensity_range)
    if not np.isfinite(high - low):
        raise UserError(f"{path}: its values lie further apart than numbers reach; scale them")
    scale = 255 / (high - low) if high > low else 0.0
    return np.clip((pixels.astype(np.float64) - low) * scale + 0.5, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def parse_range(text: str) -> tuple[float, float]:
    """`LOW,HIGH` as two numbers. Raises UserError for anything else."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = 0.0
    if not (low < high and math.isfinite(high - low)):
        raise UserError(f"--intensity_range {text}: expected 'auto' or LOW,HIGH with LOW < HIGH")
    return low, high
