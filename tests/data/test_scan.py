"""The look at all files before training."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from samtune.config import ReadOptions, Size
from samtune.data import scan
from samtune.data import scan as scan_module
from samtune.data.files import Pair
from samtune.data.samples import read_sample
from samtune.data.scan import ScanReport, SeenPictures, scan_pairs
from samtune.engine.distributed import Process
from samtune.engine.logbook import Logbook
from samtune.errors import UserError
from samtune.pipeline import check_pairs

READ = ReadOptions()


def save(folder, name, mask, extension="png"):
    """One pair: a grey image and this 0/1 mask."""
    Image.new("RGB", mask.shape[::-1], (9, 9, 9)).save(folder / f"{name}.bmp")
    path = folder / f"{name}.{extension}"
    Image.fromarray((mask * 255).astype(np.uint8)).save(path)
    return Pair(name, folder / f"{name}.bmp", path)


@pytest.fixture
def pairs(tmp_path):
    """Six good pairs: 3 with a quarter of foreground, 2 without any, 1 nearly full."""
    quarter, full = np.zeros((8, 8)), np.ones((16, 24))
    quarter[:4, :4] = 1
    full[0, 0] = 0
    return [
        save(tmp_path, str(i), mask)
        for i, mask in enumerate([quarter, quarter, quarter, quarter * 0, quarter * 0, full])
    ]


def test_counts_and_remarks(pairs):
    steps = []
    report = scan_pairs(pairs, READ, steps.append)
    assert report.images == sum(steps) == 6 and report.problems == []
    assert report.sizes == {(8, 8): 5, (16, 24): 1}
    assert report.foreground_fraction == pytest.approx((3 * 0.25 + 383 / 384) / 6)
    assert report.empty == ["3", "4"]
    assert report.remarks == ["2 of 6 images show no object (for example 3)"]
    assert [pair.id for pair in report.without_empty(pairs)] == ["0", "1", "2", "5"]
    report.raise_problems()  # has none


def test_parts_add_up_to_the_whole(pairs):
    """Each rank scans its share; the joined report says what one process would have said."""
    whole = scan_pairs(pairs, READ)
    parts = [pickle.loads(pickle.dumps(scan_pairs(pairs[rank::4], READ))) for rank in range(4)]
    joined = sum(parts[1:], parts[0])
    assert joined.sizes == whole.sizes and sorted(joined.empty) == whole.empty
    assert joined.foreground_fraction == pytest.approx(whole.foreground_fraction)
    assert joined.remarks[0].startswith("2 of 6 images")


def test_reports_that_become_one_on_the_way_say_the_same(pairs, monkeypatch):
    whole = scan_pairs(pairs, READ)
    monkeypatch.setattr(scan_module, "_REPORTS_AT_ONCE", 2)
    assert scan_pairs(pairs, READ) == whole


def test_every_problem_is_a_line_with_file_and_remedy(tmp_path, pairs):
    truncated = save(tmp_path, "cut", np.ones((9, 9)))
    truncated.image_path.write_bytes(truncated.image_path.read_bytes()[:99])
    ids = save(tmp_path, "ids", np.ones((9, 9)))
    Image.fromarray(np.arange(81, dtype=np.uint8).reshape(9, 9)).save(ids.mask_path)
    other_size = save(tmp_path, "size", np.ones((9, 9)))
    Image.new("L", (5, 9)).save(other_size.mask_path)
    report = scan_pairs([*pairs, truncated, ids, other_size], READ)
    assert report.images == 6 and len(report.problems) == 3
    with pytest.raises(UserError) as error:
        report.raise_problems()
    lines = str(error.value).splitlines()
    assert "cut.bmp: truncated" in lines[0]
    assert "ids.png" in lines[1] and "--mask_threshold" in lines[1]
    assert "size.png: 5 x 9 pixels" in lines[2] and "9 x 9" in lines[2]


def test_many_problems_are_cut_short():
    with pytest.raises(UserError) as error:
        ScanReport(problems=[f"line {i}" for i in range(500)]).raise_problems()
    assert len(str(error.value).splitlines()) == 21
    assert "and 480 more" in str(error.value)


def test_mostly_foreground_asks_about_the_polarity(tmp_path):
    mask = np.ones((10, 10))
    mask[:3] = 0
    pair = save(tmp_path, "a", mask)
    assert "70% of the images on average: did you mean --foreground below?" in str(
        scan_pairs([pair], READ).remarks
    )
    assert scan_pairs([pair], ReadOptions(foreground="below")).remarks == []


def test_jpeg_masks_are_remarked_once(tmp_path):
    mask = np.zeros((32, 32))
    mask[8:24, 8:24] = 1
    pairs = [save(tmp_path, str(i), mask, "jpg") for i in range(3)]
    remarks = scan_pairs(pairs, READ).remarks
    assert remarks == [
        "3 of 3 masks are JPEG and were cut at 128; PNG keeps them exact (for example 0)"
    ]
    assert scan_pairs(pairs, ReadOptions(mask_threshold=128)).remarks == []


def test_slivers_are_remarked(tmp_path):
    """1 x 4000 would have no height at all in a frame of 1024: it keeps one pixel."""
    pairs = [save(tmp_path, "a", np.ones((1, 4000))), save(tmp_path, "b", np.ones((2, 4000)))]
    report = scan_pairs(pairs, ReadOptions(foreground="above"), image_size=1024)
    (remark,) = [line for line in report.remarks if "narrow" in line]
    assert remark.startswith("1 of 2 images") and "example a" in remark
    wide = scan_pairs(pairs, ReadOptions(foreground="above"), image_size=(16, 4000))
    assert not [line for line in wide.remarks if "narrow" in line]


def test_the_scan_reads_through_the_training_reader(pairs, monkeypatch):
    """What the scan accepts, training can read: there is one reader, not two."""
    seen = []

    def spy(pair, read):
        seen.append(pair.id)
        return read_sample(pair, read)

    monkeypatch.setattr(scan, "read_sample", spy)
    scan_pairs(pairs, READ)
    assert sorted(seen) == [pair.id for pair in pairs]


def test_a_wrong_range_is_said_once_not_per_file(pairs):
    with pytest.raises(UserError, match="--intensity_range 9"):
        scan_pairs(pairs, ReadOptions(intensity_range="9"))


def noisy(folder, name, seed):
    """A pair with an image that no other seed has."""
    pair = save(folder, name, np.eye(12))
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(pair.image_path)
    return pair


def test_pictures_of_another_split_are_remarked(tmp_path):
    """Whatever their files are called; what has one colour only is no picture that one knows."""
    train = [noisy(tmp_path, f"t{i}", i) for i in range(3)] + [save(tmp_path, "t", np.eye(12))]
    val = [noisy(tmp_path, f"v{i}", i) for i in (2, 7)] + [save(tmp_path, "v", np.eye(12))]
    seen = SeenPictures()
    assert seen.add("training", scan_pairs(train, READ)) == []
    (line,) = seen.add("validation", scan_pairs(val, READ))
    assert line.startswith("1 picture(s) are also elsewhere") and "(v2 is training t2)" in line
    assert seen.add("test", scan_pairs([noisy(tmp_path, "x", 9)], READ)) == []
    assert "training t2" in seen.add("test", scan_pairs(val[:1], READ))[0]


def test_pictures_that_occur_twice_are_remarked(tmp_path):
    pairs = [noisy(tmp_path, "a", 1), noisy(tmp_path, "b", 2), noisy(tmp_path, "c", 1)]
    whole = scan_pairs(pairs, READ)
    assert whole.remarks == ["1 picture(s) occur more than once, a for example 2 times"]
    parts = ScanReport.merge(scan_pairs([pair], READ) for pair in pairs)
    assert parts == whole
    assert whole.without_pictures().remarks == [] and whole.pictures


def test_the_look_before_training_says_what_splits_share(tmp_path, capsys):
    process = Process(0, 1, 0, torch.device("cpu"))
    seen, logbook = SeenPictures(), Logbook.console(process)
    for split, seeds in (("training", (1, 2)), ("validation", (2, 3))):
        pairs = [noisy(tmp_path, f"{split}{seed}", seed) for seed in seeds]
        report = check_pairs(split, pairs, READ, Size(64, 64), process, logbook, seen)
        assert report.images == 2 and report.pictures == {}
    said = capsys.readouterr().out
    assert said.startswith("validation: 1 picture(s) are also elsewhere, pixel by pixel")
    assert "(validation2 is training training2)" in said
