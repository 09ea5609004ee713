"""Boxes, points and masks from masks."""

import numpy as np
import pytest
import torch

from samtune.config import PROMPTS, PromptOptions
from samtune.data.prompts import (
    box_from_mask,
    collate_prompts,
    draw_points,
    in_words,
    innermost_pixel,
    jitter_box,
    make_prompt,
    prompts_to_score,
    rough_mask,
    shown_on_grid,
)
from samtune.errors import UserError
from samtune.structures import IGNORE, Frame

FRAME = Frame((20, 30), (43, 64))  # in a square of 64


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


def ring():
    """A mask whose centre of mass lies outside of it."""
    y, x = np.mgrid[:40, :60]
    distance = np.hypot(y - 20, x - 30)
    mask = ((distance > 6) & (distance < 12)).astype(np.uint8)
    mask[5:16, 50:58] = 1  # a block at the side, the thickest part
    return mask


def test_the_innermost_pixel_is_inside():
    x, y = innermost_pixel(ring() == 1)
    assert ring()[y, x] == 1 and 50 <= x < 58 and 8 <= y < 13
    whole = np.ones((9, 21), bool)
    assert innermost_pixel(whole)[1] == 4, "the picture's border counts"


def test_points_are_inside_and_near_outside_in_turns():
    mask, rng = ring(), np.random.default_rng(0)
    mask[:, 55:] = np.where(mask[:, 55:] == 1, 1, IGNORE)
    drawn = [draw_points(mask, 5, rng, centre_first=False) for _ in range(200)]
    points = np.stack([points for points, _ in drawn]).astype(int)
    assert all(labels.tolist() == [1, 0, 1, 0, 1] for _, labels in drawn)
    values = mask[points[..., 1], points[..., 0]]
    assert (values == [1, 0, 1, 0, 1]).all()
    assert len(np.unique(points[:, 0], axis=0)) > 100
    first, _ = draw_points(mask, 1, rng, centre_first=True)
    assert tuple(first[0]) == innermost_pixel(mask == 1)


def test_negative_points_are_near_the_object_where_there_is_room():
    mask = mask_of(slice(4, 8), slice(4, 8), (100, 100))
    points, _ = draw_points(mask, 41, np.random.default_rng(0), centre_first=False)
    assert points.max() <= 8 + 4


def test_points_of_an_empty_and_of_a_full_mask():
    rng = np.random.default_rng(0)
    points, labels = draw_points(np.zeros((5, 7), np.uint8), 3, rng, centre_first=True)
    assert labels.tolist() == [0, 0, 0] and (points < (7, 5)).all()
    assert draw_points(np.ones((5, 7), np.uint8), 2, rng, True)[1].tolist() == [1, -1]


def test_what_a_grid_shows_lies_where_the_picture_lies():
    mask = mask_of(slice(8, 20), slice(0, 15))
    mask[:4] = IGNORE
    shown = shown_on_grid(mask, FRAME, (64, 64))
    assert shown.shape == (16, 16)  # the picture is 11 cells high
    assert (shown[11:] == IGNORE).all() and (shown[:2] == IGNORE).all()
    assert (shown[5:11, :8] == 1).all() and (shown[3:11, 9:] == 0).all()
    dot = shown_on_grid(mask_of(9, 17), FRAME, (64, 64))
    assert (dot == 1).sum() == 1 and dot[5, 9] == 1
    assert not (shown_on_grid(np.zeros((20, 30), np.uint8), FRAME, (64, 64)) == 1).any()


def test_a_rough_mask_is_like_the_true_one_but_not_it():
    shown = np.zeros((64, 64), np.uint8)
    shown[20:44, 16:48] = 1
    masks = [rough_mask(shown, np.random.default_rng(seed)) for seed in range(20)]
    inside = [(mask > 0) for mask in masks]
    overlap = [(i & (shown == 1)).sum() / (i | (shown == 1)).sum() for i in inside]
    assert 0.5 < np.mean(overlap) < 0.95 and max(overlap) < 1
    assert all(np.abs(mask).max() <= 10 and mask.dtype == np.float32 for mask in masks)
    assert not any(np.array_equal(mask, masks[0]) for mask in masks[1:])
    empty = rough_mask(np.zeros((8, 8), np.uint8), np.random.default_rng(0))
    assert (empty == -10).all()


