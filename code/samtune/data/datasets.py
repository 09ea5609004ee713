"""Samples ready for the model, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from samtune.config import PromptOptions, ReadOptions, Size
from samtune.data.files import Pair
from samtune.data.prompts import box_from_mask, jitter_box
from samtune.data.randomness import stream
from samtune.data.samples import read_sample
from samtune.data.transforms import augment, fit_image, fit_mask, prepare, random_crop
from samtune.errors import UserError
from samtune.structures import IGNORE, Batch, Frame, Frames, Prompts, Sample


class SampleKey(NamedTuple):
    """Which sample, when. weight: 0 for one that only keeps the ranks in step."""

    epoch: int
    index: int
    weight: float = 1.0


class Item(NamedTuple):
    """One sample in the model's frame.

    image: (S_h, S_w, 3) uint8, zero where padded. target: (H, W) at the original size, or
    (S_h, S_w) where `in_frame`. box: (4,) float32 in the frame's pixels, or None. A crop is a
    picture of its own: its frame has the crop's size, its original size is what it shows.
    """

    image: np.ndarray
    target: np.ndarray
    box: np.ndarray | None
    frame: Frame
    in_frame: bool
    weight: float
    id: str
    path: str

    @property
    def frame_size(self) -> tuple[int, int]:
        return self.image.shape[:2]


class SegmentationDataset(torch.utils.data.Dataset):
    """Pairs of files as `Item`s, asked for by `SampleKey`: read, augmented, fitted, prompted.

    image_size: (S_h, S_w) of the frame, or the side of a square. train: whether boxes are jittered.
    crop: (h, w) of the random window of the frame that is the image instead, with target and box
    (0: none); with boxes it holds an object. What is random follows from (seed, key.epoch,
    key.index).
    Reading raises UserError, also for a picture without object under `--prompt box` and
    `--empty_masks skip`: those are to be left out by the scan's report.
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
    ):
        if prompt.box_scale <= 0:
            raise UserError(f"--box_scale {prompt.box_scale}: must be more than 0")
        if prompt.box_jitter < 0:
            raise UserError(f"--box_jitter {prompt.box_jitter}: must not be negative")
        self.pairs, self.read, self.prompt = pairs, read, prompt
        self.image_size, self.crop = Size.read(image_size), Size.read(crop)
        self.loss_resolution, self.augment, self.seed = loss_resolution, augment, seed
        self.train = train
        prepare(augment)  # loader processes that are forked off find it made

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: SampleKey) -> Item:
        place = (self.seed, key.epoch, key.index)
        sample = read_sample(self.pairs[key.index], self.read).sample
        sample = augment(sample, self.augment, place)
        frame_size, resize, boxed = self.image_size, self.read.resize, self.prompt.prompt == "box"
        if self.crop:
            sample = random_crop(sample, frame_size, self.crop, resize, place, hold_object=boxed)
            frame_size, resize = self.crop, "keep"
        image, frame = fit_image(sample.image, frame_size, resize)
        in_frame = bool(self.crop) or self.loss_resolution == "frame"
        target = fit_mask(sample.mask, frame, frame_size) if in_frame else sample.mask
        box = None
        if boxed:
            corners = np.reshape(self._box(sample, place), (2, 2))
            box = frame.scale_xy(corners).reshape(4).astype(np.float32)
        return Item(image, target, box, frame, in_frame, key.weight, sample.id, sample.image_path)

    def _box(self, sample: Sample, place: tuple[int, int, int]) -> tuple[float, ...]:
        box = box_from_mask(sample.mask, self.prompt.box_scale)
        if box is None:
            if self.prompt.empty_masks == "skip":
                raise UserError(
                    f"{sample.mask_path}: has no object to put a box around; leave it out, or use "
                    "--empty_masks whole"
                )
            return box_from_mask(np.ones_like(sample.mask))
        if self.train and self.prompt.box_jitter:
            rng = np.random.default_rng(stream("jitter", place))
            box = jitter_box(box, self.prompt.box_jitter, sample.mask.shape, rng)
        return box


def collate(items: Sequence[Item]) -> Batch:
    """One batch; pictures of different sizes share a canvas that is `IGNORE` outside of each."""
    frames = Frames.collate([item.frame for item in items], items[0].frame_size)
    image = torch.from_numpy(np.stack([item.image for item in items]))  # (B, S_h, S_w, 3)
    boxes = None
    if items[0].box is not None:
        boxes = torch.from_numpy(np.stack([item.box for item in items]))  # (B, 4)
    return Batch(
        image=image.permute(0, 3, 1, 2).contiguous(),  # (B, 3, S_h, S_w)
        target=torch.from_numpy(_stack_on_canvas([item.target for item in items])),
        prompts=Prompts(boxes=boxes),
        frames=frames,
        weight=torch.tensor([item.weight for item in items], dtype=torch.float32),
        ids=[item.id for item in items],
        paths=[item.path for item in items],
        in_frame=items[0].in_frame,
    )


def _stack_on_canvas(targets: list[np.ndarray]) -> np.ndarray:
    height, width = (
        max(sizes) for sizes in zip(*(target.shape for target in targets), strict=True)
    )
    canvas = np.full((len(targets), height, width), IGNORE, np.uint8)
    for row, target in zip(canvas, targets, strict=True):
        row[: target.shape[0], : target.shape[1]] = target
    return canvas
