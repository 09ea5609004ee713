"""What training minimises: functions of logits and a 0/1 target, one value per row.

Every function takes logits, never probabilities: a saturated sigmoid has no gradient and rounds to
exactly 0 or 1 in bfloat16, the logit keeps both. All arithmetic is float32 whatever the autocast
state, nothing waits for the device, and pixels that the target marks `IGNORE` enter no sum.

Letters: R rows (questions, see `structures`), (H, W) the size of the target.
Sources: Kyyle2114/SAM-Adapter-Pytorch-Implementation 66b0e9e (BCE + IoU loss);
tianrun-chen/SAM-Adapter-PyTorch 665145d (balanced BCE, IoU loss without smoothing);
hitachinsk/SAMed e351840 (cross-entropy + soft Dice over classes).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from samtune.config import LossOptions, answers_classes
from samtune.errors import UserError
from samtune.structures import IGNORE, Batch, Prediction

SMOOTH = 1e-3  # pixels; what a row whose target and prediction are both empty is decided by
_DICE_SMOOTH = 1e-5


def make_loss(options: LossOptions, num_classes: int, prompt: str) -> MaskLoss | ClassLoss:
    """The loss of a model that answers with one mask per row, or with a mask per class.

    num_classes, prompt: as flags say them.
    """
    if answers_classes(num_classes, prompt):
        return ClassLoss(options, num_classes)
    return MaskLoss(options)


class MaskLoss:
    """Weighted sum of binary cross-entropy, plain or balanced, and soft IoU loss, per row.

    Called with what the model answered and the batch that asked, it returns the total (R,) and the
    unweighted terms {"bce" or "balanced_bce": (R,), "iou_loss": (R,)}. The caller averages over
    rows with `batch.weight`; auxiliary terms of an adapter are not included.
    """

    def __init__(self, options: LossOptions):
        self.options = options

    def __call__(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(prediction.logits.device.type, enabled=False):
            logits = batch.at_target(prediction.logits)[:, 0]
            name, bce = _BCE[self.options.bce]
            terms = {
                name: bce(logits, batch.target),
                "iou_loss": iou_loss_rows(logits, batch.target),
            }
        total = self.options.bce_weight * terms[name] + self.options.iou_weight * terms["iou_loss"]
        return total, terms

    def scores(self, prediction: Prediction, batch: Batch) -> dict[str, Tensor]:
        """The same as a scorer for validation: {"loss", the terms}, each (R,)."""
        total, terms = self(prediction, batch)
        return {"loss": total, **terms}


class ClassLoss:
    """Weighted sum of cross-entropy and soft Dice loss over K classes, per row.

    Called like `MaskLoss`; the target holds class ids. Softmax and loss at full resolution are
    computed band by band, and once more in the backward pass, so that memory is that of a band.
    Raises UserError for class weights that are not K numbers above or equal to 0.
    """

    def __init__(self, options: LossOptions, num_classes: int):
        self.options, self.num_classes = options, num_classes
        self.class_weights = parse_class_weights(options.class_weights, num_classes)

    def __call__(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        bands = batch.bands(self.num_classes)
        sums = [self._of_band(prediction.logits, batch, band, len(bands) > 1) for band in bands]
        cost, weight, both, squares = (sum(parts) for parts in zip(*sums, strict=True))
        terms = {"ce": cost / weight.clamp(min=torch.finfo(weight.dtype).tiny)}
        total = self.options.ce_weight * terms["ce"]
        if self.options.dice_weight:
            overlap = (2 * both + _DICE_SMOOTH) / (squares + _DICE_SMOOTH)
            terms["dice_loss"] = 1 - overlap.mean(1)
            total = total + self.options.dice_weight * terms["dice_loss"]
        return total, terms

    def scores(self, prediction: Prediction, batch: Batch) -> dict[str, Tensor]:
        """The same as a scorer for validation."""
        total, terms = self(prediction, batch)
        return {"loss": total, **terms}

    def _of_band(self, logits: Tensor, batch: Batch, band: slice, again: bool) -> tuple:
        if again and logits.requires_grad:
            return checkpoint(self._sums, logits, batch, band, use_reentrant=False)
        return self._sums(logits, batch, band)

    def _sums(self, logits: Tensor, batch: Batch, band: slice) -> tuple[Tensor, ...]:
        """What the pixels of some lines add: weighted cost (R,), its weight (R,), and for the Dice
        loss per class sum(p t) and sum(p^2) + sum(t^2), (R, K) each.
        """
        with torch.autocast(logits.device.type, enabled=False):
            log_p = batch.at_target(logits, band).log_softmax(1)  # (R, K, h, W)
            target = batch.target[:, band].long()
            valid = target != IGNORE
            target = target.where(valid, 0)
            weights = self.class_weights.to(log_p.device)[target] * valid
            cost = -log_p.gather(1, target[:, None])[:, 0] * weights
            sums = cost.sum((1, 2)), weights.sum((1, 2))
            if not self.options.dice_weight:
                nothing = cost.new_zeros(())
                return *sums, nothing, nothing
            p = log_p.exp() * valid[:, None]
            t = F.one_hot(target, self.num_classes).permute(0, 3, 1, 2) * valid[:, None]
            return *sums, (p * t).sum((2, 3)), (p.square() + t).sum((2, 3))


class EveryAnswer:
    """A loss averaged over the answers that a user corrected and the last one (`Prediction`)."""

    def __init__(self, loss: MaskLoss | ClassLoss):
        self.loss = loss

    def __call__(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if not prediction.earlier:
            return self.loss(prediction, batch)
        answers = [*prediction.earlier, prediction.logits]
        results = [self.loss(Prediction(logits), batch) for logits in answers]
        mean = lambda values: torch.stack(values).mean(0)  # noqa: E731
        names = results[0][1]
        terms = {name: mean([terms[name] for _, terms in results]) for name in names}
        return mean([total for total, _ in results]), terms


def parse_class_weights(text: str, num_classes: int) -> Tensor:
    """(K,) float32 from numbers with commas between; ones for an empty text."""
    if not text:
        return torch.ones(num_classes)
    try:
        weights = torch.tensor([float(part) for part in text.split(",")])
    except ValueError:
        weights = torch.empty(0)
    if len(weights) != num_classes or not (weights >= 0).all() or not weights.any():
        raise UserError(
            f"--class_weights {text}: expected {num_classes} numbers of at least 0 with commas "
            "between, one per class"
        )
    return weights


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


def balanced_bce_rows(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in which object and background weigh alike: (R, H, W) twice -> (R,) float32.

    With P object and Q background pixels in a row, P / (P + Q) times the mean of the cross-entropy
    in which the object's pixels weigh Q / P: the official SAM-Adapter's for shadows. That one
    counts P and Q over the batch of a process (the same function of the batch as one tall row);
    here each row is balanced by itself, so that it does not matter how rows are dealt to batches
    and processes. A row with one kind of pixel only, which costs nothing there whatever is
    predicted, has nothing to balance: its plain mean.
    """
    object_, valid = _split(target)
    with torch.autocast(logits.device.type, enabled=False):
        cost = F.binary_cross_entropy_with_logits(logits.float(), object_, reduction="none")
        count = valid.sum((1, 2)).clamp(min=1)
        share = (object_.sum((1, 2)) / count)[:, None, None]
        balance = torch.where(object_ > 0, 1 - share, share)
        weight = torch.where((share > 0) & (share < 1), balance, 1.0) * valid
        return (cost * weight).sum((1, 2)) / count


def _split(target: Tensor) -> tuple[Tensor, Tensor]:
    """The object's pixels and the pixels that count, as float32 zeros and ones."""
    return (target == 1).float(), (target != IGNORE).float()


# --bce -> the name of its term, and the function
_BCE = {"plain": ("bce", bce_rows), "balanced": ("balanced_bce", balanced_bce_rows)}
