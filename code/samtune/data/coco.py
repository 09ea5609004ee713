"""Annotations in COCO's JSON, read through pycocotools: each object keeps a mask of its own."""

from __future__ import annotations

import contextlib
import io
import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from samtune.data.files import Pair
from samtune.errors import UserError


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
    missing = [pair.id for pair in pairs if not pair.image_path.is_file()]
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
            mask = coco.annToMask(annotation) > 0
        except (TypeError, KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"{path}: annotation {annotation.get('id')} has no readable segmentation: {error}"
            ) from None
        if annotation.get("iscrowd"):
            unread |= mask
            continue
        category = coco.cats.get(annotation.get("category_id"), {}).get("name", "object")
        masks.append(mask)
        names.append(f"{category}:{annotation['id']}")
    return Annotations(masks, names, unread)


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
        with contextlib.redirect_stdout(io.StringIO()):  # it reports progress there
            coco = COCO()
            coco.dataset = json.loads(Path(path).read_text())
            coco.createIndex()
        return coco, {image["file_name"]: image for image in coco.dataset["images"]}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no COCO annotation file: {error!r}") from None
