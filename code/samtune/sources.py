"""Which pictures a run trains on, validates on and is scored on: files, shards or data sets."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from samtune.config import ReadOptions, TestDataOptions, TrainDataOptions
from samtune.data.catalog import (
    find_dataset,
    find_joined,
    has_split,
    locate,
    names_in,
    read_options,
)
from samtune.data.catalog_rows import DATASETS
from samtune.data.coco import find_described
from samtune.data.files import Pair, find_pairs, select
from samtune.data.lists import listed_pairs
from samtune.data.sample_data import SampleSet, make_sample_set
from samtune.data.samples import is_annotations
from samtune.data.shards import index_shards, named_shards, shard_pairs
from samtune.data.tar_files import ShardIndex
from samtune.engine import distributed
from samtune.engine.distributed import Process
from samtune.errors import UserError

SAMPLE_SET = Path("dataset/sample")
_FILES = ("image_dir", "mask_dir", "list", "shards")
# A test set is fitted as the training images were, and the same is asked about it.
_KEPT = ("resize", "objects", "background", "ask_classes", "min_area")
_KEPT_OF_OWN = ("mask_threshold", "foreground", "intensity_range")


Indexes = dict[str, list[ShardIndex]]  # by the flag that names the shards


class ScoredSet(NamedTuple):
    """Pictures to score, and how their files are read. name: of the data set, "" of others."""

    name: str
    pairs: list[Pair]
    read: ReadOptions


def complete_data(
    data: TrainDataOptions, test: TestDataOptions, read: ReadOptions, process: Process
) -> tuple[TrainDataOptions, TestDataOptions, ReadOptions]:
    """Collective. Fill in what was left open: what named data sets decide, the sample set, folders
    that validation and test share with training. Raises UserError on all ranks alike.
    """
    with distributed.together():
        data, test, read = complete_named(data, test, read)
    if not data.named:
        distributed.once_per_machine(process, lambda: make_sample_set(SAMPLE_SET))
    with distributed.together():
        if not data.named:
            data = replace(data, **_sample_folders("train"), **_sample_folders("val"))
            test = test if test.named else replace(test, **_sample_folders("test"))
        own = data.val_image_dir or data.val_shards or data.dataset
        if not own and (data.val_slice or data.val_list):
            data = replace(
                data, val_image_dir=data.train_image_dir, val_mask_dir=data.train_mask_dir,
                val_list=data.val_list or data.train_list,
                val_shards="" if data.val_list else data.train_shards,
            )  # fmt: skip
        if test.test_slice and not test.named:
            test = replace(
                test, test_image_dir=data.train_image_dir, test_mask_dir=data.train_mask_dir,
                test_list=data.train_list, test_shards=data.train_shards,
            )  # fmt: skip
    return data, test, read


def refuse_without_validation(data: TrainDataOptions) -> None:
    """Raise UserError if completed options name nothing to validate on."""
    if not (data.val_image_dir or data.val_list or data.val_shards or data.dataset):
        raise UserError(
            "there is nothing to validate on: set --val_image_dir and --val_mask_dir, or take a "
            "part of the training data by --train_slice :80 --val_slice 80:"
        )


def complete_named(
    data: TrainDataOptions, test: TestDataOptions, read: ReadOptions
) -> tuple[TrainDataOptions, TestDataOptions, ReadOptions]:
    """Fill in what named data sets decide: how files are read, what is scored.

    The result is what a run records, so that scoring needs no flag. Raises UserError for a data set
    that is unknown or not there, and for flags that contradict it.
    """
    if test.test_datasets and not test.test_data_root:
        test = replace(test, test_data_root=data.data_root)
    if data.dataset:
        for flag in (f"{split}_{kind}" for split in ("train", "val") for kind in _FILES):
            if getattr(data, flag):
                raise UserError(f"--dataset and --{flag} both say what is trained on; keep one")
        names = names_in(data.dataset, "+", "--dataset")
        read = read_options(names, data.data_root, read)
        if not test.named:
            scored = [name for name in names if has_split(name, data.data_root, "test")]
            root = data.data_root if scored else ""
            test = replace(test, test_datasets=",".join(scored), test_data_root=root)
    elif data.data_root and not test.test_datasets:
        raise UserError(f"--data_root {data.data_root}: say with --dataset what it holds")
    for name in tested(test):  # now, not after hours of training
        locate(name, test.test_data_root)
    return data, test, read


def look_into_shards(process: Process, *groups: TrainDataOptions | TestDataOptions) -> Indexes:
    """Collective. What lies in the shards that options name, by flag.

    Rank 0 says which shards there are; then each rank indexes its share. Raises UserError on all
    ranks alike.
    """
    flags = {f.name: getattr(group, f.name) for group in groups for f in fields(group)}
    texts = {f"--{name}": text for name, text in flags.items() if name.endswith("_shards") and text}
    if not texts:
        return {}
    with distributed.together():
        named = {flag: named_shards(text, flag) for flag, text in texts.items() if process.is_main}
    named = distributed.broadcast_object(named)
    places = list(dict.fromkeys(place for part in named.values() for place in part))
    mine = places[process.rank :: process.world]
    with distributed.together():
        found = dict(zip(mine, index_shards(mine), strict=True))
    for part in distributed.all_gather_objects(found):
        found |= part
    return {flag: [found[place] for place in part] for flag, part in named.items()}


def training_pairs(
    data: TrainDataOptions, read: ReadOptions, indexes: Indexes | None = None
) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on and those to validate on. Raises UserError if they share an image.

    indexes: of `look_into_shards`; without them this process looks by itself.
    """
    train, val = (split_pairs(split, data, read, indexes) for split in ("train", "val"))
    refuse_shared(train, val)
    return train, val


