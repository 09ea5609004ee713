"""Tar shards as a source of pairs: images and masks side by side, as `webdataset` names them.

`a/0001.jpg` and `a/0001.mask.png` make one pair: its key is the path up to the first dot of the
name, and what follows says which part of the sample a member is
(https://github.com/webdataset/webdataset, "The WebDataset Format").
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from samtune.config import ReadOptions
from samtune.data.files import EXTENSIONS, Affixes, Pair, natural, pair_up
from samtune.data.remote import is_url, refuse_secrets
from samtune.data.tar_files import ShardIndex, TarMember, index_tar
from samtune.errors import UserError

_MOST_SHARDS = 10**6
_MOST_BRACES = 16  # in one path
_THREADS = 8  # a shard that is far away answers late

_log = logging.getLogger("samtune")


class Part(NamedTuple):
    """Which members are images, or masks, by the word between key and extension.

    Has the interface of `Affixes`, and so stands in for them.
    """

    words: tuple[str, ...]

    def key(self, stem: str) -> str | None:
        """The key in a member's path without its last extension; None for another part."""
        folder, slash, name = stem.rpartition("/")
        key, _, word = name.partition(".")
        return f"{folder}{slash}{key}" if key and word.lower() in self.words else None


IMAGE = Part(("", "image", "img"))
MASK = Part(("mask", "seg", "segmentation", "label", "gt"))


def named_shards(text: str, flag: str) -> list[str]:
    """The paths and URLs that a flag's text names, in its order.

    Commas separate; `{000..009}` and `{a,b}` stand for several, `*`, `?` and `[...]` for local
    files. Raises UserError for text that cannot be read, names nothing, names a shard twice, or
    holds a password.
    """
    places = []
    for part in re.split(r",(?![^{}]*\})", text):
        if is_url(part):
            refuse_secrets(part.strip(), flag)
        for place in _unfold(part.strip(), flag):
            places += _matching(place, flag)
            if len(places) > _MOST_SHARDS:
                raise UserError(f"{flag} {text[:200]}: names more than {_MOST_SHARDS} shards")
    twice = [place for place, count in Counter(places).items() if count > 1]
    if twice:
        raise UserError(f"{flag} {text}: names {twice[0]} twice")
    return places


def index_shards(places: Sequence[str]) -> list[ShardIndex]:
    """What lies in each of these shards, read in threads.

    Raises one UserError about all that cannot be used.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(_index_or_error, places))
    errors = [str(one) for one in found if isinstance(one, UserError)]
    if errors:
        more = [f"and {len(errors) - 8} more shards"] if len(errors) > 8 else []
        raise UserError("\n".join(errors[:8] + more))
    return found


def shard_pairs(indexes: Sequence[ShardIndex], read: ReadOptions, flag: str) -> list[Pair]:
    """Every image in shards with its mask, in natural order of their keys, whatever the shards'.

    Without the prefixes and suffixes of `read`, members are named as `IMAGE` and `MASK` say. With
    those of masks, they are told apart as in a folder that holds both: by their paths in the tar
    without the last extension. What is neither is passed over, and the log says so. Raises
    UserError as `find_pairs` does.
    """
    of_image = Affixes(read.image_prefix, read.image_suffix)
    of_mask = Affixes(read.mask_prefix, read.mask_suffix)
    if any(of_image) and not any(of_mask):
        raise UserError(
            f"{flag}: images and masks lie together, so --image_prefix and --image_suffix need "
            "--mask_prefix or --mask_suffix, which tell masks apart"
        )
    if not any(of_mask):
        of_image, of_mask = IMAGE, MASK
    images, masks = [], []
    passed_over = sum((index.passed_over for index in indexes), Counter())
    for member in (member for index in indexes for member in index.members):
        stem = member.stem
        if of_mask.key(stem):
            masks.append(member)
        elif of_image.key(stem):
            images.append(member)
        else:
            passed_over[_extensions(member)] += 1
    _say_passed_over(passed_over, flag)
    if not images and not masks:
        raise UserError(
            f"{flag}: no image and no mask in {len(indexes)} shard(s); expected KEY.jpg with "
            "KEY.mask.png or KEY.seg.png (any format of pictures), or names that --mask_suffix "
            "and --image_suffix fit"
        )
    return pair_up(images, masks, of_image, of_mask, (flag, flag))


def _index_or_error(place: str) -> ShardIndex | UserError:
    try:
        return index_tar(place, EXTENSIONS)
    except UserError as error:
        return error


def _unfold(text: str, flag: str) -> Iterator[str]:
    """The texts that one with braces stands for, one by one, as memory may not hold them."""
    if text.count("{") > _MOST_BRACES:
        raise UserError(
            f"{flag}: more than {_MOST_BRACES} braces in {text[:80]}...; list the shards"
        )
    found = re.search(r"\{([^{}]*)\}", text)
    if not found:
        if not text or "{" in text or "}" in text:
            raise UserError(f"{flag}: {text!r} names no shard; expected for example "
                            "data/train-{000..009}.tar")  # fmt: skip
        yield text
        return
    inside = found[1]
    if span := re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", inside):
        first, last = int(span[1]), int(span[2])
        if not 0 <= last - first < _MOST_SHARDS:
            raise UserError(f"{flag} {text}: {{{inside}}} counts from the smaller number up")
        values = [f"{number:0{len(span[1])}d}" for number in range(first, last + 1)]
    elif "," in inside:
        values = inside.split(",")
    else:
        raise UserError(f"{flag} {text}: {{{inside}}} is neither FIRST..LAST nor a list")
    head, tail = text[: found.start()], text[found.end() :]
    for value in values:
        yield from _unfold(head + value + tail, flag)


def _matching(place: str, flag: str) -> list[str]:
    """The local files that wildcards stand for; else the place itself."""
    if is_url(place):
        if "*" in place:
            raise UserError(f"{flag} {place}: a URL takes no wildcard; use {{000..009}}")
        return [place]
    if not glob.has_magic(place) or os.path.exists(place):
        return [place]
    found = sorted(glob.glob(place, recursive=True), key=natural)
    if not found:
        raise UserError(f"{flag} {place}: there is no such file")
    return found


def _extensions(member: TarMember) -> str:
    """All that follows the key: ".depth.png"."""
    return "." + member.member.rpartition("/")[2].partition(".")[2]


def _say_passed_over(counts: Counter, flag: str) -> None:
    if counts:
        most = ", ".join(f"{name} ({count})" for name, count in counts.most_common(8))
        more = f" and {len(counts) - 8} more kinds" if len(counts) > 8 else ""
        _log.info("%s: %d members that are neither image nor mask are passed over: %s%s",
                  flag, counts.total(), most, more)  # fmt: skip
