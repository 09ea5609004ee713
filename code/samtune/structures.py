"""The shapes of everything that flows from an image file to a score.

Letters: B images of a batch, R questions (rows) asked about them, C output channels, N points,
(H, W) the size of a picture as it lies on disk, (S_h, S_w) the frame that the model sees. Sizes are
always (height, width); coordinates are always (x, y) in pixels.

A *row* is one question: one prompt (a box, say) about one image, or one image without any prompt.
A batch of rows is decoded in one call, so several objects per image, several classes and the plain
"one box per image" are the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = 255  # a pixel of a mask that no loss and no metric reads
ALL = slice(None)
_BAND_VALUES = 2**24  # 64 MiB in float32


@dataclass(frozen=True)
class Sample:
    """One picture with its mask, as read from disk.

    image: (H, W, 3) uint8 RGB. mask: (H, W) uint8, 0 background, 1 foreground (or class ids),
    `IGNORE` unread. id: the key that paired the two files; image_path, mask_path: where they lie.
    layers: (H, W) uint16 maps of single objects, where these are asked about: 0 nothing, `IGNORE`
    unread, any other value one object, which lies in one layer only; objects that overlap lie in
    different layers. names: what an object is called, by its value.
    """

    image: np.ndarray
    mask: np.ndarray
    id: str
    image_path: str = ""
    mask_path: str = ""
    layers: tuple[np.ndarray, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)

    def moved(self, image: np.ndarray, move: Callable[[np.ndarray], np.ndarray]) -> Sample:
        """The picture turned, cut or resized to `image`; `move` does the same to (H, W) values."""
        return replace(
            self, image=image, mask=move(self.mask), layers=tuple(map(move, self.layers))
        )


@dataclass(frozen=True)
class Frame:
    """How one picture was fitted into the model's frame: resized, then padded right and below.

    original_size: (H, W) on disk. valid_size: (h, w) after resizing, without the padding.
    """

    original_size: tuple[int, int]
    valid_size: tuple[int, int]

    def scale_xy(self, xy: np.ndarray) -> np.ndarray:
        """Bring (..., 2) coordinates of the original picture into the frame, in float64."""
        (height, width), (valid_height, valid_width) = self.original_size, self.valid_size
        return np.asarray(xy, np.float64) * (valid_width / width, valid_height / height)


@dataclass(frozen=True)
class Frames:
    """The geometry of a whole batch, as tensors, so that no step loops over images.

    original_size, valid_size: (B, 2) int64. frame_size: (S_h, S_w). canvas_size: the smallest size
    that holds every original picture of the batch; what lies outside a picture is `IGNORE` in the
    target.
    """

    original_size: Tensor
    valid_size: Tensor
    frame_size: tuple[int, int]
    canvas_size: tuple[int, int]

    @classmethod
    def collate(cls, frames: list[Frame], frame_size: tuple[int, int]) -> Frames:
        original = torch.tensor([frame.original_size for frame in frames])
        valid = torch.tensor([frame.valid_size for frame in frames])
        height, width = original.amax(0).tolist()
        return cls(original, valid, frame_size, (height, width))

    def to_frame(self, logits: Tensor) -> Tensor:
        """(R, C, h, w) decoder logits -> (R, C, S_h, S_w), bilinear, in float32."""
        return F.interpolate(logits.float(), self.frame_size, mode="bilinear", align_corners=False)

    def restore(
        self, logits: Tensor, image_index: Tensor | None = None, lines: slice = ALL
    ) -> Tensor:
        """(R, C, h, w) decoder logits -> (R, C, canvas) at the pictures' own resolution, float32.

        SAM's post-processing: bilinear to the frame, crop the padding, bilinear to the original
        size. Each of the two is linear and separable, so both together are one small matrix per
        axis and image: no loop over images of different sizes, and a deterministic backward pass.
        Row r's picture fills the upper left of its canvas; beyond it the values mean nothing.
        image_index: (R,) the image of each row; None when row r asks about image r. lines: which
        lines of the canvas to compute.
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            down, across = (
                _resize_matrix(
                    logits.shape[2 + axis],
                    self.frame_size[axis],
                    self.valid_size[:, axis],
                    self.original_size[:, axis],
                    torch.arange(self.canvas_size[axis], device=logits.device)[part],
                )
                for axis, part in enumerate((lines, ALL))
            )  # (B, canvas_h, h), (B, canvas_w, w)
            if image_index is not None:  # many rows may ask about one image
                down, across = down[image_index], across[image_index]
            return down[:, None] @ logits @ across[:, None].transpose(2, 3)


