"""Losses on logits: right, finite, blind to IGNORE, and one value per row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from samtune import structures
from samtune.config import LossOptions
from samtune.errors import UserError
from samtune.losses import (
    ClassLoss,
    MaskLoss,
    balanced_bce_rows,
    bce_rows,
    iou_loss_rows,
    make_loss,
)
from samtune.structures import IGNORE, Batch, Frame, Frames, Prediction, Prompts

SIDE = 16


def random_rows(rows=3, height=9, width=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, height, width, generator=generator)
    target = (torch.rand(rows, height, width, generator=generator) < 0.3).to(torch.uint8)
    return logits, target


def make_batch(frames, resolution="original", image_index=None, seed=0):
    """A batch whose images fill their part of the canvas and are IGNORE beyond it."""
    collated = Frames.collate(frames, (SIDE, SIDE))
    index = range(len(frames)) if image_index is None else image_index.tolist()
    size = collated.canvas_size if resolution == "original" else collated.frame_size
    generator = torch.Generator().manual_seed(seed)
    target = torch.full((len(index), *size), IGNORE, dtype=torch.uint8)
    for row, image in enumerate(index):
        frame = frames[image]
        height, width = frame.original_size if resolution == "original" else frame.valid_size
        drawn = torch.rand(height, width, generator=generator) < 0.4
        target[row, :height, :width] = drawn.to(torch.uint8)
    return Batch(
        image=torch.zeros(len(frames), 3, SIDE, SIDE, dtype=torch.uint8),
        target=target,
        prompts=Prompts(boxes=torch.zeros(len(index), 4), image_index=image_index),
        frames=collated,
        weight=torch.ones(len(index)),
        ids=[f"image{i}" for i in range(len(frames))],
        in_frame=resolution == "frame",
    )


FRAMES = [Frame((12, 20), (10, 16)), Frame((20, 9), (16, 7)), Frame((8, 8), (16, 16))]


def test_values_are_those_of_the_parents_probability_formulas():
    logits, target = random_rows()
    p, t = logits.double().sigmoid(), target.double()
    bce = -(t * p.log() + (1 - t) * (1 - p).log()).mean((1, 2))
    both = (p * t).sum((1, 2))
    iou = (both + 1e-3) / (p.sum((1, 2)) + t.sum((1, 2)) - both + 1e-3)
    torch.testing.assert_close(bce_rows(logits, target).double(), bce, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        iou_loss_rows(logits, target).double(), 1 - iou, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("loss", [bce_rows, balanced_bce_rows, iou_loss_rows])
def test_ignored_pixels_change_neither_value_nor_gradient(loss):
    logits, target = random_rows()
    target[:, 5:] = IGNORE
    whole = logits.clone().requires_grad_()
    loss(whole, target).sum().backward()
    cut = logits[:, :5].clone().requires_grad_()
    expected = loss(cut, target[:, :5])
    expected.sum().backward()
    torch.testing.assert_close(loss(whole, target), expected)
    torch.testing.assert_close(whole.grad[:, :5], cut.grad)
    assert (whole.grad[:, 5:] == 0).all()


def test_balanced_bce_weighs_the_objects_pixels_as_much_as_the_others():
    logits, target = random_rows()
    for row in range(len(target)):
        positive = target[row].float().mean()
        expected = positive * F.binary_cross_entropy_with_logits(
            logits[row], target[row].float(), pos_weight=(1 - positive) / positive
        )
        torch.testing.assert_close(balanced_bce_rows(logits, target)[row], expected)
    undecided = torch.zeros_like(logits, requires_grad=True)
    balanced_bce_rows(undecided, target).sum().backward()
    torch.testing.assert_close(undecided.grad.sum((1, 2)), torch.zeros(len(target)))


def test_balanced_bce_punishes_what_is_found_where_nothing_is():
    logits, target = random_rows()
    target[0], target[1], target[2] = 0, 1, IGNORE
    loss = balanced_bce_rows(logits, target)
    torch.testing.assert_close(loss, bce_rows(logits, target))
    assert (loss[:2] > 0.5).all() and loss[2] == 0


@pytest.mark.parametrize("smooth", [1e-3, 0])
def test_rows_that_hold_nothing_cost_nothing_and_stay_finite(smooth):
    logits = torch.full((2, 4, 4), -200.0, requires_grad=True)  # the sigmoid underflows to 0
    target = torch.zeros(2, 4, 4)
    target[1] = IGNORE
    loss = iou_loss_rows(logits, target, smooth) + bce_rows(logits, target)
    assert (loss == 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [20.0, 104.0, 1e4])
def test_saturated_logits_give_finite_losses_and_gradients_that_still_point_back(dtype, size):
    """On probabilities the parent's BCE clamps: wholly wrong pixels get no gradient at all."""
    target = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    logits = torch.tensor([[[size, -size]]], dtype=dtype, requires_grad=True)  # both wrong
    for smooth in (1e-3, 0):
        loss = bce_rows(logits, target) + iou_loss_rows(logits, target, smooth)
        assert loss.dtype == torch.float32
        assert loss.isfinite().all()
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.isfinite().all()
        assert gradient[0, 0, 0] > 0 > gradient[0, 0, 1]


