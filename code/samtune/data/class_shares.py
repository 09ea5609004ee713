"""What the masks of a data set hold, added up over all files: classes, and values that are none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from samtune.config import ReadOptions
from samtune.data.codings import UnknownValues
from samtune.errors import UserError
from samtune.structures import IGNORE

_LISTED = 12


def class_names(read: ReadOptions) -> list[str]:
    """A name per class id; the id itself where `--class_names` gives none.

    Raises UserError if there are names, but not one for each class.
    """
    if not read.class_names:
        return [str(i) for i in range(read.num_classes)]
    names = [name.strip() for name in read.class_names.split(",")]
    if len(names) != read.num_classes or not all(names) or len(set(names)) < len(names):
        raise UserError(
            f"--class_names {read.class_names}: {len(names)} names; --num_classes "
            f"{read.num_classes} needs {read.num_classes} different ones"
        )
    return names


@dataclass
class ClassShares:
    """How much of the pictures each of K classes covers; parts add up.

    names: of the K classes; none where masks show one kind of object. pixels: of each class, and of
    `IGNORE`. images: how many show the class.
    """

    names: tuple[str, ...] = ()
    pixels: Counter = field(default_factory=Counter)
    images: Counter = field(default_factory=Counter)

    @classmethod
    def of(cls, counts: np.ndarray, read: ReadOptions) -> ClassShares:
        """Of one mask. counts: (256,) its pixels of each value."""
        pixels = {int(i): int(counts[i]) for i in np.flatnonzero(counts)}
        return cls(tuple(class_names(read)), Counter(pixels), Counter(pixels.keys()))

    def __add__(self, other: ClassShares) -> ClassShares:
        return ClassShares(
            self.names or other.names, self.pixels + other.pixels, self.images + other.images
        )

    @property
    def number(self) -> int:
        return len(self.names)

    def remarks(self, images: int) -> list[str]:
        """What covers how much, in how many of `images`; which classes never occur."""
        labelled = self.pixels.total() - self.pixels[IGNORE]
        if not self.number or not labelled:
            return []
        shares = [
            f"{self._name(i)} {self.pixels[i] / labelled:.2%} in {self.images[i]}"
            for i in range(self.number)
            if self.pixels[i]
        ]
        lines = [f"classes, share of labelled pixels, in how many images: {', '.join(shares)}"]
        if ignored := self.pixels[IGNORE]:
            lines.append(
                f"{ignored / self.pixels.total():.2%} of the pixels are ignored, in "
                f"{self.images[IGNORE]} of {images} images"
            )
        if absent := [self._name(i) for i in range(self.number) if not self.pixels[i]]:
            lines.append(f"{len(absent)} of {self.number} classes never occur: {', '.join(absent)}")
        if len(shares) == 1 and ignored and self.number == 2:
            lines.append("if the ignored value marks the object, leave --num_classes out")
        return lines

    def _name(self, id: int) -> str:
        return str(id) if self.names[id] == str(id) else f"{id} {self.names[id]}"


@dataclass
class Unknown:
    """Values that no class has: in how many files, which, how often, and where first; parts add up.

    values: value -> (pixels, files, first file). rule: what they are not.
    """

    files: int = 0
    rule: str = ""
    values: dict[str, tuple[int, int, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, error: UnknownValues, path: str) -> Unknown:
        """Of one file."""
        return cls(1, error.rule, {v: (n, 1, path) for v, n in error.counts.items()})

    def __add__(self, other: Unknown) -> Unknown:
        values = dict(self.values)
        for value, (pixels, files, first) in other.values.items():
            known = values.get(value, (0, 0, first))
            values[value] = (known[0] + pixels, known[1] + files, known[2])
        return Unknown(self.files + other.files, self.rule or other.rule, values)

    def line(self, files: int) -> str:
        """One line about all of them; `files`: how many others were read."""
        most = sorted(self.values.items(), key=lambda item: -item[1][0])
        listed = "; ".join(
            f"{value}: {pixels:,} pixels in {count} file(s), first {first}"
            for value, (pixels, count, first) in most[:_LISTED]
        )
        more = f"; and {len(most) - _LISTED} more values" if len(most) > _LISTED else ""
        return (
            f"{self.files} of {files + self.files} masks hold values that are {self.rule}: "
            f"{listed}{more}; correct the flags that say how masks are read, or the masks"
        )
