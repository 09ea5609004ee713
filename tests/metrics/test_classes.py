"""Scores of class maps from counts over a set."""

from __future__ import annotations

import math

import pytest
import torch

from samtune import structures
from samtune.metrics.classes import ClassCounts, majority, per_class
from samtune.structures import IGNORE, Batch, Frame, Frames, Prediction, Prompts

K = 4


def random_batch(rows=3, side=12, seed=0):
    """Logits that say at each pixel one class for sure, at the size of the file."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(K - 1, (rows, side, side), generator=generator)  # the last never occurs
    answer = torch.randint(K, (rows, side, side), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = IGNORE
    frames = Frames.collate([Frame((side, side), (side, side))] * rows, (side, side))
    image = torch.zeros(rows, 3, side, side, dtype=torch.uint8)
    batch = Batch(image, target.to(torch.uint8), Prompts(), frames, torch.ones(rows))
    logits = torch.nn.functional.one_hot(answer, K).permute(0, 3, 1, 2).float()
    return Prediction(logits), batch, answer


@pytest.mark.parametrize("values", [2**24, 200])
def test_counts_are_those_of_a_confusion_matrix(values, monkeypatch):
    monkeypatch.setattr(structures, "_BAND_VALUES", values)
    prediction, batch, answer = random_batch()
    counts = ClassCounts(K)(prediction, batch)
    for row in range(len(answer)):
        valid = batch.target[row] != IGNORE
        true, said = batch.target[row][valid].long(), answer[row][valid]
        matrix = torch.zeros(K, K, dtype=torch.int64)
        for t, a in zip(true.tolist(), said.tolist(), strict=True):
            matrix[t, a] += 1
        assert counts[row].tolist() == [
            matrix.diagonal().tolist(), matrix.sum(0).tolist(), matrix.sum(1).tolist()
        ]  # fmt: skip


def test_a_class_that_is_nowhere_is_left_out_and_one_only_answered_scores_zero():
    counts = torch.tensor([[5, 0, 0], [6, 1, 0], [6, 1, 0]])
    iou, dice = per_class(counts)
    assert iou[:2].tolist() == [5 / 7, 0] and math.isnan(iou[2])
    assert dice[:2].tolist() == [10 / 12, 0]
    scores = ClassCounts.scores(counts)
    assert scores == {"iou": 5 / 14, "dice": 5 / 12, "accuracy": 5 / 7}
    only_answered = ClassCounts.scores(torch.tensor([[4, 0], [4, 2], [6, 0]]))
    assert only_answered["iou"] == (4 / 6 + 0) / 2


def test_the_majority_class_everywhere():
    true = torch.tensor([10, 30, 60])
    counts = majority(torch.stack([true // 2, true, true]))
    assert counts.tolist() == [[0, 0, 60], [0, 0, 100], [10, 30, 60]]
    assert ClassCounts.scores(counts)["accuracy"] == 0.6
    assert ClassCounts.scores(counts)["iou"] == pytest.approx(0.2)
