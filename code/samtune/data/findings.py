"""What a person should know about one split's files before training: each rule looks for one thing.

A rule takes a `Split` and gives findings in words. Errors are what training would refuse or learn
nothing from; warnings are what it would silently learn from, and should perhaps not; facts are for
comparison with what one believes to have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from samtune.config import ReadOptions, Size
from samtune.data.class_shares import ClassShares, class_names
from samtune.data.codings import coding_of
from samtune.data.files import Pair
from samtune.data.guesses import (
    BITS,
    WIDE,
    asked_in_words,
    contradiction,
    guess,
    kinds_in,
)
from samtune.data.inspection import MOST_BOXES, Facts
from samtune.data.transforms import fit_scale, fit_size

ERROR, WARNING, FACT = "error", "warning", "fact"
LEVELS = (ERROR, WARNING, FACT)
MOST_EXAMPLES = 1000  # that a finding keeps
DECODER_CELL = 4  # pixels of the frame that one number of SAM's mask logits answers for
_WHOLE = 0.99  # of the picture: an object that is no object
_INVERTED = 0.5  # of the picture and of its border: more looks like background
_ALL_AROUND = 0.95  # of the border, by an object that leaves out what lies in the middle
_NEARLY_ALL, _FEW = 0.8, 0.2  # of the masks
_QUANTILES = (0.05, 0.5, 0.95)


class Finding(NamedTuple):
    """One thing that was found. level: of `LEVELS`. kind: a name for programs ("empty_masks").

    split: which part of the data, "" for several. text: a sentence. examples: ids, or lines about
    files, at most `MOST_EXAMPLES`. count: how many there are of what the examples show.
    """

    level: str
    kind: str
    split: str
    text: str
    examples: tuple[str, ...] = ()
    count: int = 0


@dataclass(frozen=True)
class Split:
    """A part of the data, and what its files hold, pair by pair.

    read: how files are read, with `objects` settled. frame: (S_h, S_w) of the model.
    """

    name: str
    pairs: Sequence[Pair]
    facts: Sequence[Facts]
    read: ReadOptions
    frame: Size

    @cached_property
    def usable(self) -> list[Facts]:
        """Those that training would take."""
        return [one for one in self.facts if not one.problems]

    @cached_property
    def classes(self) -> ClassShares:
        """What each class covers; without names where masks show one kind of object."""
        total = ClassShares(tuple(class_names(self.read)) if self.read.num_classes > 1 else ())
        for one in self.usable:
            total.pixels.update(one.pixels)
            total.images.update(one.pixels.keys())
        return total

    def shrinking(self, one: Facts) -> float:
        """Pixels of the frame per pixel of a picture."""
        (height, width), fitted = one.size, fit_size(one.size, self.frame, self.read.resize)
        return fitted[0] * fitted[1] / (height * width)

    def is_tiny(self, one: Facts) -> bool:
        """Whether it shows an object smaller than a cell of the decoder's answer."""
        areas = one.boxes[:, 4] * self.shrinking(one)
        return bool((areas < DECODER_CELL**2).any())

    def looks_inverted(self, one: Facts) -> bool:
        """Whether the object is what a background would be."""
        one_object = self.read.num_classes < 2 and self.read.objects != "instance"
        return one_object and min(one.share, one.border) > _INVERTED

    def covers_all(self, one: Facts) -> bool:
        """Whether a mask is an object all over."""
        return self.read.num_classes < 2 and one.share >= _WHOLE


def findings_of(split: Split) -> list[Finding]:
    """All that the rules find in a split."""
    return [finding for rule in RULES for finding in rule(split)]


def of_some(
    level: str, kind: str, split: Split, some: Sequence[Facts], text: str
) -> Iterator[Finding]:
    """A finding about some pictures, if there are any: "3 of 24 TEXT"."""
    if some:
        ids = tuple(one.id for one in some[:MOST_EXAMPLES])
        text = f"{len(some)} of {len(split.usable)} {text}"
        yield Finding(level, kind, split.name, text, ids, len(some))


def unusable(split: Split) -> Iterator[Finding]:
    """Files that cannot be read, do not fit, or hold what no coding knows."""
    lines = tuple(line for one in split.facts for line in one.problems)
    if lines:
        bad = len(split.facts) - len(split.usable)
        text = f"{bad} of {len(split.facts)} pairs cannot be used"
        yield Finding(ERROR, "unusable", split.name, text, lines[:MOST_EXAMPLES], len(lines))


def sizes(split: Split) -> Iterator[Finding]:
    """How large pictures are, and how the frame changes that."""
    read = [one.size for one in split.facts if one.size[0]]
    if not read:
        return
    (low, high), number = (np.min(read, 0), np.max(read, 0)), len(set(read))
    text = f"pictures are {low[1]} x {low[0]} pixels, width x height"
    if number > 1:
        text = (
            f"pictures have {number} sizes, {low[1]} to {high[1]} pixels wide and {low[0]} to "
            f"{high[0]} high"
        )
    scales = [fit_scale(size, split.frame) for size in set(read)]
    text += f"; the frame of {split.frame} px scales them by {_span(scales)}"
    yield Finding(FACT, "sizes", split.name, text, count=len(read))
    slivers = [one for one in split.usable if min(one.size) * fit_scale(one.size, split.frame) < 1]
    what = "pictures are so narrow that one pixel of the frame or less is left of a side"
    yield from of_some(WARNING, "slivers", split, slivers, what)


