"""Several classes: everything that follows from one confusion matrix over the whole set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from samtune.metrics.measure import Answer, Measured, Metric, ratio
from samtune.metrics.overlap import nan_mean
from samtune.structures import IGNORE


@dataclass(frozen=True)
class Classes(Metric):
    """Mean IoU, pixel and class accuracy, frequency-weighted IoU, and IoU of each class.

    Counts are pooled over the set. A class that is neither true nor predicted anywhere is left out
    of the mean IoU, one that is only predicted counts as 0; the class accuracy is over classes that
    are true somewhere. Sums: per class, pixels that are right, true, predicted (3 K).
    """

    class_names: tuple[str, ...]

    rules: ClassVar = {
        "absent_class": "left out of mIoU (neither true nor predicted); of class_accuracy (not "
        "true)",
        "average": "one confusion matrix over the set, then the mean over classes",
    }

    @property
    def size(self) -> int:
        return 3 * len(self.class_names)

    @property
    def columns(self) -> tuple[str, ...]:
        return ("mIoU", "pixel_accuracy", *(f"iou/{name}" for name in self.class_names))

    def measure(self, truth: np.ndarray, answer: Answer) -> Measured:
        matrix = confusion(truth, answer.labels, len(self.class_names))
        sums = np.concatenate([matrix.diagonal(), matrix.sum(1), matrix.sum(0)]).astype(np.float64)
        scores = self.summarise(sums)
        return Measured({name: float(scores[name]) for name in self.columns}, sums)

    def summarise(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        right, true, predicted = np.split(np.asarray(sums, np.float64), 3, axis=-1)  # (..., K)
        iou = ratio(right, true + predicted - right)
        accuracy = ratio(right, true)
        pixels = true.sum(-1)
        named = {f"iou/{name}": iou[..., k] for k, name in enumerate(self.class_names)}
        named |= {f"accuracy/{name}": accuracy[..., k] for k, name in enumerate(self.class_names)}
        return {
            "mIoU": nan_mean(iou),
            "pixel_accuracy": ratio(right.sum(-1), pixels),
            "class_accuracy": nan_mean(accuracy),
            "fwIoU": ratio((true * np.nan_to_num(iou)).sum(-1), pixels),
            **named,
        }


@dataclass(frozen=True)
class SoftClasses(Metric):
    """Soft IoU of the class probabilities, as G-SAM's test script prints it as "mIoU".

    Per class (sum p y + s) / (sum p^2 + sum y^2 - sum p y + s), then the mean over all classes.
    Source: usagisukisuki/G-SAM 31dfd1c, which takes the sums per batch of four and averages over
    batches; here they run over the set, for a batch's number depends on how pictures are dealt.
    Not comparable with a hard mean IoU. Sums: per class the three sums (3 K).
    """

    class_names: tuple[str, ...]
    smooth: float = 1e-7

    rules: ClassVar = {
        "absent_class": "stays in the mean, as published",
        "average": "sums over the set, then the mean over classes",
    }

    @property
    def size(self) -> int:
        return 3 * len(self.class_names)

    columns = ("soft_mIoU",)

    def measure(self, truth: np.ndarray, answer: Answer) -> Measured:
        read = truth != IGNORE
        truth, whole = truth[read], read.all()
        sums = np.zeros((3, len(self.class_names)))
        for k, probability in enumerate(answer.class_probability):  # one at a time: few bytes
            probability = (probability.ravel() if whole else probability[read]).astype(np.float64)
            true = truth == k
            sums[:, k] = (probability * true).sum(), (probability**2).sum(), np.count_nonzero(true)
        sums = sums.ravel()
        return Measured({"soft_mIoU": float(self.summarise(sums)["soft_mIoU"])}, sums)

    def summarise(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        both, predicted, true = np.split(np.asarray(sums, np.float64), 3, axis=-1)
        iou = (both + self.smooth) / (predicted + true - both + self.smooth)
        known = true.sum(-1) > 0  # nothing was read at all otherwise
        return {"soft_mIoU": np.where(known, iou.mean(-1), np.nan)}


def confusion(truth: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(K, K) int64 pixel counts, rows the truth, columns the answer, without unread pixels.

    Raises ValueError for a class id outside 0..K-1 on either side.
    """
    read = truth != IGNORE
    true, predicted = truth[read].astype(np.int64), labels[read].astype(np.int64)
    for name, ids in (("truth", true), ("answer", predicted)):
        if ids.size and (ids.min() < 0 or ids.max() >= num_classes):
            raise ValueError(f"the {name} has class ids outside 0..{num_classes - 1}")
    counts = np.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)
