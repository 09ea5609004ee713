"""What the model is told about an object: a box, points, or a rough mask, made from its true mask.

Everything random follows from the words that the caller gives (seed, epoch, index, object).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import cv2
import numpy as np
import torch

from samtune.config import PromptOptions
from samtune.data.randomness import stream
from samtune.errors import UserError
from samtune.structures import IGNORE, Corrections, Frame, Prompts

MIXED = ("box", "point", "points", "box+points", "mask")  # what --prompt mixed draws from
_MASK_STRIDE = 4  # pixels of the frame per cell of a mask prompt, as SAM was trained
_SURE = 10.0  # largest logit of a mask prompt
_DEFAULT_JITTER = 0.1
# Names of `evaluate --prompts`: what is changed of the options that the run was trained with.
SCORED = {
    "exact_box": {"prompt": "box"},
    "jittered_box": {"prompt": "box", "scoring_jitter": _DEFAULT_JITTER},
    "whole_image": {"prompt": "whole_image"},
    "centre_point": {"prompt": "point"},
    "points": {"prompt": "points"},
    "box+points": {"prompt": "box+points"},
    "rough_mask": {"prompt": "mask"},
    "none": {"prompt": "none"},
}


class RowPrompt(NamedTuple):
    """What is said about one object, in the frame's pixels; every part may be absent.

    box: (4,) float32. points: (N, 2) float32 with labels (N,) int64. mask: (1, h, w) float32
    logits, h x w a quarter of the frame. truth: (h, w) uint8, what a user who corrects wants to
    see, in so many clicks; seed: from which these are drawn, None for none drawn. mixed: rows of
    other kinds share the batch, so the points are all tokens (see `Prompts.lengths`).
    """

    box: np.ndarray | None = None
    points: np.ndarray | None = None
    labels: np.ndarray | None = None
    mask: np.ndarray | None = None
    truth: np.ndarray | None = None
    clicks: int = 0
    seed: int | None = None
    mixed: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens a row has of its own, where rows of several kinds share a batch."""
        return len(self.labels) if self.mixed else 0


def prompts_to_score(names: str, trained: PromptOptions) -> dict[str, PromptOptions]:
    """Options by name for a list like "exact_box,centre_point,none", without corrections.

    trained: the run's own options, which give what a name leaves open. Raises UserError for a name
    that is none of `SCORED`.
    """
    result = {}
    exact = replace(trained, box_scale=1.0, scoring_jitter=0.0, refine_steps=0)
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in SCORED:
            raise UserError(f"--prompts {name}: choose from {', '.join(SCORED)}")
        result[name] = replace(exact, **SCORED[name])
    return result


def in_words(options: PromptOptions) -> str:
    """What the model is told in validation and scoring: a score means little without it."""
    kind = _kind(options, train=False)
    words = kind.replace("points", f"{options.num_points} points")
    if kind.startswith("box") and options.box_scale != 1:
        words += f" scaled by {options.box_scale:g}"
    if kind.startswith("box") and options.scoring_jitter:
        words += f" jittered by {options.scoring_jitter:g}"
    return words + (f", {options.refine_steps} clicks" if options.refine_steps else "")


def make_prompt(
    target: np.ndarray,
    frame: Frame,
    frame_size: tuple[int, int],
    options: PromptOptions,
    train: bool,
    words: Sequence[int],
) -> RowPrompt:
    """The prompt for what is 1 in `target` (H, W), which lies in the frame as `frame` says.

    In training points are random pixels, in scoring the first one is the innermost. Where the
    target is empty the box is the whole picture, points lie outside, and the mask is empty.
    """
    rng = np.random.default_rng(stream("prompt", words))
    kind = _kind(options, train, rng)
    box = points = labels = mask = truth = seed = None
    if kind in ("box", "box+points", "whole_image"):
        corners = _box(target, kind, options, train, words)
        box = frame.scale_xy(np.reshape(corners, (2, 2))).reshape(4).astype(np.float32)
    if kind in ("point", "points", "box+points"):
        count = 1 if kind == "point" else options.num_points
        points, labels = draw_points(target, count, rng, centre_first=not train)
        points = frame.scale_xy(points).astype(np.float32)
    if kind == "mask":
        mask = rough_mask(shown_on_grid(target, frame, frame_size), rng)[None]
    if options.refine_steps:
        truth = shown_on_grid(target, frame, frame_size)
        seed = int(rng.integers(2**32)) if train else None
    if mixed := train and options.prompt == "mixed":
        box, points, labels = None, *_all_tokens(box, points, labels)
        mask = np.zeros((1, *grid_size(frame_size)), np.float32) if mask is None else mask
    return RowPrompt(box, points, labels, mask, truth, options.refine_steps, seed, mixed)


