"""Boxes from masks, in pixels of the original picture."""

from __future__ import annotations

import cv2
import numpy as np


def box_from_mask(mask: np.ndarray, scale: float = 1.0) -> tuple[int, int, int, int] | None:
    """The box (x0, y0, x1, y1) around all pixels of a (H, W) mask that are 1; None without any.

    scale: factor on the sides, about the centre. The far corner is one past the last pixel, but on
    the right and lower border of the picture it is the last pixel itself, and a box scaled across
    the left or upper border is moved, not cut.
    Source: Kyyle2114/SAM-Adapter-Pytorch-Implementation 66b0e9e, whose models know these boxes.
    """
    foreground = (mask == 1).view(np.uint8)
    x, y, width, height = cv2.boundingRect(foreground)
    if width == 0:
        return None
    x0, x1 = _stretch(x, width, scale, mask.shape[1])
    y0, y1 = _stretch(y, height, scale, mask.shape[0])
    return x0, y0, x1, y1


def _stretch(start: int, extent: int, scale: float, limit: int) -> tuple[int, int]:
    """One axis of the box rule; int() cuts towards zero on purpose."""
    stretched = int(extent * scale)
    start = max(start - int((stretched - extent) / 2), 0)
    if start + stretched >= limit:
        stretched = limit - start - 1
    return start, start + stretched


def jitter_box(
    box: tuple[float, float, float, float],
    amount: float,
    size: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[float, float, float, float]:
    """Move each side of a box by up to `amount` of the box's width or height, uniformly.

    size: (H, W); the box stays inside the picture, and its corners keep their order.
    """
    x0, y0, x1, y1 = box
    reach = amount * np.array([x1 - x0, y1 - y0] * 2, np.float64)
    moved = np.asarray(box, np.float64) + rng.uniform(-1, 1, 4) * reach
    (x0, x1), (y0, y1) = sorted(moved[[0, 2]]), sorted(moved[[1, 3]])
    x0, x1 = np.clip((x0, x1), 0, size[1] - 1).tolist()
    y0, y1 = np.clip((y0, y1), 0, size[0] - 1).tolist()
    return x0, y0, x1, y1
