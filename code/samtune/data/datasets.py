"""Samples ready for the model, and batches of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from samtune.config import PromptOptions, ReadOptions, Size, answers_classes
from samtune.data.feature_cache import memory_order
from samtune.data.files import Pair
from samtune.data.images import blank
from samtune.data.objects import (
    EVERYTHING,
    Thing,
    check_questions,
    settle_objects,
    target_of,
    things_of,
)
from samtune.data.prompts import RowPrompt, collate_prompts, in_words, make_prompt
from samtune.data.randomness import stream
from samtune.data.samples import read_sample
from samtune.data.transforms import (
    augment,
    augmentation_versions,
    fit_image,
    fit_mask,
    fit_size,
    prepare,
    random_crop,
)
from samtune.errors import UserError
from samtune.structures import IGNORE, Batch, Frame, Frames, Sample


class SampleKey(NamedTuple):
    """Which sample, when. weight: 0 for one that only keeps the ranks in step."""

    epoch: int
    index: int
    weight: float = 1.0


class Row(NamedTuple):
    """One question about a sample. name: for tables. target: (H, W) at the original size, or
    (S_h, S_w) in the frame: 0, 1, or class ids, and `IGNORE`.
    """

    name: str
    target: np.ndarray
    prompt: RowPrompt


class Item(NamedTuple):
    """One sample in the model's frame.

    image: (S_h, S_w, 3) uint8, zero where padded. rows: what is asked about it, at least one.
    in_frame: where the targets lie. told: what the model is told, in words. features: see `Batch`;
    the image is blank then, unless the model reads it too. A crop is a picture of its own: its
    frame has the crop's size, its original size is what it shows.
    """

    image: np.ndarray
    rows: tuple[Row, ...]
    frame: Frame
    in_frame: bool
    weight: float
    id: str
    path: str
    told: str
    features: Tensor | None = None

    @property
    def frame_size(self) -> tuple[int, int]:
        return self.image.shape[:2]


class View(NamedTuple):
    """One augmented view of a picture.

    sample: augmented, and cut where --crop asks for it. image, frame: the same in the model's
    frame; image: (S_h, S_w, 3) uint8. picture_size: (H, W) as the file has it.
    """

    sample: Sample
    image: np.ndarray
    frame: Frame
    picture_size: tuple[int, int]


class Keeper(Protocol):
    """Features of views that were computed before, on disk."""

    needs_image: bool  # whether the model reads the image beside them

    def read(self, view: int, index: int) -> tuple[Tensor, tuple[int, int]] | None:
        """Features of a view and (H, W) of the picture's file; None where they are not there."""


