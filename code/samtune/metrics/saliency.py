"""S-measure, weighted F-measure and mean absolute error of a grey map.

Definitions: S, Fan et al., ICCV 2017; weighted F, Margolin et al., CVPR 2014. The numbers equal
those of lartpang/PySODMetrics ac5b1fc (MIT), which is not used here: its package holds OpenCV below
5, NumPy below 2.3.5 and scikit-image below 0.26 (without wheels for Python 3.14), keeps a curve per
picture, knows no unread pixels, and lets one undefined picture make the score of the set undefined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import cv2
import numpy as np
from scipy import ndimage

from samtune.metrics.curves import EPS
from samtune.metrics.measure import Answer, GreyMap, MeanMetric

GAUSSIAN_SIDE, GAUSSIAN_SIGMA = 7, 5.0  # of the weighted F-measure
REACH = GAUSSIAN_SIDE // 2  # pixels from the kernel's centre to its side
FAR = 266  # pixels after which 2 - 2^(-FAR / 5) is 2 in float64
EXACT_SIDE = 4096  # pixels; the squares of larger distances do not fit OpenCV's float32
HALF_DISTANCE = 5.0  # pixels after which its extra weight of a false alarm has halved its way to 2


@dataclass(frozen=True)
class MeanAbsoluteError(MeanMetric):
    """Mean |map - truth|, of the stretched map as the literature's code has it."""

    stretch: bool = True

    columns = ("MAE",)

    def values(self, truth: np.ndarray, answer: Answer) -> dict[str, float]:
        picture = answer.once(GreyMap, truth, self.stretch)
        return {"MAE": float(np.abs(picture.where_read(picture.wide) - picture.hits).mean())}


@dataclass(frozen=True)
class StructureMeasure(MeanMetric):
    """S-measure, the mean of how well objects and how well the four parts of the picture agree.

    degenerate: what a quadrant without pixels does, which the object's centroid in the last row or
    column makes. "skip": it weighs nothing (recommended); "nan": the score is undefined, as in
    PySODMetrics 1.6.2; "zero": the score is 0, also where a quadrant or the object has one pixel,
    as in the evaluation of SAM-Adapter 665145d and TS-SAM edd171c.
    """

    stretch: bool = True
    alpha: float = 0.5
    degenerate: str = "skip"

    rules: ClassVar = {"empty_truth": "1 - mean of the map", "full_truth": "mean of the map"}

    columns = ("S_measure",)

    def values(self, truth: np.ndarray, answer: Answer) -> dict[str, float]:
        picture = answer.once(GreyMap, truth, self.stretch)
        parts = picture.wide, picture.true, picture.read
        return {"S_measure": s_measure(*parts, self.alpha, self.degenerate)}


@dataclass(frozen=True)
class WeightedF(MeanMetric):
    """Weighted F-measure: errors count less beside others of their kind, more far from the object.

    beta2: the literature's is 1; the evaluation of SAM-Adapter and TS-SAM has 0.3, so its numbers
    are not those of other papers.
    """

    stretch: bool = True
    beta2: float = 1.0

    rules: ClassVar = {"empty_truth": "0"}

    columns = ("weighted_F",)

    def values(self, truth: np.ndarray, answer: Answer) -> dict[str, float]:
        picture = answer.once(GreyMap, truth, self.stretch)
        return {"weighted_F": weighted_f(picture.wide, picture.true, picture.read, self.beta2)}


def s_measure(
    grey: np.ndarray, true: np.ndarray, read: np.ndarray, alpha: float = 0.5, degenerate="skip"
) -> float:
    """S of a map (H, W) float64 in 0..1 and a mask (H, W) bool, over the read pixels."""
    inside, outside = grey[true], grey[read & ~true]
    if not inside.size:
        return float(1 - outside.mean())
    if not outside.size:
        return float(inside.mean())
    parts = [(grey[q][read[q]], true[q][read[q]]) for q in _quadrants(true)]
    smallest = min(part.size for part, _ in parts)
    if degenerate == "zero" and min(smallest, inside.size, outside.size) <= 1:
        return 0.0
    if degenerate == "nan" and smallest == 0:
        return np.nan
    size = inside.size + outside.size
    share = inside.size / size
    objects = share * _object_score(inside) + (1 - share) * _object_score(1 - outside)
    regions = sum(part.size / size * _region_score(part, of) for part, of in parts if part.size)
    return float(max(0.0, alpha * objects + (1 - alpha) * regions))


def _quadrants(true: np.ndarray) -> list[tuple[slice, slice]]:
    """Four index pairs around the mask's centroid, rounded half to even, plus one pixel."""
    (height, width), pixels = true.shape, np.count_nonzero(true)
    y = int(np.round(true.sum(1) @ np.arange(height) / pixels)) + 1
    x = int(np.round(true.sum(0) @ np.arange(width) / pixels)) + 1
    rows, columns = (slice(0, y), slice(y, height)), (slice(0, x), slice(x, width))
    return [(row, column) for row in rows for column in columns]


