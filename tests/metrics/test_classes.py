"""Scores of class maps from counts over a set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from samtune import structures
from samtune.metrics.classes import ClassCounts, class_map
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
    scores = ClassCounts.scores(torch.tensor([[5, 0, 0], [6, 1, 0], [6, 1, 0]]))
    assert scores == {"mIoU": 5 / 14, "mDice": 5 / 12, "pixel_accuracy": 5 / 7}
    only_answered = ClassCounts.scores(torch.tensor([[4, 0], [4, 2], [6, 0]]))
    assert only_answered["mIoU"] == (4 / 6 + 0) / 2


def test_the_class_map_is_the_largest_logit_whatever_the_bands(monkeypatch):
    prediction, batch, answer = random_batch()
    whole = class_map(prediction, batch)
    monkeypatch.setattr(structures, "_BAND_VALUES", 100)
    assert (whole == answer).all() and (class_map(prediction, batch) == whole).all()


def test_a_class_map_of_whole_pictures_when_scores_are_taken_in_a_small_frame(monkeypatch):
    """Bands cover the picture that is drawn, not the target that is scored."""
    prediction, batch, answer = random_batch()
    large = Frames.collate([Frame((30, 30), (12, 12))] * 3, (12, 12))
    monkeypatch.setattr(structures, "_BAND_VALUES", 3 * 12 * K * 4)
    batch = replace(batch, frames=large, in_frame=True)
    assert (class_map(prediction, batch) == answer).all()
    assert class_map(prediction, replace(batch, in_frame=False)).shape == (3, 30, 30)
