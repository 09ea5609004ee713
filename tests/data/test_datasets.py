"""Items and batches."""

import numpy as np
import pytest
import torch
from PIL import Image

from samtune.config import PromptOptions, ReadOptions
from samtune.data.datasets import SampleKey, SegmentationDataset, collate
from samtune.data.files import Pair
from samtune.data.prompts import box_from_mask
from samtune.data.scan import scan_pairs
from samtune.data.transforms import fit_image, fit_mask
from samtune.errors import UserError
from samtune.pipeline import usable
from samtune.structures import IGNORE

READ, BOX, NONE = ReadOptions(), PromptOptions(), PromptOptions(prompt="none")
SIZES = [(40, 60), (60, 40), (50, 50), (33, 90)]


def save(folder, name, size, coding=255, empty=False):
    rng = np.random.default_rng(len(name) + size[0])
    mask = np.zeros(size, np.uint8)
    if not empty:
        mask[size[0] // 4 : size[0] // 2, 5 : size[1] - 8] = 1
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{name}.bmp")
    picture = Image.fromarray(mask * coding if coding in (1, 255) else mask)
    if coding == "palette":
        picture.putpalette([0, 0, 0, 128, 0, 0])
    if coding == "1-bit":
        picture = Image.fromarray(mask.astype(bool))
    picture.save(folder / f"{name}.png")
    return Pair(name, folder / f"{name}.bmp", folder / f"{name}.png")


@pytest.fixture
def pairs(tmp_path):
    return [save(tmp_path, str(i), size) for i, size in enumerate(SIZES)]


def dataset_of(pairs, prompt=BOX, loss_resolution="original", **options):
    return SegmentationDataset(pairs, READ, 64, prompt, loss_resolution, **options)


def tensors(batch):
    return (batch.image, batch.target, batch.prompts.boxes, batch.frames.valid_size, batch.weight)


def test_mixed_sizes_share_a_batch(pairs):
    """Pictures of different sizes must batch, and nothing outside of one may be trained."""
    dataset = dataset_of(pairs)
    batch = collate([dataset[SampleKey(0, i)] for i in range(4)])
    assert batch.image.shape == (4, 3, 64, 64) and batch.image.dtype == torch.uint8
    assert batch.image.is_contiguous()
    assert batch.target.shape == (4, *batch.frames.canvas_size) == (4, 60, 90)
    assert batch.frames.original_size.tolist() == [list(size) for size in SIZES]
    assert batch.prompts.boxes.shape == (4, 4) and batch.prompts.boxes.dtype == torch.float32
    assert batch.ids == ["0", "1", "2", "3"] and batch.paths[2].endswith("2.bmp")
    for row, (height, width) in zip(batch.target, SIZES, strict=True):
        assert set(row[:height, :width].unique().tolist()) == {0, 1}
        assert (row[height:] == IGNORE).all() and (row[:, width:] == IGNORE).all()


def test_an_item_is_what_its_files_say(pairs):
    image = np.asarray(Image.open(pairs[0].image_path))
    mask = np.asarray(Image.open(pairs[0].mask_path)) // 255
    batch = collate([dataset_of(pairs)[SampleKey(0, 0)]])
    padded, frame = fit_image(image, (64, 64), "pad")
    assert (batch.image[0].permute(1, 2, 0).numpy() == padded).all()
    assert (batch.target[0].numpy() == mask).all()
    corners = frame.scale_xy(np.reshape(box_from_mask(mask), (2, 2))).ravel()
    assert batch.prompts.boxes[0].tolist() == np.float32(corners).tolist()
    assert batch.weight.tolist() == [1.0]


def test_targets_in_the_frame(pairs):
    dataset = dataset_of(pairs, loss_resolution="frame")
    batch = collate([dataset[SampleKey(0, i)] for i in (0, 1)])
    assert batch.target.shape == (2, 64, 64)
    item = dataset_of(pairs)[SampleKey(0, 1)]
    expected = fit_mask(item.rows[0].target, item.frame, (64, 64))
    assert (batch.target[1].numpy() == expected).all()


def test_without_prompt_there_is_no_box(pairs):
    batch = collate([dataset_of(pairs, NONE)[SampleKey(0, 0)]])
    assert batch.prompts.boxes is None and batch.prompts.points is None


def test_every_mask_coding_trains_alike(tmp_path):
    """Masks of 0 and 1, of 0 and 255, with a palette or of one bit give one and the same batch."""
    batches = []
    for i, coding in enumerate((1, 255, "palette", "1-bit")):
        (tmp_path / str(i)).mkdir()
        pair = save(tmp_path / str(i), "a", (40, 60), coding)
        dataset = dataset_of([pair], augment="standard", seed=3)
        batches.append([collate([dataset[SampleKey(e, 0)]]) for e in range(6)])
    for other in batches[1:]:
        for one, another in zip(batches[0], other, strict=True):
            assert all(map(torch.equal, tensors(one), tensors(another)))


def test_turned_pictures_that_are_not_square_batch_for_many_epochs(pairs):
    """A quarter turn swaps the sides of a picture, so every batch has mixed shapes."""
    dataset = dataset_of(pairs, augment="standard", train=True)
    turned = 0
    for epoch in range(60):
        batch = collate([dataset[SampleKey(epoch, i)] for i in range(4)])
        sizes = batch.frames.original_size.tolist()
        turned += sizes != [list(size) for size in SIZES]
        for (height, width), target, box in zip(
            sizes, batch.target, batch.prompts.boxes, strict=True
        ):
            foreground = (target[:height, :width] == 1).nonzero()
            scale = 64 / max(height, width)
            low, high = foreground.min(0).values, foreground.max(0).values
            assert abs(box[:2].flip(0) - low * scale).max() < 1.5
            assert abs(box[2:].flip(0) - high * scale).max() < 2 * scale + 1
    assert turned > 3


def test_the_worker_makes_image_and_box(pairs):
    """Resizing and boxes belong to the loader: the batch is bytes and boxes, ready to copy."""
    batch = collate([dataset_of(pairs)[SampleKey(0, i)] for i in range(2)])
    assert batch.image.dtype == batch.target.dtype == torch.uint8
    moved = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}


