"""What splits share that they should not: pictures, sequences; and classes that none teaches."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from samtune.data.class_shares import class_names
from samtune.data.findings import FACT, MOST_EXAMPLES, WARNING, Finding, Split
from samtune.data.inspection import LOOK_BITS, Facts

_CHANCE = 200  # pairs of any two pictures that show how much pictures differ anyhow
_ALIKE = 0.5  # neighbours that differ less than this part of that are near-duplicates
_NEAR = 1.5  # numbers in names that differ by at most so many usual steps are neighbours
_LISTED = 3  # names of sequences in a sentence


class Place(NamedTuple):
    """A picture in a split."""

    split: str
    facts: Facts

    def __str__(self) -> str:
        return f"{self.split} {self.facts.id}"


class Neighbours(NamedTuple):
    """Pictures of one sequence in two splits.

    sequence: its name. named: whether the data set says that it is one; else names suggest it.
    pairs: those of them that follow each other.
    """

    sequence: str
    named: bool
    pairs: list[tuple[Facts, Facts]]


def leaks_between(splits: Sequence[Split]) -> list[Finding]:
    """All that is found when splits are compared."""
    found = [*duplicates(splits), *other_classes(splits)]
    for one, other in combinations(splits, 2):
        if one is splits[0]:  # what is chosen by or scored on pictures like those trained on
            found += sequences(one, other)
    return found


def duplicates(splits: Sequence[Split]) -> Iterator[Finding]:
    """Pictures that occur more than once, pixel by pixel, whatever their files are."""
    several = same_pictures(splits)
    for name, other in combinations([split.name for split in splits], 2):
        shared = [g for g in several if {name, other} <= {place.split for place in g}]
        text = (
            f"{name} and {other} share {len(shared)} picture(s), pixel by pixel: scores on them "
            "say what is remembered, not what was learned; take them out of one side"
        )
        yield from _finding("shared_pictures", shared, text)
    within = [g for g in several if len({place.split for place in g}) < len(g)]
    text = f"{len(within)} picture(s) occur more than once in a split"
    yield from _finding("repeated_pictures", within, text)
    differing = [group for group in several if disagree(group)]
    text = f"{len(differing)} picture(s) occur with different masks, which cannot all be right"
    yield from _finding("contradicting_masks", differing, text)


def same_pictures(splits: Sequence[Split]) -> list[list[Place]]:
    """Where each picture stands that occurs more than once; pictures of one colour do not count."""
    places = defaultdict(list)
    for split in splits:
        for one in split.facts:
            if one.picture and not one.plain:
                places[one.picture].append(Place(split.name, one))
    return [group for group in places.values() if len(group) > 1]


def disagree(group: list[Place]) -> bool:
    """Whether one picture has different masks."""
    return len({place.facts.truth for place in group if place.facts.truth}) > 1


def _finding(kind: str, groups: list[list[Place]], text: str) -> Iterator[Finding]:
    if groups:
        examples = tuple(" = ".join(map(str, group[:4])) for group in groups[:MOST_EXAMPLES])
        yield Finding(WARNING, kind, "", text, examples, len(groups))


def other_classes(splits: Sequence[Split]) -> Iterator[Finding]:
    """Classes that are scored but were never shown in training."""
    taught, *others = splits
    for split in others:
        if taught.read.num_classes < 2 or split.read.num_classes != taught.read.num_classes:
            continue
        names = class_names(split.read)
        unseen = [
            f"{names[i]} (in {split.classes.images[i]})"
            for i in range(split.read.num_classes)
            if split.classes.images[i] and not taught.classes.images[i]
        ]
        if unseen:
            text = f"classes that {taught.name} never shows: {', '.join(unseen)}"
            yield Finding(WARNING, "unseen_classes", split.name, text, count=len(unseen))


def sequences(one: Split, other: Split) -> Iterator[Finding]:
    """Frames of one sequence on both sides, by the data set's groups or by numbers in names.

    Names alone prove nothing, as any files may be numbered: they count where pictures with
    neighbouring numbers look more alike than any two pictures do.
    """
    found = neighbours(one, other)
    if known := [n for n in found if n.named]:
        yield _in_both(known, one, other, "pictures of one sequence resemble each other")
    if guessed := [n for n in found if not n.named]:
        near = np.median([_distance(*pair) for n in guessed for pair in n.pairs])
        usual = _usual_distance(one, other)
        if near <= _ALIKE * usual:
            why = (
                f"neighbours there look alike (they differ in {near:.0f} of {LOOK_BITS} points, "
                f"any two pictures in {usual:.0f}), so that {other.name} is nearly known"
            )
            yield _in_both(guessed, one, other, why)
        elif len(guessed) > 1:
            text = (
                f"names in {one.name} and {other.name} are numbered alike ({_listed(guessed)}), "
                "but neighbours do not look alike: no sequences, it seems"
            )
            yield Finding(FACT, "numbered_names", "", text, count=len(guessed))


def _in_both(found: list[Neighbours], one: Split, other: Split, why: str) -> Finding:
    text = (
        f"{one.name} and {other.name} share {len(found)} sequence(s), {_listed(found)}: {why}; "
        "split between sequences, not within"
    )
    pairs = [pair for n in found for pair in n.pairs]
    examples = tuple(f"{a.id} ~ {b.id}" for a, b in pairs[:MOST_EXAMPLES])
    return Finding(WARNING, "shared_sequences", "", text, examples, len(pairs))


def _listed(found: list[Neighbours]) -> str:
    names = ", ".join(n.sequence for n in found[:_LISTED])
    return names + (f" and {len(found) - _LISTED} more" if len(found) > _LISTED else "")


def neighbours(one: Split, other: Split) -> list[Neighbours]:
    """Sequences with pictures in both splits that follow each other there."""
    sides = [_by_sequence(split) for split in (one, other)]
    found = []
    for key in sorted(sides[0].keys() & sides[1].keys()):
        mine, others = sides[0][key], sides[1][key]
        pairs = _following(mine, others)
        if not pairs and key[1]:  # that it is a sequence is known without them
            pairs = [(mine[-1][1], others[0][1])]
        if pairs:
            found.append(Neighbours(*key, pairs))
    return found


def sequence_of(facts: Facts) -> tuple[str, bool, int] | None:
    """The sequence of a picture, whether its data set names it, and the picture's place in it.

    `case12_slice003` is number 3 of `case12_slice#`; None where a name has no number.
    """
    match = re.fullmatch(r"(.*?)(\d{1,15})(\D*)", facts.id, re.DOTALL)
    if facts.group:
        return facts.group, True, int(match[2]) if match else 0
    return (f"{match[1]}#{match[3]}", False, int(match[2])) if match else None


def _by_sequence(split: Split) -> dict[tuple[str, bool], list[tuple[int, Facts]]]:
    """Numbers and pictures of each sequence, in rising order."""
    found = defaultdict(list)
    for one in split.usable:
        if place := sequence_of(one):
            found[place[:2]].append((place[2], one))
    return {key: sorted(members, key=lambda m: m[0]) for key, members in found.items()}


def _following(mine: list[tuple[int, Facts]], others: list[tuple[int, Facts]]) -> list:
    """For each of the others the nearest of mine, where there is one next to it.

    The same picture on both sides is no neighbour: that is told already.
    """
    numbers = np.array([number for number, _ in mine])
    steps = np.diff(sorted({*numbers.tolist(), *(number for number, _ in others)}))
    reach = _NEAR * (np.median(steps) if len(steps) else 0)
    pairs = []
    for number, facts in others:
        place = int(np.searchsorted(numbers, number))
        beside = range(max(0, place - 1), min(len(mine), place + 1))
        nearest = min(beside, key=lambda i: abs(numbers[i] - number))
        one = mine[nearest][1]
        if abs(numbers[nearest] - number) <= reach and one.picture != facts.picture:
            pairs.append((one, facts))
    return pairs


def _distance(one: Facts, other: Facts) -> int:
    """Points in which two looks differ."""
    return (int.from_bytes(one.look, "big") ^ int.from_bytes(other.look, "big")).bit_count()


def _usual_distance(one: Split, other: Split) -> float:
    """The median distance of a picture of one split and one of the other, of a seeded sample."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, len(split.usable), _CHANCE) for split in (one, other)]
    pairs = zip(*drawn, strict=True)
    return float(np.median([_distance(one.usable[i], other.usable[j]) for i, j in pairs]))
