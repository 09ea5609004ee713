"""SAM's attention with decomposed relative positions, fused, and its block around it.

Stock holds the logits of all pairs of tokens, twice, and keeps them for the backward pass; it looks
its position tables up with indices made on the CPU, which halts a GPU twice per block; and it
projects the padding of border windows. None of this is needed for the same result.

Which form computes it: on a CPU `relative_attention`, which says what it was measured against. On
other devices positions become further channels of queries and keys, so that torch's fused kernels
take it and nothing of the size of all pairs exists; no GPU has judged yet between this and the
others of `FORMS` (`benchmarks/run.py --only gpu-attention` asks one).

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
from samtune.models.relative_attention import relative_attention


class RelativeAttention(nn.Module):
    """Stock's parameters under stock's names; equal to stock's forward up to rounding."""

    head_major = False  # see `anatomy.QkvLayout`

    def __init__(self, stock: Attention | RelativeAttention):
        super().__init__()
        self.form = ""  # one of `FORMS`; empty: the device's
        self.num_heads = stock.num_heads
        self.qkv = stock.qkv
        self.proj = stock.proj
        self.rel_pos_h = stock.rel_pos_h
        self.rel_pos_w = stock.rel_pos_w

    def forward(self, x: Tensor, window_size: int = 0) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C): each token among those of its window, or among all.

        Windows of window_size x window_size at the border are filled up with zeros, which take
        part, as in stock. Here they never enter the layers before and after: what `qkv` makes of
        a zero is the same for all of them. That holds unless it looks around (`looks_around`).
        """
        if window_size and getattr(self.qkv, "looks_around", False):
            return in_windows(self, x, window_size)
        height, width = window = [window_size] * 2 if window_size else list(x.shape[1:3])
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, h, w, 3, heads, d)
        rel_h = by_distance(self.rel_pos_h, height).to(qkv.dtype)
        rel_w = by_distance(self.rel_pos_w, width).to(qkv.dtype)
        attend = FORMS[self.form or ("chunked" if x.device.type == "cpu" else "augmented")]
        outside = self._outside(x, window).to(qkv.dtype)
        return self.proj(attend(qkv, outside, rel_h, rel_w, window).flatten(3))

    def _outside(self, x: Tensor, window: list[int]) -> Tensor:
        """(3, heads, d): q, k and v of a zero; zeros where no window reaches over the grid."""
        fits = x.shape[1] % window[0] == 0 and x.shape[2] % window[1] == 0
        zero = x.new_zeros(1, 1, 1, x.shape[-1])
        return (zero.repeat(1, 1, 1, 3) if fits else self.qkv(zero)).view(3, self.num_heads, -1)


def in_windows(attention: nn.Module, x: Tensor, window_size: int) -> Tensor:
    """`attention` of (B, h, w, C) tokens, window by window, filled up with zeros at the border."""
    windows, padded = window_partition(x, window_size)  # (B * windows, window, window, C)
    return window_unpartition(attention(windows), window_size, padded, x.shape[1:3])


class Block(nn.Module):
    """SAM's block on stock's parts, which keep their names."""

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.norm1, self.attn = stock.norm1, stock.attn
        self.norm2, self.mlp = stock.norm2, stock.mlp
        self.window_size = stock.window_size

    @property
    def embed_dim(self) -> int:
        return self.norm2.normalized_shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        x = self.attend(x)
        return x + self.mlp(self.norm2(x))

    def attend(self, x: Tensor) -> Tensor:
        """The first half of the forward."""
        return x + self.attn(self.norm1(x), self.window_size)


def augmented(
    qkv: Tensor, outside: Tensor, rel_h: Tensor, rel_w: Tensor, window: list[int]
) -> Tensor:
    """`relative_attention` by torch's fused attention: the positions of keys as further channels.

    q k / sqrt(d) + down + across is one product of [q / sqrt(d), down, across] with k beside the
    key's row and column, each as ones and zeros.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        down, across = _position_logits(q, rel_h, rel_w)
        high, wide = window
        rows = torch.eye(high, dtype=k.dtype, device=k.device)[:, None].expand(-1, wide, -1)
        columns = torch.eye(wide, dtype=k.dtype, device=k.device)[None].expand(high, -1, -1)
        place = torch.cat([rows, columns], -1).flatten(0, 1)  # (N, H' + W')
        k = torch.cat([k.flatten(2, 3), place.expand(*k.shape[:2], -1, -1)], -1)
        q = torch.cat([q * q.shape[-1] ** -0.5, down, across], -1).flatten(2, 3)
        return F.scaled_dot_product_attention(q, k, v.flatten(2, 3), scale=1.0)

    return _in_windows(attend, qkv, outside, window)