def _resize_matrix(low: int, frame: int, valid: Tensor, original: Tensor, at: Tensor) -> Tensor:
    """(B, len(at), low): the weights of resizing low -> frame, cropping to valid, -> original.

    at: which pixels of the original.
    """
    device = valid.device
    last = torch.tensor(low - 1, device=device)
    up = _bilinear(torch.arange(frame, device=device), low / frame, last, low)  # (frame, low)
    ratio = valid.float()[:, None] / original.float()[:, None]  # (B, 1)
    return _bilinear(at[None], ratio, valid[:, None] - 1, frame) @ up


def _bilinear(position: Tensor, ratio: float | Tensor, last: Tensor, length: int) -> Tensor:
    """(..., length): how much each source pixel gives to the target pixel at `position`.

    Half-pixel centres, edges held: `F.interpolate(mode="bilinear", align_corners=False)`.
    """
    source = ((position.float() + 0.5) * ratio - 0.5).clamp(min=0)
    source = torch.minimum(source, last.float())
    return (1 - (source[..., None] - torch.arange(length, device=source.device)).abs()).clamp(min=0)


class Corrections(NamedTuple):
    """A user who looks at each answer, clicks on what is wrong, and asks again.

    clicks: how often. truth: (R, h, w) uint8 0, 1 or `IGNORE`: what he wants to see, in the frame,
    on a grid about as fine as the decoder's. seed: (R,) int64 in 0..2^32, from which the pixel that
    he clicks is drawn; None: he clicks in the middle of the largest error.
    """

    clicks: int
    truth: Tensor
    seed: Tensor | None = None


class Prompts(NamedTuple):
    """What the model is asked, R rows in the frame's pixels; every part may be absent.

    boxes: (R, 4) float32 x0, y0, x1, y1. points: (R, N, 2) float32 with point_labels (R, N) int64
    (1 foreground, 0 background, -1 padding). image_index: (R,) int64, the image of each row; None
    when row r asks about image r. masks: (R, 1, h, w) float32 logits of a mask in the frame, on any
    grid (SAM's own is four times that of the features); mask_given: (R,) bool, which rows have one;
    None: all. lengths: where rows of different kinds share a batch, how many of its points, from
    the last one backwards, row r has, in rising order; then they are all tokens there are, box
    corners (labels 2 near, 3 far) and SAM's padding among them. corrections: who asks again.
    """

    boxes: Tensor | None = None
    points: Tensor | None = None
    point_labels: Tensor | None = None
    image_index: Tensor | None = None
    masks: Tensor | None = None
    mask_given: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    corrections: Corrections | None = None

    def rows(self, rows: slice) -> Prompts:
        """Some of the rows. `image_index` must be there."""
        lengths = self.lengths and self.lengths[rows]
        return _map_tensors(self, lambda tensor: tensor[rows])._replace(lengths=lengths)

    def runs(self, rows: int) -> list[tuple[slice, int | None]]:
        """Runs of rows with equally many tokens, and how many; (all, None) where all are equal."""
        if self.lengths is None:
            return [(slice(0, rows), None)]
        ends = [i for i in range(1, rows) if self.lengths[i] != self.lengths[i - 1]] + [rows]
        starts = [0, *ends[:-1]]
        return [(slice(a, b), self.lengths[a]) for a, b in zip(starts, ends, strict=True)]


