"""The pictures that scoring leaves: masks, overlays, and a sheet of examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samtune.config import ReadOptions
from samtune.data.files import Pair
from samtune.data.images import read_image
from samtune.data.masks import read_mask
from samtune.engine import distributed
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
from samtune.structures import Batch, Prediction


@dataclass(frozen=True)
class Drawing:
    """How answers become masks and pictures.

    masks: (R, C, h, w) logits with their batch -> (R, canvas) uint8. truth: (image, true mask) ->
    RGB. answer: (image, mask, true mask, box or None) -> RGB. write: a mask into a PNG. read_truth:
    a mask file -> (H, W) uint8.
    """

    masks: Callable[[Prediction, Batch], Tensor]
    truth: Callable
    answer: Callable
    write: Callable[[Path, np.ndarray], None]
    read: ReadOptions


def draw_object(read: ReadOptions) -> Drawing:
    """One kind of object: outlines over the image."""

    def masks(prediction: Prediction, batch: Batch) -> Tensor:
        logits = batch.frames.restore(prediction.logits, batch.prompts.image_index)
        return (logits[:, 0] > 0).to(torch.uint8)

    return Drawing(
        masks, truth_picture, overlay, lambda path, mask: write_png(path, mask * 255), read
    )


def draw_classes(read: ReadOptions) -> Drawing:
    """Class maps: colours over the image."""
    colours = class_colours(read.num_classes)

    def masks(prediction: Prediction, batch: Batch) -> Tensor:
        bands = batch.bands(read.num_classes)
        answers = [batch.at_target(prediction.logits, band).argmax(1) for band in bands]
        return torch.cat(answers, 1).to(torch.uint8)

    return Drawing(
        masks,
        lambda image, truth: paint_classes(image, truth, colours),
        lambda image, mask, truth, box: paint_classes(image, mask, colours),
        lambda path, mask: write_classes(path, mask, colours),
        read,
    )


class Pictures:
    """Keeps the predicted masks that a picture needs, and draws them over their images."""

    def __init__(self, folder: RunFolder, pairs: dict[str, Pair], shown: set, draw: Drawing):
        self.folder, self.pairs, self.shown, self.draw = folder, pairs, shown, draw
        self.masks: dict[str, dict[str, np.ndarray]] = {}  # id -> name of the model -> mask
        self.boxes: dict[str, list[float]] = {}

    def take(self, name: str, prediction: Prediction, batch: Batch, keep_all: bool) -> None:
        """Look at one scored batch; with `keep_all` write every mask and overlay at once."""
        if not keep_all and not self.shown & set(batch.ids):
            return
        masks = self.draw.masks(prediction, batch).cpu().numpy()
        boxes = original_boxes(batch)
        for row, (key, (height, width)) in enumerate(
            zip(batch.ids, batch.frames.original_size.tolist(), strict=True)
        ):
            mask = masks[row, :height, :width]
            box = boxes[row].tolist() if boxes is not None else None
            if key in self.shown:
                self.masks.setdefault(key, {})[name] = mask
                self.boxes[key] = box
            if keep_all:
                picture = self.draw.answer(self._image(key), mask, self._truth(key), box)
                self.draw.write(self.folder.predictions / "masks" / f"{key}.png", mask)
                write_png(self.folder.predictions / "overlays" / f"{key}.png", picture)

    def write_sheet(self, names: list[str]) -> None:
        """On rank 0, write examples.png: image with truth, then each model's answer, per image."""
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
        return read_mask(self.pairs[key].mask_path, self.draw.read)
