"""What is found in one split: each rule on data that has its fault, and on data that has not."""

import numpy as np
import pytest

from samtune.config import ReadOptions, Size
from samtune.data.findings import ERROR, FACT, RULES, WARNING, Split, findings_of
from samtune.data.inspection import Facts, Values
from samtune.structures import IGNORE

BINARY = Values("grey", {0: 90, 255: 10}, 2, 0, 255, 1.0)
BITS = Values("grey", {0: 90, 1: 10}, 2, 0, 1, 1.0)
IDS = Values("grey", {0: 90, 2: 10}, 2, 0, 2, 1.0)
FRAME = Size(64, 64)
READ = ReadOptions(objects="mask")


def facts(id="a", area=300, box=(10, 20, 30, 40), **more) -> Facts:
    """A picture of 64 x 64 with one object."""
    boxes = np.array([(*box, area)] if area else [], np.int32).reshape(-1, 5)
    known = {
        "size": (64, 64), "mask_size": (64, 64), "image_mode": "8-bit RGB",
        "mask_mode": "8-bit grey", "values": BINARY, "pixels": {0: 4096 - area, 1: area},
        "things": len(boxes), "boxes": boxes,
    }  # fmt: skip
    return Facts(id, **(known | more))


def found(*of_files, read=READ, frame=FRAME) -> dict:
    """Findings by kind; no kind may occur twice here."""
    findings = findings_of(Split("training", [], of_files, read, frame))
    assert all(one.split == "training" and one.text for one in findings)
    by_kind = {one.kind: one for one in findings}
    assert len(by_kind) == len(findings)
    return by_kind


def test_good_data_gives_facts_only():
    result = found(facts("a"), facts("b"))
    assert {one.level for one in result.values()} == {FACT}
    assert set(result) == {"coding", "modes", "sizes", "boxes"}
    assert result["coding"].text == "masks hold 0 and 255 (2) and are read as one object"
    assert "2 8-bit RGB" in result["modes"].text
    assert "64 x 64 pixels" in result["sizes"].text and "by 1" in result["sizes"].text
    assert "2 boxes, 1 per picture, 1 at most" in result["boxes"].text
    assert "20 / 20 / 20 pixels wide" in result["boxes"].text


def test_nothing_to_look_at_finds_nothing():
    assert found() == {}


def test_files_that_cannot_be_used_are_all_listed():
    bad = [facts(f"{i}", problems=(f"{i}.png: is broken",), area=0) for i in range(30)]
    bad[0] = facts("0", problems=("0.jpg: truncated", "0.png: truncated"), area=0)
    result = found(facts("good"), *bad)["unusable"]
    assert (result.level, result.count) == (ERROR, 31)
    assert result.text == "30 of 31 pairs cannot be used"
    assert result.examples[:3] == ("0.jpg: truncated", "0.png: truncated", "1.png: is broken")


def test_examples_are_bounded(monkeypatch):
    monkeypatch.setattr("samtune.data.findings.MOST_EXAMPLES", 4)
    bad = [facts(f"{i}", problems=("x",), area=0) for i in range(9)]
    result = found(*bad)["unusable"]
    assert len(result.examples) == 4 and result.count == 9


def test_a_refused_split_is_told_what_its_values_suggest():
    result = found(
        facts(values=IDS._replace(counts={0: 9, 1: 1, 2: 4}, distinct=3), problems=("x",))
    )
    assert result["coding"].level == WARNING
    assert "; --num_classes 3 fits what they hold" in result["coding"].text


def test_files_of_two_tools_are_suspicious():
    result = found(facts("a"), facts("b", values=BITS))["coding"]
    assert result.level == WARNING and "two tools" in result.text


@pytest.mark.parametrize(("share", "border", "level"), [(0.8, 0.9, WARNING), (0.8, 0.1, None),
                                                        (0.3, 0.9, None)])  # fmt: skip