def _kind(options: PromptOptions, train: bool, rng: np.random.Generator | None = None) -> str:
    if options.prompt != "mixed":
        return options.prompt
    return MIXED[rng.integers(len(MIXED))] if train else "box"


def _box(target, kind: str, options: PromptOptions, train: bool, words) -> tuple[float, ...]:
    box = None if kind == "whole_image" else box_from_mask(target, options.box_scale)
    if box is None:
        return box_from_mask(np.ones_like(target))
    jitter = options.box_jitter if train else options.scoring_jitter
    if not jitter:
        return box
    return jitter_box(box, jitter, target.shape, np.random.default_rng(stream("jitter", words)))


def collate_prompts(rows: Sequence[RowPrompt]) -> Prompts:
    """One batch of prompts of one --prompt; those of 'mixed' sorted by `tokens`."""
    given = lengths = None
    if rows[0].mixed:
        lengths = tuple(row.tokens for row in rows)
        longest = max(lengths)
        given = torch.tensor([bool(row.mask.any()) for row in rows])
        rows = [_padded(row, longest) for row in rows]
    corrections = None
    if rows[0].truth is not None:
        seeds = [row.seed for row in rows]
        drawn = None if seeds[0] is None else torch.tensor(seeds)
        truth = torch.from_numpy(np.stack([row.truth for row in rows]))
        corrections = Corrections(rows[0].clicks, truth, drawn)
    return Prompts(
        boxes=_stacked([row.box for row in rows]),
        points=_stacked([row.points for row in rows]),
        point_labels=_stacked([row.labels for row in rows]),
        masks=_stacked([row.mask for row in rows]),
        mask_given=given,
        lengths=lengths,
        corrections=corrections,
    )


def _stacked(parts: list[np.ndarray | None]) -> torch.Tensor | None:
    return None if parts[0] is None else torch.from_numpy(np.stack(parts))


def _all_tokens(box, points, labels) -> tuple[np.ndarray, np.ndarray]:
    """Points, padding and box corners as one list of points, in the tokens that SAM would make.

    A padding point (label -1) follows points without a box; corners have the labels 2 and 3.
    """
    if points is None:
        points, labels = np.zeros((0, 2), np.float32), np.zeros(0, np.int64)
    if box is not None:
        return np.concatenate([points, box.reshape(2, 2)]), np.concatenate([labels, [2, 3]])
    if len(points):
        return np.pad(points, ((0, 1), (0, 0))), np.pad(labels, (0, 1), constant_values=-1)
    return points, labels


def _padded(row: RowPrompt, length: int) -> RowPrompt:
    """With points before its own that nobody reads, `length` in all."""
    more = length - len(row.labels)
    return row._replace(
        points=np.pad(row.points, ((more, 0), (0, 0))),
        labels=np.pad(row.labels, (more, 0), constant_values=-1),
    )


def draw_points(
    target: np.ndarray, count: int, rng: np.random.Generator, centre_first: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2) x, y of pixels and (N,) int64 labels: 1 inside the object, 0 outside, in turns.

    centre_first: the first one inside is the innermost. Those outside are near the object where
    there is room. A point that has no place gets the label -1.
    """
    labels = np.arange(1, count + 1, dtype=np.int64) % 2
    points = np.zeros((count, 2))
    near = _surroundings(target)
    for i, label in enumerate(labels):
        if i == 0 and centre_first and (target == 1).any():
            points[i] = innermost_pixel(target == 1)
            continue
        pixels = np.flatnonzero(target == 1) if label else near
        if not len(pixels):
            pixels, label = near, 0
        if len(pixels):
            points[i] = divmod(int(pixels[rng.integers(len(pixels))]), target.shape[1])[::-1]
        labels[i] = label if len(pixels) else -1
    return points, labels


def _surroundings(target: np.ndarray) -> np.ndarray:
    """Flat indices of background in the object's box, widened by half its sides all around."""
    box = box_from_mask(target, scale=1.0)
    if box is not None:
        x0, y0, x1, y1 = box
        dx, dy = (x1 - x0) // 2 + 1, (y1 - y0) // 2 + 1
        window = np.zeros(target.shape, bool)
        window[max(y0 - dy, 0) : y1 + dy + 1, max(x0 - dx, 0) : x1 + dx + 1] = True
        if len(near := np.flatnonzero(window & (target == 0))):
            return near
    return np.flatnonzero(target == 0)


