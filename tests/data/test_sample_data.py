"""The drawn sample set."""

import time

import numpy as np
import pytest

from samtune.config import ReadOptions
from samtune.data.files import find_pairs
from samtune.data.prompts import box_from_mask
from samtune.data.sample_data import COUNTS, make_sample_set
from samtune.data.samples import read_sample
from samtune.data.scan import scan_pairs
from samtune.errors import UserError


@pytest.fixture(scope="module")
def sample_set(tmp_path_factory):
    return make_sample_set(tmp_path_factory.mktemp("drawn") / "sample")


def pairs_of(sample_set, split):
    flags = (f"{split}_image_dir", f"{split}_mask_dir")
    return find_pairs(sample_set.image_dir(split), sample_set.mask_dir(split), ReadOptions(), flags)


def test_it_can_be_trained_on_as_it_is(sample_set):
    sizes = set()
    for split, count in COUNTS.items():
        report = scan_pairs(pairs_of(sample_set, split), ReadOptions())
        assert report.images == count and report.problems == report.remarks == []
        sizes |= set(report.sizes)
    assert len(sizes) > 20  # every batch is of mixed sizes


def test_a_box_alone_is_far_from_the_mask(sample_set):
    """The filled box is the score to beat; it must leave room, and still say something."""
    ious = []
    for split in COUNTS:
        for pair in pairs_of(sample_set, split):
            mask = read_sample(pair, ReadOptions()).sample.mask
            x0, y0, x1, y1 = box_from_mask(mask)
            ious.append(mask.sum() / ((x1 - x0) * (y1 - y0)))
            assert min(mask.shape) / 4 < max(x1 - x0, y1 - y0) < max(mask.shape)
    assert min(ious) > 0.4 and max(ious) < 0.65 and 0.45 < np.mean(ious) < 0.58


def test_no_picture_comes_twice(sample_set):
    pictures = [
        pair.image_path.read_bytes() for split in COUNTS for pair in pairs_of(sample_set, split)
    ]
    assert len(set(pictures)) == sum(COUNTS.values())


def test_it_is_quick_the_same_again_and_reused(sample_set, tmp_path):
    start = time.perf_counter()
    again = make_sample_set(tmp_path / "again")
    assert time.perf_counter() - start < 10  # half a second on a free core
    for path in sample_set.root.rglob("*.png"):
        assert (again.root / path.relative_to(sample_set.root)).read_bytes() == path.read_bytes()
    stamp = (again.root / "ABOUT.txt").stat().st_mtime_ns
    make_sample_set(tmp_path / "again")
    assert (again.root / "ABOUT.txt").stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == ["again"]  # no drafts are left


def test_seeds_draw_other_pictures(sample_set, tmp_path):
    other = make_sample_set(tmp_path / "other", seed=1)
    name = next(other.image_dir("val").iterdir()).name
    paths = other.image_dir("val") / name, sample_set.image_dir("val") / name
    assert paths[0].read_bytes() != paths[1].read_bytes()


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose this")
    with pytest.raises(UserError, match=r"mine: .*remove what is there"):
        make_sample_set(tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not lose this"