def prompt_of(kind, words=(0, 0, 0), train=True, **options):
    mask = mask_of(slice(3, 13), slice(5, 22))
    options = PromptOptions(kind, **options)
    return make_prompt(mask, FRAME, (64, 64), options, train, words)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("box", {"box": (4,)}),
        ("whole_image", {"box": (4,)}),
        ("point", {"points": (1, 2), "labels": (1,)}),
        ("points", {"points": (3, 2), "labels": (3,)}),
        ("box+points", {"box": (4,), "points": (3, 2), "labels": (3,)}),
        ("mask", {"mask": (1, 16, 16)}),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_each_kind_has_its_parts(kind, parts, train):
    prompt = prompt_of(kind, train=train, num_points=3)
    arrays = {n: v for n, v in prompt._asdict().items() if isinstance(v, np.ndarray)}
    assert {name: array.shape for name, array in arrays.items()} == parts
    again = prompt_of(kind, train=train, num_points=3)
    assert all(np.array_equal(array, getattr(again, name)) for name, array in arrays.items())
    collated = collate_prompts([prompt, again])
    assert collated.lengths is None and collated.mask_given is None
    for name, ours in (("box", "boxes"), ("labels", "point_labels"), ("mask", "masks")):
        tensor = getattr(collated, ours)
        assert tensor.shape == (2, *parts[name]) if name in parts else tensor is None


def test_draws_follow_the_words_and_a_centre_does_not():
    points = [tuple(prompt_of("point", (0, epoch, 3)).points[0]) for epoch in range(8)]
    assert len(set(points)) > 5
    centres = {tuple(prompt_of("point", (0, 0, i), train=False).points[0]) for i in range(4)}
    assert len(centres) == 1


def test_the_jitter_of_scoring_is_its_own():
    plain = prompt_of("box", train=False, box_jitter=0.3).box
    assert (plain == prompt_of("box", train=False).box).all()
    moved = prompt_of("box", train=False, scoring_jitter=0.3).box
    assert (moved != plain).any()
    assert (moved == prompt_of("box", train=False, scoring_jitter=0.3).box).all()
    assert (prompt_of("box", scoring_jitter=0.3).box == plain).all()


def test_mixed_rows_have_the_tokens_of_their_kind():
    prompts = [prompt_of("mixed", (0, 0, i), num_points=3) for i in range(60)]
    kinds = {(*p.labels.tolist(), bool(p.mask.any())) for p in prompts}
    assert kinds == {
        (2, 3, False), (1, -1, False), (1, 0, 1, -1, False), (1, 0, 1, 2, 3, False), (True,),
    }  # fmt: skip
    batch = collate_prompts(prompts)
    assert batch.boxes is None and batch.points.shape == (60, 5, 2)
    assert batch.lengths == tuple(len(prompt.labels) for prompt in prompts)
    assert batch.mask_given.tolist() == [bool(p.mask.any()) for p in prompts]
    for row, prompt in zip(batch.point_labels, prompts, strict=True):
        assert row.tolist() == [-1] * (5 - len(prompt.labels)) + prompt.labels.tolist()
    assert prompt_of("mixed", train=False).box is not None, "in scoring it is the box"


def test_corrections_come_with_what_the_user_wants_to_see():
    train, scoring = (prompt_of("box", train=t, refine_steps=3) for t in (True, False))
    assert (
        train.truth == shown_on_grid(mask_of(slice(3, 13), slice(5, 22)), FRAME, (64, 64))
    ).all()
    batch = collate_prompts([train, prompt_of("box", (0, 0, 1), refine_steps=3)])
    user = batch.corrections
    assert user.clicks == 3 and user.truth.shape == (2, 16, 16)
    assert user.seed.dtype == torch.int64 and user.seed[0] != user.seed[1]
    assert collate_prompts([scoring]).corrections.seed is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "box"),
        ({"prompt": "none"}, "none"),
        ({"prompt": "mixed"}, "box"),
        ({"prompt": "point", "refine_steps": 2}, "point, 2 clicks"),
        ({"prompt": "box+points", "num_points": 3}, "box+3 points"),
        ({"scoring_jitter": 0.1, "box_scale": 1.2}, "box scaled by 1.2 jittered by 0.1"),
    ],
)
def test_a_prompt_in_words(options, words):
    assert in_words(PromptOptions(**options)) == words


def test_what_one_run_can_be_scored_under():
    trained = PromptOptions("mixed", box_scale=1.3, num_points=5, refine_steps=4)
    names = "exact_box, jittered_box,whole_image,centre_point,points,none"
    asked = prompts_to_score(names, trained)
    assert [in_words(options) for options in asked.values()] == [
        "box", "box jittered by 0.1", "whole_image", "point", "5 points", "none",
    ]  # fmt: skip
    assert {options.prompt for options in asked.values()} <= set(PROMPTS)
    with pytest.raises(UserError, match=r"--prompts perfect: choose from exact_box"):
        prompts_to_score("perfect", trained)
