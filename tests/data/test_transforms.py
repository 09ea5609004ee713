"""Augmentation, and the fit into the model's frame."""

import random
from collections import Counter

import cv2
import numpy as np
import pytest
import torch

from samtune.data import transforms
from samtune.data.prompts import box_from_mask
from samtune.data.transforms import MEAN_COLOUR, augment, fit_image, fit_mask, fit_size
from samtune.structures import IGNORE, Frame, Frames, Sample

SEEDS = 800


def a_sample(size=(40, 60)):
    """Unlike any of its mirror images and turns; the mask follows the image."""
    rng = np.random.default_rng(5)
    image = rng.integers(0, 200, (*size, 3), dtype=np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] * 3 // 4] = 1
    image[mask == 1] = (255, 255, 0)
    return Sample(image, mask, "a")


def exact_variants(sample):
    """What the flips and quarter turns can make of a sample, by name."""
    by = {
        "left-right": lambda a: a[:, ::-1],
        "up-down": lambda a: a[::-1],
        **{f"turn {k}": lambda a, k=k: np.rot90(a, k) for k in range(4)},
    }
    return {name: (turn(sample.image), turn(sample.mask)) for name, turn in by.items()}


def kind_of(variant, known):
    for name, (image, mask) in known.items():
        if image.shape == variant.image.shape and (image == variant.image).all():
            assert (mask == variant.mask).all(), f"{name}: the mask did not follow the image"
            return name
    return "affine"


@pytest.fixture(scope="module")
def variants():
    sample = a_sample()
    return [augment(sample, "standard", (21, 3, i)) for i in range(SEEDS)]


def test_half_of_the_samples_get_exactly_one_of_four_changes(variants):
    counts = Counter(kind_of(v, exact_variants(a_sample())) for v in variants)
    eighth, sixteenth = SEEDS / 8, SEEDS / 32  # each of four changes; each of its four turns
    spread = 3.5 * np.sqrt(eighth)
    assert abs(counts["left-right"] - eighth) < spread
    assert abs(counts["up-down"] - eighth) < spread
    assert abs(counts["affine"] - eighth) < spread
    for k in (1, 2, 3):
        assert abs(counts[f"turn {k}"] - sixteenth) < 3.5 * np.sqrt(sixteenth)
    assert abs(counts["turn 0"] - (SEEDS / 2 + sixteenth)) < 3.5 * np.sqrt(SEEDS) / 2


def test_shift_scale_and_rotation_use_their_whole_range(monkeypatch):
    """Seeding every part of the composition alike would tie the shift to the draw that decides
    whether to augment at all: then no picture ever moves right or down."""
    affine = transforms.prepare("standard").transforms[0].transforms[3]
    seen = []
    original = affine.get_params_dependent_on_data

    def spy(params, data):
        result = original(params, data)
        seen.append(result)
        return result

    monkeypatch.setattr(affine, "get_params_dependent_on_data", spy)
    sample = a_sample((200, 400))
    for i in range(1600):
        augment(sample, "standard", (0, 0, i))
    rotate = np.array([s["rotate"] for s in seen])
    scale = np.array([[s["scale"]["x"], s["scale"]["y"]] for s in seen])
    centre = np.array([199.5, 99.5, 1])
    shift = np.array([(s["matrix"] @ centre)[:2] for s in seen]) - centre[:2]
    right, down = shift.T
    for values, reach in ((rotate, 45), (scale[:, 0] - 1, 0.1), (right, 25), (down, 12.5)):
        assert -reach <= values.min() < -0.9 * reach
        assert 0.9 * reach < values.max() <= reach
        assert abs(values.mean()) < 0.15 * reach
    assert (scale[:, 0] == scale[:, 1]).all()  # the aspect stays


