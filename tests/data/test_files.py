"""Pairs are made by name."""

import logging
import os

import pytest

from samtune.config import ReadOptions
from samtune.data.files import find_pairs, select
from samtune.errors import UserError

FLAGS = ("train_image_dir", "train_mask_dir")


def folders(tmp_path, images, masks):
    """Two folders with empty files of these names, written in the order given."""
    for folder, names in (("image", images), ("mask", masks)):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    return tmp_path / "image", tmp_path / "mask"


def pairs_of(tmp_path, images, masks, **read):
    return find_pairs(*folders(tmp_path, images, masks), ReadOptions(**read), FLAGS)


def names_of(pairs):
    return [(pair.id, pair.image_path.name, pair.mask_path.name) for pair in pairs]


def test_pairs_by_name_whatever_order_the_folders_list(tmp_path, monkeypatch):
    """Two listings in different orders must not pair an image with a stranger's mask."""
    names = [f"{i}.png" for i in range(12)]
    scandir = os.scandir

    class Shuffled:
        def __init__(self, folder):
            with scandir(folder) as entries:
                self.entries = sorted(
                    entries, key=lambda e: e.name, reverse=str(folder).endswith("mask")
                )

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    image_dir, mask_dir = folders(tmp_path, names, reversed(names))
    monkeypatch.setattr(os, "scandir", Shuffled)
    pairs = find_pairs(image_dir, mask_dir, ReadOptions(), FLAGS)
    assert [p.id for p in pairs] == [str(i) for i in range(12)]  # 2 before 10
    assert all(p.image_path.stem == p.mask_path.stem for p in pairs)


def test_missing_and_extra_partners_are_named_with_their_flags(tmp_path):
    with pytest.raises(UserError) as error:
        pairs_of(tmp_path, ["a.png", "b.png", "c.png"], ["b.png", "c.png", "d.png"])
    message = str(error.value)
    assert "--train_image_dir: without a mask: a.png" in message
    assert "--train_mask_dir: without an image: d.png" in message
    assert "b.png" not in message


def test_long_lists_of_lonely_files_are_cut(tmp_path):
    with pytest.raises(UserError, match="and 93 more"):
        pairs_of(tmp_path, [f"{i}.png" for i in range(102)], ["0.png"])


def test_stray_files_and_case_of_extensions(tmp_path):
    """Thumbnails' data bases, hidden files and macOS' shadow files crash no reader."""
    strays = [".DS_Store", "Thumbs.db", "._a.png", "notes.txt"]
    pairs = pairs_of(tmp_path, ["a.JPG", "b.Jpeg", *strays], ["a.png", "b.TIF", *strays])
    assert names_of(pairs) == [("a", "a.JPG", "a.png"), ("b", "b.Jpeg", "b.TIF")]


def test_two_files_with_one_key_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--train_mask_dir: x\.jpg, x\.png have the same key 'x'"):
        pairs_of(tmp_path, ["x.png"], ["x.png", "x.jpg"])


def test_prefix_and_suffix_flags(tmp_path):
    pairs = pairs_of(
        tmp_path,
        ["im-a_rgb.jpg", "im-b_rgb.jpg"],
        ["a_mask.png", "b_mask.png"],
        image_prefix="im-",
        image_suffix="_rgb",
        mask_suffix="_mask",
    )
    assert names_of(pairs) == [
        ("a", "im-a_rgb.jpg", "a_mask.png"),
        ("b", "im-b_rgb.jpg", "b_mask.png"),
    ]


def test_a_file_without_the_given_suffix_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--train_mask_dir: b\.png not named KEY_mask"):
        pairs_of(tmp_path, ["a.png", "b.png"], ["a_mask.png", "b.png"], mask_suffix="_mask")


