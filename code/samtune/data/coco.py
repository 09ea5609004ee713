"""Annotations in COCO's JSON, read through pycocotools: each object keeps a mask of its own.

Its compiled part trusts what it is told, so polygons and run lengths are looked at before it draws
them: far corners would take all memory, runs of another length would end outside of the picture.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from samtune.data.files import Pair, is_text
from samtune.data.limits import check_bytes, check_pixels
from samtune.errors import UserError

_MOST_OUTLINE = 2**22  # pixels along a polygon: pycocotools keeps some hundred bytes of each


class Annotations(NamedTuple):
    """One image's. masks: (H, W) bool each; names: "category:annotation id".

    unread: (H, W) bool, where crowds are, which show no single object.
    """

    masks: list[np.ndarray]
    names: list[str]
    unread: np.ndarray


def find_described(image_dir: str | Path, annotations: str | Path, flag: str) -> list[Pair]:
    """The images of a folder that a COCO .json describes, in its order; their "mask" is the .json.

    Their ids are the file names, relative to the folder. Other images may lie there too. Raises
    UserError for images that are missing; flag: of the folder, for messages.
    """
    path = Path(annotations)
    pairs = [Pair(name, Path(image_dir) / name, path) for name in _load(path)[1]]
    missing = [pair.id for pair in pairs if not os.path.isfile(pair.image_path)]
    if missing:
        raise UserError(
            f"{flag} {image_dir}: {len(missing)} of the {len(pairs)} images that {path} describes "
            f"are missing, {', '.join(missing[:5])} for example"
        )
    return pairs


def read_annotations(path: Path, image_name: str) -> Annotations:
    """What a COCO .json says about one of its images.

    Raises UserError for a file that is no such JSON, an image that it does not describe, or a
    polygon that cannot be drawn.
    """
    coco, by_name = _load(path)
    if image_name not in by_name:
        raise UserError(f"{path}: does not describe {image_name}")
    image = by_name[image_name]
    masks, names = [], []
    unread = np.zeros((image["height"], image["width"]), bool)
    for annotation in coco.imgToAnns[image["id"]]:
        try:
            _check_segmentation(annotation["segmentation"], unread.shape)
            mask = coco.annToMask(annotation) > 0
            category = coco.cats.get(annotation.get("category_id"), {}).get("name", "object")
        except Exception as error:  # pycocotools raises bare exceptions, too
            raise UserError(
                f"{path}: annotation {annotation.get('id')} has no readable segmentation: {error}"
            ) from None
        if annotation.get("iscrowd"):
            unread |= mask
            continue
        masks.append(mask)
        names.append(f"{category}:{annotation['id']}")
    return Annotations(masks, names, unread)


def _check_segmentation(segmentation: Any, size: tuple[int, int]) -> None:
    """Raise ValueError for polygons or run lengths that do not belong into a picture of (H, W)."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if list(segmentation["size"]) != list(size):
            raise ValueError(f"its size is {segmentation['size']}, the image's {list(size)}")
        runs = counts if isinstance(counts, list) else run_lengths(counts)
        if not all(type(run) is int and run >= 0 for run in runs) or sum(runs) != math.prod(size):
            raise ValueError("its run lengths do not add up to the image")
        return
    if not segmentation:
        raise ValueError("it is empty")
    for polygon in segmentation:
        if (
            len(polygon) < 6
            or len(polygon) % 2
            or not all(type(v) in (int, float) for v in polygon)
        ):
            raise ValueError("a polygon is a list of at least three x, y")
        points = list(zip(polygon[0::2], polygon[1::2], strict=True))
        if not all(-w <= v <= 2 * w for p in points for v, w in zip(p, size[::-1], strict=True)):
            raise ValueError("a corner lies far outside of the image")
        sides = pairwise([*points, points[0]])
        if sum(max(abs(a - c), abs(b - d)) for (a, b), (c, d) in sides) > _MOST_OUTLINE:
            raise ValueError("its outline is longer than an image can hold")


def run_lengths(text: str) -> list[int]:
    """The numbers in COCO's compressed text: five bits a character, the lowest first, and from the
    fourth on the difference to the one before the last. Raises ValueError for other text.
    """
    runs, value, shift = [], 0, 0
    for bits in (byte - 48 for byte in text.encode()):
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError("its run lengths are no compressed text")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more of this number follows
            continue
        value -= (1 << shift) if bits & 16 else 0
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("its run lengths end within a number")
    return runs


@lru_cache(maxsize=4)
def _load(path: Path) -> tuple:
    """The parsed file, once per process, and its images by file name."""
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise UserError(
            f"{path}: reading COCO annotations needs pycocotools: pip install pycocotools"
        ) from None
    try:
        check_bytes(os.path.getsize(path), path)
        with contextlib.redirect_stdout(io.StringIO()):  # it reports progress there
            coco = COCO()
            coco.dataset = json.loads(Path(path).read_text(encoding="utf-8"))
            coco.createIndex()
        return coco, _by_name(coco.dataset["images"], path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is no COCO annotation file: {error!r}") from None


def _by_name(images: list[dict], path: Path) -> dict[str, dict]:
    """The images by file name. Raises UserError where annotations could meet a wrong image."""
    by_name, ids = {}, set()
    for image in images:
        name, id = image["file_name"], image["id"]
        if not (isinstance(name, str) and is_text(name) and name) or "\0" in name:
            raise UserError(f"{path}: {name!r} is no name of a file")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{path}: the image {name} leads out of its folder; move it inside")
        if name in by_name or id in ids:
            raise UserError(f"{path}: describes {name} twice, or two images as number {id!r}")
        height, width = image["height"], image["width"]
        if type(height) is not int or type(width) is not int:
            raise UserError(f"{path}: gives {name} the size {width!r} x {height!r}")
        check_pixels(width, height, f"{path}, {name}")
        by_name[name] = image
        ids.add(id)
    return by_name
