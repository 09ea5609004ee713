"""Which image file belongs to which mask file: by name, never by position in a listing."""

from __future__ import annotations

import logging
import os
import re
import string
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from samtune.config import NameOptions
from samtune.data.arrays import ArraySlice
from samtune.data.tar_files import TarMember
from samtune.errors import UserError

# What may hold a picture. The name only selects files; the content says how one is decoded.
_IMAGE_FORMATS = "png jpg jpeg jpe tif tiff bmp webp gif jp2 pgm ppm pnm"
EXTENSIONS = frozenset(f".{name}" for name in _IMAGE_FORMATS.split())
_SEPARATORS = "_-. "

_log = logging.getLogger("samtune")


class Pair(NamedTuple):
    """An image and its mask: files, slices of files of arrays, or members of tar files.

    id: the part of the names that they share. group: what neighbours that look alike have in common
    (a sequence, a volume, a scene); "" where every picture stands for itself.
    """

    id: str
    image_path: Path | ArraySlice | TarMember
    mask_path: Path | ArraySlice | TarMember
    group: str = ""


class Affixes(NamedTuple):
    """What surrounds the key in a file name."""

    prefix: str = ""
    suffix: str = ""

    def key(self, stem: str) -> str | None:
        """The key in a stem, or None if the stem does not have these affixes around one."""
        fits = stem.startswith(self.prefix) and stem.endswith(self.suffix)
        key = stem[len(self.prefix) : len(stem) - len(self.suffix)]
        return key if fits and key else None


def find_pairs(
    image_dir: str | Path, mask_dir: str | Path, read: NameOptions, flags: tuple[str, str]
) -> list[Pair]:
    """Every image of a folder with its mask, in natural order of their ids (2 before 10).

    The key of a file is its name without the extension and without the prefix and suffix that
    `read` gives. If it gives none and not one name occurs in both folders, the beginning and end
    that all names of a folder share are tried, and the log says so. Hidden files and files without
    a picture's extension are passed over. flags: the names of the two folders' flags, for messages.
    Raises UserError for a missing or empty folder, a key that two files share, and for every file
    without a partner.
    """
    flags = tuple("--" + flag.lstrip("-") for flag in flags)
    images, masks = _list_pictures(image_dir, flags[0]), _list_pictures(mask_dir, flags[1])
    of_image = Affixes(read.image_prefix, read.image_suffix)
    of_mask = Affixes(read.mask_prefix, read.mask_suffix)
    if Path(image_dir).resolve() == Path(mask_dir).resolve():
        images, masks = _split_one_folder(images, of_image, of_mask, flags)
    found = None
    if not any((*of_image, *of_mask)) and not _stems(images) & _stems(masks):
        found = _discover(_stems(images), _stems(masks))
        of_image, of_mask = found or (of_image, of_mask)
    pairs = pair_up(images, masks, of_image, of_mask, flags)
    if found:
        _log.info(
            "%s: %sKEY%s is paired with %sKEY%s; --image_prefix, --image_suffix, --mask_prefix and "
            "--mask_suffix say otherwise",
            flags[0], *of_image, *of_mask,
        )  # fmt: skip
    return pairs


def pair_up(
    images: list[Path], masks: list[Path], of_image: Affixes, of_mask: Affixes, flags
) -> list[Pair]:
    """Images and masks by their keys, in natural order. Raises UserError as `find_pairs` does."""
    image_of = _by_key(images, of_image, flags[0])
    mask_of = _by_key(masks, of_mask, flags[1])
    _refuse_one_sided(image_of, mask_of, flags)
    return [Pair(key, image_of[key], mask_of[key]) for key in sorted(image_of, key=natural)]


def pair_known(
    image_dir: Path,
    mask_dir: Path,
    of_image: Affixes,
    of_mask: Affixes,
    only: str = "",
    spare_masks: bool = False,
) -> list[Pair]:
    """The pairs of two folders whose naming is known; files of other names are passed over.

    only: a regular expression that keys match from their start. spare_masks: masks without an image
    are passed over, where one folder of masks serves several of images. Raises UserError as
    `find_pairs` does, and where no name fits.
    """
    sides = []
    for folder, affixes in ((image_dir, of_image), (mask_dir, of_mask)):
        files = _list_pictures(folder, "--data_root")
        fitting = [
            path for path in files if (key := affixes.key(path.stem)) and re.match(only, key)
        ]
        if not fitting:
            raise UserError(f"{folder}: no file in it is named {affixes.prefix}KEY{affixes.suffix}"
                            + (f" with a KEY like {only}" if only else ""))  # fmt: skip
        sides.append(_by_key(fitting, affixes, str(folder)))
    image_of, mask_of = sides
    if spare_masks:
        mask_of = {key: path for key, path in mask_of.items() if key in image_of}
    _refuse_one_sided(image_of, mask_of, (str(image_dir), str(mask_dir)))
    return [Pair(key, image_of[key], mask_of[key]) for key in sorted(image_of, key=natural)]