def test_outside_pixels_are_mean_colour_and_ignored(variants):
    """Corners that a rotation brings in are not trained as background."""
    known = exact_variants(a_sample())
    turned = [v for v in variants if kind_of(v, known) == "affine"]
    for variant in turned:
        assert set(np.unique(variant.mask)) <= {0, 1, IGNORE}
        outside = variant.mask == IGNORE
        away_from_seam = cv2.erode(outside.astype(np.uint8), np.ones((5, 5)), borderValue=1) > 0
        assert (variant.image[away_from_seam] == MEAN_COLOUR).all()
        # The object is where the image shows it, but for the interpolated rim.
        yellow = (variant.image[..., 0] > 220) & (variant.image[..., 2] < 60)
        assert ((variant.mask == 1) == yellow)[~outside].mean() > 0.9
    corners = [v for v in turned if (v.mask == IGNORE).mean() > 0.05]
    assert len(corners) > len(turned) / 2


def test_the_same_place_gives_the_same_variant_whatever_came_before():
    sample = a_sample()
    first = [augment(sample, "standard", (1, 2, i)) for i in range(40)]
    for i in reversed(range(40)):
        again = augment(sample, "standard", (1, 2, i))
        assert (again.image == first[i].image).all() and (again.mask == first[i].mask).all()


def test_a_reused_composition_equals_a_fresh_one():
    sample = a_sample()
    used = [augment(sample, "standard", (7, i)).image for i in range(40)]
    for i, image in enumerate(used):
        transforms.prepare.cache_clear()
        assert (augment(sample, "standard", (7, i)).image == image).all()


def test_epochs_indices_and_seeds_do_not_repeat_each_other():
    """Processes or epochs that share a stream would show the same variant of every picture."""
    sample = a_sample()

    def signature(place):
        return [augment(sample, "standard", (*place, i)).image.tobytes() for i in range(24)]

    signatures = [signature(place) for place in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, one in enumerate(signatures):
        for other in signatures[:i]:
            assert sum(a != b for a, b in zip(one, other, strict=True)) > 8


def test_global_random_state_is_neither_read_nor_changed():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = [augment(a_sample(), "standard", (3, i)).image for i in range(12)]
    assert state[0] == random.getstate()
    assert state[1] == np.random.get_state()[1].tolist()
    assert state[2] == torch.get_rng_state().tolist()
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert all((augment(a_sample(), "standard", (3, i)).image == first[i]).all() for i in range(12))


def test_an_object_that_would_be_lost_keeps_the_sample_as_it_is():
    """Rotated out of the picture, the object would leave an empty mask and no box."""
    mask = np.zeros((60, 90), np.uint8)
    mask[0, 0] = 1
    sample = Sample(np.zeros((60, 90, 3), np.uint8), mask, "a")
    variants = [augment(sample, "standard", i) for i in range(200)]
    assert all((variant.mask == 1).any() for variant in variants)
    affine = transforms.prepare("standard").transforms[0].transforms[3]
    lost = [v for v in variants if v is sample]
    assert affine.fill_mask == IGNORE and lost


def test_a_sample_without_object_is_augmented_too():
    sample = Sample(a_sample().image, np.zeros((40, 60), np.uint8), "a")
    assert any((augment(sample, "flip", i).image != sample.image).any() for i in range(9))


def test_flip_and_none():
    sample = a_sample()
    assert augment(sample, "none", 0) is sample
    counts = Counter(
        kind_of(augment(sample, "flip", i), exact_variants(sample)) for i in range(400)
    )
    assert set(counts) == {"left-right", "turn 0"} and 160 < counts["left-right"] < 240


def test_rotate_turns_every_sample_by_any_angle_of_its_range():
    """What comes in from outside is no class, and a mirrored half shows that flips are drawn."""
    size, stroke = 61, slice(26, 35)
    image = np.zeros((size, size, 3), np.uint8)
    image[stroke, 31:56] = 255, 0, 0  # points right, and left where it is mirrored
    image[31:45, stroke] = 0, 255, 0  # points down in both
    sample = Sample(image, (image[..., 0] > 0).astype(np.uint8), "a")
    angles, flips, outside = [], 0, 0
    for i in range(400):
        variant = augment(sample, "rotate", (0, i))
        outside += (variant.mask == IGNORE).any()
        red, green = (
            np.argwhere(variant.image[..., channel] > 200).mean(0) - 30 for channel in (0, 1)
        )
        if red[0] * green[1] - red[1] * green[0] > 0:
            flips += 1
        angles.append(np.degrees(np.arctan2(green[1], green[0])))  # off straight down
    assert 160 < flips < 240 and outside > 380
    assert -92 < min(angles) < -80 and 80 < max(angles) < 92
    assert abs(np.mean(angles)) < 9 and 45 < np.std(angles) < 58  # uniform: 52


# --- the frame ---


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((333, 777), (439, 1024)),
        ((1024, 1024), (1024, 1024)),
        ((100, 50), (1024, 512)),
        ((1, 4000), (1, 1024)),  # 0.256 pixels: kept at one
        ((4000, 1), (1024, 1)),
        ((3, 2048), (2, 1024)),  # half up
    ],
)
def test_sizes(size, fitted):
    assert fit_size(size, (1024, 1024), "pad") == fitted
    assert fit_size(size, (1024, 1024), "squash") == (1024, 1024)