def test_jitter_is_for_training_and_follows_the_key(pairs):
    prompt = PromptOptions(box_jitter=0.1)
    train, val = dataset_of(pairs, prompt, train=True), dataset_of(pairs, prompt)
    plain = dataset_of(pairs)[SampleKey(0, 0)].rows[0].prompt.box
    boxes = [train[SampleKey(epoch, 0)].rows[0].prompt.box for epoch in range(4)]
    assert (val[SampleKey(2, 0)].rows[0].prompt.box == plain).all()
    assert all((box != plain).any() for box in boxes) and len(set(map(tuple, boxes))) == 4
    assert (train[SampleKey(2, 0)].rows[0].prompt.box == boxes[2]).all()
    other_seed = dataset_of(pairs, prompt, train=True, seed=1)
    assert (other_seed[SampleKey(2, 0)].rows[0].prompt.box != boxes[2]).any()


def test_the_policy_for_images_without_object(tmp_path):
    """No silent box of nothing: either the picture is left out, or the box is the whole picture."""
    pair = save(tmp_path, "a", (40, 60), empty=True)
    with pytest.raises(UserError, match=r"a\.png: has no object.*--empty_masks whole"):
        dataset_of([pair])[SampleKey(0, 0)]
    item = dataset_of([pair], PromptOptions(empty_masks="whole"))[SampleKey(0, 0)]
    corners = item.frame.scale_xy([[0, 0], [59, 39]]).ravel()
    assert item.rows[0].prompt.box.tolist() == np.float32(corners).tolist()
    assert dataset_of([pair], NONE)[SampleKey(0, 0)].rows[0].prompt.box is None


def test_fillers_carry_weight_zero(pairs):
    batch = collate([dataset_of(pairs)[SampleKey(0, 0, weight)] for weight in (1.0, 0.0)])
    assert batch.weight.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("flag", ["box_scale", "box_jitter"])