def test_under_bf16_autocast_the_loss_is_still_float32_arithmetic():
    """The parent's loss on sigmoid outputs is refused under CUDA autocast; ours takes logits."""
    logits, target = random_rows()
    expected = bce_rows(logits, target) + iou_loss_rows(logits, target)
    with torch.autocast("cpu", torch.bfloat16):
        under = bce_rows(logits, target) + iou_loss_rows(logits, target)
    assert torch.equal(under, expected)


@pytest.mark.parametrize("bce", ["plain", "balanced"])
@pytest.mark.parametrize("resolution", ["original", "frame"])
def test_mask_loss_weighs_its_terms_at_the_resolution_of_the_target(resolution, bce):
    batch = make_batch(FRAMES, resolution)
    logits = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    loss = MaskLoss(LossOptions(2.0, 0.5, bce))
    total, terms = loss(Prediction(logits), batch)
    assert total.shape == (3,)
    name, function = {
        "plain": ("bce", bce_rows),
        "balanced": ("balanced_bce", balanced_bce_rows),
    }[bce]
    torch.testing.assert_close(total, 2 * terms[name] + 0.5 * terms["iou_loss"])
    frames = batch.frames
    resized = frames.restore(logits) if resolution == "original" else frames.to_frame(logits)
    torch.testing.assert_close(terms[name], function(resized[:, 0], batch.target))
    scores = loss.scores(Prediction(logits), batch)
    assert scores.keys() == {"loss", name, "iou_loss"}
    assert torch.equal(scores["loss"], total)


def test_images_of_mixed_size_in_one_batch_cost_what_each_costs_alone():
    batch = make_batch(FRAMES)
    logits = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    together, _ = MaskLoss(LossOptions())(Prediction(logits), batch)
    for row, frame in enumerate(FRAMES):
        height, width = frame.original_size
        alone = Batch(
            batch.image[row : row + 1], batch.target[row : row + 1, :height, :width],
            Prompts(), Frames.collate([frame], (SIDE, SIDE)), torch.ones(1),
        )  # fmt: skip
        single, _ = MaskLoss(LossOptions())(Prediction(logits[row : row + 1]), alone)
        torch.testing.assert_close(single[0], together[row])


def test_each_row_is_scored_against_its_own_image():
    index = torch.tensor([2, 0, 0, 1])
    batch = make_batch(FRAMES, image_index=index)
    logits = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    total, _ = MaskLoss(LossOptions())(Prediction(logits), batch)
    restored = batch.frames.restore(logits, index)[:, 0]
    torch.testing.assert_close(
        total, bce_rows(restored, batch.target) + iou_loss_rows(restored, batch.target)
    )


