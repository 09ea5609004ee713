"""Losses and scores stay finite where pictures are odd and answers are sure of themselves."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from samtune.adapters import build_model
from samtune.adapters.conv_lora import NoisyGate
from samtune.adapters.options import DecoderOptions
from samtune.config import LossOptions, ModelOptions
from samtune.data.prompts import box_from_mask
from samtune.losses import (
    ClassLoss,
    EveryAnswer,
    MaskLoss,
    balanced_bce_rows,
    bce_rows,
    iou_loss_rows,
)
from samtune.metrics.classes import ClassCounts
from samtune.metrics.measure import Answer
from samtune.metrics.protocols import PROTOCOLS
from samtune.metrics.region import region_scores
from samtune.metrics.scoring import Scoring
from samtune.structures import IGNORE, Batch, Frame, Frames, Prediction, Prompts

SIDE = 16  # of the frame and of the pictures
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = {
    "bce": bce_rows,
    "balanced_bce": balanced_bce_rows,
    "iou_loss": iou_loss_rows,
    "iou_loss without smoothing": lambda logits, target: iou_loss_rows(logits, target, 0.0),
}


def targets() -> dict[str, torch.Tensor]:
    """What a mask can be: (16, 16) uint8 each."""
    empty = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    pixel, corner, half = empty.clone(), empty.clone(), empty.clone()
    pixel[7, 9] = corner[-1, -1] = 1
    half[:8] = 1
    one_read = torch.full_like(empty, IGNORE)
    one_read[3, 3] = 1
    unread_object = empty.clone()
    unread_object[:8] = IGNORE
    return {
        "empty": empty, "full": torch.ones_like(empty), "one pixel": pixel, "a corner": corner,
        "half": half, "nothing read": torch.full_like(empty, IGNORE), "one pixel read": one_read,
        "the rest unread": unread_object,
    }  # fmt: skip


def answers(truth: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model can say of it: (16, 16) float32 logits each."""
    right = torch.where(truth == 1, 1.0, -1.0)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    return {
        "undecided": torch.zeros_like(right), "sure and right": 1e4 * right,
        "sure and wrong": -1e4 * right, "sure of anything": 1e4 * noise.sign(), "noise": noise,
        "next to nothing": 1e-30 * noise, "a threshold of fp16": 6e4 * right,
    }  # fmt: skip


def batch_of(target: torch.Tensor) -> Batch:
    """The same question at three sizes of the picture it is about."""
    sizes = [(SIDE, SIDE), (9, SIDE), (1, 1)]
    frames = [Frame(size, (SIDE, max(1, size[0]))) for size in sizes]
    canvas = torch.full((len(sizes), SIDE, SIDE), IGNORE, dtype=torch.uint8)
    for row, (height, width) in enumerate(sizes):
        canvas[row, :height, :width] = target[:height, :width]
    return Batch(
        torch.zeros(3, 3, SIDE, SIDE, dtype=torch.uint8), canvas, Prompts(),
        Frames.collate(frames, (SIDE, SIDE)), torch.ones(3), ids=["a", "b", "c"],
    )  # fmt: skip


def assert_finite(loss: torch.Tensor, leaf: torch.Tensor) -> None:
    """The loss, and its gradient in the leaf's own number format; neither below nothing."""
    assert loss.dtype == torch.float32 and loss.isfinite().all() and (loss > -1e-5).all(), loss
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert gradient.isfinite().all()


# --- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", targets())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("term", ROWS)
def test_every_term_is_finite_forward_and_backward(term, dtype, target):
    truth = targets()[target]
    for said, logits in answers(truth).items():
        leaf = logits.to(dtype)[None].requires_grad_()
        loss = ROWS[term](leaf, truth[None])
        assert_finite(loss, leaf)
        if said == "sure and right" and not (term.startswith("iou") and target == "empty"):
            assert loss < 1e-3, "what is right costs nothing"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bce", ["plain", "balanced"])
def test_a_masks_loss_and_scores_are_finite_at_the_size_of_every_picture(bce, dtype):
    for truth in targets().values():
        batch = batch_of(truth)
        for logits in answers(truth).values():
            leaf = logits.to(dtype).expand(3, 1, SIDE, SIDE).clone().requires_grad_()
            prediction = Prediction(leaf, earlier=(leaf / 2,))
            total, _ = EveryAnswer(MaskLoss(LossOptions(bce=bce)))(prediction, batch)
            assert_finite(total, leaf)
            for values in region_scores(prediction, batch).values():
                assert ((values >= 0) & (values <= 1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", ["", "0,1,1", "0,0,5"])
def test_a_loss_over_classes_is_finite_also_where_no_class_weighs_anything(weights, dtype):
    loss = ClassLoss(LossOptions(dice_weight=0.5, class_weights=weights), 3)
    counts = ClassCounts(3)
    for truth in targets().values():
        batch = batch_of(truth)
        for logits in answers(truth).values():
            three = torch.stack([logits, -logits, 0.5 * logits]).to(dtype)
            leaf = three.expand(3, 3, SIDE, SIDE).clone().requires_grad_()
            total, _ = loss(Prediction(leaf), batch)
            assert_finite(total, leaf)
            scores = ClassCounts.scores(counts(Prediction(leaf), batch).sum(0))
            read = bool((batch.target != IGNORE).any())
            assert all(0 <= score <= 1 if read else math.isnan(score) for score in scores.values())


def test_what_is_infinite_is_not_hidden():
    """The trainer must see it, to stop and name the images."""
    for value in (math.inf, math.nan):
        logits = torch.full((1, 4, 4), value)
        assert not bce_rows(logits, torch.ones(1, 4, 4)).isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e4])
