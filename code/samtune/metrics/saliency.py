"""S-measure, weighted F-measure and mean absolute error of a grey map.

Definitions: S, Fan et al., ICCV 2017; weighted F, Margolin et al., CVPR 2014. The numbers equal
those of lartpang/PySODMetrics ac5b1fc (MIT), which is not used here: its package holds OpenCV below
5, NumPy below 2.3.5 and scikit-image below 0.26 (without wheels for Python 3.14), keeps a curve per
picture, knows no unread pixels, and lets one undefined picture make the score of the set undefined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import ndimage

from samtune.metrics.curves import EPS
from samtune.metrics.measure import Answer, MeanMetric, stretched
from samtune.structures import IGNORE

GAUSSIAN_SIDE, GAUSSIAN_SIGMA = 7, 5.0  # of the weighted F-measure
HALF_DISTANCE = 5.0  # pixels after which its extra weight of a false alarm has halved its way to 2


@dataclass(frozen=True)
class MeanAbsoluteError(MeanMetric):
    """Mean |map - truth|, of the stretched map as the literature's code has it."""

    stretch: bool = True

    columns = ("MAE",)

    def values(self, truth: np.ndarray, answer: Answer) -> dict[str, float]:
        read = truth != IGNORE
        grey = stretched(answer.probability, read, self.stretch)[read].astype(np.float64)
        return {"MAE": float(np.abs(grey - (truth[read] == 1)).mean())}


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
        read = truth != IGNORE
        grey = stretched(answer.probability, read, self.stretch).astype(np.float64)
        return {"S_measure": s_measure(grey, truth == 1, read, self.alpha, self.degenerate)}


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
        read = truth != IGNORE
        grey = stretched(answer.probability, read, self.stretch).astype(np.float64)
        return {"weighted_F": weighted_f(grey, truth == 1, read, self.beta2)}


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
    distance, nearest = ndimage.distance_transform_edt(~true, return_indices=True)
    error = np.where(read, np.abs(grey - true), 0)
    # Outside the object, the error of its nearest pixel; what is not read, as beyond the edge, 0.
    carried = np.where(read, error[tuple(nearest)], 0)
    smooth = ndimage.correlate1d(carried, _gaussian(), axis=0, mode="constant")
    smooth = ndimage.correlate1d(smooth, _gaussian(), axis=1, mode="constant")
    missed = np.minimum(error, smooth)[true]
    outside = read & ~true
    false_alarm = error[outside] * (2 - np.exp(np.log(0.5) / HALF_DISTANCE * distance[outside]))
    found = missed.size - missed.sum()
    recall, precision = 1 - missed.mean(), found / (found + false_alarm.sum() + EPS)
    return float((1 + beta2) * recall * precision / (recall + beta2 * precision + EPS))


def _gaussian() -> np.ndarray:
    """(7,) one axis of the separable kernel, sum 1."""
    offset = np.arange(GAUSSIAN_SIDE) - GAUSSIAN_SIDE // 2
    weight = np.exp(-(offset**2) / (2 * GAUSSIAN_SIGMA**2))
    return weight / weight.sum()