def split_pairs(
    split: str, data: TrainDataOptions, read: ReadOptions, indexes: Indexes | None = None
) -> list[Pair]:
    """The pairs of one split, "train" or "val". indexes: as `training_pairs` takes them."""
    if not data.dataset:
        return _of_files(split, data, read, indexes)
    names = names_in(data.dataset, "+", "--dataset")
    pairs = find_joined(names, data.data_root, split, data.val_share)
    return select(pairs, getattr(data, f"{split}_slice"), f"--{split}_slice")


def refuse_shared(train: list[Pair], val: list[Pair]) -> None:
    """Raise UserError if an image is trained on and validated on."""
    twice = {pair.image_path for pair in train} & {pair.image_path for pair in val}
    if twice:
        raise UserError(
            f"{len(twice)} images are in training and in validation, {min(map(str, twice))} for "
            "one; validation would be blind: separate them by folders or by --train_slice, "
            "--val_slice"
        )


def scored_set(
    test: TestDataOptions,
    read: ReadOptions,
    own: Collection[str] = (),
    said: dict | None = None,
    indexes: Indexes | None = None,
) -> ScoredSet:
    """The pictures of one test set: of folders, a list, shards, or the one data set that is named.

    read: how the run's files are read; what has no name is read like this. A data set is read as
    its row says and as flags say (`said`, by name); one that the run was trained on (`own`) keeps a
    threshold and a range of the run's. indexes: as `training_pairs` takes them.
    Raises UserError if there is nothing, or if it has other classes than the run.
    """
    if not test.test_datasets:
        return ScoredSet("", _of_files("test", test, read, indexes), read)
    (name,) = tested(test)
    kept = _KEPT + (_KEPT_OF_OWN if name in own else ())
    base = {key: getattr(read, key) for key in kept}
    base |= {key: value for key, value in (said or {}).items() if key in vars(read)}
    base = read_options([name], test.test_data_root, ReadOptions(**base))
    if base.num_classes != read.num_classes:
        raise UserError(
            f"--test_datasets {name}: it has {base.num_classes} class(es), the run "
            f"{read.num_classes}"
        )
    pairs = find_dataset(name, test.test_data_root, "test")
    return ScoredSet(name, select(pairs, test.test_slice, "--test_slice"), base)


def scored_sets(
    test: TestDataOptions,
    read: ReadOptions,
    own: Collection[str] = (),
    said: dict | None = None,
    indexes: Indexes | None = None,
) -> list[ScoredSet]:
    """Every test set that is named, or the one of folders, a list or shards; see `scored_set`."""
    return [
        scored_set(replace(test, test_datasets=name), read, own, said, indexes)
        for name in tested(test) or [""]
    ]


def said_of(data: TrainDataOptions) -> str:
    """Where the training data is from, for people; of data sets also what their splits are."""
    if not data.dataset:
        return data.train_shards or data.train_list or data.train_image_dir
    names = names_in(data.dataset, "+", "--dataset")
    rows = "".join(f"\n  {DATASETS[name].title}: {DATASETS[name].splits}" for name in names)
    return f"{data.dataset} ({data.data_root}){rows}"


def tested(test: TestDataOptions) -> list[str]:
    """The named test sets. Raises UserError for one that is unknown, or folders beside them."""
    if not test.test_datasets:
        return []
    for kind in _FILES:
        if getattr(test, f"test_{kind}"):
            raise UserError(f"--test_datasets and --test_{kind} both say what is scored; keep one")
    return names_in(test.test_datasets, ",", "--test_datasets")


def _sample_folders(split: str) -> dict[str, str]:
    """The sample set's folders of one split, as options."""
    files = SampleSet(SAMPLE_SET)
    return {
        f"{split}_image_dir": str(files.image_dir(split)),
        f"{split}_mask_dir": str(files.mask_dir(split)),
    }


def _of_files(
    split: str,
    data: TrainDataOptions | TestDataOptions,
    read: ReadOptions,
    indexes: Indexes | None = None,
) -> list[Pair]:
    """The pairs of one split's folders, list or shards; its name is that of the flags."""
    image_dir, mask_dir, listed, shards = (getattr(data, f"{split}_{kind}") for kind in _FILES)
    flags = (f"--{split}_image_dir", f"--{split}_mask_dir")
    if shards:
        pairs = _of_shards(split, data, read, indexes or {})
    elif listed:
        pairs = listed_pairs(listed, image_dir, mask_dir, f"--{split}_list")
    else:
        for flag, folder in zip(flags, (image_dir, mask_dir), strict=True):
            if not folder:
                raise UserError(f"{flag} is not set")
        if is_annotations(mask_dir):
            pairs = find_described(image_dir, mask_dir, flags[0])
        else:
            pairs = find_pairs(image_dir, mask_dir, read, flags)
    return select(pairs, getattr(data, f"{split}_slice"), f"--{split}_slice")


def _of_shards(split: str, data, read: ReadOptions, indexes: Indexes) -> list[Pair]:
    """The pairs of one split's shards."""
    flag = f"--{split}_shards"
    for kind in _FILES:
        if kind != "shards" and getattr(data, f"{split}_{kind}"):
            raise UserError(f"{flag} and --{split}_{kind} both say where files lie; keep one")
    found = indexes.get(flag)
    if found is None:
        found = index_shards(named_shards(getattr(data, f"{split}_shards"), flag))
    return shard_pairs(found, read, flag)
