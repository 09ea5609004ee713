"""The electron-microscopy and street data sets as they are distributed."""

import numpy as np
import pytest

from samtune.config import ReadOptions
from samtune.data.catalog import find_dataset, read_options
from samtune.data.files import find_pairs
from samtune.data.masks import read_mask
from samtune.data.scan import scan_pairs
from samtune.errors import UserError
from samtune.structures import IGNORE

FLAGS = ("train_image_dir", "train_mask_dir")
MEMBRANE = ReadOptions(foreground="below")


@pytest.fixture
def isbi(data_dir):
    folder = data_dir / "isbi2012"
    if not folder.is_dir():
        pytest.skip(f"no ISBI 2012 at {folder}")
    return folder


@pytest.fixture
def camvid(data_dir):
    folder = data_dir / "camvid"
    if not folder.is_dir():
        pytest.skip(f"no CamVid at {folder}")
    return folder


def test_isbi_pairs_by_discovery_and_by_flags(isbi):
    found = find_pairs(isbi / "images", isbi / "labels", ReadOptions(), FLAGS)
    read = ReadOptions(image_prefix="train-volume", mask_prefix="train-labels")
    assert found == find_pairs(isbi / "images", isbi / "labels", read, FLAGS)
    assert [pair.id for pair in found] == [f"{i:02d}" for i in range(30)]
    assert all(pair.mask_path.stem[-2:] == pair.image_path.stem[-2:] for pair in found)


def test_isbi_membranes_are_a_fifth_of_the_pixels(isbi):
    """JPEG labels of about 50 grey values: 128 is the cut, and the dark membrane the object."""
    pairs = find_pairs(isbi / "images", isbi / "labels", MEMBRANE, FLAGS)
    report = scan_pairs(pairs, MEMBRANE)
    assert report.problems == [] and report.empty == [] and report.sizes == {(512, 512): 30}
    assert report.foreground_fraction == pytest.approx(0.2196, abs=5e-5)
    assert len(report.remarks) == 1 and report.remarks[0].startswith("30 of 30 masks are JPEG")
    explicit = ReadOptions(foreground="below", mask_threshold=150)  # the value others use
    for pair in pairs[:5]:
        by_others = read_mask(pair.mask_path, explicit)
        assert np.array_equal(read_mask(pair.mask_path, MEMBRANE), by_others)


def test_isbi_read_the_wrong_way_round_is_suspected(isbi):
    pairs = find_pairs(isbi / "images", isbi / "labels", ReadOptions(), FLAGS)[:4]
    assert "did you mean --foreground below?" in str(scan_pairs(pairs, ReadOptions()).remarks)


def test_camvid_class_ids_are_no_binary_mask(camvid):
    labels = sorted((camvid / "trainannot").iterdir())[:6]
    for path in labels:
        with pytest.raises(UserError) as error:
            read_mask(path, ReadOptions())
        assert path.name in str(error.value) and "0, 1, 2, 3" in str(error.value)
        assert "--mask_threshold" in str(error.value)
    road_and_later = read_mask(labels[0], ReadOptions(mask_threshold=3))
    assert 0.2 < road_and_later.mean() < 0.9


def test_camvid_pairs_across_formats(camvid):
    pairs = find_pairs(camvid / "val", camvid / "valannot", ReadOptions(), FLAGS)
    assert len(pairs) == len(list((camvid / "val").iterdir()))
    report = scan_pairs(pairs[:3], ReadOptions())
    assert report.images == 0 and len(report.problems) == 3


def test_camvid_by_name(camvid):
    """Counts, classes and the ignored share as published; the scan names every class."""
    read = read_options(["camvid"], camvid, ReadOptions())
    assert (read.num_classes, read.ignore_index) == (11, 11)
    pairs = {split: find_dataset("camvid", camvid, split) for split in ("train", "val", "test")}
    assert [len(of_split) for of_split in pairs.values()] == [367, 101, 233]
    groups = {split: {pair.group for pair in of_split} for split, of_split in pairs.items()}
    assert groups["val"] == {"0016E5"} and "0016E5" in groups["train"]
    assert groups["test"] == {"0001TP", "Seq05VD"}
    report = scan_pairs(pairs["train"], read)
    report.raise_problems()
    assert report.sizes == {(360, 480): 367}
    assert report.classes.pixels[IGNORE] / report.classes.pixels.total() == pytest.approx(
        0.039, abs=5e-4
    )
    assert set(report.classes.pixels) == {*range(11), IGNORE}
    assert "10 bicyclist" in report.remarks[0]


def test_camvid_without_its_ignored_id_is_refused(camvid):
    pairs = find_dataset("camvid", camvid, "val")[:9]
    with pytest.raises(UserError, match=r"9 of 9 masks hold values .*: 11: [\d,]+ pixels in 9"):
        scan_pairs(pairs, ReadOptions(num_classes=11)).raise_problems()


def test_isbi_by_name(isbi):
    """Blocks of one volume, membranes as objects."""
    read = read_options(["isbi2012"], isbi, ReadOptions())
    pairs = [find_dataset("isbi2012", isbi, split) for split in ("train", "val", "test")]
    assert [(p[0].id, p[-1].id) for p in pairs] == [("00", "19"), ("20", "24"), ("25", "29")]
    report = scan_pairs([pair for of_split in pairs for pair in of_split], read)
    assert report.problems == [] and report.remarks == []
    assert report.foreground_fraction == pytest.approx(0.2196, abs=5e-5)
