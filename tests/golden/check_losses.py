"""Fixtures of losses and region metrics.

The parent's losses take probabilities, ours logits. Where the fixture's probability is exactly 0 or
1 the parent clamps its logarithm at -100, which is what a logit of -100 or 100 costs.
"""

from __future__ import annotations

import torch
from fixture import Fixture, close

from samtune.losses import balanced_bce_rows, bce_rows, iou_loss_rows
from samtune.metrics.region import overlap

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 5e-5


def check_losses_metrics(fixture: Fixture) -> None:
    _check_parent(fixture)
    _check_official(fixture)
    _check_gradients(fixture)


def _check_parent(fixture: Fixture) -> None:
    logits, target, probability = (fixture[f"input.{n}"] for n in ("logits", "mask", "prob"))
    logits = torch.where(probability == 0, -100.0, torch.where(probability == 1, 100.0, logits))
    hard = fixture["input.logits"] > 0
    soft = _overlap(probability, target)
    rows = {
        "bce": bce_rows(logits, target),
        "iou_loss": iou_loss_rows(logits, target),
        **_overlap(hard, target),
        "iou_soft": soft["iou"],
        "dice_soft": soft["dice"],
    }
    expected = fixture.group("output.kyyle.per_image.")
    assert expected.keys() == rows.keys()
    for name, values in expected.items():
        for row, value in enumerate(values):  # a small value is held to its own scale
            ours, where = rows[name][row], f"{name} of row {row}"
            # Where the parent has an exact 0, ours may have exp(-100).
            assert ours.abs() < 1e-30 if value == 0 else close(ours, value, TOLERANCE, where), where
    for name, value in fixture.group("output.kyyle.batch.").items():
        close(rows[name].mean(), value, TOLERANCE, f"batch {name}")


def _check_official(fixture: Fixture) -> None:
    logits, target = fixture["input.logits"], fixture["input.mask"]
    iou_loss = iou_loss_rows(logits, target, smooth=0)
    expected = fixture["output.official.iou_loss_per_image"]
    # The source divides 0 by 0 where nothing is to be found and every probability underflows:
    # NaN there. Ours says that such a prediction is perfect.
    defined = ~expected.isnan()
    close(iou_loss[defined], expected[defined], TOLERANCE, "iou_loss")
    assert (iou_loss[~defined] == 0).all()
    close(iou_loss[:4].mean(), fixture["output.official.iou_loss_first4"], TOLERANCE, "first 4")
    mean = fixture["output.official.iou_loss_all"]
    assert iou_loss.mean().isfinite() if mean.isnan() else close(iou_loss.mean(), mean, TOLERANCE)

    close(bce_rows(logits, target).mean(), fixture["output.official.bce_logits"], TOLERANCE, "bce")
    close(batch_balanced(logits, target), fixture["output.official.bbce"], TOLERANCE, "bbce")
    ours, per_image = balanced_bce_rows(logits, target), fixture["output.official.bbce_per_image"]
    # A mask of one kind of pixel costs 0 in the source, whatever is predicted; ours is plain there.
    mixed = target.mean((1, 2)) % 1 > 0
    assert mixed.any() and not mixed.all()
    for row, value in enumerate(per_image):
        expected = value if mixed[row] else bce_rows(logits, target)[row]
        close(ours[row], expected, TOLERANCE, f"bbce of row {row}")


def _check_gradients(fixture: Fixture) -> None:
    target, probability = fixture["input.mask"], fixture["input.prob"]

    def gradient(loss) -> torch.Tensor:
        logits = fixture["input.logits"].clone().requires_grad_()
        (result,) = torch.autograd.grad(loss(logits[:2], target[:2]), logits)
        return result

    def both(smooth: float):
        return lambda z, t: (bce_rows(z, t) + iou_loss_rows(z, t, smooth)).mean()

    parent = fixture["grad.kyyle.bce_plus_iou_first2_wrt_prob"] * probability * (1 - probability)
    close(gradient(both(1e-3)), parent, GRADIENT_TOLERANCE, "gradient of bce + iou")
    official = fixture.group("grad.official.")
    assert official.keys() == {"bce_plus_iou_first2_wrt_logits", "bbce_first2_wrt_logits"}
    close(
        gradient(both(0)), official["bce_plus_iou_first2_wrt_logits"][:, 0], GRADIENT_TOLERANCE,
        "gradient of bce + unsmoothed iou",
    )  # fmt: skip
    close(
        gradient(batch_balanced), official["bbce_first2_wrt_logits"][:, 0], GRADIENT_TOLERANCE,
        "gradient of bbce",
    )  # fmt: skip


def batch_balanced(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The source balances over a whole batch: one tall row."""
    return balanced_bce_rows(logits.flatten(0, 1)[None], target.flatten(0, 1)[None])[0]


def _overlap(predicted: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    both = (predicted * target).double().sum((1, 2))
    return overlap(both, predicted.double().sum((1, 2)) + target.double().sum((1, 2)))


CHECKS = {"losses_metrics": check_losses_metrics}