def modes(split: Split) -> Iterator[Finding]:
    """How files hold their pixels."""
    sides = []
    for side in ("image", "mask"):
        found = Counter(getattr(one, f"{side}_mode") for one in split.facts)
        del found[""]
        words = ", ".join(f"{count} {mode}" for mode, count in found.most_common())
        sides += [f"{side} files: {words}"] if found else []
    if sides:
        yield Finding(FACT, "modes", split.name, "; ".join(sides))
    plain = [one for one in split.usable if one.plain]
    yield from of_some(WARNING, "plain", split, plain, "images have one colour only")


def remarks(split: Split) -> Iterator[Finding]:
    """What the reader remarks while it reads."""
    for note in dict.fromkeys(note for one in split.usable for note in one.notes):
        noted = [one for one in split.usable if note in one.notes]
        yield from of_some(WARNING, "reading", split, noted, note)


def coding(split: Split) -> Iterator[Finding]:
    """What the values of mask files look like, beside what flags say."""
    found = guess(split.facts)
    if found is None:
        return
    text = f"masks hold {found.words} and are read as {asked_in_words(split.read)}"
    kinds, level = kinds_in(split.facts), WARNING
    refused = len(split.usable) < len(split.facts)
    if why := contradiction(found, split.facts, split.read):
        text += f": {why}"
    elif refused and found.flags and coding_of(split.read) is None:
        text += f"; {found.flags} fits what they hold"
    elif kinds[BITS] and kinds[WIDE] and split.read.num_classes < 2:
        text += f": files of {BITS} beside files of {WIDE} are perhaps from two tools"
    else:
        level = FACT
    yield Finding(level, "coding", split.name, text, count=sum(kinds.values()))


def polarity(split: Split) -> Iterator[Finding]:
    """Whether the object looks like a background, in nearly all masks that show one."""
    shown = [one for one in split.usable if one.share]
    inverted = [one for one in shown if split.looks_inverted(one)]
    if len(inverted) < _NEARLY_ALL * len(shown):
        unlike = [f for f in inverted if f.border > _ALL_AROUND and not split.covers_all(f)]
        if len(unlike) <= _FEW * len(shown):  # where they are many, objects are just large
            what = (
                "masks show an object that is most of the picture and nearly all of its border, "
                "unlike the others: are they inverted?"
            )
            yield from of_some(WARNING, "polarity", split, unlike, what)
        return
    side = "below" if split.read.foreground == "above" else "above"
    advice = "say another --mask_coding"
    if coding_of(split.read) is None:
        advice = f"say --foreground {side}"
    what = (
        "masks show an object that covers most of the picture and of its border, as a background "
        f"does: if object and background are interchanged, {advice}"
    )
    yield from of_some(WARNING, "polarity", split, inverted, what)


def emptiness(split: Split) -> Iterator[Finding]:
    """Masks that show nothing to ask about, or nothing else."""
    empty = [one for one in split.usable if not one.things]
    if empty and len(empty) == len(split.usable):
        what = "masks show nothing to ask about: there is nothing to learn"
        yield from of_some(ERROR, "empty_masks", split, empty, what)
    else:
        what = "masks are empty (--empty_masks says what becomes of them under a prompt)"
        yield from of_some(WARNING, "empty_masks", split, empty, what)
    whole = [one for one in split.usable if split.covers_all(one)]
    what = "masks are an object from border to border"
    yield from of_some(WARNING, "whole_masks", split, whole, what)


def tininess(split: Split) -> Iterator[Finding]:
    """Objects that the decoder cannot draw."""
    tiny = [one for one in split.usable if split.is_tiny(one)]
    what = (
        f"pictures show objects smaller than {DECODER_CELL} x {DECODER_CELL} pixels of the frame "
        f"({split.frame} px), the grain of SAM's masks; a larger --image_size, --min_area or tiles "
        "help"
    )
    yield from of_some(WARNING, "tiny_objects", split, tiny, what)


def classes(split: Split) -> Iterator[Finding]:
    """What each class covers."""
    shares = split.classes
    if not shares.number:
        return
    for line in shares.remarks(len(split.usable)):
        level = WARNING if "never occur" in line or "leave --num_classes" in line else FACT
        yield Finding(level, "classes", split.name, line)


def boxes(split: Split) -> Iterator[Finding]:
    """How many objects there are, how large, and of which shape."""
    counts = [one.things for one in split.usable]
    table = np.concatenate([one.boxes for one in split.usable] or [np.zeros((0, 5))])
    if not len(table):
        return
    number = f"{np.mean(counts):.3g} per picture, {max(counts)} at most"
    sides = table[:, 2:4] - table[:, :2]
    cover = [area for one in split.usable for area in covers(one)]
    text = (
        f"{len(table)} boxes, {number}; of 100 of them the 5th, middle and 95th: "
        f"{_quantiles(sides[:, 0])} pixels wide, {_quantiles(sides[:, 1])} high, width by height "
        f"{_quantiles(sides[:, 0] / np.maximum(sides[:, 1], 1))}, object by picture "
        f"{_quantiles(cover)}"
    )
    if max(counts) > MOST_BOXES:
        text += f" (of the first {MOST_BOXES} of a picture)"
    yield Finding(FACT, "boxes", split.name, text, count=len(table))


def covers(one: Facts) -> np.ndarray:
    """(n,): the share of the picture that each object covers."""
    return one.boxes[:, 4] / max(1, one.size[0] * one.size[1])


def printable(text: str) -> str:
    """Text for consoles and pages: names of files may hold what steers a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _span(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _quantiles(numbers: Sequence[float]) -> str:
    return " / ".join(f"{value:.3g}" for value in np.quantile(numbers, _QUANTILES))


RULES: tuple[Callable[[Split], Iterator[Finding]], ...] = (
    unusable, coding, polarity, emptiness, tininess, remarks, modes, sizes, classes, boxes,
)  # fmt: skip
