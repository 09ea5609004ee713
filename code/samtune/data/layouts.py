"""Where the pictures of one split lie: in folders, files of arrays, stacks or lists.

Each kind of place answers three questions about a data set's folder: is it there, what would be
there (for messages), and which pairs does it hold.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from samtune.data.arrays import ArraySlice, count_slices
from samtune.data.files import Affixes, Pair, natural, pair_known, select
from samtune.data.lists import listed_id, read_list
from samtune.errors import UserError

BARE = Affixes()  # a file is named by its key alone


@dataclass(frozen=True)
class Folders:
    """A folder of images and one of masks, paired by name.

    images, masks: below the data set's folder; one `*` in each stands for any subfolder, whose name
    becomes part of the ids. only, spare_masks: as `pair_known` takes them. rows: START:STOP of the
    sorted pairs. thirds: of the sorted subfolders, those whose index modulo 3 is among these.
    """

    images: str
    masks: str
    of_image: Affixes = BARE
    of_mask: Affixes = BARE
    only: str = ""
    spare_masks: bool = False
    rows: str = ""
    thirds: tuple[int, ...] = (0, 1, 2)

    @property
    def needs(self) -> str:
        named = f" named {'KEY'.join(self.of_mask)}" if any(self.of_mask) else ""
        return f"{self.images} with {self.masks}{named}"

    def exists(self, root: Path) -> bool:
        """Whether there is a folder of images, and a mask of the right name."""
        masks = root.glob(f"{self.masks}/{self.of_mask.prefix}*{self.of_mask.suffix}.*")
        is_there = any(path.is_dir() for path in root.glob(self.images))
        return is_there and next(masks, None) is not None

    def pairs(self, root: Path) -> list[Pair]:
        """All pairs, in natural order of subfolder and name. Raises UserError."""
        found = []
        for name, images, masks in self._places(root):
            for pair in pair_known(
                images, masks, self.of_image, self.of_mask, self.only, self.spare_masks
            ):
                apart = name and not pair.id.startswith(name)  # an id may hold it already
                found.append(pair._replace(id=f"{name}/{pair.id}" if apart else pair.id))
        return select(found, self.rows, self.images)

    def _places(self, root: Path) -> Iterator[tuple[str, Path, Path]]:
        """(subfolder's name, folder of images, folder of masks)."""
        if "*" not in self.images:
            yield "", root / self.images, root / self.masks
            return
        head, tail = self.images.split("*")
        names = {path.relative_to(root).parts[head.count("/")] for path in root.glob(self.images)}
        for index, name in enumerate(sorted(names, key=natural)):
            if index % 3 in self.thirds:
                yield name, root / f"{head}{name}{tail}", root / self.masks.replace("*", name)


@dataclass(frozen=True)
class Arrays:
    """Files with an array of images and one of labels: .npz a slice each, .h5 a volume each."""

    files: str
    image: str = "image"
    mask: str = "label"

    @property
    def needs(self) -> str:
        return f"{self.files} with arrays {self.image!r} and {self.mask!r}"

    def exists(self, root: Path) -> bool:
        return next(root.glob(self.files), None) is not None

    def pairs(self, root: Path) -> list[Pair]:
        """A pair per slice, in the order of the volume. Raises UserError."""
        files = sorted(root.glob(self.files), key=lambda path: natural(path.name))
        return [pair for file in files for pair in self._of_file(file)]

    def _of_file(self, file: Path) -> Iterator[Pair]:
        name = file.name.split(".")[0]
        if file.suffix == ".npz":
            yield Pair(name, ArraySlice(file, self.image), ArraySlice(file, self.mask))
            return
        yield from _slices(file, self.image, file, self.mask, f"{name}_slice")


@dataclass(frozen=True)
class Stacks:
    """A .npy file of all images, (N, H, W) or (N, H, W, 3), and one of all labels, (N, H, W)."""

    images: str
    masks: str

    @property
    def needs(self) -> str:
        return f"{self.images} with {self.masks}"

    def exists(self, root: Path) -> bool:
        return (root / self.images).is_file()

    def pairs(self, root: Path) -> list[Pair]:
        """A pair per row of the stacks. Raises UserError, also if their lengths differ."""
        return list(_slices(root / self.images, "", root / self.masks, "", ""))


@dataclass(frozen=True)
class Lists:
    """A text file that names the images and one that names their masks, line by line."""

    images: str
    masks: str
    below: str

    @property
    def needs(self) -> str:
        return f"{self.images} with {self.masks}, naming files in {self.below}"

    def exists(self, root: Path) -> bool:
        return (root / self.images).is_file()

    def pairs(self, root: Path) -> list[Pair]:
        """A pair per line, in the lists' order. Raises UserError."""
        names = [row[0] for row in read_list(root / self.images, "the list")]
        images = [root / self.below / name for name in names]
        masks = [root / self.below / row[0] for row in read_list(root / self.masks, "the list")]
        if len(images) != len(masks):
            raise UserError(
                f"{root / self.images} has {len(images)} lines, {root / self.masks} {len(masks)}"
            )
        for file in (*images, *masks):
            if not os.path.isfile(file):  # a name may be one that no file can have
                raise UserError(f"{file}: is in a list, but there is no such file")
        ids = [listed_id(name) for name in names]
        if len(set(ids)) < len(ids):
            twice = Counter(ids).most_common(1)[0][0]
            raise UserError(f"{root / self.images}: {twice} is listed twice")
        return [Pair(*parts) for parts in zip(ids, images, masks, strict=True)]


def _slices(
    image_file: Path, image: str, mask_file: Path, mask: str, prefix: str
) -> Iterator[Pair]:
    counts = count_slices(image_file, image), count_slices(mask_file, mask)
    if counts[0] != counts[1]:
        raise UserError(f"{image_file}: {counts[0]} images, but {counts[1]} labels in {mask_file}")
    for index in range(counts[0]):
        yield Pair(
            f"{prefix}{index:03d}",
            ArraySlice(image_file, image, index),
            ArraySlice(mask_file, mask, index),
        )
