"""Which pairs each part of the data has: as training finds them, but what it refuses is told and
what is left of it is looked at all the same.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from samtune.config import CheckConfig, ReadOptions
from samtune.data.files import Pair, Unpaired, select
from samtune.data.findings import ERROR, MOST_EXAMPLES, Finding
from samtune.data.objects import settle_objects
from samtune.errors import UserError
from samtune.sources import (
    Indexes,
    refuse_shared,
    refuse_without_validation,
    scored_set,
    split_pairs,
    tested,
)

_WINDOW = 40  # names before and behind, in sorted order, among which the nearest is looked for


class Source(NamedTuple):
    """A part of the data. read: how its files are read, with `objects` settled. dataset: its name,
    "" of files."""

    name: str
    pairs: list[Pair]
    read: ReadOptions
    dataset: str = ""


def find_sources(config: CheckConfig, indexes: Indexes) -> tuple[list[Source], list[Finding]]:
    """Training, validation and each test set, and what is wrong with how they are named.

    config: with its data completed.
    """
    findings: list[Finding] = []
    data, read = config.data, settle_objects(config.read, config.prompts)

    def validation() -> list[Pair]:
        refuse_without_validation(data)
        return split_pairs("val", data, config.read, indexes)

    find = _Finder(findings)
    train = find("training", lambda: split_pairs("train", data, config.read, indexes),
                 data.train_slice, "--train_slice")  # fmt: skip
    val = find("validation", validation, data.val_slice, "--val_slice")
    name = data.dataset.split("+")[0]
    sources = [Source("training", train, read, name), Source("validation", val, read, name)]
    find.attempt("validation", lambda: refuse_shared(train, val))
    sources += _test_sources(config, indexes, find)
    return sources, findings


def _test_sources(config: CheckConfig, indexes: Indexes, find: _Finder) -> list[Source]:
    test, sources = config.test, []
    if not test.named:
        return []
    for dataset in find.attempt("test", lambda: tested(test)) or [""]:
        name = f"test {dataset}".rstrip()
        read = config.read

        def pairs(dataset: str = dataset) -> list[Pair]:
            nonlocal read
            own = config.data.dataset.split("+")
            one = replace(test, test_datasets=dataset)
            _, found, read = scored_set(one, config.read, own, indexes=indexes)
            return found

        found = find(name, pairs, test.test_slice, "--test_slice")
        sources.append(Source(name, found, settle_objects(read, config.prompts), dataset))
    return sources


class _Finder:
    """Calls what finds pairs; what it raises becomes a finding."""

    def __init__(self, findings: list[Finding]):
        self.findings = findings

    def __call__(
        self, name: str, find: Callable[[], list[Pair]], part: str, flag: str
    ) -> list[Pair]:
        """The pairs, or where some files have no partner, those that have one."""
        try:
            return find()
        except Unpaired as error:
            finding = unpaired(name, error)
            known = any(one.examples == finding.examples for one in self.findings)
            if not known:  # training and validation may be parts of one folder
                self.findings.append(finding)
            left = error.pairs
        except UserError as error:
            self.findings.append(Finding(ERROR, "source", name, str(error)))
            return []
        return self.attempt(name, lambda: select(left, part, flag)) or []

    def attempt(self, name: str, call: Callable):
        """What the call returns; None where it raises."""
        try:
            return call()
        except UserError as error:
            self.findings.append(Finding(ERROR, "source", name, str(error)))
            return None


def unpaired(name: str, error: Unpaired) -> Finding:
    """Every file without a partner, with the name on the other side that is most like its own."""
    lines = []
    for mine, others, missing in (
        (error.images, error.masks, "no mask"),
        (error.masks, error.images, "no image"),
    ):
        names = sorted(others)
        for key in sorted(mine):
            nearest = _nearest(key, names)
            hint = f"; nearest is {others[nearest].name}" if nearest else ""
            lines.append(f"{mine[key]}: {missing}{hint}")
            if len(lines) == MOST_EXAMPLES:
                break
    count = len(error.images) + len(error.masks)
    text = (
        f"{len(error.images)} image(s) have no mask and {len(error.masks)} mask(s) no image; "
        f"{len(error.pairs)} pairs are complete"
    )
    return Finding(ERROR, "unpaired", name, text, tuple(lines[:MOST_EXAMPLES]), count)


def _nearest(key: str, names: Sequence[str]) -> str:
    """The name that is most like a key, of those around its place in the sorted `names`."""
    place = bisect_left(names, key)
    around = [*names[:_WINDOW], *names[max(0, place - _WINDOW) : place + _WINDOW]]
    found = difflib.get_close_matches(key, around, n=1, cutoff=0.6)
    return found[0] if found else ""
