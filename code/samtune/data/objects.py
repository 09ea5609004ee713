"""What is asked about in a picture: its whole foreground, its classes, or its single objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from samtune.config import PromptOptions, ReadOptions, answers_classes
from samtune.data.class_shares import class_names
from samtune.errors import UserError
from samtune.structures import IGNORE, Sample

_MOST_OBJECTS = 2**16 - 2  # values of a uint16 layer without 0 and `IGNORE`


class Thing(NamedTuple):
    """One thing to ask about. number: its class or its value in `layer` of the sample's layers.

    name: what it is called within its picture; "" for the whole foreground.
    """

    name: str
    number: int
    layer: int = -1


EVERYTHING = Thing("", 0)  # the whole foreground


def settle_objects(read: ReadOptions, prompt: PromptOptions) -> ReadOptions:
    """`--objects auto` as what it means under this prompt. What is scored under another prompt

    than it was trained with must be settled first, so that both are asked about the same things.
    """
    if read.objects != "auto":
        return read
    by_class = read.num_classes > 1 and prompt.prompt != "none"
    return replace(read, objects="class" if by_class else "mask")


def check_questions(read: ReadOptions, prompt: PromptOptions) -> None:
    """Refuse what cannot be asked, with a UserError."""
    smallest = {"num_points": 1, "refine_steps": 0, "max_objects": 0, "box_jitter": 0}
    for flag, least in (smallest | {"scoring_jitter": 0}).items():
        if getattr(prompt, flag) < least:
            raise UserError(f"--{flag} {getattr(prompt, flag)}: must be at least {least}")
    if prompt.box_scale <= 0:
        raise UserError(f"--box_scale {prompt.box_scale}: must be more than 0")
    if read.min_area < 1:
        raise UserError(f"--min_area {read.min_area}: must be at least 1")
    if read.background >= read.num_classes > 1 or read.background < -1:
        raise UserError(
            f"--background {read.background}: with --num_classes {read.num_classes} it is a class "
            f"from 0 to {read.num_classes - 1}, or -1 for none"
        )
    if read.ask_classes and read.num_classes < 2:
        raise UserError(f"--ask_classes {read.ask_classes} needs --num_classes K of 2 or more")
    classes_asked(read)
    if read.objects == "class" and read.num_classes < 2:
        raise UserError("--objects class needs --num_classes K of 2 or more")
    if read.objects == "instance" and read.num_classes > 1:
        raise UserError("--objects instance reads masks as numbers of objects: drop --num_classes")
    if answers_classes(read.num_classes, prompt.prompt) and read.objects not in ("auto", "mask"):
        raise UserError(
            f"--objects {read.objects}: with --prompt none and several classes the answer is a "
            "mask per class of the whole image; drop --objects, or choose another --prompt"
        )
    if prompt.refine_steps and prompt.prompt == "none":
        raise UserError(f"--refine_steps {prompt.refine_steps} corrects an answer to a --prompt")


@lru_cache
def classes_asked(read: ReadOptions) -> tuple[int, ...]:
    """Ids of the classes that questions are about. Raises UserError for one that is unknown."""
    if not read.ask_classes:
        return tuple(c for c in range(read.num_classes) if c != read.background)
    names = class_names(read)
    asked = []
    for part in map(str.strip, read.ask_classes.split(",")):
        if part not in names and not (part.isdigit() and int(part) < read.num_classes):
            raise UserError(f"--ask_classes {part}: there are {', '.join(names)}")
        asked.append(names.index(part) if part in names else int(part))
    return tuple(sorted(set(asked)))


def foreground(mask: np.ndarray, read: ReadOptions) -> np.ndarray:
    """(H, W) bool: what questions are about."""
    return mask == 1 if read.num_classes < 2 else np.isin(mask, classes_asked(read))


def things_of(sample: Sample, read: ReadOptions) -> list[Thing]:
    """Everything that a picture shows of what `read.objects` (not 'auto') asks about."""
    if read.objects == "mask":
        return [EVERYTHING] if foreground(sample.mask, read).any() else []
    if read.objects == "class":
        pixels, names = np.bincount(sample.mask.ravel(), minlength=256), class_names(read)
        return [Thing(names[c], c) for c in classes_asked(read) if pixels[c]]
    return [
        Thing(sample.names[number], number, layer)
        for layer, values in enumerate(sample.layers)
        for number in np.flatnonzero(np.bincount(values.ravel())).tolist()
        if number not in (0, IGNORE)
    ]


def target_of(sample: Sample, thing: Thing, read: ReadOptions) -> np.ndarray:
    """(H, W) uint8: 1 where the thing is, `IGNORE` where the mask is unread, 0 elsewhere."""
    if thing.layer >= 0:
        shown = sample.layers[thing.layer] == thing.number
    elif read.objects == "class":
        shown = sample.mask == thing.number
    elif read.num_classes < 2:
        return sample.mask
    else:
        shown = foreground(sample.mask, read)
    target = shown.astype(np.uint8)
    target[(sample.mask == IGNORE) & ~shown] = IGNORE
    return target


def with_components(sample: Sample, read: ReadOptions) -> Sample:
    """The connected parts (8 neighbours) of the foreground, or of each class, as a layer.

    Parts of fewer than `read.min_area` pixels are background. Named "1", "2", ... or
    "class:1", "class:2", ... in the order of their first pixels. They are found before the picture
    is augmented, so that a turn, which frays an edge, splits none.
    """
    layer, names = np.zeros(sample.mask.shape, np.uint16), {}
    for region, prefix in _regions(sample.mask, read):
        count, labels, stats, _ = cv2.connectedComponentsWithStats(
            region.astype(np.uint8), connectivity=8
        )
        large = [
            label for label in range(1, count) if stats[label, cv2.CC_STAT_AREA] >= read.min_area
        ]
        values = _values(len(names), len(large), sample.mask_path)
        lookup = np.zeros(count, np.uint16)
        lookup[large] = values
        layer += lookup[labels]  # regions do not overlap
        names |= {value: f"{prefix}{i}" for i, value in enumerate(values, start=1)}
    return replace(sample, layers=(layer,), names=names)


def with_instances(sample: Sample, numbers: np.ndarray, read: ReadOptions) -> Sample:
    """What a map (H, W) of object numbers (0: none) shows, as a layer; named by these numbers."""
    found, inverse, areas = np.unique(numbers, return_inverse=True, return_counts=True)
    large = (found != 0) & (areas >= read.min_area)
    values = _values(0, int(large.sum()), sample.mask_path)
    lookup = np.zeros(len(found), np.uint16)
    lookup[large] = values
    names = dict(zip(values, map(str, found[large].tolist()), strict=True))
    return replace(sample, layers=(lookup[inverse.reshape(numbers.shape)],), names=names)


def with_masks(
    sample: Sample, masks: Sequence[np.ndarray], names: Sequence[str], read: ReadOptions
) -> Sample:
    """Objects that may overlap, each an (H, W) bool mask, on as few layers as they need."""
    layers: list[np.ndarray] = []
    kept = {}
    large = [(m, n) for m, n in zip(masks, names, strict=True) if m.sum() >= read.min_area]
    values = _values(0, len(large), sample.mask_path)
    for value, (mask, name) in zip(values, large, strict=True):
        layer = next((layer for layer in layers if not layer[mask].any()), None)
        if layer is None:
            layer = np.zeros(sample.mask.shape, np.uint16)
            layers.append(layer)
        layer[mask] = value
        kept[value] = name
    return replace(sample, layers=tuple(layers), names=kept)


def _regions(mask: np.ndarray, read: ReadOptions) -> list[tuple[np.ndarray, str]]:
    if read.num_classes < 2:
        return [(mask == 1, "")]
    names = class_names(read)
    return [(mask == c, f"{names[c]}:") for c in classes_asked(read)]


def _values(taken: int, count: int, path: str) -> list[int]:
    """The next `count` values of a layer, none of them 0 or `IGNORE`."""
    if taken + count > _MOST_OBJECTS:
        raise UserError(
            f"{path}: shows {taken + count} objects, which is more than {_MOST_OBJECTS}; raise "
            "--min_area, or cut the image into tiles"
        )
    numbers = range(taken + 1, taken + count + 1)
    return [number + (number >= IGNORE) for number in numbers]