def _object_score(values: np.ndarray) -> float:
    mean, spread = values.mean(), values.std(ddof=1) if values.size > 1 else 0.0
    return 2 * mean / (mean**2 + 1 + spread + EPS)


def _region_score(grey: np.ndarray, true: np.ndarray) -> float:
    """Structural similarity of (N,) values and their truth, without stabilising constants."""
    x, y, degrees = grey.mean(), true.mean(), grey.size - 1 + EPS
    dx, dy = grey - x, true - y
    numerator = 4 * x * y * (dx @ dy) / degrees
    denominator = (x**2 + y**2) * (dx @ dx + dy @ dy) / degrees
    if numerator == 0:
        return 1.0 if denominator == 0 else 0.0
    return numerator / (denominator + EPS)


def weighted_f(grey: np.ndarray, true: np.ndarray, read: np.ndarray, beta2: float = 1.0) -> float:
    """Weighted F of a map (H, W) float64 in 0..1 and a mask (H, W) bool, over the read pixels."""
    if not true.any():
        return 0.0
    error = np.where(read, np.abs(grey - true), 0)
    near = _around(true, REACH)
    # What is not read counts like what lies beyond the picture's edge: 0.
    carried = np.where(read[near], _carried(error[near], true[near]), 0)
    smooth = ndimage.correlate1d(carried, _gaussian(), axis=0, mode="constant")
    smooth = ndimage.correlate1d(smooth, _gaussian(), axis=1, mode="constant")
    missed = np.minimum(error[true], smooth[true[near]])
    outside = read & ~true
    false_alarm = error[outside] * _false_alarm_weight(true)[outside]
    found = missed.size - missed.sum()
    recall, precision = 1 - missed.mean(), found / (found + false_alarm.sum() + EPS)
    return float((1 + beta2) * recall * precision / (recall + beta2 * precision + EPS))


def _around(true: np.ndarray, margin: int) -> tuple[slice, slice]:
    """The mask's bounding box, `margin` pixels wider on each side where the picture has them."""
    x, y, width, height = cv2.boundingRect(true.view(np.uint8))
    rows = slice(max(0, y - margin), y + height + margin)
    return rows, slice(max(0, x - margin), x + width + margin)


def _carried(error: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The object's error, and within the kernel's reach of it that of the object's nearest pixel.

    Of equally near ones it is the leftmost, then the uppermost, as SciPy's distance transform has
    it. Farther away, where no pixel of the object reads it, 0.
    """
    height, width = true.shape
    farthest = math.isqrt(2 * REACH**2)
    span = range(-farthest, farthest + 1)
    steps = sorted((r * r + c * c, c, r) for r in span for c in span)
    band = cv2.dilate(true.astype(np.uint8), np.ones((GAUSSIAN_SIDE,) * 2, np.uint8)).astype(bool)
    true, error, band = (np.pad(part, farthest).ravel() for part in (true, error, band))
    carried, left = np.zeros_like(error), np.flatnonzero(band)
    for _, column, row in steps:
        source = left + (row * (width + 2 * farthest) + column)
        found = true[source]
        carried[left[found]] = error[source[found]]
        left = left[~found]
    return carried.reshape(height + 2 * farthest, -1)[farthest:-farthest, farthest:-farthest]


def _false_alarm_weight(true: np.ndarray) -> np.ndarray:
    """(H, W) float64: 1 on the object, growing to 2 far from it."""
    weight = np.full(true.shape, 2.0)
    near = _around(true, FAR)
    weight[near] = _weight_by_distance()[_squared_distance(true[near])]
    return weight


@cache
def _weight_by_distance() -> np.ndarray:
    """(FAR^2 + 1,) float64, by the square of the distance."""
    distance = np.sqrt(np.arange(FAR**2 + 1, dtype=np.float64))
    return 2 - np.exp(np.log(0.5) / HALF_DISTANCE * distance)


def _squared_distance(true: np.ndarray) -> np.ndarray:
    """(H, W) integers, to the nearest pixel of the mask, at most FAR^2."""
    if max(true.shape) <= EXACT_SIDE:
        outside = (~true).view(np.uint8)
        distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    else:
        distance = ndimage.distance_transform_edt(~true)
    return np.minimum(np.rint(distance * distance), FAR**2).astype(np.int32)


def _gaussian() -> np.ndarray:
    """(7,) one axis of the separable kernel, sum 1."""
    offset = np.arange(GAUSSIAN_SIDE) - GAUSSIAN_SIDE // 2
    weight = np.exp(-(offset**2) / (2 * GAUSSIAN_SIGMA**2))
    return weight / weight.sum()
