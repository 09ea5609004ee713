"""Overlap of predicted and true region: IoU and Dice per row, and the mean over a set.

Convention: the hard mask is logit > 0 at the picture's own resolution; each row is scored on its
own and the mean is over rows; 1e-3 pixels are added to both sides of each fraction, so an empty
mask predicted empty scores 1 and exactly one of both empty scores almost 0. Pixels that the target
marks `IGNORE` are not counted. Source: Kyyle2114/SAM-Adapter-Pytorch-Implementation 66b0e9e.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samtune.structures import IGNORE, Batch, Prediction

SMOOTH = 1e-3  # pixels


@torch.no_grad()
def region_scores(prediction: Prediction, batch: Batch) -> dict[str, Tensor]:
    """{"iou": (R,), "dice": (R,)} of the hard masks, float64, without a host sync or a graph."""
    predicted = (batch.at_target(prediction.logits)[:, 0] > 0) & (batch.target != IGNORE)
    true = batch.target == 1
    both = (predicted & true).sum((1, 2))
    return overlap(both, predicted.sum((1, 2)) + true.sum((1, 2)))


def overlap(both: Tensor, total: Tensor, smooth: float = SMOOTH) -> dict[str, Tensor]:
    """IoU and Dice of (R,) counts: pixels in both masks, and the sum of the two masks' sizes."""
    both, total = both.double(), total.double()
    return {
        "iou": (both + smooth) / (total - both + smooth),
        "dice": (2 * both + smooth) / (total + smooth),
    }