@pytest.mark.parametrize("resize", ["pad", "squash"])
def test_an_image_fills_its_part_of_the_frame_and_no_more(resize):
    image = np.full((30, 47, 3), 200, np.uint8)
    padded, frame = fit_image(image, (64, 64), resize)
    height, width = frame.valid_size
    assert padded.shape == (64, 64, 3) and padded.dtype == np.uint8
    assert (padded[:height, :width] == 200).all()
    assert not padded[height:].any() and not padded[:, width:].any()
    assert (height, width) == ((41, 64) if resize == "pad" else (64, 64))


def test_masks_are_resized_by_pixel_centres():
    """7 -> 4 takes 0, 2, 4, 6; the floor convention of other libraries takes 0, 1, 3, 5."""
    line = np.arange(7, dtype=np.uint8)
    mask = np.repeat(line[None], 7, 0)
    fitted = fit_mask(mask, Frame((7, 7), (4, 4)), (6, 6))
    assert fitted[0].tolist() == [0, 2, 4, 6, IGNORE, IGNORE]
    assert (fitted[:4, :4] == fitted[0, :4]).all() and (fitted[4:] == IGNORE).all()


def test_image_and_mask_meet_in_the_frame():
    sample = a_sample((37, 61))
    image, frame = fit_image(sample.image, (128, 128), "pad")
    mask = fit_mask(sample.mask, frame, (128, 128))
    yellow = (image[..., 0] > 230) & (image[..., 2] < 40)
    assert (yellow == (mask == 1))[mask != IGNORE].mean() > 0.97


# --- a frame that is not square ---

FRAME = (48, 80)


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((48, 80), (48, 80)), ((100, 100), (48, 48)), ((96, 100), (48, 50)), ((20, 100), (16, 80)),
     ((24, 40), (48, 80)), ((1, 4000), (1, 80)), ((25, 41), (48, 79))],
)  # fmt: skip
def test_sizes_in_a_frame_that_is_not_square(size, fitted):
    """As large as both sides allow."""
    assert fit_size(size, FRAME, "pad") == fitted
    assert fit_size(size, FRAME, "squash") == FRAME


@pytest.mark.parametrize("size", [(60, 61), (37, 110), (110, 37)])
@pytest.mark.parametrize("resize", ["pad", "squash"])
def test_there_and_back(size, resize):
    """A mask goes into the frame and comes back; its box there is around it there."""
    sample = a_sample(size)
    image, frame = fit_image(sample.image, FRAME, resize)
    mask = fit_mask(sample.mask, frame, FRAME)
    assert image.shape == (*FRAME, 3) and mask.shape == FRAME
    height, width = frame.valid_size
    assert not image[height:].any() and not image[:, width:].any()
    assert (mask[height:] == IGNORE).all() and (mask[:, width:] == IGNORE).all()

    box = frame.scale_xy(np.reshape(box_from_mask(sample.mask), (2, 2))).ravel()
    assert np.abs(box - box_from_mask(mask)).max() <= 1

    frames = Frames.collate([frame], FRAME)
    logits = torch.from_numpy((mask == 1) - 0.5)[None, None]
    back = (frames.restore(logits)[0, 0] > 0).numpy()
    both, either = (back & (sample.mask == 1)).sum(), (back | (sample.mask == 1)).sum()
    assert back.shape == size and both / either > 0.85