def biased(qkv: Tensor, outside: Tensor, rel_h: Tensor, rel_w: Tensor, window: list[int]) -> Tensor:
    """`relative_attention` by torch's fused attention with the positions as a mask of all pairs."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        down, across = _position_logits(q, rel_h, rel_w)
        bias = (down[..., :, None] + across[..., None, :]).flatten(4).flatten(2, 3)
        q, k, v = (x.flatten(2, 3) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    return _in_windows(attend, qkv, outside, window)


def flexible(
    qkv: Tensor, outside: Tensor, rel_h: Tensor, rel_w: Tensor, window: list[int]
) -> Tensor:
    """`relative_attention` by torch's FlexAttention, which adds positions to each logit as it is
    made. On a GPU only: torch fuses it when it is compiled, and has no gradient for it on a CPU.
    """
    from torch.nn.attention.flex_attention import flex_attention  # it takes the compiler along

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        down, across = (x.flatten(2, 3) for x in _position_logits(q, rel_h, rel_w))
        wide = window[1]

        def with_positions(logit, b, head, query, key):
            return logit + down[b, head, query, key // wide] + across[b, head, query, key % wide]

        compiled = torch.compile(flex_attention) if q.is_cuda else flex_attention
        return compiled(*(x.flatten(2, 3) for x in (q, k, v)), score_mod=with_positions)

    return _in_windows(attend, qkv, outside, window)


# How attention is computed: each takes and returns what `relative_attention` does.
FORMS = {
    "chunked": relative_attention,
    "augmented": augmented,
    "biased": biased,
    "flexible": flexible,
}


def _position_logits(q: Tensor, rel_h: Tensor, rel_w: Tensor) -> tuple[Tensor, Tensor]:
    """(B', heads, H', W', d) -> (B', heads, H', W', H') and (B', heads, H', W', W')."""
    down = torch.einsum("bnhwd,hkd->bnhwk", q, rel_h)
    return down, torch.einsum("bnhwd,wkd->bnhwk", q, rel_w)


def _in_windows(attend, qkv: Tensor, outside: Tensor, window: list[int]) -> Tensor:
    """attend: q, k, v (B', heads, H', W', d) each -> (B', heads, H' W', d)."""
    (batch, height, width), (high, wide) = qkv.shape[:3], window
    down, across = -height % high, -width % wide
    if down:
        qkv = torch.cat([qkv, outside.expand(batch, down, width, *outside.shape)], 1)
    if across:
        qkv = torch.cat([qkv, outside.expand(batch, height + down, across, *outside.shape)], 2)
    x = qkv.unflatten(2, (-1, wide)).unflatten(1, (-1, high))  # (B, R, H', C, W', 3, heads, d)
    rows, columns = x.shape[1], x.shape[3]
    x = x.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(1, 3)  # (3, B', heads, H', W', d)
    x = attend(*x.unbind(0)).unflatten(2, (high, wide)).unflatten(0, (batch, rows, columns))
    x = x.permute(0, 1, 4, 2, 5, 3, 6)  # (B, R, H', C, W', heads, d)
    return x.flatten(3, 4).flatten(1, 2)[:, :height, :width]


def by_distance(table: Tensor, length: int) -> Tensor:
    """(2 n - 1, d) -> (length, length, d): the entry for query i and key j.

    A table of another length is resized.
    """
    if len(table) != 2 * length - 1:
        table = resize_rel_pos(table, 2 * length - 1)
    position = torch.arange(length, device=table.device)
    return table[position[:, None] - position + length - 1]
