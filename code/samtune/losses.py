"""What training minimises: functions of logits and a 0/1 target, one value per row.

Every function takes logits, never probabilities: a saturated sigmoid has no gradient and rounds to
exactly 0 or 1 in bfloat16, the logit keeps both. All arithmetic is float32 whatever the autocast
state, nothing waits for the device, and pixels that the target marks `IGNORE` enter no sum.

Letters: R rows (questions, see `structures`), (H, W) the size of the target.
Sources: Kyyle2114/SAM-Adapter-Pytorch-Implementation 66b0e9e (BCE + IoU loss);
tianrun-chen/SAM-Adapter-PyTorch 665145d (balanced BCE, IoU loss without smoothing).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from samtune.config import LossOptions
from samtune.structures import IGNORE, Batch, Prediction

SMOOTH = 1e-3  # pixels; what a row whose target and prediction are both empty is decided by


class MaskLoss:
    """Weighted sum of binary cross-entropy and soft IoU loss, per row.

    Called with what the model answered and the batch that asked, it returns the total (R,) and the
    unweighted terms {"bce": (R,), "iou_loss": (R,)}. The caller averages over rows with
    `batch.weight`; auxiliary terms of an adapter are not included.
    """

    def __init__(self, options: LossOptions):
        self.options = options

    def __call__(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(prediction.logits.device.type, enabled=False):
            logits = batch.at_target(prediction.logits)
            terms = {
                "bce": bce_rows(logits, batch.target),
                "iou_loss": iou_loss_rows(logits, batch.target),
            }
        total = self.options.bce_weight * terms["bce"] + self.options.iou_weight * terms["iou_loss"]
        return total, terms

    def scores(self, prediction: Prediction, batch: Batch) -> dict[str, Tensor]:
        """The same as a scorer for validation: {"loss", "bce", "iou_loss"}, each (R,)."""
        total, terms = self(prediction, batch)
        return {"loss": total, **terms}


def bce_rows(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy, mean over the pixels of each row: (R, H, W) twice -> (R,) float32.

    target: 0, 1 or `IGNORE`, any number type. A row with nothing but `IGNORE` costs 0.
    """
    object_, valid = _split(target)
    with torch.autocast(logits.device.type, enabled=False):
        cost = F.binary_cross_entropy_with_logits(logits.float(), object_, reduction="none")
        return (cost * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def iou_loss_rows(logits: Tensor, target: Tensor, smooth: float = SMOOTH) -> Tensor:
    """One minus the soft IoU of sigmoid(logits) and target: (R, H, W) twice -> (R,) float32.

    smooth: pixels added to intersection and union; 0 gives the official SAM-Adapter's loss. Where
    that one divides 0 by 0 (nothing to find, and every probability underflows to 0) the prediction
    is perfect and the loss is 0 here, as it is with smoothing, and never NaN.
    """
    object_, valid = _split(target)
    with torch.autocast(logits.device.type, enabled=False):
        probability = logits.float().sigmoid() * valid
        intersection = (probability * object_).sum((1, 2))
        union = probability.sum((1, 2)) + object_.sum((1, 2)) - intersection
        intersection, union = intersection + smooth, union + smooth
        tiny = torch.finfo(union.dtype).tiny
        # Dividing by the clamped union keeps the gradient of the branch not taken finite as well.
        iou = torch.where(union > tiny, intersection / union.clamp(min=tiny), 1.0)
        return 1 - iou


def balanced_bce(logits: Tensor, target: Tensor) -> Tensor:
    """The official SAM-Adapter's cross-entropy for shadows: (R, H, W) twice -> one float32 number.

    The object's pixels weigh as much as the background's, counted over the whole batch: with P
    object and Q background pixels, P / (P + Q) times the mean of the cross-entropy in which the
    object's pixels weigh Q / P.
    """
    object_, valid = _split(target)
    with torch.autocast(logits.device.type, enabled=False):
        positive = object_.sum() + 1e-10
        negative = (valid - object_).sum() + 1e-10
        cost = F.binary_cross_entropy_with_logits(
            logits.float(), object_, pos_weight=negative / positive, reduction="none"
        )
        mean = (cost * valid).sum() / valid.sum().clamp(min=1)
        return positive / (positive + negative) * mean


def _split(target: Tensor) -> tuple[Tensor, Tensor]:
    """The object's pixels and the pixels that count, as float32 zeros and ones."""
    return (target == 1).float(), (target != IGNORE).float()
