"""Mask codings by name and by colour table, and how values that are no class are said."""

import numpy as np
import pytest
from PIL import Image

from samtune.config import ReadOptions
from samtune.data.class_shares import class_names
from samtune.data.codings import (
    CODINGS,
    UnknownValues,
    coding_of,
    colours_of,
    parse_colours,
)
from samtune.data.files import Pair
from samtune.data.masks import read_mask
from samtune.data.scan import ScanReport, scan_pairs
from samtune.errors import UserError
from samtune.structures import IGNORE

RED_GREEN = "0,0,0;255,0,0;0,255,0;ignore=255,255,255"


def save(folder, name, pixels, mode=None):
    """A mask file and an image beside it, as a pair."""
    pixels = np.asarray(pixels, np.uint8)
    Image.new("RGB", pixels.shape[1::-1]).save(folder / f"{name}.bmp")
    path = folder / f"{name}.png"
    picture = Image.fromarray(pixels)
    (picture.convert(mode, palette=Image.Palette.ADAPTIVE) if mode else picture).save(path)
    return Pair(name, folder / f"{name}.bmp", path)


def named(coding: str) -> ReadOptions:
    return ReadOptions(mask_coding=coding, num_classes=CODINGS[coding].num_classes)


@pytest.mark.parametrize(
    ("coding", "values", "ids"),
    [
        ("above128", [0, 127, 128, 255], [0, 0, 1, 1]),
        ("above200", [0, 200, 201, 255], [0, 0, 1, 1]),
        ("red_below150", [0, 149, 150, 255], [1, 1, 0, 0]),
        ("cityscapes", [0, 7, 8, 9, 26, 33, 255], [IGNORE, 0, 1, IGNORE, 13, 18, IGNORE]),
        ("btcv", [0, 1, 4, 5, 6, 8, 11, 13], [0, 1, 4, 0, 5, 7, 8, 0]),
    ],
)
def test_grey_codings(tmp_path, coding, values, ids):
    pair = save(tmp_path, "a", [values])
    assert read_mask(pair.mask_path, named(coding)).tolist() == [ids]


@pytest.mark.parametrize(
    ("coding", "colours", "ids"),
    [
        ("red_above150", [(255, 0, 0), (150, 9, 9), (149, 255, 255)], [1, 1, 0]),
        ("trans10k", [(0, 0, 0), (255, 0, 0), (0, 0, 255), (255, 255, 255)], [0, 1, 1, 2]),
        (
            "camvid_colour",
            [(128, 128, 128), (64, 192, 0), (128, 0, 192), (0, 0, 0), (192, 0, 192)],
            [0, 1, 3, IGNORE, 10],
        ),
    ],
)  # fmt: skip
def test_colour_codings_also_from_a_palette(tmp_path, coding, colours, ids):
    for mode in (None, "P"):
        pair = save(tmp_path, "a", [colours], mode)
        assert read_mask(pair.mask_path, named(coding)).tolist() == [ids], mode


def test_the_32_colours_of_camvid_are_all_there():
    table = CODINGS["camvid_colour"].entries
    assert len(table) == 32 and set(table.values()) == {*range(11), IGNORE}
    assert all(part in (0, 64, 128, 192) for value in table
               for part in (value >> 16, value >> 8 & 255, value & 255))  # fmt: skip


def test_a_colour_table_of_ones_own(tmp_path):
    read = ReadOptions(class_colours=RED_GREEN, num_classes=3)
    colours = [(0, 0, 0), (0, 255, 0), (255, 255, 255), (255, 0, 0)]
    pair = save(tmp_path, "a", [colours])
    assert read_mask(pair.mask_path, read).tolist() == [[0, 2, IGNORE, 1]]
    two = ReadOptions(class_colours="0,0,0;255,0,0")  # background and object, one kind
    assert read_mask(save(tmp_path, "b", [colours[::3]]).mask_path, two).tolist() == [[0, 1]]


def test_unknown_colours_are_added_up_over_all_files(tmp_path):
    read = ReadOptions(class_colours=RED_GREEN, num_classes=3)
    good, one, two = [(0, 0, 0)] * 4, [(0, 0, 0)] * 3 + [(9, 9, 9)], [(9, 9, 9), (1, 2, 3)] * 2
    pairs = [save(tmp_path, name, [row]) for name, row in zip("abc", (good, one, two), strict=True)]
    parts = [scan_pairs(pairs[i::2], read) for i in range(2)]
    for report in (scan_pairs(pairs, read), ScanReport.merge(parts[::-1])):
        with pytest.raises(UserError) as error:
            report.raise_problems()
        said = str(error.value)
        assert "2 of 3 masks hold values that are not in --class_colours" in said
        assert f"(9, 9, 9): 3 pixels in 2 file(s), first {pairs[1].mask_path}" in said
        assert f"(1, 2, 3): 2 pixels in 1 file(s), first {pairs[2].mask_path}" in said


