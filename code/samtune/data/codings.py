"""What the values of a mask file mean: rules with a name, and a colour table of one's own.

A rule turns what was decoded into class ids: 0 and 1, or 0..K-1, and `IGNORE`. A value that a rule
does not know is never guessed at: `UnknownValues` says which, how often and where.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from samtune.config import ReadOptions
from samtune.errors import UserError
from samtune.structures import IGNORE

_LISTED = 12


class UnknownValues(UserError):
    """A mask with values that its coding does not know.

    counts: pixels of each value. rule: what they are not ("no class id below --num_classes 3").
    """

    def __init__(self, message: str, counts: Counter | None = None, rule: str = ""):
        super().__init__(message)
        self.counts, self.rule = counts or Counter(), rule


@dataclass(frozen=True)
class Cut:
    """One object: what is at least `level` in a grey file, or in the red of a coloured one.

    below: the object is what is less.
    """

    level: int
    below: bool = False
    coloured: bool = False
    num_classes: int = 1

    def ids(self, values: np.ndarray, path: str | Path) -> np.ndarray:
        """(H, W[, channels]) file values -> (H, W) uint8."""
        above = (values if values.ndim == 2 else values[..., 0]) >= self.level
        return (~above if self.below else above).astype(np.uint8)


@dataclass(frozen=True)
class Table:
    """A class id for each value of a file: of its grey, its colour or its channels' sum.

    entries: value -> class id or `IGNORE`. by: "grey", "colour" (0xRRGGBB) or "sum" (R + G + B).
    name: the flag and value that chose it, for messages.
    """

    entries: dict[int, int]
    num_classes: int
    name: str
    by: str = "grey"

    @property
    def coloured(self) -> bool:
        return self.by != "grey"

    def ids(self, values: np.ndarray, path: str | Path) -> np.ndarray:
        """(H, W[, channels]) file values -> (H, W) uint8. Raises UnknownValues."""
        values = self._values(values, path)
        known = np.array(sorted(self.entries), np.int64)
        ids = np.array([self.entries[value] for value in known.tolist()], np.uint8)
        place = np.searchsorted(known, values).clip(max=len(known) - 1)
        unknown = known[place] != values
        if unknown.any():
            raise unknown_values(values[unknown], values.size, self._say, f"not in {self.name}",
                                 path)  # fmt: skip
        return ids[place]

    def _values(self, values: np.ndarray, path: str | Path) -> np.ndarray:
        """(H, W): the numbers that `entries` is asked for. Raises UserError for no 8-bit colour."""
        if not self.coloured:
            return values
        if values.dtype != np.uint8 and not np.isin(values, np.arange(256)).all():
            raise UserError(f"{path}: {self.name} is about colours of 8 bits; save the mask so")
        if values.ndim == 2 or values.shape[2] < 3:
            grey = values if values.ndim == 2 else values[..., 0]
            values = np.repeat(grey[..., None], 3, axis=2)
        red, green, blue = np.moveaxis(values[..., :3].astype(np.int64), 2, 0)
        return red + green + blue if self.by == "sum" else (red << 16) + (green << 8) + blue

    def _say(self, value) -> str:
        if self.by == "colour":
            return f"({value >> 16}, {value >> 8 & 255}, {value & 255})"
        return f"{value / 3:g} (mean of R, G, B)" if self.by == "sum" else f"{value:g}"


def unknown_values(values: np.ndarray, pixels: int, say, rule: str, path) -> UnknownValues:
    """The error about a file's unknown values: (N,) of them among `pixels`; `say` prints one."""
    found, counts = np.unique(values, return_counts=True)
    counts = Counter({say(v): n for v, n in zip(found.tolist(), counts.tolist(), strict=True)})
    listed = ", ".join(list(counts)[:_LISTED])
    more = f" and {len(counts) - _LISTED} more" if len(counts) > _LISTED else ""
    return UnknownValues(
        f"{path}: the mask's values {listed}{more} are {rule}; {len(values) / pixels:.2%} of its "
        "pixels",
        counts,
        rule,
    )


def coding_of(read: ReadOptions) -> Cut | Table | None:
    """The rule that masks are read by; None: by what they hold (`--mask_coding auto`).

    Raises UserError where flags contradict each other or the number of classes.
    """
    if not 1 <= read.num_classes <= IGNORE:
        raise UserError(f"--num_classes {read.num_classes}: must be from 1 to {IGNORE}")
    if read.class_colours:
        if read.mask_coding != "auto":
            raise UserError(
                f"--class_colours and --mask_coding {read.mask_coding} both say how masks are "
                "read; keep one"
            )
        coding, flag = parse_colours(read.class_colours), "--class_colours"
        fits = coding.num_classes == max(2, read.num_classes)
    elif read.mask_coding == "auto":
        return None
    else:
        coding, flag = CODINGS[read.mask_coding], f"--mask_coding {read.mask_coding}"
        fits = coding.num_classes == read.num_classes
    if not fits:
        raise UserError(
            f"{flag} has {coding.num_classes} classes, --num_classes says {read.num_classes}; set "
            f"--num_classes {coding.num_classes}"
        )
    if read.mask_threshold >= 0 or read.foreground != "above":
        raise UserError(f"--mask_threshold and --foreground have no meaning with {flag}")
    return coding


