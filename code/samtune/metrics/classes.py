"""Class maps of a whole set: pixels counted per class on the device, scores from the sums.

Convention: the answer is the class with the largest logit at the picture's own resolution; pixels
that the target marks `IGNORE` are not counted; counts are pooled over the set. A class that neither
the truth nor the answer shows has no score and is left out of means.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from samtune.structures import IGNORE, Batch, Prediction


class ClassCounts:
    """Counts of (R, 3, K) pixels: answered rightly, answered, and true, of each class."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    @torch.no_grad()
    def __call__(self, prediction: Prediction, batch: Batch) -> Tensor:
        """int64, without a host sync. Computed band by band, see `Batch.bands`."""
        bands = batch.bands(prediction.logits.shape[1])
        return sum(self._of_band(prediction.logits, batch, band) for band in bands)

    def _of_band(self, logits: Tensor, batch: Batch, band: slice) -> Tensor:
        target = batch.target[:, band].long()
        valid = target != IGNORE
        answer = batch.at_target(logits, band).argmax(1)
        return torch.stack(
            [
                self._count(target, valid & (answer == target)),
                self._count(answer, valid),
                self._count(target, valid),
            ],
            dim=1,
        )

    def _count(self, classes: Tensor, which: Tensor) -> Tensor:
        """(R, h, W) class ids, and which pixels to count -> (R, K)."""
        classes = classes.where(which, self.num_classes).flatten(1)  # one bin more for the others
        counts = classes.new_zeros(len(classes), self.num_classes + 1)
        return counts.scatter_add_(1, classes, torch.ones_like(classes))[:, :-1]

    @staticmethod
    def scores(counts: Tensor) -> dict[str, float]:
        """(3, K) counts of a set -> means over its classes of IoU and Dice, and pixel accuracy."""
        iou, dice = (_mean(values) for values in per_class(counts))
        right, _, true = counts.sum(1).tolist()
        return {"iou": iou, "dice": dice, "accuracy": right / true if true else math.nan}


def per_class(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(3, K) counts -> IoU and Dice of each class, (K,) float64, NaN for a class never seen."""
    right, answered, true = counts.double()
    return right / (answered + true - right), 2 * right / (answered + true)


def majority(counts: Tensor) -> Tensor:
    """(3, K) counts -> those of the answer that the most frequent true class is everywhere."""
    true = counts[2]
    most = torch.nn.functional.one_hot(true.argmax(), len(true))
    return torch.stack([true * most, true.sum() * most, true])


def _mean(values: Tensor) -> float:
    """Of what is a number."""
    return values.nanmean().item()
