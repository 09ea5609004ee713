"""What the two files of a pair hold, in numbers that are small enough to keep for every pair.

More than training needs to know, for a person who wants to see what a model would learn from. Files
are read by the parts of `read_sample`, so what is found here is what training meets; but a file
that it refuses ends nothing, and says all the same what it holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np

from samtune.config import ReadOptions
from samtune.data.decoding import Decoded, decode
from samtune.data.files import Pair
from samtune.data.images import image_from
from samtune.data.masks import decode_mask
from samtune.data.objects import foreground, target_of, things_of
from samtune.data.prompts import box_from_mask
from samtune.data.samples import NOTES, is_annotations, sample_of
from samtune.errors import UserError
from samtune.structures import IGNORE, Sample

LOOK_BITS = 256
MOST_BOXES = 64  # per picture; more objects are counted, but not measured
_MOST_VALUES = 64  # of a mask file, the most frequent ones
_EXTREME = 8  # how far from a file's lowest or highest value still counts as that value
_JPEG_CHROMA = 8  # how far the channels of a grey JPEG stray from each other
_DEPTHS = {"b1": "1-bit", "u1": "8-bit", "u2": "16-bit", "i4": "32-bit", "f4": "float"}
_CHANNELS = {1: "grey", 2: "grey with alpha", 3: "RGB", 4: "RGB with alpha"}


class Values(NamedTuple):
    """The values of a mask file, before any coding.

    kind: "grey", "palette" (indices), "1-bit", "alpha" (where the mask is drawn in it), "colour"
    (values are 0xRRGGBB) or "unknown" (none of these; the numbers mean nothing). counts: pixels of
    each value, of the most frequent ones. distinct: how many values there are. low, high: the least
    and the largest. extreme: the share of pixels that all but have one of these two.
    """

    kind: str
    counts: dict[float, int]
    distinct: int
    low: float
    high: float
    extreme: float


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known of one pair after its files were read; about 1 KB.

    problems: why training would refuse it, a sentence each. notes: remarks on how it was read.
    size, mask_size: (H, W) of the files; (0, 0) where unread. image_mode, mask_mode: how the files
    hold their pixels, in words. values: of the mask file; None where there is none.
    picture, truth: digests of the image and of the mask as training sees them; b"" where unread.
    look: `LOOK_BITS` bits of how the image looks from afar. plain: the image has one colour only.
    pixels: of each value of the mask as read: 0 and 1 or class ids, and `IGNORE`. border: the share
    of the picture's border pixels that show what is asked about. things: how many objects (masks,
    classes) are asked about; boxes: (n, 5) int32 x0, y0, x1, y1 and pixels of the first
    `MOST_BOXES` of them.
    """

    id: str
    group: str = ""
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)
    mask_size: tuple[int, int] = (0, 0)
    image_mode: str = ""
    mask_mode: str = ""
    values: Values | None = None
    picture: bytes = b""
    truth: bytes = b""
    look: bytes = b""
    plain: bool = False
    pixels: dict[int, int] = field(default_factory=dict)
    border: float = 0.0
    things: int = 0
    boxes: np.ndarray = field(default_factory=partial(np.zeros, (0, 5), np.int32))

    @property
    def share(self) -> float:
        """The share of the labelled pixels that are 1; means something where there is one class."""
        labelled = sum(self.pixels.values()) - self.pixels.get(IGNORE, 0)
        return self.pixels.get(1, 0) / labelled if labelled else 0.0

    @property
    def touches_border(self) -> bool:
        """Whether anything that is asked about reaches the border of the picture."""
        return self.border > 0


class Inspected(Sequence):
    """The facts about pairs, found when they are asked for: what loader processes take."""

    def __init__(self, pairs: Sequence[Pair], read: ReadOptions):
        self.pairs, self.read = pairs, read

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Facts:
        return inspect(self.pairs[index], self.read)


def inspect(pair: Pair, read: ReadOptions) -> Facts:
    """Read both files of a pair. Raises nothing: what is wrong stands in `problems`.

    read: with `objects` settled, as `settle_objects` does.
    """
    problems: list[str] = []
    attempt = partial(_attempt, problems, pair)
    image_file = attempt(decode, pair.image_path)
    described = is_annotations(pair.mask_path)
    mask_file = None if described else attempt(decode_mask, pair.mask_path, read)
    facts = Facts(pair.id, pair.group)
    if mask_file is not None:
        facts = replace(
            facts, mask_size=mask_file.array.shape[:2], mask_mode=mode_of(mask_file),
            values=attempt(values_of, mask_file),
        )  # fmt: skip
    if image_file is None:
        return replace(facts, problems=tuple(problems))
    facts = replace(facts, size=image_file.array.shape[:2], image_mode=mode_of(image_file))
    image = attempt(image_from, image_file, read, pair.image_path)
    if image is not None:
        facts = replace(facts, picture=digest_of(image), look=look_of(image), plain=is_plain(image))
    if not problems:
        turned = image_file.turned
        facts = attempt(_with_truth, facts, pair, read, image, mask_file, turned) or facts
    return replace(facts, problems=tuple(problems))


