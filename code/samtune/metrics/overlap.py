"""Overlap of one predicted and one true region, per picture and over the whole set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from samtune.metrics.measure import Answer, MeanMetric, Measured, Metric, foreground, ratio


@dataclass(frozen=True)
class Overlap(MeanMetric):
    """IoU and Dice of each picture, then the mean over pictures.

    threshold: foreground is probability > threshold. smooth: pixels added to both sides of each
    fraction; 1e-3 is Kyyle2114/Fine-tuning-Segment-Anything a7cf899, where both masks empty gives
    1 and exactly one empty almost 0. both_empty: what 0 / 0 counts as when nothing is added.
    """

    threshold: float = 0.5
    smooth: float = 0.0
    both_empty: float = 1.0

    rules: ClassVar = {"one_empty": "0 (with smoothing: smooth / (pixels + smooth))"}

    columns = ("iou", "dice")

    def values(self, truth: np.ndarray, answer: Answer) -> dict[str, float]:
        predicted, true, _ = foreground(truth, answer, self.threshold)
        both = np.count_nonzero(predicted & true)
        total = np.count_nonzero(predicted) + np.count_nonzero(true)
        s, empty = self.smooth, self.both_empty
        return {
            "iou": float(ratio(both + s, total - both + s, empty)),
            "dice": float(ratio(2 * both + s, total + s, empty)),
        }


@dataclass(frozen=True)
class PooledOverlap(Metric):
    """All pixels of the set as one picture: IoU, Dice, pixel accuracy, mean IoU of two classes.

    `mIoU_pooled` is the mean over background and foreground: G-SAM's validation number of its
    two-class models (usagisukisuki/G-SAM 31dfd1c, which thresholds at >= 0.5 and at its own
    resolution). Sums: true positives, false positives, false negatives, true negatives.
    """

    threshold: float = 0.5

    rules: ClassVar = {"nothing_true_or_predicted": "undefined"}

    size = 4
    columns = ()

    def measure(self, truth: np.ndarray, answer: Answer) -> Measured:
        predicted, true, read = foreground(truth, answer, self.threshold)
        return Measured({}, quarters(predicted, true, read))

    def summarise(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        tp, fp, fn, tn = np.moveaxis(np.asarray(sums), -1, 0)
        iou, background = ratio(tp, tp + fp + fn), ratio(tn, tn + fp + fn)
        return {
            "iou_pooled": iou,
            "dice_pooled": ratio(2 * tp, 2 * tp + fp + fn),
            "mIoU_pooled": nan_mean(np.stack([background, iou], -1)),
            "pixel_accuracy": ratio(tp + tn, tp + fp + fn + tn),
        }


def quarters(predicted: np.ndarray, true: np.ndarray, read: np.ndarray) -> np.ndarray:
    """(4,) pixel counts: true positives, false positives, false negatives, true negatives.

    predicted and true are False where nothing is read.
    """
    tp = np.count_nonzero(predicted & true)
    fp, fn = np.count_nonzero(predicted) - tp, np.count_nonzero(true) - tp
    return np.array([tp, fp, fn, np.count_nonzero(read) - tp - fp - fn], np.float64)


def nan_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is defined; NaN, without a warning, where nothing is."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0).sum(-1), known.sum(-1))