def select(pairs: list[Pair], text: str, flag: str) -> list[Pair]:
    """The pairs of a slice `START:STOP`, each end optional or negative, as in Python."""
    if not text:
        return pairs
    flag = "--" + flag.lstrip("-")
    match = re.fullmatch(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*", text)
    if not match:
        raise UserError(f"{flag} {text}: expected START:STOP, for example 0:20")
    start, stop = (int(end) if end else None for end in match.groups())
    chosen = pairs[start:stop]
    if not chosen:
        raise UserError(f"{flag} {text} selects none of the {len(pairs)} pairs")
    return chosen


def _list_pictures(folder: str | Path, flag: str) -> list[Path]:
    if not str(folder):
        raise UserError(f"{flag} is not set")
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_file())
    except FileNotFoundError:
        raise UserError(f"{flag} {folder}: there is no such folder") from None
    except OSError as error:
        raise UserError(f"{flag} {folder}: {error.strerror}") from None
    names = [
        name
        for name in names
        if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS
    ]
    if strange := [name for name in names if not is_text(name)]:
        raise UserError(f"{flag} {folder}: the name {strange[0]!r} is no UTF-8 text; rename it")
    pictures = [Path(folder) / name for name in names]
    if not pictures:
        raise UserError(
            f"{flag} {folder}: no image file in it ({' '.join(sorted(EXTENSIONS))}; subfolders "
            "are not searched)"
        )
    return pictures


def _split_one_folder(files, of_image, of_mask, flags) -> tuple[list[Path], list[Path]]:
    """Images and masks side by side in one folder: what a mask is named is no image."""
    masks = [path for path in files if of_mask.key(path.stem)]
    images = [path for path in files if path not in set(masks) and of_image.key(path.stem)]
    if not (any(of_mask) and images and masks):
        raise UserError(
            f"{flags[0]} and {flags[1]} are the same folder: say with --mask_suffix or "
            "--mask_prefix how the names of masks differ"
        )
    return images, masks


def _stems(files: Iterable[Path]) -> set[str]:
    return {path.stem for path in files}


def _discover(images: set[str], masks: set[str]) -> tuple[Affixes, Affixes] | None:
    """Affixes under which the stems of both sides pair off exactly, or None.

    What all names of a folder begin (end) with is its prefix (suffix); digits at the seam belong to
    the key, and so does what both folders' affixes have in common there, but for separators.
    """
    of_image, of_mask = _common_affixes(images), _common_affixes(masks)
    tail = _shared_start([of_image.prefix[::-1], of_mask.prefix[::-1]]).rstrip(_SEPARATORS)
    head = _shared_start([of_image.suffix, of_mask.suffix]).rstrip(_SEPARATORS)
    of_image, of_mask = (
        Affixes(prefix[: len(prefix) - len(tail)], suffix[len(head) :])
        for prefix, suffix in (of_image, of_mask)
    )
    image_keys = {of_image.key(stem) for stem in images}
    mask_keys = {of_mask.key(stem) for stem in masks}
    return (of_image, of_mask) if image_keys == mask_keys and None not in image_keys else None


def _common_affixes(stems: set[str]) -> Affixes:
    prefix = _shared_start(stems).rstrip(string.digits)
    suffix = _shared_start([stem[len(prefix) :][::-1] for stem in stems])[::-1]
    return Affixes(prefix, suffix.lstrip(string.digits))


def _shared_start(texts: Iterable[str]) -> str:
    first, last = min(texts), max(texts)  # what these two share, all in between share
    return first[: next((i for i, c in enumerate(first) if last[i : i + 1] != c), len(first))]


def _by_key(files: list[Path], affixes: Affixes, flag: str) -> dict[str, Path]:
    found = defaultdict(list)
    for path in files:
        found[affixes.key(path.stem)].append(path)
    if None in found:
        raise UserError(
            f"{flag}: {_names(found[None])} not named {affixes.prefix}KEY{affixes.suffix} as the "
            "prefix and suffix flags say"
        )
    for key, paths in found.items():
        if len(paths) > 1:
            raise UserError(f"{flag}: {_names(paths)} have the same key {key!r}; keep one of them")
    return {key: paths[0] for key, paths in found.items()}


def _refuse_one_sided(image_of: dict, mask_of: dict, flags: tuple[str, str]) -> None:
    lonely = []
    for mine, other, flag, partner in (
        (image_of, mask_of, flags[0], "a mask"),
        (mask_of, image_of, flags[1], "an image"),
    ):
        if missing := sorted(mine.keys() - other.keys(), key=natural):
            lonely.append(f"{flag}: without {partner}: {_names([mine[key] for key in missing])}")
    if lonely:
        hint = ""
        if not image_of.keys() & mask_of.keys():
            hint = (
                "; if the names differ by a fixed beginning or end, say so with --image_prefix, "
                "--image_suffix, --mask_prefix, --mask_suffix"
            )
        raise UserError("; ".join(lonely) + hint)


def _names(paths: list[Path], limit: int = 8) -> str:
    names = ", ".join(path.name for path in paths[:limit])
    return names + (f" and {len(paths) - limit} more" if len(paths) > limit else "")


def is_text(name: str) -> bool:
    """Whether a name can be written down: bytes that are no UTF-8 are lone surrogates in it."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def natural(key: str) -> tuple:
    """Sort key: numbers in names by value; the key itself breaks ties, so the order is one."""
    parts = re.split(r"([0-9]+)", key)
    digits = (p.lstrip("0") if i % 2 else p for i, p in enumerate(parts))  # int() takes 4,300 only
    return [(len(p), p) if i % 2 else p for i, p in enumerate(digits)], key