def test_the_balance_of_gates_is_finite_for_features_of_any_size(size):
    gate = NoisyGate(3, 4)
    torch.nn.init.normal_(gate.w_gate)
    torch.nn.init.normal_(gate.w_noise)
    features = size * torch.ones(5, 3)
    features.requires_grad_()
    _, balance = gate(features, torch.randn(5, 4))
    balance.backward()
    assert balance.isfinite() and features.grad.isfinite().all()
    assert gate.w_gate.grad.isfinite().all() and gate.w_noise.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_box_around_one_pixel_and_a_mask_of_nothing_train(tiny, dtype):
    """The model's own arithmetic: a box of no area, at the frame's edge too."""
    chosen = ModelOptions(model_type="tiny", adapter="decoder", train="all")
    model = build_model(chosen, DecoderOptions(), "box", None, seed=1).train()
    size = tuple(model.image_size)
    mask = np.zeros(size, np.uint8)
    mask[-1, -1] = 1
    boxes = torch.tensor(
        [box_from_mask(mask), (0.0, 0.0, 0.0, 0.0), (5.0, 5.0, 5.0, 5.0)], dtype=torch.float32
    )
    frames = Frames.collate([Frame(size, size)] * 3, size)
    target = torch.stack([torch.from_numpy(mask), torch.zeros(size), torch.full(size, IGNORE)])
    batch = Batch(
        torch.zeros(3, 3, *size, dtype=torch.uint8), target.to(torch.uint8), Prompts(boxes=boxes),
        frames, torch.ones(3),
    )  # fmt: skip
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        prediction = model(*batch.inputs)
    total, _ = MaskLoss(LossOptions())(prediction, batch)
    total.sum().backward()
    assert total.isfinite().all() and total[2] < 1 + 1e-3
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# --- metrics -------------------------------------------------------------------------------------

BINARY = [(name, mode) for name, p in PROTOCOLS.items() if p.classes == 1 for mode in p.modes]
CLASSES = [(name, mode) for name, p in PROTOCOLS.items() if p.classes > 1 for mode in p.modes]
# What a score may be; others are shares, or percent, or pixels.
HIGHEST = {"BER": 100, "shadow_error": 100, "non_shadow_error": 100, "HD95": 30}


def assert_scores(scoring: Scoring) -> None:
    """Every score is a share in its range, or undefined; nothing else."""
    result = scoring.result()
    for name, value in result["scores"].items():
        head = name.split("/")[0].removesuffix("_image_mean")
        limit = HIGHEST.get(head, 2 if head.startswith("E_") else 1)
        assert value is None or -1e-9 <= value <= limit + 1e-9, (name, value)
    for row in scoring.table():
        assert not any(isinstance(v, float) and math.isinf(v) for v in row.values()), row


def binary_cases():
    """Truths and the probabilities that logits of any size become, and pictures of one pixel."""
    for truth in targets().values():
        for logits in answers(truth).values():
            yield truth.numpy(), logits.sigmoid().numpy()
    for value in (0, 1, IGNORE):
        for said in (0.0, 0.5, 1.0):
            yield np.full((1, 1), value, np.uint8), np.full((1, 1), said, np.float32)
            yield np.full((1, 5), value, np.uint8), np.full((1, 5), said, np.float32)


@pytest.mark.parametrize(("protocol", "mode"), BINARY)
def test_every_score_of_one_foreground_is_in_its_range_or_undefined(protocol, mode):
    whole = Scoring(protocol, mode=mode, replicates=10)
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("error")
        for index, (truth, probability) in enumerate(binary_cases()):
            answer = Answer(probability=probability)
            if protocol == "instances":
                truth = (
                    truth[None] == 1 if (truth == 1).any() else np.zeros((0, *truth.shape), bool)
                )
                found = probability[None] > 0.5
                kept = found[found.any((1, 2))]
                answer = Answer(masks=kept, scores=np.ones(len(kept)))
            alone = Scoring(protocol, mode=mode, replicates=10)
            for scoring in (alone, whole):
                scoring.add(str(index), truth, answer)
            assert_scores(alone)
        assert_scores(whole)


@pytest.mark.parametrize(("protocol", "mode"), CLASSES)
def test_every_score_of_classes_is_in_its_range_or_undefined(protocol, mode):
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("error")
        whole = Scoring(protocol, 3, mode=mode, replicates=10)
        for index, (truth, probability) in enumerate(binary_cases()):
            labels = (probability > 0.5).astype(np.uint8) * 2
            shares = np.stack([1 - probability, 0 * probability, probability])
            alone = Scoring(protocol, 3, mode=mode, replicates=10)
            for scoring in (alone, whole):
                answer = Answer(labels=labels, class_probability=shares)
                scoring.add(str(index), truth, answer, group=str(index))
            assert_scores(alone)
        assert_scores(whole)


def test_a_set_without_any_picture_scores_nothing():
    for protocol, mode in BINARY:
        assert_scores(Scoring(protocol, mode=mode, replicates=10))


def test_the_gradient_of_a_row_that_weighs_nothing_is_nothing():
    """A filler's loss may be anything: it must not reach the sum."""
    batch = replace(batch_of(targets()["half"]), weight=torch.tensor([1.0, 0.0, 1.0]))
    leaf = torch.full((3, 1, SIDE, SIDE), 1e4).requires_grad_()
    total, _ = MaskLoss(LossOptions())(Prediction(leaf), batch)
    (batch.weight * total).sum().backward()
    assert (leaf.grad[1] == 0).all() and leaf.grad.isfinite().all()
