"""IoU and Dice of hard masks, and their weighted means."""

from __future__ import annotations

import pytest
import torch

from samtune.metrics.region import overlap, region_scores
from samtune.structures import IGNORE, Batch, Frame, Frames, Prediction, Prompts


def batch_of(target: torch.Tensor) -> Batch:
    """Square images whose frame, decoder output and file all have the same size."""
    rows, side, _ = target.shape
    frames = Frames.collate([Frame((side, side), (side, side))] * rows, (side, side))
    image = torch.zeros(rows, 3, side, side, dtype=torch.uint8)
    return Batch(image, target, Prompts(), frames, torch.ones(rows))


def logits_of(mask: torch.Tensor) -> Prediction:
    return Prediction(torch.where(mask > 0, 5.0, -5.0)[:, None])


def test_scores_are_those_of_counted_pixels():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(4, 8, 8, generator=generator) < 0.5
    true = torch.rand(4, 8, 8, generator=generator) < 0.5
    scores = region_scores(logits_of(predicted), batch_of(true.to(torch.uint8)))
    for row in range(4):
        p = {tuple(x) for x in predicted[row].nonzero().tolist()}
        t = {tuple(x) for x in true[row].nonzero().tolist()}
        iou = (len(p & t) + 1e-3) / (len(p | t) + 1e-3)
        dice = (2 * len(p & t) + 1e-3) / (len(p) + len(t) + 1e-3)
        assert scores["iou"][row].item() == pytest.approx(iou, abs=1e-12)
        assert scores["dice"][row].item() == pytest.approx(dice, abs=1e-12)


def test_empty_masks_score_one_when_both_are_empty_and_almost_nothing_when_one_is():
    empty, full = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    predicted, true = torch.cat([empty, full, empty]), torch.cat([empty, empty, full])
    batch = batch_of(true.to(torch.uint8))
    scores = region_scores(logits_of(predicted), batch)
    for values in scores.values():
        assert values[0] == 1
        assert (values[1:] < 1e-4).all()


def test_ignored_pixels_are_not_counted_whatever_is_predicted_there():
    true = torch.zeros(1, 8, 8, dtype=torch.uint8)
    true[:, :2] = 1
    true[:, 6:] = IGNORE
    predicted = true.clone()
    predicted[:, 6:] = 1
    scores = region_scores(logits_of(predicted), batch_of(true))
    assert scores["iou"].item() == scores["dice"].item() == 1


def test_scores_are_taken_at_the_size_of_the_file_and_ignore_the_padding():
    """A wide and a tall picture in one batch score what each scores alone."""
    frames = [Frame((6, 24), (4, 16)), Frame((10, 5), (16, 8))]
    together = Frames.collate(frames, (16, 16))
    logits = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    target = torch.full((2, 10, 24), IGNORE, dtype=torch.uint8)
    for row, frame in enumerate(frames):
        height, width = frame.original_size
        target[row, :height, :width] = torch.rand(height, width) < 0.5
    image = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    joint = region_scores(
        Prediction(logits), Batch(image, target, Prompts(), together, torch.ones(2))
    )
    for row, frame in enumerate(frames):
        height, width = frame.original_size
        alone = Frames.collate([frame], (16, 16))
        single = region_scores(
            Prediction(logits[row : row + 1]),
            Batch(image[:1], target[row : row + 1, :height, :width], Prompts(), alone,
                  torch.ones(1)),
        )  # fmt: skip
        assert single["iou"][0] == joint["iou"][row]
        assert single["dice"][0] == joint["dice"][row]


def test_counts_are_exact_where_float32_would_round():
    """2^24 + 1 pixels: a float32 sum loses the last one."""
    both = torch.tensor([2**24 + 1])
    scores = overlap(both, 2 * both, smooth=0)
    assert scores["iou"].item() == scores["dice"].item() == 1
    assert overlap(both - 1, 2 * both - 1, smooth=0)["iou"].item() < 1


def test_scores_keep_no_graph_so_memory_stays_flat_over_an_epoch():
    """The parent summed losses with their graphs: every batch of the epoch stayed in memory."""
    logits = torch.randn(2, 1, 8, 8, requires_grad=True)
    batch = batch_of(torch.ones(2, 8, 8, dtype=torch.uint8))
    prediction = Prediction(logits * 2)
    scores = region_scores(prediction, batch)
    assert not any(values.requires_grad for values in scores.values())
