"""What is asked about: classes, connected parts, instances, from maps and from COCO's JSON."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from samtune.config import PromptOptions, ReadOptions
from samtune.data.coco import find_described
from samtune.data.files import Pair
from samtune.data.objects import (
    check_questions,
    settle_objects,
    target_of,
    things_of,
    with_components,
    with_instances,
    with_masks,
)
from samtune.data.samples import read_sample
from samtune.data.scan import scan_pairs
from samtune.data.transforms import augment
from samtune.errors import UserError
from samtune.structures import IGNORE, Sample

SIZE = (24, 30)
CLASSES = ReadOptions(objects="class", num_classes=4)
PARTS = ReadOptions(objects="component")
INSTANCES = ReadOptions(objects="instance")


def sample_of(mask) -> Sample:
    return Sample(np.zeros((*mask.shape, 3), np.uint8), mask, "img7", mask_path="img7.png")


def class_mask():
    mask = np.zeros(SIZE, np.uint8)
    mask[2:6, 3:9] = 1
    mask[10:20, 5:8] = mask[10:20, 20:25] = 3
    mask[0] = IGNORE
    return mask


def shown(sample, read) -> dict[str, np.ndarray]:
    return {thing.name: target_of(sample, thing, read) for thing in things_of(sample, read)}


def test_a_row_for_each_class_that_is_there():
    """Class 2 is absent and asks nothing; the background is no object."""
    mask = class_mask()
    rows = shown(sample_of(mask), CLASSES)
    assert list(rows) == ["1", "3"]
    for name, target in rows.items():
        assert ((target == 1) == (mask == int(name))).all()
        assert ((target == IGNORE) == (mask == IGNORE)).all()
    assert list(shown(sample_of(mask), replace(CLASSES, background=3))) == ["0", "1"]
    assert list(shown(sample_of(mask), replace(CLASSES, background=-1))) == ["0", "1", "3"]


def test_all_classes_as_one_object():
    (target,) = shown(sample_of(class_mask()), replace(CLASSES, objects="mask")).values()
    assert (target == 1).sum() == 24 + 80 and (target[0] == IGNORE).all()


def test_connected_parts_touch_by_corners_and_have_a_least_size():
    mask = np.zeros(SIZE, np.uint8)
    mask[2:4, 2:4] = mask[4:6, 4:6] = 1  # one part, by its corner
    mask[10:12, 10:12] = 1
    mask[20, 20] = 1
    rows = shown(with_components(sample_of(mask), PARTS), PARTS)
    assert {name: (target == 1).sum() for name, target in rows.items()} == {"1": 8, "2": 4, "3": 1}
    large = replace(PARTS, min_area=4)
    rows = shown(with_components(sample_of(mask), large), large)
    assert list(rows) == ["1", "2"]
    assert rows["1"][20, 20] == 0, "what is too small is background"


def test_connected_parts_of_each_class():
    read = replace(CLASSES, objects="component")
    rows = shown(with_components(sample_of(class_mask()), read), read)
    assert {name: (target == 1).sum() for name, target in rows.items()} == {
        "1:1": 24, "3:1": 30, "3:2": 50,
    }  # fmt: skip


def test_many_objects_pass_over_the_value_of_unread_pixels():
    numbers = np.arange(400).reshape(20, 20) * 3
    sample = with_instances(sample_of((numbers > 0).astype(np.uint8)), numbers, INSTANCES)
    rows = shown(sample, INSTANCES)
    assert len(rows) == 399 and "765" in rows
    assert all((target == 1).sum() == 1 for target in rows.values())
    assert (rows["1194"] == 1)[19, 18]


def test_objects_that_overlap_keep_their_pixels():
    masks = np.zeros((3, *SIZE), bool)
    masks[0, 2:10, 2:10] = masks[1, 6:14, 6:14] = masks[2, 15:20, 2:10] = True
    mask = masks.any(0).astype(np.uint8)
    sample = with_masks(sample_of(mask), masks, ["a", "b", "c"], INSTANCES)
    assert len(sample.layers) == 2, "as few as can be"
    rows = shown(sample, INSTANCES)
    assert all(((rows[n] == 1) == m).all() for n, m in zip("abc", masks, strict=True))


@pytest.mark.parametrize("name", ["flip", "standard"])
def test_objects_follow_the_picture(name):
    """Each object is its class's pixels before and after, whatever was drawn."""
    mask = class_mask()
    read = replace(CLASSES, objects="component")
    sample = with_components(sample_of(mask), read)
    changed = 0
    for seed in range(40):
        variant = augment(sample, name, seed)
        (layer,) = variant.layers
        assert layer.shape == variant.mask.shape and layer.dtype == np.uint16
        for value, thing in variant.names.items():
            assert set(np.unique(variant.mask[layer == value])) <= {int(thing[0])}
        known = (variant.mask != 0) & (variant.mask != IGNORE)
        assert (layer[known] > 0).all() and not np.isin(layer[variant.mask == 0], [1, 2, 3]).any()
        changed += not np.array_equal(variant.mask, mask)
    assert changed > 10


