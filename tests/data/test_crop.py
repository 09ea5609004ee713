"""Random windows of the frame, in training."""

import numpy as np
import pytest
import torch
from PIL import Image

from samtune.config import PromptOptions, ReadOptions
from samtune.data.datasets import SampleKey, SegmentationDataset, collate
from samtune.data.files import Pair
from samtune.data.prompts import box_from_mask
from samtune.data.transforms import random_crop
from samtune.errors import UserError
from samtune.structures import IGNORE, Sample

BOX, NONE = PromptOptions(), PromptOptions(prompt="none")
PLACE = (0, 0, 0)


def a_picture(size=(60, 90), object_=(slice(20, 40), slice(30, 70))) -> Sample:
    """Red is the row, green the column, blue the object."""
    mask = np.zeros(size, np.uint8)
    mask[object_] = 1
    rows, columns = np.indices(size).astype(np.uint8)
    return Sample(np.stack([rows, columns, 255 * mask], axis=-1), mask, "a")


def crop(sample, size, frame_size=None, hold_object=False, place=PLACE):
    frame_size = frame_size or sample.mask.shape
    return random_crop(sample, frame_size, size, "pad", place, hold_object)


def dataset_of(folder, sample, prompt=BOX, **options):
    for name, pixels in (("a.bmp", sample.image), ("a.png", sample.mask * 255)):
        Image.fromarray(pixels).save(folder / name)
    pairs = [Pair("a", folder / "a.bmp", folder / "a.png")]
    options = {"crop": (24, 32), "train": True} | options
    return SegmentationDataset(pairs, ReadOptions(), (60, 90), prompt, "original", **options)


def test_image_and_mask_are_the_same_window():
    whole = a_picture()
    corners = []
    for i in range(300):
        part = crop(whole, (24, 32), place=(i, 0, 0))
        y, x = part.image[0, 0, :2].astype(int)
        window = slice(y, y + 24), slice(x, x + 32)
        assert (part.image == whole.image[window]).all() and part.image.shape == (24, 32, 3)
        assert (part.mask == whole.mask[window]).all()
        corners.append((y, x))
    assert np.min(corners, 0).tolist() == [0, 0] and np.max(corners, 0).tolist() == [36, 58]


def test_a_window_is_of_the_frame_not_of_the_file():
    """The picture is first brought to its size in the frame."""
    part = crop(a_picture((30, 45), (slice(10, 20), slice(15, 35))), (24, 32), (60, 90))
    blue = part.image[..., 2] > 127
    assert part.image.shape == (24, 32, 3) and (blue == (part.mask == 1)).mean() > 0.95
    assert np.ptp(part.image[..., 0]) < 14, "24 rows of the frame are 12 of the file"


def test_the_window_follows_the_key(tmp_path):
    dataset = dataset_of(tmp_path, a_picture())
    torch.manual_seed(0), np.random.seed(0)
    first = [dataset[SampleKey(epoch, 0)] for epoch in range(6)]
    torch.manual_seed(1), np.random.seed(1)
    again = [dataset[SampleKey(epoch, 0)] for epoch in reversed(range(6))]
    assert all((a.image == b.image).all() for a, b in zip(first, reversed(again), strict=True))
    assert len({item.image.tobytes() for item in first}) > 3
    other = dataset_of(tmp_path, a_picture(), seed=1)
    assert any((other[SampleKey(e, 0)].image != first[e].image).any() for e in range(3))


def test_the_box_is_that_of_the_object_in_the_window(tmp_path):
    dataset = dataset_of(tmp_path, a_picture())
    for epoch in range(40):
        item = dataset[SampleKey(epoch, 0)]
        assert item.rows[0].prompt.box.tolist() == list(box_from_mask(item.rows[0].target))
        assert ((item.image[..., 2] == 255) == (item.rows[0].target == 1)).all()


def test_a_batch_of_crops_is_a_batch_of_small_frames(tmp_path):
    dataset = dataset_of(tmp_path, a_picture())
    batch = collate([dataset[SampleKey(epoch, 0)] for epoch in range(3)])
    assert batch.image.shape == (3, 3, 24, 32) and batch.target.shape == (3, 24, 32)
    assert batch.in_frame and batch.frames.frame_size == (24, 32)
    assert batch.frames.original_size.tolist() == [[24, 32]] * 3
    logits = torch.zeros(3, 1, 12, 16)
    assert batch.at_target(logits)[:, 0].shape == batch.target.shape
    assert batch.frames.restore(logits).shape == (3, 1, 24, 32)


def test_without_crop_the_frame_is_whole(tmp_path):
    item = dataset_of(tmp_path, a_picture(), crop=0)[SampleKey(0, 0)]
    assert item.image.shape == (60, 90, 3) and item.frame.valid_size == (60, 90)


def test_a_picture_that_is_shorter_than_the_window_is_padded(tmp_path):
    """Its frame has rows beyond it; the crop shows the picture, and nothing reads what is below."""
    narrow = a_picture((20, 90), (slice(5, 15), slice(0, 90)))  # fitted into (60, 90) as it is
    item = dataset_of(tmp_path, narrow)[SampleKey(0, 0)]
    assert item.image.shape == (24, 32, 3) and item.frame.valid_size == (20, 32)
    assert not item.image[20:].any() and (item.rows[0].target[20:] == IGNORE).all()
    assert (item.rows[0].target[:20] != IGNORE).all() and (item.rows[0].target[5:15] == 1).all()
    assert item.rows[0].prompt.box.tolist() == [0, 5, 31, 15]


def test_with_boxes_every_window_holds_an_object(tmp_path):
    speck = a_picture(object_=(slice(2, 4), slice(40, 42)))
    boxed, plain = dataset_of(tmp_path, speck), dataset_of(tmp_path, speck, NONE)
    keys = [SampleKey(epoch, 0) for epoch in range(60)]
    assert all((boxed[key].rows[0].target == 1).any() for key in keys)
    assert not all((plain[key].rows[0].target == 1).any() for key in keys)
    assert len({boxed[key].image.tobytes() for key in keys}) > 10, "not always the same window"


def test_a_ring_is_met_at_its_rim_not_in_its_middle():
    mask = np.ones((60, 90), np.uint8)
    mask[2:-2, 2:-2] = 0
    ring = Sample(np.zeros((60, 90, 3), np.uint8), mask, "a")
    parts = [crop(ring, (16, 16), hold_object=True, place=(i, 0, 0)) for i in range(200)]
    assert all((part.mask == 1).any() for part in parts)


def test_an_object_that_resizing_loses_keeps_one_pixel():
    speck = a_picture((600, 900), (slice(301, 302), slice(601, 602)))
    part = crop(speck, (24, 32), (60, 90), hold_object=True)
    assert (part.mask == 1).sum() == 1


def test_an_image_without_object_is_cut_too(tmp_path):
    empty = a_picture(object_=(slice(0), slice(0)))
    item = dataset_of(tmp_path, empty, PromptOptions(empty_masks="whole"))[SampleKey(0, 0)]
    assert item.rows[0].prompt.box.tolist() == [0, 0, 31, 23] and not item.rows[0].target.any()
    with pytest.raises(UserError, match="no object"):
        dataset_of(tmp_path, empty)[SampleKey(0, 0)]


def test_pixels_that_nothing_reads_stay_so():
    sample = a_picture()
    sample.mask[:, 45:] = IGNORE
    part = crop(sample, (60, 60))
    assert (part.mask == IGNORE).any() and (part.image[..., 1][part.mask == IGNORE] >= 45).all()
