"""The verb `shards`: pack folders of images and masks into tar files."""

from __future__ import annotations

from pathlib import Path

from samtune.config import NameOptions, ShardsOptions
from samtune.data.files import Pair, find_pairs
from samtune.data.lists import listed_pairs
from samtune.data.samples import is_annotations
from samtune.data.shard_writer import shard_keys, write_shard
from samtune.engine.durable import write_atomically
from samtune.errors import UserError


def run(options: ShardsOptions, names: NameOptions) -> list[Path]:
    """Write NAME-000000.tar, NAME-000001.tar, ...: all pairs in natural order. Returns their paths.

    Raises UserError for pairs that folders would be refused for, and where there are such shards.
    """
    if options.pairs_per_shard < 1:
        raise UserError(f"--pairs_per_shard {options.pairs_per_shard}: must be at least 1")
    if not options.output_dir:
        raise UserError("--output_dir is not set: the folder that the shards go to")
    pairs = _pairs(options, names)
    keys = shard_keys(pairs)
    folder = _new_folder(options)
    if renamed := sum(key != pair.id for key, pair in zip(keys, pairs, strict=True)):
        print(f"{renamed} names hold a dot, which ends a key in a shard; `_` stands for it")
    paths = []
    for first in range(0, len(pairs), options.pairs_per_shard):
        part = slice(first, first + options.pairs_per_shard)
        path = folder / f"{options.name}-{len(paths):06d}.tar"
        write_atomically(path, lambda out, part=part: write_shard(out, pairs[part], keys[part]))
        print(
            f"{path}: {len(pairs[part])} pairs, {path.stat().st_size / 2**20:.1f} MiB", flush=True
        )
        paths.append(path)
    span = f"{{000000..{len(paths) - 1:06d}}}"
    print(f"read them by --train_shards '{folder / options.name}-{span}.tar'")
    return paths


def _pairs(options: ShardsOptions, names: NameOptions) -> list[Pair]:
    if options.list:
        return listed_pairs(options.list, options.image_dir, options.mask_dir, "--list")
    if is_annotations(options.mask_dir):
        raise UserError(
            f"--mask_dir {options.mask_dir}: a shard holds a mask for each image; COCO's JSON is "
            "read beside a folder of images only"
        )
    return find_pairs(options.image_dir, options.mask_dir, names, ("image_dir", "mask_dir"))


def _new_folder(options: ShardsOptions) -> Path:
    """The output folder, made, without shards of this name: they would mix with the new ones."""
    folder = Path(options.output_dir)
    if old := next(folder.glob(f"{options.name}-*.tar"), None):
        raise UserError(f"--output_dir {folder} already holds {old.name}: remove such shards, or "
                        "choose another --name")  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from None
    return folder