def test_an_object_like_a_background(share, border, level):
    pixels = {0: 4096 - int(4096 * share), 1: int(4096 * share)}
    masks = [facts(f"{i}", pixels=pixels, border=border) for i in range(9)]
    masks.append(facts("normal"))  # nearly all is enough
    result = found(*masks)
    assert result.get("polarity", Facts("")).level == level if level else "polarity" not in result
    if level:
        assert "--foreground below" in result["polarity"].text and result["polarity"].count == 9
        below = ReadOptions(objects="mask", foreground="below")
        assert "--foreground above" in found(*masks, read=below)["polarity"].text
        coded = ReadOptions(objects="mask", mask_coding="red_below150")
        assert "another --mask_coding" in found(*masks, read=coded)["polarity"].text
        half = masks[:5] + [facts(f"n{i}") for i in range(5)]
        assert "polarity" not in found(*half)


@pytest.mark.parametrize(("number", "border", "told"), [(1, 1.0, True), (1, 0.6, False),
                                                        (4, 1.0, False)])  # fmt: skip
def test_single_masks_that_are_inverted(number, border, told):
    """One of ten with the whole border as object; if four are so, objects are just large."""
    odd = [facts(f"{i}", pixels={0: 96, 1: 4000}, border=border) for i in range(number)]
    result = found(*odd, *(facts(f"n{i}") for i in range(10 - number)))
    assert ("polarity" in result) == told
    if told:
        assert result["polarity"].text.startswith("1 of 10 masks") and "unlike the others" in str(
            result["polarity"]
        )


def test_empty_masks():
    result = found(facts("a"), facts("b", area=0))["empty_masks"]
    assert (result.level, result.count, result.examples) == (WARNING, 1, ("b",))
    result = found(facts("a", area=0), facts("b", area=0))["empty_masks"]
    assert result.level == ERROR and "nothing to learn" in result.text


def test_masks_all_over():
    result = found(facts("a", area=4096), facts("b"))["whole_masks"]
    assert (result.level, result.examples) == (WARNING, ("a",))


@pytest.mark.parametrize(("frame", "tiny"), [(64, False), (32, True)])
def test_objects_smaller_than_a_cell_of_the_answer(frame, tiny):
    """20 pixels are 20 in a frame of 64, 5 in one of 32; a cell has 16."""
    result = found(facts(area=20), frame=Size(frame, frame))
    assert ("tiny_objects" in result) == tiny


def test_a_squashed_frame_counts_its_own_pixels():
    """A picture of 64 x 16 fills a frame of 64 x 64 fourfold if it is squashed into it."""
    tall = facts(size=(64, 16), area=5, box=(1, 1, 3, 4))
    assert "tiny_objects" in found(tall)
    squash = ReadOptions(objects="mask", resize="squash")
    assert "tiny_objects" not in found(tall, read=squash)


def test_one_colour_and_slivers_and_remarks():
    result = found(
        facts("a", plain=True),
        facts("b", size=(1, 4000)),
        facts("c", notes=("masks are JPEG",)),
    )
    assert result["plain"].examples == ("a",)
    assert result["slivers"].examples == ("b",)
    assert result["reading"].text == "1 of 3 masks are JPEG"
    assert {result[k].level for k in ("plain", "slivers", "reading")} == {WARNING}


def test_classes_and_those_that_never_occur():
    read = ReadOptions(num_classes=3, class_names="sky,road,<b>", objects="class")
    ids = Values("grey", {0: 1, 1: 1}, 2, 0, 1, 1.0)
    split = Split(
        "training", [], [facts(pixels={0: 75, 1: 25, IGNORE: 9}, values=ids)], read, FRAME
    )
    lines = [one for one in findings_of(split) if one.kind == "classes"]
    assert "0 sky 75.00% in 1, 1 road 25.00% in 1" in lines[0].text and lines[0].level == FACT
    assert lines[-1].text == "1 of 3 classes never occur: 2 <b>" and lines[-1].level == WARNING
    assert split.classes.pixels == {0: 75, 1: 25, IGNORE: 9}


def test_each_rule_can_find_something():
    """Every rule of the table has spoken in a test above."""
    assert len(RULES) == 10
