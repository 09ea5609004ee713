"""Pairs into tar files that `webdataset` and `--train_shards` read: KEY.jpg beside KEY.mask.png."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from samtune.data.files import Pair
from samtune.data.tar_files import read_bytes
from samtune.errors import UserError


def shard_keys(pairs: Sequence[Pair]) -> list[str]:
    """What each pair is called in a shard: its id, with `_` for dots in the name, which end a key.

    Raises UserError if two would be called alike.
    """
    keys = []
    for pair in pairs:
        folder, slash, name = pair.id.rpartition("/")
        keys.append(folder + slash + name.replace(".", "_"))
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise UserError(
            f"{twice[0]} would name {keys.count(twice[0])} pairs, as a dot ends a key in a shard "
            "and `_` stands for it; rename the files"
        )
    return keys


def write_shard(file: BinaryIO, pairs: Sequence[Pair], keys: Sequence[str]) -> None:
    """Write pairs as one tar, their files as they are; the same pairs give the same bytes.

    Raises UserError for a file that cannot be read.
    """
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, pair in zip(keys, pairs, strict=True):
            for part, path in (("", pair.image_path), (".mask", pair.mask_path)):
                try:
                    content = read_bytes(path)
                except OSError as error:
                    raise UserError(f"{path}: {error.strerror}") from None
                member = tarfile.TarInfo(f"{key}{part}{Path(path.name).suffix.lower()}")
                member.size = len(content)  # no time and no owner: they would differ
                tar.addfile(member, io.BytesIO(content))
