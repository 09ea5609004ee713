"""Data sets by name: found below a folder by what exists there, split, and read as they are coded.

The rows themselves, with their layouts, codings and splits, are in `catalog_rows.py`.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from samtune.config import ReadOptions
from samtune.data.catalog_rows import DATASETS, Dataset, Layout
from samtune.data.files import Pair
from samtune.data.splits import hold_out
from samtune.errors import UserError

_NAMING = ("image_prefix", "image_suffix", "mask_prefix", "mask_suffix")
_CODED = ("mask_coding", "class_colours", "ignore_index")


class Found(NamedTuple):
    """A data set on this disk. root: the folder that its layout's places are below."""

    name: str
    row: Dataset
    layout: Layout
    root: Path


def names_in(text: str, separator: str, flag: str) -> list[str]:
    """The data sets that a flag names. Raises UserError for one that is unknown or named twice."""
    names = [name.strip() for name in text.split(separator)]
    for name in names:
        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"{flag} {name}: no such data set; {hint}there are "
                            f"{', '.join(DATASETS)}")  # fmt: skip
    if len(set(names)) < len(names):
        raise UserError(f"{flag} {text}: a data set stands there twice")
    return names


def locate(name: str, data_root: str | Path) -> Found:
    """Find a data set in a folder that holds it, or in the folder of its usual name there.

    Of its layouts the one counts of which most splits exist. Raises UserError with all that was
    looked for.
    """
    (name,) = names_in(name, "\n", "--dataset")
    row, data_root = DATASETS[name], Path(data_root)
    if not str(data_root) or not data_root.is_dir():
        raise UserError(f"--data_root {data_root}: there is no such folder; it is to hold {name}")
    candidates = [
        (sum(place.exists(root) for place in layout.splits.values()), layout, root)
        for root in (data_root, *(data_root / folder for folder in row.folders))
        for layout in row.layouts
    ]
    existing, layout, root = max(candidates, key=lambda candidate: candidate[0])
    if not existing:
        looked = "; ".join(
            f"{layout.title}: {' or '.join(p.needs for p in layout.splits.values())}"
            for layout in row.layouts
        )
        inside = f" or in its folder {', '.join(row.folders)}" if row.folders else ""
        raise UserError(f"{data_root} does not hold {row.title}; looked there{inside} for {looked}")
    return Found(name, row, layout, root)


def find_dataset(
    name: str, data_root: str | Path, split: str, val_share: float = 0.1
) -> list[Pair]:
    """The pairs of a data set's split: "train", "val" or "test".

    Where it has no validation split of its own, `val_share` of its training pictures are held out
    for one, whole groups at a time. Raises UserError if the data set or the split is not there.
    """
    found = locate(name, data_root)
    layout = found.layout
    try:
        if split in layout.splits:
            pairs = _existing(found, split)
        elif split == "val" or (layout.test_share and split == "test"):
            pairs = _existing(found, "train")
        else:
            raise _no_split(found, split)
        if layout.test_share:
            pairs = hold_out(pairs, layout.test_share, "the test part")[split == "test"]
        if split != "test" and "val" not in layout.splits:
            pairs = hold_out(pairs, val_share, "--val_share")[split == "val"]
    except UserError as error:
        raise UserError(f"{name}, {split} split: {error}") from None
    return pairs


def find_joined(names: list[str], data_root: str, split: str, val_share: float) -> list[Pair]:
    """The pairs of several data sets as one; ids and groups begin with the data set's name then."""
    if len(names) == 1:
        return find_dataset(names[0], data_root, split, val_share)
    return [
        pair._replace(id=f"{name}/{pair.id}", group=pair.group and f"{name}/{pair.group}")
        for name in names
        for pair in find_dataset(name, data_root, split, val_share)
    ]


def has_split(name: str, data_root: str | Path, split: str) -> bool:
    """Whether a data set has a split of this name at all, here."""
    found = locate(name, data_root)
    place = found.layout.splits.get(split)
    return place.exists(found.root) if place else bool(found.layout.test_share)


def read_options(names: list[str], data_root: str | Path, read: ReadOptions) -> ReadOptions:
    """How the files of these data sets, joined, are read: as their rows say.

    `read` may say the same, fit and range of images, or for one kind of object another
    `mask_threshold`. Raises UserError if it contradicts a row, or rows contradict each other.
    """
    results = {name: _read_one(locate(name, data_root), read) for name in names}
    first, *others = results
    for other in others:
        for f in fields(ReadOptions):
            values = [getattr(results[name], f.name) for name in (first, other)]
            if values[0] != values[1]:
                raise UserError(
                    f"{first} and {other} cannot be joined: --{f.name} is {values[0]!r} for one, "
                    f"{values[1]!r} for the other"
                )
    return results[first]


def _read_one(found: Found, read: ReadOptions) -> ReadOptions:
    row, default = found.row, ReadOptions()
    rule = {name: getattr(default, name) for name in _CODED} | found.layout.read
    rule["num_classes"] = row.num_classes
    if row.num_classes > 1:
        rule["class_names"] = ",".join(row.class_names)
        if read.background == default.background:
            rule["background"] = row.background
    said = {
        f.name: getattr(read, f.name)
        for f in fields(read)
        if getattr(read, f.name) != getattr(default, f.name)
    }
    if row.num_classes == 1 and said.keys() & {"mask_threshold", "foreground"}:
        if said.get("mask_coding") == rule["mask_coding"]:
            del said["mask_coding"]
        rule["mask_coding"] = default.mask_coding  # the threshold is the user's
    for name in said:
        if name in _NAMING or (name in ("mask_threshold", "foreground") and row.num_classes > 1):
            raise UserError(
                f"--{name} has no meaning with the data set {found.name}: its layout says it"
            )
        if name != "intensity_range" and said[name] != rule.get(name, said[name]):
            raise UserError(
                f"--{name} {said[name]}: the data set {found.name} has {rule[name] or 'none'}; "
                "leave the flag out, or name its folders by --train_image_dir and --train_mask_dir"
            )
    return replace(read, **(rule | said))


def _existing(found: Found, split: str) -> list[Pair]:
    place = found.layout.splits.get(split)
    if place is None or not place.exists(found.root):
        raise _no_split(found, split)
    pattern = found.row.group
    return [
        pair._replace(group=match[1] if pattern and (match := re.match(pattern, pair.id)) else "")
        for pair in place.pairs(found.root)
    ]


def _no_split(found: Found, split: str) -> UserError:
    place = found.layout.splits.get(split)
    if place:
        return UserError(f"not in {found.root}; looked for {place.needs}")
    if split == "train":
        return UserError(f"{found.row.title} is a test set; use it by --test_datasets {found.name}")
    return UserError(f"{found.layout.title} has none; it has {', '.join(found.layout.splits)}")