@pytest.mark.parametrize(
    ("images", "masks", "keys"),
    [
        # digits at the seam belong to the key, though all names here share the first digit
        (["vol00", "vol01", "vol09"], ["lab00", "lab01", "lab09"], ["00", "01", "09"]),
        (["a_img", "b_img"], ["a_seg", "b_seg"], ["a", "b"]),
        # the image's whole name is the key if the mask's only adds to it
        (["cat1", "cat2"], ["mask_cat1", "mask_cat2"], ["cat1", "cat2"]),
        (["cat1", "cat2"], ["cat1_mask", "cat2_mask"], ["cat1", "cat2"]),
        (["x_leftImg8bit", "y_leftImg8bit"], ["x_gtFine_ids", "y_gtFine_ids"], ["x", "y"]),
        (["train7"], ["label7"], ["7"]),
    ],
)
def test_common_beginnings_and_ends_are_found_and_said(tmp_path, caplog, images, masks, keys):
    with caplog.at_level(logging.INFO, "samtune"):
        pairs = pairs_of(tmp_path, [n + ".png" for n in images], [n + ".png" for n in masks])
    assert [pair.id for pair in pairs] == keys
    assert [p.image_path.stem for p in pairs] == images
    assert [p.mask_path.stem for p in pairs] == masks
    assert "--mask_prefix" in caplog.text


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        (["dog"], ["cat"]),  # one file each proves nothing
        (["a1", "a2"], ["b1", "b3"]),
        (["a1", "a2"], ["b1", "b2", "b3"]),
        (["tree", "house"], ["1", "2"]),
    ],
)
def test_discovery_never_guesses(tmp_path, images, masks):
    with pytest.raises(UserError, match=r"without a mask.*--mask_suffix"):
        pairs_of(tmp_path, [n + ".png" for n in images], [n + ".png" for n in masks])


def test_no_discovery_where_some_names_match(tmp_path):
    with pytest.raises(UserError, match=r"without a mask: b1\.png"):
        pairs_of(tmp_path, ["a1.png", "b1.png"], ["a1.png", "c1.png"])


def test_one_folder_for_both(tmp_path):
    for name in ("a.jpg", "a_mask.png", "b.jpg", "b_mask.png"):
        (tmp_path / name).touch()
    pairs = find_pairs(tmp_path, tmp_path, ReadOptions(mask_suffix="_mask"), FLAGS)
    assert names_of(pairs) == [("a", "a.jpg", "a_mask.png"), ("b", "b.jpg", "b_mask.png")]
    with pytest.raises(UserError, match="same folder"):
        find_pairs(tmp_path, tmp_path, ReadOptions(), FLAGS)


def test_folder_mistakes_name_the_flag(tmp_path):
    image_dir, mask_dir = folders(tmp_path, ["a.png"], [])
    with pytest.raises(UserError, match=r"--train_image_dir .*nowhere: there is no such folder"):
        find_pairs(tmp_path / "nowhere", mask_dir, ReadOptions(), FLAGS)
    with pytest.raises(UserError, match=r"--train_mask_dir .*no image file"):
        find_pairs(image_dir, mask_dir, ReadOptions(), FLAGS)
    with pytest.raises(UserError, match="--train_mask_dir is not set"):
        find_pairs(image_dir, "", ReadOptions(), FLAGS)
    with pytest.raises(UserError, match=r"--train_image_dir .*a\.png"):
        find_pairs(image_dir / "a.png", mask_dir, ReadOptions(), FLAGS)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", "0123456789"),
        (":3", "012"),
        ("7:", "789"),
        ("2:4", "23"),
        ("-2:", "89"),
        ("8:99", "89"),
    ],
)
def test_slices(tmp_path, text, ids):
    pairs = pairs_of(tmp_path, *[[f"{i}.png" for i in range(10)]] * 2)
    assert "".join(pair.id for pair in select(pairs, text, "train_slice")) == ids


@pytest.mark.parametrize("text", ["3", "a:b", "1:2:3", "1-2"])
def test_a_malformed_slice_names_its_flag(text):
    with pytest.raises(UserError, match=f"--train_slice {text}: expected START:STOP"):
        select([], text, "train_slice")


def test_an_empty_slice_is_refused(tmp_path):
    pairs = pairs_of(tmp_path, ["a.png"], ["a.png"])
    with pytest.raises(UserError, match="--val_slice 5:9 selects none of the 1 pairs"):
        select(pairs, "5:9", "val_slice")
