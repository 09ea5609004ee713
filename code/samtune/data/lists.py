"""Lists of files: a line per image, with its mask."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

from samtune.data.files import Pair
from samtune.errors import UserError


def read_list(path: str | Path, flag: str) -> list[list[str]]:
    """The columns of every line that is not empty; commas, tabs or spaces separate them.

    A first line that names the columns (`image,mask`) is passed over. Raises UserError if the file
    cannot be read or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        lines = [line for line in text.splitlines() if line.strip()]
        if "," in text:
            rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
        else:
            rows = [re.split(r"\t+" if "\t" in line else r"\s+", line.strip()) for line in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{flag} {path}: cannot be read ({error})") from None
    if rows and rows[0][0].lower() in ("image", "image_path", "images"):
        rows = rows[1:]
    if not rows:
        raise UserError(f"{flag} {path}: no line in it")
    return rows


def listed_id(name: str) -> str:
    """An image's path as a list writes it, without extension; names a file below any folder."""
    return "/".join(part for part in Path(name).with_suffix("").parts if part not in ("..", "/"))


def listed_pairs(
    path: str | Path, image_dir: str | Path, mask_dir: str | Path, flag: str
) -> list[Pair]:
    """The pairs of a list with an image and its mask per line, in its order.

    Paths are relative to the folders, or where those are empty to the list's own. An id is the
    image's path as written, without its extension. Raises UserError for a line without two columns,
    a file that is missing and an image that is listed twice.
    """
    pairs, seen = [], set()
    roots = [Path(folder or Path(path).parent) for folder in (image_dir, mask_dir)]
    for number, row in enumerate(read_list(path, flag), 1):
        if len(row) != 2:
            raise UserError(
                f"{flag} {path}, entry {number}: {len(row)} columns; expected an image and its mask"
            )
        image, mask = (root / name for root, name in zip(roots, row, strict=True))
        for file in (image, mask):
            if not os.path.isfile(file):  # a name may be one that no file can have
                raise UserError(f"{flag} {path}, entry {number}: {file}: there is no such file")
        id = listed_id(row[0])
        if id in seen:
            raise UserError(f"{flag} {path}, entry {number}: {row[0]} is listed twice")
        seen.add(id)
        pairs.append(Pair(id, image, mask))
    return pairs