def save(folder, mask, name="a", suffix="png"):
    image = np.zeros((*mask.shape[:2], 3), np.uint8)
    Image.fromarray(image).save(folder / f"{name}.bmp")
    Image.fromarray(mask).save(folder / f"{name}.{suffix}")
    return Pair(name, folder / f"{name}.bmp", folder / f"{name}.{suffix}")


def numbered():
    numbers = np.zeros(SIZE, np.uint16)
    numbers[2:8, 2:8], numbers[2:8, 12:20], numbers[15:18, 3:9] = 1, 40000, 255
    return numbers


def test_maps_that_number_objects_may_have_16_bits(tmp_path):
    sample = read_sample(save(tmp_path, numbered()), INSTANCES).sample
    assert set(shown(sample, INSTANCES)) == {"1", "255", "40000"}
    assert (sample.mask == (numbered() > 0)).all()
    small = read_sample(save(tmp_path, numbered(), "b"), replace(INSTANCES, min_area=30)).sample
    assert set(shown(small, INSTANCES)) == {"1", "40000"}


def test_a_smaller_map_is_brought_to_the_size_of_its_image(tmp_path):
    pair = save(tmp_path, numbered())
    Image.fromarray(numbered()[::2, ::2].copy()).save(pair.mask_path)
    sample = read_sample(pair, INSTANCES).sample
    assert (sample.layers[0] > 0)[2:8, 2:8].all() and set(sample.names.values()) >= {"40000"}


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.float32([[0, 1.5]]), "whole and not negative"),
        (np.zeros((4, 4, 3), np.uint8) + np.uint8([1, 2, 3]), "coloured"),
    ],
)
def test_maps_that_number_nothing_are_refused(tmp_path, mask, said):
    suffix = "tif" if mask.dtype == np.float32 else "png"
    with pytest.raises(UserError, match=said):
        read_sample(save(tmp_path, mask, suffix=suffix), INSTANCES)


def test_a_jpeg_numbers_no_objects(tmp_path):
    with pytest.raises(UserError, match="JPEG"):
        read_sample(save(tmp_path, np.zeros(SIZE, np.uint8), suffix="jpg"), INSTANCES)


