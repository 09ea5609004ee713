"""What mask values suggest, and that the flags which are suggested do read such masks."""

import shlex

import numpy as np
import pytest
from PIL import Image

from samtune import flags
from samtune.config import PromptOptions, ReadOptions
from samtune.data.decoding import Decoded
from samtune.data.files import Pair
from samtune.data.guesses import asked_in_words, contradiction, guess, kind_of
from samtune.data.inspection import inspect, values_of
from samtune.data.objects import settle_objects

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (20, 20), dtype=np.uint8)
BINARY = np.zeros((20, 20), np.uint8)
BINARY[5:15, 4:12] = 1
IDS = BINARY.copy()
IDS[12:, :] = 4
SOFT = BINARY * 255
SOFT[5, 4:12] = 120
NUMBERS = BINARY.astype(np.uint16) * 300
NUMBERS[12:, :] = 17
DRAWN = np.zeros((20, 20, 3), np.uint8)
DRAWN[5:15] = (255, 0, 0)
DRAWN[15:] = (0, 0, 255)


def facts_of(tmp_path, *masks, read=None):
    """The facts about pictures with these masks."""
    tmp_path.mkdir(exist_ok=True)
    pairs = []
    for i, mask in enumerate(masks):
        Image.fromarray(RNG.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.bmp"
        )
        Image.fromarray(mask).save(tmp_path / f"{i}.png")
        pairs.append(Pair(str(i), tmp_path / f"{i}.bmp", tmp_path / f"{i}.png"))
    read = settle_objects(read or ReadOptions(), PromptOptions())
    return [inspect(pair, read) for pair in pairs]


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (BINARY, "0 and 1"),
        (BINARY > 0, "0 and 1"),
        (BINARY * 255, "0 and 255"),
        (BINARY * 38, "two values"),
        (SOFT, "grey edges"),
        (IDS, "ids"),
        (np.where(IDS == 4, 255, IDS).astype(np.uint8), "ids"),
        (NUMBERS, "numbers"),
        (DRAWN, "colours"),
        (PHOTO, "a picture"),
        (BINARY * 0, "one value, 0"),
        (BINARY * 0 + 3, "one value, not 0"),
        (BINARY * 0.5, "other values"),
        (BINARY.astype(np.int32) * -30 + np.arange(20, dtype=np.int32), "other values"),
    ],
)
def test_kinds_of_mask_files(array, kind):
    assert kind_of(values_of(Decoded(array, lossy=False, turned=False))) == kind


@pytest.mark.parametrize(
    ("masks", "answer", "said"),
    [
        ([BINARY, BINARY * 255, BINARY * 0], "object", ""),
        ([BINARY * 38, BINARY * 0], "object", "--mask_threshold 19"),
        ([SOFT, BINARY * 255], "object", "--mask_threshold 128"),
        ([IDS, BINARY], "classes", "--num_classes 5"),
        ([IDS, BINARY, BINARY * 255], "classes", "--num_classes 5"),  # 255 is ignored
        ([NUMBERS], "instances", "--objects instance"),
        ([DRAWN, DRAWN[::-1]], "classes", '--class_colours "255,0,0;0,0,0;0,0,255"'),
    ],
)
def test_what_is_suggested_reads_the_masks(tmp_path, masks, answer, said):
    found = guess(facts_of(tmp_path, *masks))
    assert (found.answer, found.flags) == (answer, said)
    argv = shlex.split(said)
    if "--class_colours" in argv:
        argv += ["--num_classes", "3"]
    (read,) = flags.parse("", "", [ReadOptions], argv).instances
    assert [one.problems for one in facts_of(tmp_path, *masks, read=read)] == [()] * len(masks)


def test_photographs_suggest_nothing(tmp_path):
    facts = facts_of(tmp_path, PHOTO, PHOTO.T.copy())
    found = guess(facts)
    assert found.flags == "" and "photograph" in found.words
    assert "are the folders the right ones?" in contradiction(found, facts, ReadOptions())
    assert guess([]) is None


@pytest.mark.parametrize(
    ("masks", "options", "said"),
    [
        ([BINARY * 255], {"num_classes": 3}, "255 is ignored: drop --num_classes"),
        ([BINARY * 255], {"num_classes": 3, "ignore_index": 9}, "not 3 classes: drop"),
        ([BINARY], {"mask_threshold": 128}, "no value reaches --mask_threshold 128"),
        ([BINARY, BINARY * 255], {"mask_threshold": 128}, "cuts files of 0 and 1 and of"),
        ([BINARY], {"num_classes": 2}, ""),
        ([BINARY * 255], {}, ""),
        ([IDS], {"num_classes": 5}, ""),
        ([SOFT], {"mask_threshold": 128}, ""),
    ],
)
def test_flags_that_files_contradict(tmp_path, masks, options, said):
    read = ReadOptions(**options)
    facts = facts_of(tmp_path, *masks, read=read)
    found = contradiction(guess(facts), facts, read)
    assert said in found and bool(said) == bool(found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "one object"),
        ({"num_classes": 4}, "class ids 0..3"),
        ({"mask_threshold": 9, "foreground": "below"}, "one object, below 9"),
        ({"mask_coding": "cityscapes", "num_classes": 19}, "rule of cityscapes, 19"),
        ({"objects": "instance"}, "a number per object"),
    ],
)
def test_flags_in_words(options, said):
    assert said in asked_in_words(ReadOptions(**options))
