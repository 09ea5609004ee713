"""The pictures that scoring leaves: masks, overlays, and a sheet of examples."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samtune.config import ReadOptions, answers_classes
from samtune.data.codings import colours_of
from samtune.data.files import Pair
from samtune.data.images import read_image
from samtune.data.objects import EVERYTHING, target_of
from samtune.data.samples import read_sample
from samtune.engine import distributed
from samtune.metrics.classes import class_map
from samtune.pictures import (
    class_colours,
    overlay,
    paint_classes,
    sheet,
    truth_picture,
    write_classes,
    write_png,
)
from samtune.pipeline import original_boxes
from samtune.run_folder import RunFolder
from samtune.structures import Batch, Prediction, Sample
from samtune.threads import InOrder

_NO_FILE_NAME = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_LONGEST = 60  # characters between slashes; of four bytes each, a file system takes that many


@dataclass(frozen=True)
class Drawing:
    """How answers become masks and pictures.

    masks: (R, C, h, w) logits with their batch -> (R, T_h, T_w) uint8, where the target lies.
    truth: (image, true mask) -> RGB. answer: (image, mask, true mask, box or None) -> RGB. write: a
    mask into a PNG. shown: what a sample's mask shows, as `masks` would. read: how files are read.
    """

    masks: Callable[[Prediction, Batch], Tensor]
    truth: Callable
    answer: Callable
    write: Callable[[Path, np.ndarray], None]
    shown: Callable[[Sample], np.ndarray]
    read: ReadOptions


def drawing_of(read: ReadOptions, prompt: str, colours: Sequence[Sequence[int]] = ()) -> Drawing:
    """Outlines of objects, or coloured classes where the model answers with a mask per class.

    colours: RGB by class id, where the data set has its own; `--class_colours` win over them.
    """
    if not answers_classes(read.num_classes, prompt):
        return _draw_objects(read)
    own = colours_of(read) or list(colours)
    colours = own or class_colours(read.num_classes)
    return _draw_classes(read, np.array(colours, np.uint8))


def _draw_objects(read: ReadOptions) -> Drawing:
    everything = replace(read, objects="mask")
    return Drawing(
        lambda prediction, batch: (batch.at_target(prediction.logits)[:, 0] > 0).to(torch.uint8),
        truth_picture,
        overlay,
        lambda path, mask: write_png(path, mask * 255),
        lambda sample: target_of(sample, EVERYTHING, everything),
        read,
    )


def _draw_classes(read: ReadOptions, colours: np.ndarray) -> Drawing:
    return Drawing(
        class_map,
        lambda image, truth: paint_classes(image, truth, colours),
        lambda image, mask, truth, box: paint_classes(image, mask, colours),
        lambda path, mask: write_classes(path, mask, colours),
        lambda sample: sample.mask,
        read,
    )


def file_below(name: str, image_id: str) -> str:
    """The path of a row's .png below any folder.

    name: the image's id, whose slashes are folders, and what is asked about it, whose slashes are
    not: it comes from annotations and flags. What no file can be called, or what would lead
    elsewhere, becomes `_`, and a part of the name's SHA-256 keeps such names apart.
    """
    asked = name[len(image_id) :].replace("/", "_")
    parts = _NO_FILE_NAME.sub("_", image_id + asked).split("/")
    parts = [part[:_LONGEST] if part.strip(".") else "_" for part in parts]
    path = "/".join(parts)
    if path != name:
        path += "-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{path}.png"


class Pictures:
    """Keeps the predicted masks that a picture needs, and draws them over their images.

    shown: ids of the images on the sheet. keep_all: the model whose every mask is written, by
    `threads` beside the scoring.
    """

    def __init__(
        self,
        folder: RunFolder,
        pairs: dict[str, Pair],
        shown: set[str],
        draw: Drawing,
        keep_all: str = "",
        threads: int = 0,
    ):
        self.folder, self.pairs, self.shown, self.draw = folder, pairs, shown, draw
        self.keep_all, self.writing = keep_all, InOrder(threads)
        self.masks: dict[str, dict[str, np.ndarray]] = {}  # id -> name of the model -> mask
        self.boxes: dict[str, list[float] | None] = {}

    def take(self, name: str, prediction: Prediction, batch: Batch) -> None:
        """Look at one scored batch of a model; a mask in the frame is brought to its picture."""
        keep_all = name == self.keep_all
        if not keep_all and not self.shown & set(batch.ids):
            return
        batch = replace(batch, in_frame=False)
        masks = self.draw.masks(prediction, batch).cpu().numpy()
        boxes = original_boxes(batch)
        sizes, images = batch.frames.original_size.tolist(), batch.image_of_row
        for row, image in enumerate(images):
            key, (height, width) = batch.ids[image], sizes[image]
            mask = masks[row, :height, :width]
            box = boxes[row].tolist() if boxes is not None else None
            if key in self.shown:
                self._keep(name, key, mask, box if images.count(image) == 1 else None)
            if keep_all:
                name_of_row = (batch.row_names or batch.ids)[row]
                self.writing.put(self._write, name_of_row, key, mask, box, size=mask.nbytes)

    def _write(self, name: str, key: str, mask: np.ndarray, box: list[float] | None) -> None:
        picture = self.draw.answer(self._image(key), mask, self._truth(key), box)
        file = file_below(name, key)
        self.draw.write(self.folder.predictions / "masks" / file, mask)
        write_png(self.folder.predictions / "overlays" / file, picture)

    def _keep(self, name: str, key: str, mask: np.ndarray, box: list[float] | None) -> None:
        """For the sheet: what the rows of an image show together."""
        seen = self.masks.setdefault(key, {})
        seen[name] = np.maximum(mask, seen.get(name, 0))
        self.boxes[key] = box

    def write_sheet(self, names: list[str]) -> None:
        """The last step. Write examples.png on rank 0: image with truth, then each model's answer,
        per image.
        """
        self.writing.finish()
        gathered = distributed.gather_objects((self.masks, self.boxes))
        if gathered is None:
            return
        rows = []
        for masks, boxes in gathered:
            for key, by_model in sorted(masks.items()):
                image, truth = self._image(key), self._truth(key)
                drawn = [self.draw.answer(image, by_model[n], truth, boxes[key]) for n in names]
                rows.append([self.draw.truth(image, truth), *drawn])
        titles = ["truth", *(name.replace("_", "-") for name in names)]
        if rows:
            write_png(self.folder.examples, sheet(rows, titles))

    def _image(self, key: str) -> np.ndarray:
        return read_image(self.pairs[key].image_path, self.draw.read)

    def _truth(self, key: str) -> np.ndarray:
        return self.draw.shown(read_sample(self.pairs[key], self.draw.read).sample)