def _attempt(problems: list[str], pair: Pair, call: Callable, *arguments) -> Any:
    """What the call returns, or None and one problem more."""
    try:
        return call(*arguments)
    except UserError as error:
        problems.append(str(error))
    except Exception as error:  # no file may end the look at thousands of others
        problems.append(f"{pair.image_path}, {pair.mask_path}: {type(error).__name__}: {error}")
    return None


def _with_truth(facts, pair, read, image, mask_file, turned) -> Facts:
    """The facts, and what the mask shows."""
    sample, notes = sample_of(pair, read, image, mask_file, turned)
    counts = np.bincount(sample.mask.ravel(), minlength=256)
    shown = foreground(sample.mask, read)
    border = np.concatenate([shown[0], shown[-1], shown[1:-1, 0], shown[1:-1, -1]])
    count, boxes = _boxes(sample, read)
    return replace(
        facts,
        notes=tuple(NOTES[note] for note in notes),
        truth=digest_of(sample.mask, *sample.layers),
        pixels={int(value): int(counts[value]) for value in np.flatnonzero(counts)},
        border=float(border.mean()),
        things=count,
        boxes=boxes,
    )


def _boxes(sample: Sample, read: ReadOptions) -> tuple[int, np.ndarray]:
    """How many things are asked about, and (n, 5) boxes with areas, of the first ones."""
    things, rows = things_of(sample, read), []
    for thing in things[:MOST_BOXES]:
        target = target_of(sample, thing, read)
        rows.append((*box_from_mask(target), np.count_nonzero(target == 1)))
    return len(things), np.array(rows, np.int32).reshape(-1, 5)


def digest_of(*planes: np.ndarray) -> bytes:
    """16 bytes that tell pixels from others: of their numbers and shapes, not of any file."""
    digest = hashlib.blake2b(digest_size=16)
    for plane in planes:
        digest.update(f"{plane.dtype} {plane.shape}".encode())
        digest.update(np.ascontiguousarray(plane))
    return digest.digest()


def look_of(image: np.ndarray) -> bytes:
    """`LOOK_BITS` bits about an image (H, W, 3): whether it gets lighter, cell by cell rightwards.

    Pictures that look alike differ in few of them, whatever their size or compression.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    cells = cv2.resize(grey, (17, 16), interpolation=cv2.INTER_AREA)
    return np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes()


def mode_of(decoded: Decoded) -> str:
    """How a file holds its pixels: "8-bit RGB, JPEG"."""
    array = decoded.array
    words = _DEPTHS.get(array.dtype.str[1:], str(array.dtype))
    if words != "1-bit":
        channels = 1 if array.ndim == 2 else array.shape[2]
        words += f" {_CHANNELS.get(channels, f'with {channels} channels')}"
    if decoded.mode in ("P", "PA"):
        words = "palette"
    elif decoded.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        words = f"8-bit {decoded.mode}"
    words += ", JPEG" if decoded.lossy else ""
    return words + (", turned by its EXIF tag" if decoded.turned else "")


def values_of(mask_file: Decoded) -> Values:
    """What values a mask file holds."""
    kind, values = _coded(mask_file)
    if values is None:
        return Values("unknown", {}, 0, 0, 0, 0.0)
    if values.dtype.kind in "bu" and values.dtype.itemsize <= 2:
        counts = np.bincount(values.ravel())
        found = np.flatnonzero(counts)
        counts = counts[found]
    else:
        found, counts = np.unique(values, return_counts=True)
    low, high = found[0].item(), found[-1].item()
    extreme = counts[(found <= low + _EXTREME) | (found >= high - _EXTREME)].sum() / counts.sum()
    most = np.sort(np.argsort(-counts, kind="stable")[:_MOST_VALUES])
    listed = dict(zip(found[most].tolist(), counts[most].tolist(), strict=True))
    return Values(kind, listed, len(found), low, high, float(extreme))


def _coded(mask_file: Decoded) -> tuple[str, np.ndarray | None]:
    """The kind of values, and them as (H, W)."""
    array = mask_file.array
    if array.ndim == 2:
        kinds = {"P": "palette", "PA": "palette"}
        return "1-bit" if array.dtype == bool else kinds.get(mask_file.mode, "grey"), array
    if array.shape[2] in (2, 4):
        array, alpha = array[..., :-1], array[..., -1]
        if (array == array[:1, :1]).all() and (alpha != alpha[0, 0]).any():
            return "alpha", alpha
    if array.shape[2] not in (1, 3):
        return "unknown", None
    if np.ptp(array, axis=2).max() <= (_JPEG_CHROMA if mask_file.lossy else 0):
        return "grey", array[..., 0]
    if array.dtype != np.uint8:
        return "unknown", None
    red, green, blue = np.moveaxis(array.astype(np.uint32), 2, 0)
    return "colour", (red << 16) + (green << 8) + blue


def is_plain(image: np.ndarray) -> bool:
    """Whether all pixels of an image (H, W, 3) have one colour."""
    return all((part == image[0, 0]).all() for part in (image[::16, ::16], image))