def test_impossible_boxes_are_refused(pairs, flag):
    with pytest.raises(UserError, match=f"--{flag} -1"):
        dataset_of(pairs, PromptOptions(**{flag: -1.0}))


CLASSES = ReadOptions(num_classes=5)


@pytest.fixture
def many(tmp_path):
    """Pictures of 1, 2 and 4 classes beside the background, and one of none."""
    pairs = []
    for name, classes in (("one", [3]), ("two", [1, 2]), ("four", [1, 2, 3, 4]), ("none", [])):
        pair = save(tmp_path, name, (40, 60))
        mask = np.zeros((40, 60), np.uint8)
        for c in classes:
            mask[3 + 8 * c : 8 + 8 * c, 5 : 20 + 9 * c] = c
        mask[:, 58] = IGNORE
        Image.fromarray(mask).save(pair.mask_path)
        pairs.append(pair)
    return pairs


def ragged(pairs, read=CLASSES, prompt=BOX, **options):
    return SegmentationDataset(pairs, read, 64, prompt, "original", **options)


def test_rows_of_an_image_follow_each_other_and_share_its_weight(many):
    dataset = ragged(many)
    keys = [SampleKey(0, 2), SampleKey(0, 0), SampleKey(0, 1, 0.0)]
    batch = collate([dataset[key] for key in keys])
    assert batch.prompts.image_index.tolist() == [0, 0, 0, 0, 1, 2, 2]
    assert batch.image_of_row == [0, 0, 0, 0, 1, 2, 2]
    assert batch.weight.tolist() == [0.25] * 4 + [1.0, 0.0, 0.0]
    assert batch.ids == ["four", "one", "two"]
    assert batch.row_names == [*(f"four#{c}" for c in (1, 2, 3, 4)), "one#3", "two#1", "two#2"]
    assert batch.target.shape == (7, 40, 60) and batch.told == "box"
    whole = np.asarray(Image.open(many[2].mask_path))
    for c, target, box in zip((1, 2, 3, 4), batch.target, batch.prompts.boxes, strict=False):
        assert ((target == 1).numpy() == (whole == c)).all()
        assert ((target == IGNORE).numpy() == (whole == IGNORE)).all()
        x0, y0, x1, y1 = box_from_mask((whole == c).astype(np.uint8))
        assert torch.allclose(box, torch.tensor([x0, y0, x1, y1]) * 64 / 60, atol=0.6)


def test_one_row_per_image_needs_no_index(many):
    batch = collate([ragged(many)[SampleKey(0, 0)]])
    assert batch.prompts.image_index is None and batch.row_names == ["one#3"]


def test_parts_of_a_batch_are_its_rows(many):
    dataset = ragged(many, prompt=PromptOptions("points", refine_steps=1))
    batch = collate([dataset[SampleKey(0, i)] for i in range(3)])
    parts = batch.in_parts(3)
    assert [len(part.target) for part in parts] == [3, 3, 1]
    for name in ("points", "point_labels", "image_index"):
        joined = torch.cat([getattr(part.prompts, name) for part in parts])
        assert torch.equal(joined, getattr(batch.prompts, name))
    assert torch.equal(
        torch.cat([part.prompts.corrections.truth for part in parts]),
        batch.prompts.corrections.truth,
    )
    assert [name for part in parts for name in part.row_names] == batch.row_names
    assert all(part.ids == batch.ids and part.image is batch.image for part in parts)
    assert batch.in_parts(0) == batch.in_parts(7) == [batch]


def test_training_takes_some_of_many_objects_and_scoring_all(many):
    prompt = PromptOptions(max_objects=2)
    train, val = (ragged(many, prompt=prompt, train=t) for t in (True, False))
    drawn = [tuple(r.name for r in train[SampleKey(epoch, 2)].rows) for epoch in range(20)]
    assert {len(names) for names in drawn} == {2} and len(set(drawn)) > 4
    assert all(list(names) == sorted(names) for names in drawn)
    assert drawn[3] == tuple(row.name for row in train[SampleKey(3, 2)].rows)
    assert len(val[SampleKey(0, 2)].rows) == 4


