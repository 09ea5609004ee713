"""SAM's mask decoder with one row per question, all rows of a batch in one call."""

from __future__ import annotations

import torch
from segment_anything.modeling import MaskDecoder
from torch import Tensor


def decode_masks(
    decoder: MaskDecoder,
    features: Tensor,
    image_pe: Tensor,
    sparse: Tensor,
    dense: Tensor,
    tokens: slice = slice(0, 1),
) -> tuple[Tensor, Tensor]:
    """Decode row r from features[r] and its own prompt.

    features: (R, C, h, w). image_pe: (1 or R, C, h, w) position encoding. sparse: (R, T, C) prompt
    tokens, T may be 0. dense: (1 or R, C, h or 1, w or 1), added to the features. tokens: which
    mask tokens are read; only their hyper-networks run. Returns logits (R, T', 4h, 4w) and SAM's
    estimate of each mask's IoU (R, T').

    Equal to the stock decoder called once per image. Stock itself repeats the whole image batch for
    every prompt, and so pairs prompts with wrong images as soon as there are several images.
    """
    rows, channels, height, width = features.shape
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    queries = torch.cat([own.expand(rows, -1, -1), sparse], dim=1)  # (R, 1 + masks + T, C)
    queries, keys = decoder.transformer(features + dense, image_pe, queries)

    keys = keys.transpose(1, 2).reshape(rows, channels, height, width)
    upscaled = decoder.output_upscaling(keys)  # (R, C / 8, 4h, 4w)
    asked = range(decoder.num_mask_tokens)[tokens]
    weights = [decoder.output_hypernetworks_mlps[i](queries[:, 1 + i]) for i in asked]
    logits = torch.stack(weights, dim=1) @ upscaled.flatten(2)  # (R, T', 16hw)
    iou = decoder.iou_prediction_head(queries[:, 0])[:, tokens]
    return logits.unflatten(2, upscaled.shape[2:]), iou
