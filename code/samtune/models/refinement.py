"""Answers that a simulated user corrects: SAM's interactive training, all rows at once.

After each answer he clicks once on what is wrong: on what is missing (a foreground point) or on
what is too much (a background point). All points so far and the last answer's logits, as mask
prompt, make the next question. Nothing waits for the device, and no global random state is used:
the draws follow from a seed per row, so any number of processes draws alike.

Source: arXiv 2304.02643, appendix A ("training algorithm"): points uniform in the error region, the
unthresholded logits fed back. *Deviations*: errors are seen on the decoder's grid (4 pixels of the
frame with SAM's own), not at full resolution; one answer per step, never the best of three; the
number of clicks is the caller's, and none comes without a new point; where rows of several kinds
share a batch, one that began with a mask alone gets no padding point with its first click.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from samtune.structures import Prediction, Prompts

_BITS = 0xFFFFFFFF


def with_corrections(
    decode: Callable[[Tensor, Prompts, tuple[int, int]], Prediction],
    features: Tensor,
    prompts: Prompts,
    frame_size: tuple[int, int],
) -> Prediction:
    """Decode, and again after each click that `prompts.corrections` asks for.

    features: (B, C, h, w). The last answer, with the logits of those before in `earlier`. No
    gradient flows from one answer through the prompt into the one before.
    """
    user = prompts.corrections
    if prompts.image_index is not None:  # once, not in every step
        features = features[prompts.image_index]
    prompts = prompts._replace(image_index=None, corrections=None)
    answers = [decode(features, prompts, frame_size)]
    for click in range(user.clicks):
        logits = answers[-1].logits[:, :1].detach().float()
        seed = None if user.seed is None else user.seed + click
        cell, label = next_click(logits[:, 0] > 0, _on_grid(user.truth, logits.shape[-2:]), seed)
        point = _cell_to_pixel(cell, logits.shape[-2:], frame_size)
        prompts = _add_click(prompts, point, label, logits)
        answers.append(decode(features, prompts, frame_size))
    return answers[-1]._replace(earlier=tuple(answer.logits for answer in answers[:-1]))


def next_click(predicted: Tensor, truth: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the user clicks: (R, 2) int64 row and column, and (R,) int64 labels.

    predicted: (R, h, w) bool. truth: (R, h, w) 0, 1 or `IGNORE`, where nothing is wrong. seed: (R,)
    int64 below 2^32, drawn from uniformly; None: the innermost cell of the largest error. The label
    is 1 where the object was missed, 0 where it was seen but is not, -1 where nothing is wrong.
    """
    missed = (truth == 1) & ~predicted
    surplus = (truth == 0) & predicted
    wrong = torch.stack([missed, surplus], dim=1)  # (R, 2, h, w)
    worth = _depth(wrong) if seed is None else _noise(wrong, seed) * wrong
    best = worth.flatten(1).max(dim=1)
    kind, cell = best.indices // missed[0].numel(), best.indices % missed[0].numel()
    label = (1 - kind).where(best.values > 0, -1)
    width = missed.shape[2]
    return torch.stack([cell // width, cell % width], dim=1), label


def _noise(like: Tensor, seed: Tensor) -> Tensor:
    """Shaped (R, ...) as `like`: int64 from 1 on, another one in every place and for every seed."""
    place = torch.arange(like[0].numel(), device=like.device)
    x = (place * 0x9E3779B1 + seed[:, None] * 0x85EBCA6B) & _BITS
    for _ in range(2):  # a multiply and xor-shift hash; products stay below 2^63
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & _BITS
    return (x ^ (x >> 16)).view(like.shape) + 1


def _depth(regions: Tensor) -> Tensor:
    """(R, K, h, w) bool -> int64: the side of the largest square that lies inside around a cell.

    In half sides: 1 for a cell at the border of its region, 0 outside; beyond the picture there is
    nothing. Each bit of the answer takes one look at the sums over squares, so a grid of any size
    takes a few steps.
    """
    height, width = regions.shape[-2:]
    reach = 1 << (min(height, width) // 2).bit_length()
    sums = F.pad(regions.long(), [reach + 1, reach] * 2).cumsum(-1).cumsum(-2)
    flat, across = sums.flatten(2), sums.shape[-1]
    y = torch.arange(height, device=regions.device)[:, None] + reach + 1
    x = torch.arange(width, device=regions.device)[None, :] + reach + 1
    half = torch.zeros_like(regions, dtype=torch.long)  # cells on each side of the middle one, + 1

    def filled(half: Tensor) -> Tensor:
        """Whether the square with `half` cells from the middle to its rim is all inside."""
        top, bottom, left, right = y - half, y + half - 1, x - half, x + half - 1
        corners = ((bottom, right, 1), (top, right, -1), (bottom, left, -1), (top, left, 1))
        area = sum(
            sign * flat.gather(2, (row * across + column).flatten(2)).view(half.shape)
            for row, column, sign in corners
        )
        return area == (2 * half - 1).square()

    step = reach
    while step:
        larger = half + step
        half = larger.where(filled(larger.clamp(max=reach)) & (larger <= reach), half)
        step //= 2
    return half


def _on_grid(truth: Tensor, size: tuple[int, int]) -> Tensor:
    """(R, h', w') -> (R, h, w), nearest cell centre."""
    if truth.shape[-2:] == size:
        return truth
    return F.interpolate(truth[:, None].float(), size, mode="nearest-exact")[:, 0].to(truth.dtype)


def _cell_to_pixel(cell: Tensor, grid: tuple[int, int], frame_size: tuple[int, int]) -> Tensor:
    """(R, 2) rows and columns of a grid -> (R, 2) float32 x and y of their centres."""
    y, x = (
        (index.float() + 0.5) * (frame / cells) - 0.5
        for index, frame, cells in zip(cell.unbind(1), frame_size, grid, strict=True)
    )
    return torch.stack([x, y], dim=1)


def _add_click(prompts: Prompts, point: Tensor, label: Tensor, logits: Tensor) -> Prompts:
    """The next question: one point more, and the last answer."""
    points, labels = point[:, None], label[:, None]
    if prompts.points is not None:
        points = torch.cat([prompts.points, points], dim=1)
        labels = torch.cat([prompts.point_labels, labels], dim=1)
    lengths = prompts.lengths and tuple(length + 1 for length in prompts.lengths)
    return prompts._replace(
        points=points, point_labels=labels, masks=logits, mask_given=None, lengths=lengths
    )