def test_no_loss_reads_a_value_back_from_the_device():
    """Fake tensors have no values: reading one (`.item()`, `if tensor`) raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch = make_batch(FRAMES, image_index=torch.tensor([0, 1, 2]))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = type(batch)(
            image=mode.from_tensor(batch.image),
            target=mode.from_tensor(batch.target),
            prompts=Prompts(image_index=mode.from_tensor(batch.prompts.image_index)),
            frames=Frames(
                mode.from_tensor(batch.frames.original_size),
                mode.from_tensor(batch.frames.valid_size),
                batch.frames.frame_size,
                batch.frames.canvas_size,
            ),
            weight=mode.from_tensor(batch.weight),
        )
        total, _ = MaskLoss(LossOptions())(Prediction(torch.zeros(3, 1, 4, 4)), fake)
        assert total.shape == (3,)
        balanced_bce_rows(torch.zeros(3, 4, 4), torch.zeros(3, 4, 4))


# A mask per class


def class_batch(num_classes, resolution="original", ignore=0.1, seed=0):
    """Logits and class ids at random, some of them IGNORE."""
    batch = make_batch(FRAMES, resolution, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(num_classes, batch.target.shape, generator=generator).to(torch.uint8)
    unread = torch.rand(batch.target.shape, generator=generator) < ignore
    target = torch.where((batch.target == IGNORE) | unread, IGNORE, ids)
    logits = torch.randn(len(FRAMES), num_classes, 4, 4, generator=generator)
    return logits, replace(batch, target=target.to(torch.uint8))


@pytest.mark.parametrize("resolution", ["original", "frame"])
def test_class_loss_is_torchs_cross_entropy_and_the_dice_formula_row_by_row(resolution):
    logits, batch = class_batch(5, resolution)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5])
    options = LossOptions(ce_weight=0.2, dice_weight=0.8, class_weights="0.5,1,2,0,1.5")
    total, terms = ClassLoss(options, 5)(Prediction(logits), batch)
    at_target = batch.at_target(logits)
    for row in range(len(FRAMES)):
        target = batch.target[row].long()
        ce = F.cross_entropy(
            at_target[row : row + 1], target[None], weight=weights, ignore_index=IGNORE
        )
        valid = target != IGNORE
        p = at_target[row].softmax(0)[:, valid]
        t = F.one_hot(target[valid], 5).T.float()
        dice = (2 * (p * t).sum(1) + 1e-5) / (p.square().sum(1) + t.square().sum(1) + 1e-5)
        torch.testing.assert_close(terms["ce"][row], ce)
        torch.testing.assert_close(terms["dice_loss"][row], 1 - dice.mean())
        torch.testing.assert_close(total[row], 0.2 * ce + 0.8 * (1 - dice.mean()))


@pytest.mark.parametrize("resolution", ["original", "frame"])
def test_cutting_the_picture_into_bands_changes_neither_loss_nor_gradient(resolution, monkeypatch):
    logits, batch = class_batch(4, resolution)
    loss = ClassLoss(LossOptions(dice_weight=0.5), 4)
    results = []
    for values in (2**24, 4 * 3 * 20 * 3):  # all at once, and a few lines at a time
        monkeypatch.setattr(structures, "_BAND_VALUES", values)
        leaf = logits.clone().requires_grad_()
        total, _ = loss(Prediction(leaf), batch)
        total.sum().backward()
        results.append((len(batch.bands(4)), total.detach(), leaf.grad))
    (one, total, gradient), (many, banded, banded_gradient) = results
    assert one == 1 and many > 3
    torch.testing.assert_close(banded, total)
    torch.testing.assert_close(banded_gradient, gradient)


def test_a_row_without_a_pixel_that_counts_costs_nothing_and_has_no_gradient():
    logits, batch = class_batch(3, ignore=1.1)
    leaf = logits.requires_grad_()
    total, _ = ClassLoss(LossOptions(), 3)(Prediction(leaf), batch)
    total.sum().backward()
    assert (total == 0).all() and (leaf.grad == 0).all()


@pytest.mark.parametrize("text", ["1,2", "1,2,x", "1,-1,1", "0,0,0"])
def test_class_weights_that_are_not_one_number_per_class_are_refused(text):
    with pytest.raises(UserError, match="--class_weights"):
        ClassLoss(LossOptions(class_weights=text), 3)


def test_which_loss_belongs_to_which_answer():
    assert isinstance(make_loss(LossOptions(), 3, "none"), ClassLoss)
    assert isinstance(make_loss(LossOptions(), 3, "box"), MaskLoss)
    assert isinstance(make_loss(LossOptions(), 1, "none"), MaskLoss)