def test_unknown_class_ids_are_added_up_over_all_files(tmp_path):
    pairs = [save(tmp_path, str(i), [[0, 1, 2, 11 if i > 1 else 0]]) for i in range(5)]
    report = scan_pairs(pairs, ReadOptions(num_classes=3, class_names="sky,road,car"))
    with pytest.raises(UserError) as error:
        report.raise_problems()
    said = str(error.value)
    assert len(said.splitlines()) == 1
    assert "3 of 5 masks" in said and "--num_classes 3" in said and "--ignore_index 255" in said
    assert f"11: 3 pixels in 3 file(s), first {pairs[2].mask_path}" in said
    ignored = scan_pairs(pairs, ReadOptions(num_classes=3, ignore_index=11))
    ignored.raise_problems()
    assert "15.00% of the pixels are ignored, in 3 of 5 images" in ignored.remarks


def test_one_unknown_value_in_one_file_says_which_and_how_often(tmp_path):
    pair = save(tmp_path, "a", [[7, 7, 77, 33]])
    with pytest.raises(UnknownValues, match=r"a.png: .* 77 are not in .*cityscapes; 25.00%"):
        read_mask(pair.mask_path, named("cityscapes"))
    grey = save(tmp_path, "b", [[0, 85, 255]])
    assert read_mask(grey.mask_path, named("trans10k")).tolist() == [[0, 1, 2]]  # the mean itself
    grey = save(tmp_path, "b", [[0, 84, 255]])
    with pytest.raises(UnknownValues, match=r"84 \(mean of R, G, B\)"):
        read_mask(grey.mask_path, named("trans10k"))


def test_classes_that_never_occur_are_a_remark(tmp_path):
    pairs = [save(tmp_path, str(i), [[0, 1, 3, 3]]) for i in range(2)]
    report = scan_pairs(pairs, ReadOptions(num_classes=5, class_names="a,b,c,d,e"))
    report.raise_problems()
    assert report.remarks == [
        "classes, share of labelled pixels, in how many images: 0 a 25.00% in 2, 1 b 25.00% in 2, "
        "3 d 50.00% in 2",
        "2 of 5 classes never occur: 2 c, 4 e",
    ]


def test_an_object_of_255_with_two_classes_is_suspected(tmp_path):
    """255 is ignored by default, so nothing but background would be left to learn."""
    pairs = [save(tmp_path, "a", [[0, 0, 255, 255]])]
    remarks = scan_pairs(pairs, ReadOptions(num_classes=2)).remarks
    assert any("leave --num_classes out" in line for line in remarks)
    blank = scan_pairs([save(tmp_path, "b", [[255, 255]])], ReadOptions(num_classes=2))
    assert blank.empty == ["b"] and "1 of 1 images show background only" in blank.remarks[0]


def test_ids_read_as_one_object_are_told_the_flag(tmp_path):
    pair = save(tmp_path, "a", [[0, 1, 2, 11]])
    with pytest.raises(UserError, match=r"if they are class ids, set --num_classes.* 12"):
        read_mask(pair.mask_path, ReadOptions())
    coloured = save(tmp_path, "b", [[(0, 0, 0), (255, 0, 0)]])
    with pytest.raises(UserError, match="--class_colours"):
        read_mask(coloured.mask_path, ReadOptions())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask_coding": "cityscapes"}, "has 19 classes, --num_classes says 1; set"),
        ({"mask_coding": "above128", "num_classes": 2}, "--num_classes says 2"),
        ({"class_colours": RED_GREEN, "num_classes": 4}, "set --num_classes 3"),
        ({"class_colours": RED_GREEN, "mask_coding": "btcv"}, "keep one"),
        ({"mask_coding": "above128", "mask_threshold": 3}, "no meaning with --mask_coding"),
        ({"mask_coding": "above128", "foreground": "below"}, "no meaning"),
        ({"num_classes": 3, "class_names": "a,b"}, "2 names; --num_classes 3 needs 3"),
        ({"num_classes": 2, "class_names": "a,a"}, "2 different ones"),
    ],
)  # fmt: skip
def test_flags_that_contradict_each_other_are_said_before_any_file(options, said):
    with pytest.raises(UserError, match=said):
        scan_pairs([], ReadOptions(**options))


@pytest.mark.parametrize(
    "text", ["0,0,0;1,2", "0,0,0;a,b,c", "0,0,0;0,0,256", "0,0,0;0,-1,0", "0,0,0;0,0,0", "0,0,0"]
)
def test_colour_tables_that_are_none(text):
    with pytest.raises(UserError, match="--class_colours"):
        parse_colours(text)


def test_class_ids_in_jpeg_are_refused_by_every_coding(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(path)
    for read in (named("cityscapes"), ReadOptions(class_colours=RED_GREEN, num_classes=3)):
        with pytest.raises(UserError, match="JPEG does not keep class ids"):
            read_mask(path, read)


def test_names_default_to_ids():
    assert class_names(ReadOptions(num_classes=3)) == ["0", "1", "2"]
    assert class_names(ReadOptions(num_classes=2, class_names="sky, traffic light")) == [
        "sky", "traffic light",
    ]  # fmt: skip
    assert coding_of(ReadOptions()) is None


def test_colours_of_classes_are_those_of_the_flag_in_the_order_of_the_ids():
    assert colours_of(ReadOptions(class_colours="0,0,0;255,1,2;ignore=9,9,9;3,0,4")) == [
        (0, 0, 0), (255, 1, 2), (3, 0, 4)
    ]  # fmt: skip
    assert colours_of(ReadOptions()) == []