def innermost_pixel(inside: np.ndarray) -> tuple[int, int]:
    """x, y of the pixel of an (H, W) bool mask that is farthest from all others and the border."""
    x, y, width, height = cv2.boundingRect(inside.astype(np.uint8))
    part = np.pad(inside[y : y + height, x : x + width], 1).astype(np.uint8)
    depth = cv2.distanceTransform(part, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return x + int(column) - 1, y + int(row) - 1


def grid_size(frame_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a mask prompt in a frame of (S_h, S_w) pixels."""
    height, width = (math.ceil(side / _MASK_STRIDE) for side in frame_size)
    return height, width


def shown_on_grid(target: np.ndarray, frame: Frame, frame_size: tuple[int, int]) -> np.ndarray:
    """(H, W) -> a quarter of the frame: 1 where most of a cell is object, `IGNORE` if unread.

    An object too small for any cell gets the one that it covers most.
    """
    grid = grid_size(frame_size)
    height, width = (
        max(1, round(valid * cells / side))
        for valid, cells, side in zip(frame.valid_size, grid, frame_size, strict=True)
    )
    shown = np.full(grid, IGNORE, np.uint8)
    share = cv2.resize(np.float32(target == 1), (width, height), interpolation=cv2.INTER_AREA)
    inside = share >= min(0.5, share.max() or 1.0)
    part = shown[:height, :width]
    part[:] = 0
    if (unread := target == IGNORE).any():  # in most pictures nothing is: half of the time saved
        unread = cv2.resize(np.float32(unread), (width, height), interpolation=cv2.INTER_AREA)
        part[unread >= 0.5] = IGNORE
    part[inside] = 1
    return shown


def rough_mask(shown: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask (h, w) of 0, 1 and `IGNORE` as the logits of a mediocre answer, float32.

    Two per cell of distance from the object's border, at most 10. The border is moved in or out,
    everywhere by up to a tenth of the object's radius (that of the disc of its area) and by a
    smooth random field of a fifth of it. In scoring as well, for the true mask would be the answer.
    """
    inside = (shown == 1).astype(np.uint8)
    if not inside.any():
        return np.full(shown.shape, -_SURE, np.float32)
    depth, height_above = (
        cv2.distanceTransform(np.pad(part, 1, mode="edge"), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        for part in (inside, 1 - inside)
    )
    radius = math.sqrt(inside.sum() / math.pi)
    waves = rng.normal(size=(5, 5)).astype(np.float32)
    waves = cv2.resize(waves, shown.shape[::-1], interpolation=cv2.INTER_CUBIC)
    distance = (depth - height_above)[1:-1, 1:-1]
    moved = distance + radius * (rng.uniform(-0.1, 0.1) + 0.2 * waves)
    return np.clip(2 * moved, -_SURE, _SURE).astype(np.float32)


def box_from_mask(mask: np.ndarray, scale: float = 1.0) -> tuple[int, int, int, int] | None:
    """The box (x0, y0, x1, y1) around all pixels of a (H, W) mask that are 1; None without any.

    scale: factor on the sides, about the centre. The far corner is one past the last pixel, but on
    the right and lower border of the picture it is the last pixel itself, and a box scaled across
    the left or upper border is moved, not cut.
    Source: Kyyle2114/SAM-Adapter-Pytorch-Implementation 66b0e9e, whose models know these boxes.
    """
    foreground = (mask == 1).view(np.uint8)
    x, y, width, height = cv2.boundingRect(foreground)
    if width == 0:
        return None
    x0, x1 = _stretch(x, width, scale, mask.shape[1])
    y0, y1 = _stretch(y, height, scale, mask.shape[0])
    return x0, y0, x1, y1


def _stretch(start: int, extent: int, scale: float, limit: int) -> tuple[int, int]:
    """One axis of the box rule; int() cuts towards zero on purpose."""
    stretched = int(extent * scale)
    start = max(start - int((stretched - extent) / 2), 0)
    if start + stretched >= limit:
        stretched = limit - start - 1
    return start, start + stretched


def jitter_box(
    box: tuple[float, float, float, float],
    amount: float,
    size: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[float, float, float, float]:
    """Move each side of a box by up to `amount` of the box's width or height, uniformly.

    size: (H, W); the box stays inside the picture, and its corners keep their order.
    """
    x0, y0, x1, y1 = box
    reach = amount * np.array([x1 - x0, y1 - y0] * 2, np.float64)
    moved = np.asarray(box, np.float64) + rng.uniform(-1, 1, 4) * reach
    (x0, x1), (y0, y1) = sorted(moved[[0, 2]]), sorted(moved[[1, 3]])
    x0, x1 = np.clip((x0, x1), 0, size[1] - 1).tolist()
    y0, y1 = np.clip((y0, y1), 0, size[0] - 1).tolist()
    return x0, y0, x1, y1
