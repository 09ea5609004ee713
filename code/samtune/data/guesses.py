"""What the values of mask files suggest that they mean, beside what flags say they mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from samtune.config import ReadOptions
from samtune.data.codings import coding_of
from samtune.data.inspection import Facts, Values
from samtune.structures import IGNORE

# Kinds of mask files, by what their values are.
BITS, WIDE, TWO, EDGES = "0 and 1", "0 and 255", "two values", "grey edges"
IDS, NUMBERS, COLOURS, PICTURE, OTHER = "ids", "numbers", "colours", "a picture", "other values"
EMPTY, FULL = "one value, 0", "one value, not 0"
_ONE_OBJECT = {BITS, WIDE, TWO, EDGES}
_MOST_IDS = 64  # class ids are below; more values of 8 bits are grey levels
_MOST_COLOURS = 32  # that a flag can reasonably list
_SHARP = 0.9  # the share of a mask's pixels that are all black or all white, edges being grey
_FEW = 8  # so many values may be ids, if they are not 0 to 255
_CONTRAST = 64  # how far apart black and white are at least, where values between are edges


class Guess(NamedTuple):
    """What mask files look like. words: what they hold. flags: to read them so, "" for none.

    answer: what they show: "object" (one kind of it), "classes", "instances", or "" where it cannot
    be told.
    """

    words: str
    flags: str
    answer: str


def kind_of(values: Values) -> str:
    """One of the kinds above."""
    whole = all(value == int(value) for value in values.counts if value == value)
    if values.kind == "colour":
        return COLOURS if values.distinct <= _MOST_COLOURS else PICTURE
    if values.kind == "unknown" or not whole:
        return OTHER
    if values.kind == "1-bit":
        return BITS
    if values.distinct == 1:
        return FULL if values.low else EMPTY
    if values.low == 0 and values.distinct == 2 and values.high in (1, 255):
        return BITS if values.high == 1 else WIDE
    if values.distinct == 2 and values.high - values.low > 1:
        return TWO
    if _has_grey_edges(values):
        return EDGES
    if values.low < 0:
        return OTHER
    if values.high > 255:
        return NUMBERS
    return IDS if values.distinct <= _MOST_IDS else PICTURE


def _has_grey_edges(values: Values) -> bool:
    """Whether nearly all is black or white. Few small ids and `IGNORE` are not meant."""
    wide = values.low == 0 and values.high == 255
    return (
        values.high <= 255
        and values.high - values.low >= _CONTRAST
        and values.extreme >= _SHARP
        and max(set(values.counts) - {IGNORE}) >= _CONTRAST
        and (wide or values.distinct > _FEW)
    )


def kinds_in(facts: Sequence[Facts]) -> Counter:
    """How many mask files are of each kind."""
    return Counter(kind_of(one.values) for one in facts if one.values is not None)


def guess(facts: Sequence[Facts]) -> Guess | None:
    """What the mask files of a split suggest together; None where there are none."""
    kinds = kinds_in(facts)
    if not kinds:
        return None
    telling = [kind for kind in kinds if kind not in (EMPTY, FULL)] or list(kinds)
    words = ", ".join(f"{_said(kind, facts)} ({count})" for kind, count in kinds.most_common())
    main = max(telling, key=lambda kind: kinds[kind])
    if set(telling) <= {BITS, WIDE, EMPTY, FULL}:
        return Guess(words, "", "object")
    if set(telling) <= _ONE_OBJECT:
        return Guess(words, f"--mask_threshold {_threshold(facts)}", "object")
    if set(telling) <= {IDS, BITS, WIDE, FULL}:  # of ids, 255 is what is ignored
        ids = {int(v) for one in facts if one.values for v in one.values.counts} - {IGNORE}
        return Guess(words, f"--num_classes {max(2, max(ids, default=0) + 1)}", "classes")
    if main == NUMBERS:
        return Guess(words, "--objects instance", "instances")
    if main == COLOURS and (listed := _colours(facts)):
        return Guess(words, f'--class_colours "{listed}"', "classes")
    return Guess(words, "", "")


def asked_in_words(read: ReadOptions) -> str:
    """How flags say masks are read."""
    coding = coding_of(read)
    if read.objects == "instance":
        return "a number per object (--objects instance)"
    if coding is not None:
        named = read.mask_coding if read.mask_coding != "auto" else "--class_colours"
        return f"by the rule of {named}, {coding.num_classes} class(es)"
    if read.num_classes > 1:
        return f"class ids 0..{read.num_classes - 1} (--num_classes {read.num_classes})"
    if read.mask_threshold >= 0:
        return f"one object, {read.foreground} {read.mask_threshold} (--mask_threshold)"
    return "one object"


def contradiction(found: Guess, facts: Sequence[Facts], read: ReadOptions) -> str:
    """Why what files hold and what flags say do not go together; "" if they do."""
    kinds = kinds_in(facts)
    if kinds[PICTURE] > sum(kinds.values()) / 2:
        return "most of them look like photographs, not masks: are the folders the right ones?"
    if coding_of(read) is not None:
        return ""
    if read.num_classes > 1 and found.answer == "object" and kinds[WIDE]:
        ignored = f", and {IGNORE} is ignored" if read.ignore_index == IGNORE else ""
        return f"{WIDE} is one object, not {read.num_classes} classes{ignored}: drop --num_classes"
    threshold = read.mask_threshold
    highest = max((one.values.high for one in facts if one.values), default=0)
    if read.num_classes < 2 and threshold > highest > 0:
        return f"no value reaches --mask_threshold {threshold}: every mask is of one side only"
    if kinds[BITS] and kinds[WIDE] and threshold >= 0:
        return f"--mask_threshold {threshold} cuts files of {BITS} and of {WIDE} differently"
    return ""


def _said(kind: str, facts: Sequence[Facts]) -> str:
    """A kind with its numbers."""
    all_values = [one.values for one in facts if one.values and kind_of(one.values) == kind]
    low, high = min(v.low for v in all_values), max(v.high for v in all_values)
    distinct = max(v.distinct for v in all_values)
    if kind in (IDS, NUMBERS):
        found = sorted({v for values in all_values for v in values.counts})
        some = ", ".join(f"{v:g}" for v in found[:16]) + (", ..." if len(found) > 16 else "")
        return f"whole numbers {some}"
    if kind == TWO:
        return f"two values such as {all_values[0].low:g} and {all_values[0].high:g}"
    if kind == EDGES:
        between = 1 - sum(v.extreme for v in all_values) / len(all_values)
        return f"black and white with {between:.2%} grey between (JPEG or smoothed edges)"
    if kind == COLOURS:
        return f"up to {distinct} colours"
    if kind == PICTURE:
        return f"up to {distinct} values, as a photograph has"
    if kind == FULL:
        return f"only {low:g}" if low == high else f"one value each, {low:g} to {high:g}"
    return {EMPTY: "only 0", OTHER: f"values {low:g} to {high:g}"}.get(kind, kind)


def _threshold(facts: Sequence[Facts]) -> int:
    """The middle between dark and light."""
    sides = [(one.values.low, one.values.high) for one in facts if one.values]
    sides = [(low, high) for low, high in sides if high > low]
    lowest, highest = min(high for _, high in sides), max(low for low, _ in sides)
    return int(highest + lowest + 1) // 2


def _colours(facts: Sequence[Facts]) -> str:
    """All colours as `--class_colours` takes them, the most frequent first; "" if too many."""
    pixels = Counter()
    for one in facts:
        if one.values and one.values.kind == "colour":
            pixels.update(one.values.counts)
    if len(pixels) > _MOST_COLOURS:
        return ""
    return ";".join(f"{v >> 16},{v >> 8 & 255},{v & 255}" for v, _ in pixels.most_common())
