"""What is computed by a shorter way equals the plain definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from samtune.metrics import saliency
from samtune.metrics.curves import EPS
from samtune.metrics.instances import mask_ious
from samtune.metrics.measure import Answer
from samtune.metrics.protocols import PROTOCOLS
from samtune.metrics.saliency import FAR, HALF_DISTANCE, _gaussian, weighted_f
from samtune.metrics.scoring import Scoring
from samtune.metrics.surface import BoundaryIoU, boundary_thickness, surface_distances
from samtune.structures import IGNORE, Frame, Frames

SIZES = [(1, 1), (1, 40), (37, 20), (64, 90), (9, 700)]


def blobs(size, seed: int, sigma: float = 2.0, level: float = 0.7) -> np.ndarray:
    """(H, W) bool, some regions with ragged borders, at least one pixel."""
    noise = np.random.default_rng(seed).standard_normal(size)
    noise = ndimage.gaussian_filter(noise, sigma)
    return noise >= min(noise.max(), level * noise.std())


def plain_weighted_f(grey, true, read, beta2):
    """Every pixel's distance and nearest pixel of the object, as the paper's code has it."""
    distance, nearest = ndimage.distance_transform_edt(~true, return_indices=True)
    error = np.where(read, np.abs(grey - true), 0)
    smooth = np.where(read, error[tuple(nearest)], 0)
    for axis in (0, 1):
        smooth = ndimage.correlate1d(smooth, _gaussian(), axis=axis, mode="constant")
    missed = np.minimum(error, smooth)[true]
    outside = read & ~true
    alarm = error[outside] * (2 - np.exp(np.log(0.5) / HALF_DISTANCE * distance[outside]))
    found = missed.size - missed.sum()
    recall, precision = 1 - missed.mean(), found / (found + alarm.sum() + EPS)
    return (1 + beta2) * recall * precision / (recall + beta2 * precision + EPS)


@pytest.mark.parametrize("exact_side", [4096, 0])
@pytest.mark.parametrize("size", SIZES)
def test_weighted_f_reads_distances_only_where_they_matter(size, exact_side, monkeypatch):
    """To the last bit: ties between nearest pixels, too, are decided as by SciPy's transform."""
    monkeypatch.setattr(saliency, "EXACT_SIDE", exact_side)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        true, grey = blobs(size, seed, sigma=seed), rng.random(size)
        read = (rng.random(size) < 0.9) | true
        assert weighted_f(grey, true, read, 0.3) == plain_weighted_f(grey, true, read, 0.3)


def test_far_from_the_object_the_weight_is_two():
    weights = saliency._weight_by_distance()
    assert weights[FAR**2] == 2.0 > weights[20**2] and weights[0] == 1.0


@pytest.mark.parametrize("size", SIZES)
def test_an_inner_border_is_what_erosions_take_away(size):
    for seed in range(4):
        true, predicted = blobs(size, seed).astype(np.uint8), blobs(size, seed + 1)
        steps, square = boundary_thickness(size, 0.02), np.ones((3, 3))
        borders = [
            mask & ~ndimage.binary_erosion(mask, square, iterations=steps)
            for mask in (predicted, true == 1)
        ]
        expected = (borders[0] & borders[1]).sum() / (borders[0] | borders[1]).sum()
        answer = Answer(probability=predicted.astype(np.float32))
        assert BoundaryIoU().values(true, answer)["boundary_iou"] == expected


@pytest.mark.parametrize("spacing", [None, (5.0, 0.7, 0.7)])
def test_surface_distances_are_those_of_a_distance_transform(spacing):
    shape = (8, 30, 24)
    masks = [blobs(shape, seed, 3.0) for seed in (0, 1)]
    borders = [mask & ~ndimage.binary_erosion(mask) for mask in masks]
    one, other = surface_distances(*masks, spacing)
    for found, at, to in ((one, 0, 1), (other, 1, 0)):
        distance = ndimage.distance_transform_edt(~borders[to], sampling=spacing)[borders[at]]
        np.testing.assert_allclose(found, distance, rtol=0 if spacing is None else 1e-14)


def test_overlaps_of_objects_are_counted_pixel_by_pixel():
    masks = np.stack([blobs((40, 50), seed, 3.0, level) for seed, level in enumerate([2, 2, 1, 0])])
    others = np.concatenate([masks[:2], np.zeros((1, 40, 50), bool), ~masks[3:]])
    expected = np.zeros((4, 4))
    for row, mask in enumerate(masks):
        for column, other in enumerate(others):
            expected[row, column] = (mask & other).sum() / max(1, (mask | other).sum())
    np.testing.assert_array_equal(mask_ious(masks, others), expected)
    assert mask_ious(masks[:0], others).shape == (0, 4)


@pytest.mark.parametrize("protocol", ["cod", "polyp"])
def test_metrics_that_share_what_they_compute_say_what_each_says_alone(protocol):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        truth = blobs((30, 41), seed).astype(np.uint8)
        truth[0, :seed] = IGNORE
        answer = Answer(probability=(0.5 * truth.clip(0, 1) + 0.5 * rng.random(truth.shape)))
        scoring = Scoring(protocol, replicates=2)
        together = scoring.measure("a", truth, answer)
        assert answer.shared is None, "another truth may be compared with it"
        for metric, measured in zip(scoring.metrics, together.measured, strict=True):
            alone = metric.measure(truth, answer)
            assert measured.columns == alone.columns
            np.testing.assert_array_equal(measured.sums, alone.sums)
    assert {kind for kind, _ in PROTOCOLS[protocol].modes["literature"].metrics} >= {"Curve"}


def test_rows_about_one_image_are_resized_as_each_alone():
    sizes = [(20, 33), (45, 16)]
    fitted = [(19, 32), (32, 11)]
    frames = [Frame(size, valid) for size, valid in zip(sizes, fitted, strict=True)]
    frames = Frames.collate(frames, (32, 32))
    logits = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([1, 0, 1, 1, 0])
    together = frames.restore(logits, index)
    for row in range(5):
        alone = frames.restore(logits[row : row + 1], index[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-6, atol=1e-6)
