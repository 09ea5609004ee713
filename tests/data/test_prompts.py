"""Boxes from masks."""

import numpy as np
import pytest

from samtune.data.prompts import box_from_mask, jitter_box


def mask_of(rows, columns, size=(20, 30)):
    mask = np.zeros(size, np.uint8)
    mask[rows, columns] = 1
    return mask


@pytest.mark.parametrize(
    ("mask", "box"),
    [
        (mask_of(slice(3, 7), slice(5, 12)), (5, 3, 12, 7)),  # the far corner is exclusive
        (mask_of(slice(3, 20), slice(5, 30)), (5, 3, 29, 19)),  # but not on the border
        (mask_of(4, 29), (29, 4, 29, 5)),  # one pixel there has no width
        (mask_of(slice(None), slice(None)), (0, 0, 29, 19)),
        (mask_of([2, 9], [3, 20]), (3, 2, 21, 10)),  # several parts share one box
    ],
)
def test_boxes(mask, box):
    assert box_from_mask(mask) == box


def test_an_empty_mask_has_no_box():
    """Not the degenerate box at the origin that the bounding-box routine returns."""
    assert box_from_mask(np.zeros((9, 9), np.uint8)) is None


def test_ignored_pixels_are_no_object():
    mask = mask_of(slice(3, 7), slice(5, 12))
    mask[0] = mask[:, -1] = 255
    assert box_from_mask(mask) == (5, 3, 12, 7)
    assert box_from_mask(np.full((4, 4), 255, np.uint8)) is None


def test_a_scaled_box_moves_from_the_near_border_and_is_cut_at_the_far_one():
    assert box_from_mask(mask_of(slice(0, 4), slice(0, 4)), 2.0) == (0, 0, 8, 8)
    assert box_from_mask(mask_of(slice(14, 18), slice(24, 28)), 2.0) == (22, 12, 29, 19)
    assert box_from_mask(mask_of(slice(8, 12), slice(8, 12)), 0.5) == (9, 9, 11, 11)


def test_jitter_stays_in_reach_and_in_the_picture():
    rng = np.random.default_rng(0)
    boxes = np.array([jitter_box((2, 4, 22, 14), 0.2, (20, 30), rng) for _ in range(500)])
    shift = boxes - (2, 4, 22, 14)
    assert (np.abs(shift) <= (4, 2, 4, 2)).all() and (boxes[:, 0] >= 0).all()
    assert shift[:, 2].min() < -3.5 and shift[:, 2].max() > 3.5  # both ways, the whole reach
    assert (boxes[:, 0] == 0).any()  # clipped
    wild = np.array([jitter_box((5, 5, 9, 9), 3.0, (12, 12), rng) for _ in range(200)])
    assert (wild[:, :2] <= wild[:, 2:]).all() and wild.min() >= 0 and wild.max() <= 11


def test_no_jitter_is_no_change():
    assert jitter_box((2, 4, 22, 14), 0.0, (20, 30), np.random.default_rng(0)) == (2, 4, 22, 14)