@lru_cache(maxsize=8)
def parse_colours(text: str) -> Table:
    """`R,G,B;R,G,B;ignore=R,G,B` as a table. Raises UserError for anything else."""
    entries, classes = {}, 0
    for part in filter(None, (part.strip() for part in text.split(";"))):
        ignored, colour = part.startswith("ignore="), part.removeprefix("ignore=")
        try:
            red, green, blue = (int(number) for number in colour.split(","))
        except ValueError:
            red = -1
        if red < 0 or max(red, green, blue) > 255 or min(green, blue) < 0:
            raise UserError(
                f"--class_colours: {part!r} is no colour; expected 'R,G,B;R,G,B;...' with numbers "
                "from 0 to 255"
            )
        value = (red << 16) + (green << 8) + blue
        if value in entries:
            raise UserError(f"--class_colours: {colour} stands there twice")
        entries[value] = IGNORE if ignored else classes
        classes += not ignored
    if not 2 <= classes < IGNORE:
        raise UserError(f"--class_colours: {classes} classes; at least 2 and less than {IGNORE}")
    return Table(entries, classes, "--class_colours", by="colour")


def colours_of(read: ReadOptions) -> list[tuple[int, int, int]]:
    """RGB by class id, where `--class_colours` gives them; else none."""
    if not read.class_colours:
        return []
    entries = parse_colours(read.class_colours).entries
    by_id = {id: value for value, id in entries.items() if id != IGNORE}
    return [(by_id[i] >> 16, by_id[i] >> 8 & 255, by_id[i] & 255) for i in range(len(by_id))]


def _colours(rows: dict[int, tuple[tuple[int, int, int], ...]]) -> dict[int, int]:
    return {(r << 16) + (g << 8) + b: id for id, colours in rows.items() for r, g, b in colours}


# Raw ids that are evaluated, in the order of their train ids (cityscapesScripts @ 02a0f28); the
# other raw ids are ignored. The licence plate's -1 is 255 in an 8-bit file.
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# The 32 colours of the CamVid release in the groups that SegNet evaluates; void is ignored.
_CAMVID = {
    0: ((128, 128, 128),),  # sky
    1: ((128, 0, 0), (192, 0, 128), (0, 128, 64), (64, 0, 64), (64, 192, 0)),  # + arch, bridge, ...
    2: ((192, 192, 128), (0, 0, 64)),  # pole, traffic cone
    3: ((128, 64, 128), (128, 0, 192), (192, 0, 64)),  # road, lane markings
    4: ((0, 0, 192), (64, 192, 128), (128, 128, 192)),  # pavement, parking block, shoulder
    5: ((128, 128, 0), (192, 192, 0)),  # tree, other vegetation
    6: ((192, 128, 128), (128, 128, 64), (0, 64, 64)),  # sign, text, traffic light
    7: ((64, 64, 128),),  # fence
    8: ((64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)),  # car, ...
    9: ((64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)),  # pedestrian, child, ...
    10: ((0, 128, 192), (192, 0, 192)),  # bicyclist, motorcycle
    IGNORE: ((0, 0, 0),),
}
# Abdominal organs of BTCV in the order that TransUNet made of them (hitachinsk/SAMed @ e351840).
_BTCV = {1: 1, 2: 2, 3: 3, 4: 4, 6: 5, 7: 6, 8: 7, 11: 8}

CODINGS = {
    "above128": Cut(128),
    "above200": Cut(201),  # "more than 200" (usagisukisuki/G-SAM @ 31dfd1c, Kvasir)
    "red_above150": Cut(150, coloured=True),  # Massachusetts: the building is the object
    "red_below150": Cut(150, below=True, coloured=True),  # ISBI 2012: the dark membrane is
    "cityscapes": Table(
        dict.fromkeys([*range(-1, 34), 255], IGNORE) | {v: i for i, v in enumerate(_CITYSCAPES)},
        19,
        "the table of --mask_coding cityscapes",
    ),
    "trans10k": Table(
        {0: 0, 255: 1, 765: 2}, 3, "the table of --mask_coding trans10k", by="sum"
    ),  # black, one saturated channel, white
    "camvid_colour": Table(
        _colours(_CAMVID), 11, "the table of --mask_coding camvid_colour", by="colour"
    ),
    "btcv": Table(dict.fromkeys(range(14), 0) | _BTCV, 9, "the table of --mask_coding btcv"),
}