def test_a_prompt_does_not_depend_on_which_other_objects_are_asked_about(many):
    prompt = PromptOptions("point", max_objects=2)
    some = ragged(many, prompt=prompt, train=True)[SampleKey(1, 2)].rows
    every = ragged(many, prompt=PromptOptions("point"), train=True)[SampleKey(1, 2)].rows
    of_all = {row.name: row.prompt.points.tolist() for row in every}
    assert all(row.prompt.points.tolist() == of_all[row.name] for row in some)


def test_without_prompt_classes_are_one_target(many):
    item = ragged(many, prompt=NONE)[SampleKey(0, 2)]
    (row,) = item.rows
    assert row.name == "four" and set(np.unique(row.target)) == {0, 1, 2, 3, 4, IGNORE}


def test_an_image_that_loses_its_objects_is_taken_as_it_is(tmp_path):
    pair = save(tmp_path, "edge", (60, 60))
    mask = np.zeros((60, 60), np.uint8)
    mask[0, 0] = 2
    Image.fromarray(mask).save(pair.mask_path)
    read = ReadOptions(num_classes=3, objects="component")
    dataset = ragged([pair], read, augment="standard", seed=1, train=True)
    for epoch in range(30):
        (row,) = dataset[SampleKey(epoch, 0)].rows
        assert row.name == "edge#2:1" and (row.target == 1).any()


class Said(list):
    say = list.append


@pytest.mark.parametrize("whole", ["skip", "whole"])
def test_images_with_nothing_to_ask_about_are_skipped_and_counted(many, whole):
    prompts, said = PromptOptions(empty_masks=whole), Said()
    report = scan_pairs(many, CLASSES)
    report.raise_problems()
    assert report.empty == ["none"]
    kept = usable("test", many, report, CLASSES, prompts, said)
    assert [pair.id for pair in kept] == ["one", "two", "four"] and "1 images" in said[0]
    with pytest.raises(UserError, match="no object to ask about"):
        ragged(many, prompt=prompts)[SampleKey(0, 3)]
    assert usable("test", many, report, CLASSES, NONE, said) == many
    with pytest.raises(UserError, match="--prompt point has nothing to ask"):
        usable(
            "test", many[3:], scan_pairs(many[3:], CLASSES), CLASSES, PromptOptions("point"), said
        )


def test_small_parts_leave_an_image_with_nothing_to_ask(many):
    areas = {"one": 210, "two": 165, "four": 255, "none": 0}  # of the largest part
    for least in (1, 166, 211, 256):
        read = ReadOptions(num_classes=5, objects="component", min_area=least)
        assert scan_pairs(many, read).empty == [n for n, area in areas.items() if area < least]


def test_rows_of_several_kinds_are_sorted_by_their_tokens(many):
    dataset = ragged(many, prompt=PromptOptions("mixed"), train=True)
    items = [dataset[SampleKey(0, i)] for i in range(3)]
    batch = collate(items)
    lengths = batch.prompts.lengths
    assert list(lengths) == sorted(lengths) and len(set(lengths)) > 1
    for name, image, target, weight in zip(
        batch.row_names, batch.image_of_row, batch.target, batch.weight, strict=True
    ):
        item = items[image]
        (row,) = (row for row in item.rows if row.name == name)
        assert np.array_equal(target, row.target)
        assert weight == pytest.approx(1 / len(item.rows))


def test_a_window_holds_an_object_that_is_asked_about(tmp_path):
    """Not one that is too small to ask about, which the mask shows too."""
    pair = save(tmp_path, "corner", (64, 64))
    mask = np.zeros((64, 64), np.uint8)
    mask[2:8, 2:8] = 1
    mask[20::6, 20::6] = 1
    Image.fromarray(mask).save(pair.mask_path)
    read = ReadOptions(objects="component", min_area=9)
    dataset = ragged([pair], read, train=True, crop=(16, 16))
    for epoch in range(20):
        (row,) = dataset[SampleKey(epoch, 0)].rows
        assert row.name == "corner#1" and (row.target == 1).any()
