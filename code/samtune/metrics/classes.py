"""Class maps of a whole set: pixels counted per class on the device, scores from the sums.

Convention: the answer is the class with the largest logit at the picture's own resolution; pixels
that the target marks `IGNORE` are not counted; counts are pooled over the set. A class that neither
the truth nor the answer shows has no score and is left out of means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samtune.structures import IGNORE, Batch, Prediction


def class_map(prediction: Prediction, batch: Batch) -> Tensor:
    """(R, T_h, T_w) uint8: the class with the largest logit, where the target lies.

    Computed band by band, see `Batch.bands`.
    """
    bands = batch.bands(prediction.logits.shape[1])
    answers = [_largest(batch.at_target(prediction.logits, band)) for band in bands]
    return torch.cat(answers, 1).to(torch.uint8)


def _largest(logits: Tensor) -> Tensor:
    """(R, K, h, W) -> (R, h, W) int64, the first of equals; `argmax` alone is slow on a CPU."""
    return logits.max(1).indices


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
        pairs = self.num_classes * target + _largest(batch.at_target(logits, band))
        pairs = pairs.where(valid, self.num_classes**2).flatten(1)  # one bin more for the others
        counts = pairs.new_zeros(len(pairs), self.num_classes**2 + 1)
        counts.scatter_add_(1, pairs, torch.ones_like(pairs))
        confusion = counts[:, :-1].unflatten(1, (self.num_classes, self.num_classes))
        return torch.stack(
            [confusion.diagonal(dim1=1, dim2=2), confusion.sum(1), confusion.sum(2)], dim=1
        )

    @staticmethod
    def scores(counts: Tensor) -> dict[str, float]:
        """(3, K) counts of a set -> means over its classes of IoU and Dice, and pixel accuracy."""
        right, answered, true = counts.double()
        iou, dice = right / (answered + true - right), 2 * right / (answered + true)
        return {
            "mIoU": iou.nanmean().item(),
            "mDice": dice.nanmean().item(),
            "pixel_accuracy": (right.sum() / true.sum()).item(),
        }