@pytest.fixture
def coco(tmp_path):
    """Two overlapping squares, a crowd, and an image without annotations."""
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "x.png")
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "y.png")
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "of_another_split.png")

    def square(x0, y0, x1, y1):
        return [[x0, y0, x1, y0, x1, y1, x0, y1]]

    def note(number, category, segmentation, crowd=0):
        return {
            "id": number, "image_id": 4, "category_id": category, "segmentation": segmentation,
            "iscrowd": crowd, "area": 1, "bbox": [0, 0, 1, 1],
        }  # fmt: skip

    crowd = {"size": list(SIZE), "counts": [0, 24, 24 * 29]}  # the first column
    content = {
        "images": [
            {"id": 4, "file_name": "x.png", "height": SIZE[0], "width": SIZE[1]},
            {"id": 9, "file_name": "y.png", "height": SIZE[0], "width": SIZE[1]},
        ],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [
            note(11, 1, square(4, 4, 14, 14)),
            note(12, 1, square(8, 8, 20, 18)),
            note(13, 1, crowd, crowd=1),
        ],
    }
    path = tmp_path / "notes.json"
    path.write_text(json.dumps(content))
    return path


def test_annotations_keep_a_mask_of_their_own_each(coco):
    pytest.importorskip("pycocotools")
    pairs = find_described(coco.parent, coco, "--train_image_dir")
    assert [pair.id for pair in pairs] == ["x.png", "y.png"]
    sample = read_sample(pairs[0], INSTANCES).sample
    rows = shown(sample, INSTANCES)
    assert {name: (t == 1).sum() for name, t in rows.items()} == {"cell:11": 100, "cell:12": 120}
    assert (sample.mask[:, 0] == IGNORE).all() and (rows["cell:11"][:, 0] == IGNORE).all()
    assert (sample.mask == 1).sum() == 220 - 36
    report = scan_pairs(pairs, INSTANCES)
    report.raise_problems()
    assert report.empty == ["y.png"]


def test_what_is_wrong_with_annotations_is_said(coco):
    pytest.importorskip("pycocotools")
    (coco.parent / "y.png").unlink()
    with pytest.raises(UserError, match=r"--val_image_dir.*1 of the 2 images.*y\.png"):
        find_described(coco.parent, coco, "--val_image_dir")
    broken = coco.parent / "other.json"
    broken.write_text('{"shapes": []}')
    with pytest.raises(UserError, match="no COCO annotation file"):
        find_described(coco.parent, broken, "--val_image_dir")
    with pytest.raises(UserError, match="drop --num_classes"):
        read_sample(Pair("x.png", coco.parent / "x.png", coco), ReadOptions(num_classes=3))


def test_without_pycocotools_the_way_out_is_named(coco, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UserError, match="pip install pycocotools"):
        find_described(coco.parent, coco.with_name("never_read.json"), "--val_image_dir")


@pytest.mark.parametrize(
    ("read", "prompt", "meant"),
    [
        (ReadOptions(), "box", "mask"),
        (ReadOptions(num_classes=3), "box", "class"),
        (ReadOptions(num_classes=3), "none", "mask"),
        (ReadOptions(num_classes=3, objects="mask"), "box", "mask"),
    ],
)
def test_what_is_asked_by_default(read, prompt, meant):
    assert settle_objects(read, PromptOptions(prompt=prompt)).objects == meant


@pytest.mark.parametrize(
    ("read", "prompt", "said"),
    [
        ({"objects": "class"}, {}, "--objects class needs --num_classes"),
        ({"objects": "instance", "num_classes": 3}, {}, "drop --num_classes"),
        ({"num_classes": 3, "background": 3}, {}, "--background 3"),
        ({"min_area": 0}, {}, "--min_area 0"),
        ({"num_classes": 3, "objects": "class"}, {"prompt": "none"}, "drop --objects"),
        ({}, {"num_points": 0}, "--num_points 0"),
        ({}, {"refine_steps": -1}, "--refine_steps -1"),
        ({}, {"refine_steps": 1, "prompt": "none"}, "--refine_steps 1"),
        ({}, {"max_objects": -1}, "--max_objects -1"),
        ({}, {"scoring_jitter": -0.1}, "--scoring_jitter"),
    ],
)
def test_what_cannot_be_asked_is_refused(read, prompt, said):
    with pytest.raises(UserError, match=said):
        check_questions(ReadOptions(**read), PromptOptions(**prompt))
