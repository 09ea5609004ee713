"""SAM's attention with decomposed relative positions, fused and without waiting for the device.

Stock looks its position tables up with indices made on the CPU, which halts the host twice per
block until the GPU has caught up. Here they are made where the table is.

Source: facebookresearch/segment-anything dca509f; decomposed positions: arXiv 2112.01526.
"""

from __future__ import annotations

import torch
from segment_anything.modeling.image_encoder import (
    Attention,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn
from torch.nn import functional as F

from samtune.models.positions import resize_rel_pos


class RelativeAttention(nn.Module):
    """Stock's parameters under stock's names; equal to stock's forward up to rounding."""

    head_major = False  # see `anatomy.QkvLayout`

    def __init__(self, stock: Attention | RelativeAttention):
        super().__init__()
        self.num_heads = stock.num_heads
        self.qkv = stock.qkv
        self.proj = stock.proj
        self.rel_pos_h = stock.rel_pos_h
        self.rel_pos_w = stock.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, h w, d) each
        bias = position_bias(q, self.rel_pos_h, self.rel_pos_w, (height, width))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(batch, height, width, -1))


def in_windows(attention: nn.Module, x: Tensor, window_size: int) -> Tensor:
    """`attention` of (B, h, w, C) tokens among those of their window; window_size 0: among all.

    Windows at the border are filled up with zeros, which take part, as in stock.
    """
    if window_size == 0:
        return attention(x)
    windows, padded = window_partition(x, window_size)  # (B * windows, window, window, C)
    return window_unpartition(attention(windows), window_size, padded, x.shape[1:3])


def position_bias(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, heads, h w, h w): what relative position adds to each query's logits.

    q: (B, heads, h w, d), unscaled. rel_pos_h, rel_pos_w: (2 n - 1, d) tables, resized to the grid
    where it is not theirs.
    """
    height, width = grid
    q = q.unflatten(2, grid)  # (B, heads, h, w, d)
    down = torch.einsum("bnhwd,hkd->bnhwk", q, _by_distance(rel_pos_h, height))
    across = torch.einsum("bnhwd,wkd->bnhwk", q, _by_distance(rel_pos_w, width))
    bias = down[..., :, None] + across[..., None, :]  # (B, heads, h, w, h, w)
    return bias.flatten(4).flatten(2, 3)


def _by_distance(table: Tensor, length: int) -> Tensor:
    """(2 n - 1, d) -> (length, length, d): the entry for query i and key j."""
    if len(table) != 2 * length - 1:
        table = resize_rel_pos(table, 2 * length - 1)
    position = torch.arange(length, device=table.device)
    return table[position[:, None] - position + length - 1]