class Prediction(NamedTuple):
    """What the model answers.

    logits: (R, C, h, w) at the decoder's own resolution (`Frames` brings them to another); iou:
    (R, C) SAM's estimate of its own mask quality, or None; aux: further loss terms by name.
    earlier: the logits of the answers before this one, where a user corrected them.
    """

    logits: Tensor
    iou: Tensor | None = None
    aux: dict[str, Tensor] | None = None
    earlier: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Batch:
    """What the loader hands to the model.

    image: (B, 3, S_h, S_w) uint8, zero where padded. target: (R, T_h, T_w) uint8 (0, 1, or class
    ids where the model answers with a mask per class; `IGNORE`), on the canvas of original sizes,
    or in the frame where `in_frame`. weight: (R,) float32: a real sample weighs 1, which its rows
    share equally, and one that only keeps the ranks in step 0. ids, paths: B strings for messages
    and files. row_names: R strings for tables ("img7", "img7#3"); empty: the image's id. told: what
    the model was told, in words; empty: what the prompts show. features: (B, ...) what
    `PromptedSam.frozen` says of the images, where that is kept on disk; `image` is then one zero
    that is expanded to its shape, unless the model reads it beside the features.
    """

    image: Tensor
    target: Tensor
    prompts: Prompts
    frames: Frames
    weight: Tensor
    ids: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    in_frame: bool = False
    row_names: list[str] = field(default_factory=list)
    told: str = ""
    features: Tensor | None = None

    @property
    def inputs(self) -> tuple:
        """The model's arguments, in its order."""
        known = (self.image, self.prompts, self.frames.valid_size)
        return known if self.features is None else (*known, self.features)

    @property
    def image_of_row(self) -> list[int]:
        """Which image each row asks about. Waits for the device; on the CPU it costs nothing."""
        index = self.prompts.image_index
        return list(range(len(self.target))) if index is None else index.tolist()

    def in_parts(self, rows: int) -> list[Batch]:
        """The same questions in batches of at most `rows` rows, all with all images; 0: in one."""
        if rows < 1 or len(self.target) <= rows:
            return [self]
        prompts, names = self.prompts, self.row_names
        if prompts.image_index is None:
            index = torch.arange(len(self.target), device=self.target.device)
            prompts, names = prompts._replace(image_index=index), names or self.ids
        starts = range(0, len(self.target), rows)
        return [
            replace(
                self,
                target=self.target[part],
                prompts=prompts.rows(part),
                weight=self.weight[part],
                row_names=names[part],
            )
            for part in (slice(start, start + rows) for start in starts)
        ]

    def at_target(self, logits: Tensor, lines: slice = ALL) -> Tensor:
        """(R, C, h, w) decoder logits -> (R, C, T_h, T_w) float32, where the target lies.

        lines: which lines of the target.
        """
        if self.in_frame:
            return self.frames.to_frame(logits)[:, :, lines]
        return self.frames.restore(logits, self.prompts.image_index, lines)

    def bands(self, values: int) -> list[slice]:
        """The target's lines, cut such that `values` numbers per pixel of a band stay few.

        What is computed for every pixel and class at full resolution is computed band by band, so
        that memory does not grow with the pictures.
        """
        rows = len(self.target)
        height, width = self.frames.frame_size if self.in_frame else self.frames.canvas_size
        lines = max(1, _BAND_VALUES // (rows * width * values))
        return [slice(start, start + lines) for start in range(0, height, lines)]

    def to(self, device: torch.device) -> Batch:
        """Copy every tensor, without waiting for it when the memory is pinned."""
        return self.map(_once(lambda tensor: tensor.to(device, non_blocking=True)))

    def pin_memory(self) -> Batch:
        return self.map(_once(lambda tensor: tensor.pin_memory()))

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `function` applied to every tensor."""
        return _map_tensors(self, function)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of these tensors until `stream` has done what is queued there by then."""
        _map_tensors(self, lambda tensor: tensor.record_stream(stream))


def _once(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`move`, which copies one number only where a tensor is one number expanded to a shape."""

    def moved(tensor: Tensor) -> Tensor:
        if tensor.numel() > 1 and not any(tensor.stride()):
            return move(tensor[(slice(1),) * tensor.ndim]).expand(tensor.shape)
        return move(tensor)

    return moved


def _map_tensors(value, function):
    """Apply `function` to every tensor in a (nested) dataclass or named tuple."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (Prompts, Corrections)):
        return type(value)(*(_map_tensors(part, function) for part in value))
    if isinstance(value, (Batch, Frames)):
        names = [f.name for f in fields(value)]
        return replace(value, **{n: _map_tensors(getattr(value, n), function) for n in names})
    return value
