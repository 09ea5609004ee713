"""Objects found: segmentation accuracy over IoU thresholds, and COCO's average precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment

from samtune.metrics.measure import (
    Answer,
    MeanMetric,
    Measured,
    RankedMetric,
    ratio,
)
from samtune.structures import IGNORE

THRESHOLDS = np.arange(10, 20) / 20  # IoU 0.50, 0.55, .. 0.95
RECALLS = np.linspace(0, 1, 101)
KEPT = 100  # best-scored objects of a picture that average precision looks at


@dataclass(frozen=True)
class SegmentationAccuracy(MeanMetric):
    """Objects right over objects right, wrong and missed, at each IoU threshold, per picture.

    mSA is the mean over 0.50, 0.55, .. 0.95; precision, recall and F1 are at 0.50. Objects are
    matched one to one so that most agree, then so that their IoU is largest. Source: the 2018 Data
    Science Bowl; computational-cell-analytics/micro-sam 3acdcd7.
    """

    rules: ClassVar = {"both_empty": "1", "one_empty": "0", "matching": "one to one, optimal"}

    columns = ("mSA", "SA50", "SA75", "precision", "recall", "F1")

    def values(self, truth: np.ndarray, answer: Answer) -> dict[str, float]:
        iou = answer.once(_ious, truth)  # (N, M)
        found, true = iou.shape
        accuracy, right = accuracies(iou)
        return {
            "mSA": float(accuracy.mean()),
            "SA50": float(accuracy[0]),
            "SA75": float(accuracy[5]),
            "precision": float(ratio(right[0], found, float(not true))),
            "recall": float(ratio(right[0], true, float(not found))),
            "F1": float(ratio(2 * right[0], found + true, 1)),
        }


@dataclass(frozen=True)
class AveragePrecision(RankedMetric):
    """COCO's AP, AP50, AP75 (101 recalls) and AR100, objects in the order of their scores.

    As pycocotools' COCOeval(..., "segm") over all areas, with one class and no crowds; unlike it,
    no mask is kept: of each picture stay the scores of the (at most 100) best objects, and at which
    IoU thresholds each found an object of its own. Sums: the number of true objects.
    """

    rules: ClassVar = {
        "no_true_object_in_the_set": "undefined",
        "matching": "best score first, to the free object of largest IoU",
    }

    size = 1
    columns = ()

    def measure(self, truth: np.ndarray, answer: Answer) -> Measured:
        order = np.argsort(-answer.scores, kind="stable")[:KEPT]
        iou = answer.once(_ious, truth)[order]
        hits = np.stack([_greedy(iou, threshold) for threshold in THRESHOLDS], 1)  # (N, 10)
        ranked = np.concatenate([answer.scores[order, None].astype(np.float64), hits], 1)
        return Measured({}, np.array([float(iou.shape[1])]), ranked)

    def nothing(self) -> Measured:
        return Measured({}, np.zeros(1), np.zeros((0, 1 + len(THRESHOLDS))))

    def rank(self, ranked: list[np.ndarray], sums: np.ndarray, weights: np.ndarray) -> dict:
        picture = np.repeat(np.arange(len(ranked)), [len(table) for table in ranked])
        table = np.concatenate(ranked)
        order = np.argsort(-table[:, 0], kind="stable")
        hits, picture = table[order, 1:].T, picture[order]  # (10, D), (D,)
        rows = [_average_precision(hits, w[picture], float(w @ sums[:, 0])) for w in weights]
        precision, recall = (np.array(part) for part in zip(*rows, strict=True))  # (B, 10)
        return {
            "AP": precision.mean(1),
            "AP50": precision[:, 0],
            "AP75": precision[:, 5],
            "AR100": recall.mean(1),
        }


def _ious(truth: np.ndarray, answer: Answer) -> np.ndarray:
    return mask_ious(answer.masks, truth)


def masks_of(ids: np.ndarray) -> np.ndarray:
    """(H, W) object ids, 0 background -> (M, H, W) bool, in the order of the ids.

    In a uint8 map `IGNORE` is no object.
    """
    present = np.unique(ids)
    skipped = (0, IGNORE) if ids.dtype == np.uint8 else (0,)
    present = present[~np.isin(present, skipped)]
    return ids[None] == present[:, None, None]


def mask_ious(masks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N, H, W) and (M, H, W) bool -> (N, M) float64; masks may overlap, empty ones have IoU 0."""
    both = np.zeros((len(masks), len(others)))
    (start, stop), (other_start, other_stop) = _boxes(masks), _boxes(others)
    start = np.maximum(start[:, None], other_start)  # (N, M, 2), of what two boxes share
    stop = np.minimum(stop[:, None], other_stop)
    for row, column in np.argwhere((start < stop).all(-1)):  # most objects are far apart
        shared = tuple(map(slice, start[row, column], stop[row, column]))
        both[row, column] = np.count_nonzero(masks[row][shared] & others[column][shared])
    sizes, true = (np.array([np.count_nonzero(m) for m in part]) for part in (masks, others))
    return ratio(both, sizes[:, None] + true - both, 0)


def _boxes(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, H, W) bool -> the (y, x) where each mask starts and where it stops, (N, 2) each."""
    found = [cv2.boundingRect(mask.view(np.uint8)) for mask in masks]  # empty: nothing
    x, y, width, height = np.array(found, np.int64).reshape(-1, 4).T
    return np.stack([y, x], 1), np.stack([y + height, x + width], 1)


def accuracies(iou: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, M) IoUs -> (10,) right / (right + wrong + missed) at `THRESHOLDS`, and (10,) right."""
    right = np.array([_matched(iou, threshold) for threshold in THRESHOLDS])
    return ratio(right, sum(iou.shape) - right, 1), right


def _matched(iou: np.ndarray, threshold: float) -> int:
    """The most pairs, one to one, with at least that IoU."""
    good = iou >= threshold
    rows, columns = linear_sum_assignment(good + iou / (2 * max(1, min(iou.shape))), maximize=True)
    return int(np.count_nonzero(good[rows, columns]))


def _greedy(iou: np.ndarray, threshold: float) -> np.ndarray:
    """(N,) bool: whether each answer, best score first, finds a free object of enough IoU."""
    free = np.ones(iou.shape[1], bool)
    hits = np.zeros(len(iou), bool)
    for row, values in enumerate(iou):
        candidates = np.flatnonzero(free & (values >= threshold))
        if candidates.size:
            hits[row] = True
            best = values[candidates].max()
            free[candidates[values[candidates] == best][-1]] = False  # the last of equals, as COCO
    return hits


def _average_precision(
    hits: np.ndarray, weight: np.ndarray, true: float
) -> tuple[np.ndarray, np.ndarray]:
    """(10,) average precision and final recall of (10, D) hits in order, D weights, M objects."""
    if not true:
        return np.full(len(hits), np.nan), np.full(len(hits), np.nan)
    if not hits.shape[1]:
        return np.zeros(len(hits)), np.zeros(len(hits))
    right, wrong = np.cumsum(hits * weight, 1), np.cumsum((1 - hits) * weight, 1)
    recall = right / true
    precision = right / (right + wrong + np.spacing(1))
    envelope = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    envelope = np.concatenate([envelope, np.zeros((len(hits), 1))], 1)  # recalls never reached: 0
    places = [np.searchsorted(line, RECALLS, side="left") for line in recall]
    averages = [line[place].mean() for line, place in zip(envelope, places, strict=True)]
    return np.array(averages), recall[:, -1]