class SegmentationDataset(torch.utils.data.Dataset):
    """Pairs of files as `Item`s, asked for by `SampleKey`: read, augmented, fitted, prompted.

    image_size: (S_h, S_w) of the frame, or the side of a square. train: whether prompts are drawn,
    and at most `prompt.max_objects` rows of an image. crop: (h, w) of the random window of the
    frame that is the image instead (0: none); under a prompt it holds an object. What is random
    follows from (seed, key.epoch, key.index) and the object. views: augmentation and crop of an
    image repeat after so many epochs; 0: never. Reading raises UserError, also for a picture that
    shows nothing to ask about: those are to be left out by the scan's report.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        read: ReadOptions,
        image_size: int | tuple[int, int],
        prompt: PromptOptions,
        loss_resolution: str,
        augment: str = "none",
        seed: int = 0,
        train: bool = False,
        crop: int | tuple[int, int] = 0,
        views: int = 0,
    ):
        check_questions(read, prompt)
        self.pairs, self.read, self.prompt = pairs, settle_objects(read, prompt), prompt
        self.image_size, self.crop = Size.read(image_size), Size.read(crop)
        self.loss_resolution, self.augment, self.seed = loss_resolution, augment, seed
        self.train, self.views = train, views
        self.kept: Keeper | None = None
        prepare(augment)  # loader processes that are forked off find it made

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: SampleKey) -> Item:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[Item]:
        """Items of one batch: with features all of them, or none."""
        kept = [self._features(key) for key in keys]
        if any(found is None for found in kept):
            kept = [None] * len(keys)
        return [self._item(key, found) for key, found in zip(keys, kept, strict=True)]

    def files_of(self, keys: Sequence[SampleKey]) -> list[str]:
        """The image files of these samples, for messages."""
        return [str(self.pairs[key.index].image_path) for key in keys]

    def keeping(self, kept: Keeper) -> SegmentationDataset:
        """The same pictures with their features, where `kept` has them."""
        keeping = copy.copy(self)
        keeping.kept = kept
        return keeping

    def view_of(self, epoch: int) -> int:
        """Which view of each picture is seen in this epoch."""
        if self.augment == "none" and not self.crop:
            return 0
        return epoch % self.views if self.views else epoch

    @property
    def drawn(self) -> str:
        """All that says, beside view, index and files, how a view is drawn; "" if nothing is."""
        if self.augment == "none" and not self.crop:
            return ""
        versions = [augmentation_versions(), self.seed, self.augment, self.crop.plain]
        return json.dumps([*versions, self._asks, asdict(self.read)])

    def look(self, epoch: int, index: int, size: tuple[int, int] | None = None) -> View:
        """A picture as it is seen in an epoch.

        size: (H, W) of its file, where all but the pixels is wanted: the image is blank then.
        """
        whole = read_sample(self.pairs[index], self.read, size).sample
        place = (self.seed, self.view_of(epoch), index)
        sample = augment(whole, self.augment, place)
        if self._asks and not things_of(sample, self.read) and things_of(whole, self.read):
            sample = whole  # what was asked about has left the picture
        frame_size, resize = self.image_size, self.read.resize
        if self.crop:
            sample = random_crop(sample, frame_size, self.crop, resize, place, self._asks)
            frame_size, resize = self.crop, "keep"
        if size is None:
            image, frame = fit_image(sample.image, frame_size, resize)
        else:
            shown = sample.image.shape[:2]
            image, frame = blank(frame_size), Frame(shown, fit_size(shown, frame_size, resize))
        return View(sample, image, frame, whole.image.shape[:2])

    def _features(self, key: SampleKey) -> tuple[Tensor, tuple[int, int]] | None:
        return self.kept and self.kept.read(self.view_of(key.epoch), key.index)

    def _item(self, key: SampleKey, kept: tuple[Tensor, tuple[int, int]] | None) -> Item:
        features, size = kept or (None, None)
        if features is not None and self.kept.needs_image:
            size = None
        sample, image, frame, _ = self.look(key.epoch, key.index, size)
        place, frame_size = (self.seed, key.epoch, key.index), image.shape[:2]
        in_frame = bool(self.crop) or self.loss_resolution == "frame"
        rows = tuple(
            Row(
                f"{sample.id}#{thing.name}" if thing.name else sample.id,
                fit_mask(target, frame, frame_size) if in_frame else target,
                self._prompt(target, frame, frame_size, (*place, thing.number)),
            )
            for thing in self._things(sample, place)
            for target in [self._target(sample, thing)]
        )
        return Item(
            image, rows, frame, in_frame, key.weight, sample.id, sample.image_path,
            in_words(self.prompt), features,
        )  # fmt: skip

    @property
    def _asks(self) -> bool:
        """Whether rows are about objects; else each image is one row, whatever it shows."""
        return self.prompt.prompt != "none" or self.read.objects != "mask"

    def _things(self, sample: Sample, place: tuple[int, int, int]) -> list[Thing]:
        if not self._asks:
            return [EVERYTHING]
        things = things_of(sample, self.read)
        if not things:
            if self.read.objects != "mask":
                raise UserError(f"{sample.mask_path}: has no object to ask about; leave it out")
            if self.prompt.empty_masks == "skip":
                raise UserError(
                    f"{sample.mask_path}: has no object to put a box around; leave it out, or use "
                    "--empty_masks whole"
                )
            return [EVERYTHING]
        most = self.prompt.max_objects
        if self.train and 0 < most < len(things):
            rng = np.random.default_rng(stream("objects", place))
            things = [things[i] for i in sorted(rng.choice(len(things), most, replace=False))]
        return things

    def _target(self, sample: Sample, thing: Thing) -> np.ndarray:
        if answers_classes(self.read.num_classes, self.prompt.prompt) and not self._asks:
            return sample.mask
        return target_of(sample, thing, self.read)

    def _prompt(self, target, frame: Frame, frame_size, words) -> RowPrompt:
        if self.prompt.prompt == "none":
            return RowPrompt()
        return make_prompt(target, frame, frame_size, self.prompt, self.train, words)


def collate(items: Sequence[Item]) -> Batch:
    """One batch; pictures of different sizes share a canvas that is `IGNORE` outside of each.

    Its rows are those of the first item, then those of the second, and so on; but where prompts of
    several kinds share the batch, those with fewer tokens come first.
    """
    asked = [(i, row) for i, item in enumerate(items) for row in item.rows]
    asked.sort(key=lambda pair: pair[1].prompt.tokens)
    rows, owners = [row for _, row in asked], [items[i] for i, _ in asked]
    prompts = collate_prompts([row.prompt for row in rows])
    index = [i for i, _ in asked]
    if index != list(range(len(items))):
        prompts = prompts._replace(image_index=torch.tensor(index))
    weights = [item.weight / len(item.rows) for item in owners]
    return Batch(
        image=_stack_images([item.image for item in items]),
        target=torch.from_numpy(_stack_on_canvas([row.target for row in rows])),
        prompts=prompts,
        frames=Frames.collate([item.frame for item in items], items[0].frame_size),
        weight=torch.tensor(weights, dtype=torch.float32),
        ids=[item.id for item in items],
        paths=[item.path for item in items],
        in_frame=items[0].in_frame,
        row_names=[row.name for row in rows],
        told=items[0].told,
        features=_stack_features([item.features for item in items]),
    )


def _stack_images(images: list[np.ndarray]) -> Tensor:
    """(S_h, S_w, 3) each -> (B, 3, S_h, S_w); blank ones take no memory together either."""
    if not any(any(image.strides) for image in images):
        height, width = images[0].shape[:2]
        return torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(len(images), 3, height, width)
    stacked = torch.from_numpy(np.stack(images))  # (B, S_h, S_w, 3)
    return stacked.permute(0, 3, 1, 2).contiguous()


def _stack_features(features: list[Tensor | None]) -> Tensor | None:
    """(C, h, w) or (h, w, C) each -> (B, ...), laid out in memory as they are: how a kernel rounds
    may depend on it.
    """
    if features[0] is None:
        return None
    order = memory_order(features[0])
    laid_out = torch.stack([one.permute(order) for one in features])
    return laid_out.permute(0, *(order.index(axis) + 1 for axis in range(len(order))))


def _stack_on_canvas(targets: list[np.ndarray]) -> np.ndarray:
    height, width = (
        max(sizes) for sizes in zip(*(target.shape for target in targets), strict=True)
    )
    canvas = np.full((len(targets), height, width), IGNORE, np.uint8)
    for row, target in zip(canvas, targets, strict=True):
        row[: target.shape[0], : target.shape[1]] = target
    return canvas
