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
def region_scores(
    prediction: Prediction, batch: Batch, resolution: str = "original"
) -> dict[str, Tensor]:
    """{"iou": (R,), "dice": (R,)} of the hard masks, float64, without a host sync or a graph.

    resolution: where the target of the batch lies, 'original' or 'frame' (the model's own).
    """
    predicted, true = _masks(prediction, batch, resolution)
    both = (predicted & true).sum((1, 2))
    return overlap(both, predicted.sum((1, 2)) + true.sum((1, 2)))


@torch.no_grad()
def empty_rows(
    prediction: Prediction, batch: Batch, resolution: str = "original"
) -> dict[str, Tensor]:
    """{"empty_target": (R,), "empty_prediction": (R,)}: 1 where a mask has no pixel, else 0.

    The rows whose IoU and Dice are a matter of convention; their mean is the share of such rows.
    """
    predicted, true = _masks(prediction, batch, resolution)
    return {
        "empty_target": (~true.flatten(1).any(1)).double(),
        "empty_prediction": (~predicted.flatten(1).any(1)).double(),
    }


def overlap(both: Tensor, total: Tensor, smooth: float = SMOOTH) -> dict[str, Tensor]:
    """IoU and Dice of (R,) counts: pixels in both masks, and the sum of the two masks' sizes."""
    both, total = both.double(), total.double()
    return {
        "iou": (both + smooth) / (total - both + smooth),
        "dice": (2 * both + smooth) / (total + smooth),
    }


def _masks(prediction: Prediction, batch: Batch, resolution: str) -> tuple[Tensor, Tensor]:
    """Predicted and true mask, (R, H, W) bool, both false where the target says `IGNORE`."""
    if resolution == "original":
        logits = batch.frames.restore(prediction.logits, batch.prompts.image_index)
    else:
        logits = batch.frames.to_frame(prediction.logits)
    if logits.shape != (batch.target.shape[0], 1, *batch.target.shape[1:]):
        raise ValueError(
            f"logits {tuple(logits.shape)} at {resolution} resolution do not fit the target "
            f"{tuple(batch.target.shape)}"
        )
    return (logits[:, 0] > 0) & (batch.target != IGNORE), batch.target == 1


class Mean:
    """Weighted means of named scores, kept as one float64 vector: a sum per name, and the weight.

    `update` only queues work on the device. Vectors of several processes, or of the two halves of
    an interrupted epoch, add up to the vector of the whole.
    """

    def __init__(self, names: list[str], device: torch.device | str = "cpu"):
        self.names = list(names)
        self.sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, scores: dict[str, Tensor], weight: Tensor) -> None:
        """Add rows: each score (R,), weight (R,); what a row of weight 0 scored is never read."""
        rows = torch.stack([scores[name].double() for name in self.names])  # (names, R)
        weight = weight.double()
        rows = torch.where(weight > 0, rows, 0.0)  # 0 times NaN would be NaN
        self.sums += torch.cat([rows @ weight, weight.sum()[None]])

    def state(self) -> Tensor:
        """(names + 1,) float64: what to sum over processes, or to save."""
        return self.sums

    def load(self, state: Tensor) -> None:
        """Go on from sums that `state` gave."""
        self.sums.copy_(state)

    def compute(self) -> dict[str, float]:
        """The means, by name; NaN when nothing was added. Waits for the device."""
        *sums, weight = self.sums.tolist()
        return {
            name: total / weight if weight else float("nan")
            for name, total in zip(self.names, sums, strict=True)
        }
