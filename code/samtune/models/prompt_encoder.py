"""Prompts as tokens: the maths of SAM's prompt encoder on its own parameters, one row per prompt.

The stock forward equals this to rounding. It is written anew because stock's point labels are
boolean-mask assignments (each waits for the GPU), its grid is a cumulative sum (no deterministic
GPU kernel) and its dense map has one fixed grid.

Source: facebookresearch/segment-anything dca509f, arXiv 2304.02643, appendix A.
"""

from __future__ import annotations

import math

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor
from torch.nn import functional as F

from samtune.structures import Prompts


def embed_prompts(
    encoder: PromptEncoder,
    prompts: Prompts,
    rows: int,
    frame_size: tuple[int, int] | None = None,
) -> Tensor:
    """(rows, T, C) sparse tokens: the points, then the two corners of the box.

    frame_size: height and width, pixels, of the frame that the prompts lie in; None for the
    encoder's own. T is N + 1 for N points alone (SAM appends one padding point), 2 for a box alone,
    N + 2 for both, 0 without either, N where rows have lengths of their own (they come last).
    """
    frame_size = frame_size or encoder.input_image_size
    tokens = []
    if prompts.points is not None:
        points, labels = prompts.points, prompts.point_labels
        if prompts.boxes is None and prompts.lengths is None:
            points, labels = F.pad(points, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
        tokens.append(
            _embed_points(encoder, points, labels, frame_size, prompts.lengths is not None)
        )
    if prompts.boxes is not None:
        corners = _encode(encoder, _to_unit(encoder, prompts.boxes.reshape(-1, 2, 2), frame_size))
        kinds = [encoder.point_embeddings[2].weight, encoder.point_embeddings[3].weight]
        tokens.append(corners + torch.cat(kinds))  # (R, 2, C)
    if not tokens:
        return encoder.no_mask_embed.weight.new_zeros(rows, 0, encoder.embed_dim)
    return torch.cat(tokens, dim=1)


def embed_masks(encoder: PromptEncoder, prompts: Prompts, grid: tuple[int, int]) -> Tensor:
    """(1 or R, C, h or 1, w or 1): the dense prompt for features on a grid of h x w cells.

    SAM's encoder reads masks four times as fine; those on another grid are resized (bilinear).
    """
    if prompts.masks is None:
        return no_mask(encoder)
    masks = prompts.masks.to(encoder.no_mask_embed.weight.dtype)
    size = (4 * grid[0], 4 * grid[1])
    if masks.shape[-2:] != size:
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
    dense = encoder.mask_downscaling(masks)  # (R, C, h, w)
    if prompts.mask_given is None:
        return dense
    return dense.where(prompts.mask_given[:, None, None, None], no_mask(encoder))


def parts_used(prompt: str, refine_steps: int = 0) -> frozenset[str]:
    """The submodules of the prompt encoder that a training step under `--prompt prompt` reads.

    All others get no gradient, whatever the data: with DistributedDataParallel they must be frozen.
    """
    near, far = "point_embeddings.2", "point_embeddings.3"
    points = {"point_embeddings.0", "point_embeddings.1", "not_a_point_embed"}
    used = {
        "box": {near, far, "no_mask_embed"},
        "whole_image": {near, far, "no_mask_embed"},
        "point": points | {"no_mask_embed"},
        "points": points | {"no_mask_embed"},
        "box+points": points | {near, far, "no_mask_embed"},
        "mask": {"mask_downscaling"},
        "mixed": points | {near, far, "no_mask_embed", "mask_downscaling"},
        "none": {"no_mask_embed"},
    }[prompt]
    return frozenset(used | points | {"mask_downscaling"} if refine_steps else used)


def no_mask(encoder: PromptEncoder) -> Tensor:
    """(1, C, 1, 1): the dense prompt where no mask is given, the same in every cell."""
    return encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)


def position_encoding(encoder: PromptEncoder, grid: tuple[int, int]) -> Tensor:
    """(1, C, h, w): the encoding of the cell centres of a grid of h rows and w columns."""
    weight = encoder.no_mask_embed.weight
    y, x = (
        (torch.arange(length, device=weight.device, dtype=weight.dtype) + 0.5) / length
        for length in grid
    )
    cells = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (h, w, 2)
    return _encode(encoder, cells).permute(2, 0, 1)[None]


def _embed_points(
    encoder: PromptEncoder,
    points: Tensor,
    labels: Tensor,
    frame_size: tuple[int, int],
    with_corners: bool,
) -> Tensor:
    """(R, N, 2) pixels and (R, N) labels -> (R, N, C); a padding point is its vector alone."""
    label = labels[..., None]
    encoding = _encode(encoder, _to_unit(encoder, points, frame_size)).masked_fill(label == -1, 0)
    named = encoder.point_embeddings if with_corners else encoder.point_embeddings[:2]
    for value, embedding in [(-1, encoder.not_a_point_embed), *enumerate(named)]:
        encoding = encoding + (label == value) * embedding.weight
    return encoding


def _to_unit(encoder: PromptEncoder, xy: Tensor, frame_size: tuple[int, int]) -> Tensor:
    """Pixels of the frame to 0..1, taken at the pixel's centre."""
    height, width = frame_size
    x, y = (xy.to(encoder.no_mask_embed.weight.dtype) + 0.5).unbind(-1)
    return torch.stack([x / width, y / height], dim=-1)


def _encode(encoder: PromptEncoder, xy: Tensor) -> Tensor:
    """(..., 2) coordinates in 0..1 -> (..., C) sines, then cosines, of random frequencies."""
    along_x, along_y = encoder.pe_layer.positional_encoding_gaussian_matrix  # (C / 2,) each
    x, y = (2 * xy - 1).unsqueeze(-1).unbind(-2)
    phase = 2 * math.pi * (x * along_x + y * along_y)  # no matmul: TF32 would blur positions
    return torch.cat([phase.sin(), phase.cos()], dim=-1)
