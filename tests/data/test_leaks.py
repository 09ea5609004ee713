"""What splits must not share: pictures, sequences, classes that training never shows."""

import numpy as np
import pytest

from samtune.config import ReadOptions, Size
from samtune.data.findings import FACT, WARNING, Split
from samtune.data.inspection import Facts
from samtune.data.leaks import leaks_between, sequence_of

RNG = np.random.default_rng(0)
READ = ReadOptions()


def facts(id, picture=None, truth=b"t", look=None, **more):
    picture = RNG.bytes(16) if picture is None else picture
    return Facts(id, picture=picture, truth=truth, look=look or RNG.bytes(32), **more)


def splits(*of_files, read=READ):
    names = ("training", "validation", "test")
    return [Split(n, [], f, read, Size(8, 8)) for n, f in zip(names, of_files, strict=False)]


def leaks(*of_files, **more):
    return {one.kind: one for one in leaks_between(splits(*of_files, **more))}


def video(count, start=0, name="frame_{:03d}"):
    """Frames that change slowly: each differs from the one before in 3 of 256 points."""
    bits = RNG.integers(0, 2, 256)
    frames = []
    for number in range(start, start + count):
        bits[RNG.choice(256, 3, replace=False)] ^= 1
        frames.append(facts(name.format(number), look=np.packbits(bits).tobytes()))
    return frames


def test_clean_splits_share_nothing():
    assert leaks([facts("x")], [facts("y")], [facts("z")]) == {}


def test_pictures_on_both_sides():
    train = [facts("a", b"1"), facts("b", b"2"), facts("c", b"3")]
    found = leaks_between(splits(train, [facts("v", b"2")], [facts("t", b"2"), facts("u", b"3")]))
    shared = [one for one in found if one.kind == "shared_pictures"]
    assert [one.count for one in shared] == [1, 2, 1]  # train-val, train-test, val-test
    assert shared[1].text.startswith("training and test share 2 picture(s), pixel by pixel")
    assert shared[1].examples == (
        "training b = validation v = test t", "training c = test u",
    )  # fmt: skip
    assert {one.level for one in shared} == {WARNING} and len(found) == 3


def test_pictures_twice_in_a_split_and_with_two_masks():
    found = leaks([facts("a", b"1", b"m"), facts("b", b"1", b"n")], [facts("c")])
    assert set(found) == {"repeated_pictures", "contradicting_masks"}
    assert found["contradicting_masks"].examples == ("training a = training b",)
    same = leaks([facts("a", b"1", b"m"), facts("b", b"1", b"m")], [facts("c")])
    assert set(same) == {"repeated_pictures"}
    across = leaks([facts("a", b"1", b"m")], [facts("b", b"1", b"n")])
    assert set(across) == {"shared_pictures", "contradicting_masks"}


def test_unread_and_plain_pictures_are_equal_to_none():
    train, val = [facts("a", b""), facts("b", b"1", plain=True)], [facts("c", b"")]
    assert leaks(train, [*val, facts("d", b"1", plain=True)]) == {}
    unread_mask = leaks([facts("a", b"1", b"")], [facts("b", b"1", b"n")])
    assert set(unread_mask) == {"shared_pictures"}


@pytest.mark.parametrize(
    ("id", "said"),
    [
        ("case12_slice003", ("case12_slice#", False, 3)),
        ("video_0001", ("video_#", False, 1)),
        ("0007", ("#", False, 7)),
        ("a/b2_c", ("a/b#_c", False, 2)),
        ("cat", None),
    ],
)
def test_the_sequence_that_a_name_says(id, said):
    assert sequence_of(Facts(id)) == said


def test_a_data_set_says_its_sequences_itself():
    assert sequence_of(Facts("scene7_12", group="scene7")) == ("scene7", True, 12)
    assert sequence_of(Facts("first", group="g")) == ("g", True, 0)


def test_a_video_split_at_random_is_found():
    frames = video(60)
    found = leaks([f for i, f in enumerate(frames) if i % 4], frames[::4])["shared_sequences"]
    assert found.level == WARNING and "frame_#" in found.text
    assert "split between sequences" in found.text
    assert found.count == 15 and "frame_001 ~ frame_000" in found.examples


def test_a_video_cut_in_two_is_found_at_the_cut():
    frames = video(60)
    found = leaks(frames[:40], frames[40:])["shared_sequences"]
    assert found.examples == ("frame_039 ~ frame_040",)


def test_numbered_pictures_that_have_nothing_in_common_are_no_sequence():
    pictures = [facts(f"img_{i:03d}") for i in range(60)]
    assert leaks([f for i, f in enumerate(pictures) if i % 4], pictures[::4]) == {}


def test_several_numbered_names_are_a_fact_for_people():
    cats, dogs = ([facts(f"{kind}_{i}") for i in range(30)] for kind in ("cat", "dog"))
    found = leaks(cats[:20] + dogs[:20], cats[20:] + dogs[20:])
    assert set(found) == {"numbered_names"} and found["numbered_names"].level == FACT


def test_groups_of_a_data_set_on_both_sides_are_told_whatever_they_look_like():
    train, val = (
        [facts("s1_3", group="s1"), facts("s2_1", group="s2")],
        [facts("s1_99", group="s1")],
    )
    found = leaks(train, val)["shared_sequences"]
    assert "share 1 sequence(s), s1:" in found.text and found.examples == ("s1_3 ~ s1_99",)


def test_the_same_picture_is_no_neighbour_of_itself():
    train = [facts(f"img_{i:03d}", str(i).encode()) for i in range(20)]
    assert set(leaks(train, train[:3])) == {"shared_pictures"}


def test_volumes_that_are_kept_apart_are_fine():
    one, two = video(30, name="case1_slice{:03d}"), video(30, name="case2_slice{:03d}")
    assert leaks(one, two) == {}


def test_validation_and_test_are_not_compared_for_sequences():
    """Both are held out; what counts is what was trained on."""
    frames = video(40)
    assert leaks([facts("other")], frames[::2], frames[1::2]) == {}


def test_classes_that_training_never_shows():
    read = ReadOptions(num_classes=3, class_names="sky,road,car")
    found = leaks([facts("a", pixels={0: 5, 1: 5})], [facts("b", pixels={0: 9, 2: 1})], read=read)[
        "unseen_classes"
    ]
    assert found.level == WARNING and found.split == "validation"
    assert found.text == "classes that training never shows: car (in 1)"
