"""Attention with decomposed relative positions on a CPU, which never holds all of its logits.

One operator of torch, so autocast, the compiler and the counter of operations see one thing. Only
q, k and v are kept for the backward pass; logits are made again there, group by group, each group
small enough for the processor's cache. Padding of border windows costs no memory either.

Measured on two cores of an AMD EPYC in float32 (SAM's global block at 1024 px, both passes,
peak of the whole process): 3.1 s and 0.9 GiB, against 4.1 s and 3.2 GiB for the stock block, 3.9 s
and 3.5 GiB for torch's fused attention with the positions as mask (one that needs a gradient gets
no fused kernel on a CPU), 4.7 s and 3.3 GiB with the positions as further channels of q and k.
`benchmarks/run.py --only attention` measures it anew.

Source of the maths: facebookresearch/segment-anything dca509f; positions: arXiv 2112.01526.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_VALUES_PER_THREAD = 2**20  # logits of a group: 4 MiB in float32
_VALUES_AT_MOST = 2**23
_TENSORS = "Tensor qkv, Tensor outside, Tensor rel_h, Tensor rel_w, int[] window"


@torch.library.custom_op(
    "samtune::relative_attention",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_TENSORS}) -> Tensor",  # torch 2.6 cannot read it off annotations
)
def relative_attention(
    qkv: Tensor, outside: Tensor, rel_h: Tensor, rel_w: Tensor, window: list[int]
) -> Tensor:
    """Each token's mixture of the values in its window: (B, h, w, heads, d).

    qkv: (B, h, w, 3, heads, d), queries unscaled. outside: (3, heads, d), what takes part where a
    border window reaches over the grid. rel_h, rel_w: (H', H', d) and (W', W', d), the entry for
    query row i and key row j, likewise columns. window: its sides [H', W'], the grid's own for
    attention among all tokens. One floating-point type for all.
    """
    out = qkv.new_empty(*qkv.shape[:3], *qkv.shape[4:])
    with torch.autocast("cpu", enabled=False):
        for place in _groups(qkv, window):
            q, k, v = _windows(qkv[place], outside, window)
            mixed = torch.empty_like(q, memory_format=torch.contiguous_format)
            for heads, lines in _parts(q):
                k_up, values = _upright(k[heads]), v[heads].flatten(1, 2).contiguous()
                for rows in lines:
                    p = _probabilities(q[heads, rows], k_up, rel_h[rows], rel_w)
                    mixed[heads, rows] = (p @ values).view_as(mixed[heads, rows])
            _back(out[place], mixed[None], window)
    return out


@torch.library.custom_op(
    "samtune::relative_attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor gradient, {_TENSORS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    gradient: Tensor,
    qkv: Tensor,
    outside: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    window: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of each tensor that `relative_attention` takes."""
    d_qkv, d_outside = torch.empty_like(qkv), torch.zeros_like(outside)
    d_h, d_w = torch.zeros_like(rel_h), torch.zeros_like(rel_w)
    nothing = outside.new_zeros(1, *outside.shape[1:])
    with torch.autocast("cpu", enabled=False):
        for place in _groups(qkv, window):
            qkv_windows = _windows(qkv[place], outside, window)
            (of_mixed,) = _windows(gradient[place].unsqueeze(3), nothing, window)
            d_windows, more_h, more_w = _group_backward(of_mixed, qkv_windows, rel_h, rel_w)
            d_outside += _back(d_qkv[place], d_windows, window)
            d_h += more_h
            d_w += more_w
    return d_qkv, d_outside, d_h, d_w


def _group_backward(
    gradient: Tensor, qkv: Tensor, rel_h: Tensor, rel_w: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """gradient: (G, H', W', d). qkv: (3, G, H', W', d). Returns the gradients of the others.

    They are summed in float32 at least.
    """
    exact = torch.promote_types(qkv.dtype, torch.float32)
    result = torch.empty(qkv.shape, dtype=exact)
    d_h, d_w = torch.zeros_like(rel_h, dtype=exact), torch.zeros_like(rel_w, dtype=exact)
    (q, k, v), sides = qkv, qkv.shape[2:4]
    scale = q.shape[-1] ** -0.5
    for heads, lines in _parts(q):
        k_up, v_up = _upright(k[heads]), _upright(v[heads])
        keys = k[heads].flatten(1, 2).contiguous()
        d_k, d_v = torch.zeros(2, *k_up.shape, dtype=exact)  # (G', d, N')
        for rows in lines:
            queries = q[heads, rows]
            p = _probabilities(queries, k_up, rel_h[rows], rel_w)  # (G', N, N')
            mixed = gradient[heads, rows].flatten(1, 2)  # (G', N, d)
            d_v += mixed.transpose(1, 2).contiguous() @ p
            d_p = mixed @ v_up
            d_logits = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype)
            del p, d_p
            d_k += (queries.flatten(1, 2) * scale).transpose(1, 2).contiguous() @ d_logits
            by_key = d_logits.view(*queries.shape[:3], *sides)
            down, across = by_key.sum(-1), by_key.sum(-2)  # (G', rows, W', H'), (G', rows, W', W')
            d_queries = (d_logits @ keys).mul_(scale).view_as(queries)
            d_queries += down @ rel_h[rows]
            d_queries += (across.transpose(1, 2) @ rel_w).transpose(1, 2)
            result[0][heads, rows] = d_queries.to(exact)
            d_h[rows] += torch.einsum("grwk,grwd->rkd", down, queries)
            d_w += torch.einsum("grwk,grwd->wkd", across, queries)
        for part, of_keys in ((1, d_k), (2, d_v)):
            result[part][heads] = of_keys.transpose(1, 2).unflatten(1, sides)
    return result, d_h, d_w


def _upright(x: Tensor) -> Tensor:
    """(G, H', W', d) -> (G, d, H' W'), contiguous: torch's products in bfloat16 copy a transposed
    matrix at each call, which cost more than the product itself.
    """
    return x.flatten(1, 2).transpose(1, 2).contiguous()


def _probabilities(q: Tensor, k: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """q: (G, rows, W', d) of H' rows or fewer. k: (G, d, H' W'). rel_h: (rows, H', d), of these
    queries. Returns (G, rows W', H' W').
    """
    down = q @ rel_h.transpose(1, 2)  # (G, rows, W', H')
    across = (q.transpose(1, 2) @ rel_w.transpose(1, 2)).transpose(1, 2)  # (G, rows, W', W')
    logits = (down[..., :, None] + across[..., None, :]).flatten(3).flatten(1, 2)
    logits.baddbmm_(q.flatten(1, 2), k, alpha=q.shape[-1] ** -0.5)
    return logits.softmax(-1)


def _most_values() -> int:
    return min(_VALUES_AT_MOST, _VALUES_PER_THREAD * torch.get_num_threads())


def _groups(qkv: Tensor, window: list[int]) -> Iterator[tuple[slice, slice]]:
    """Which images, and which lines of their grids, are taken together: whole rows of windows."""
    batch, height, width, _, heads, _ = qkv.shape
    high, wide = window
    bands = math.ceil(height / high)
    values = math.ceil(width / wide) * heads * (high * wide) ** 2  # logits of one band
    together = max(1, _most_values() // values)
    if together >= bands:
        images = together // bands
        yield from ((slice(i, i + images), slice(None)) for i in range(0, batch, images))
        return
    for image in range(batch):
        for line in range(0, height, together * high):
            yield slice(image, image + 1), slice(line, line + together * high)


def _parts(q: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Which of the G heads of windows are computed together, and in which bands of query lines."""
    count, high, wide = q.shape[:3]
    of_line = wide * high * wide
    rows = min(high, max(1, _most_values() // of_line))
    heads = max(1, _most_values() // (rows * of_line))
    bands = [slice(row, row + rows) for row in range(0, high, rows)]
    for head in range(0, count, heads):
        yield slice(head, head + heads), bands


def _windows(x: Tensor, outside: Tensor, window: list[int]) -> Tensor:
    """(B, h, w, P, heads, d) -> (P, G, H', W', d): the windows of all heads, G of them.

    outside: (P, heads, d), which fills windows up. A view where there is one window per image and
    one image.
    """
    (_, height, width), (high, wide) = x.shape[:3], window
    down, across = -height % high, -width % wide
    if down or across:
        filled = outside.expand(len(x), height + down, width + across, *outside.shape).clone()
        filled[:, :height, :width] = x
        x = filled
    x = x.unflatten(2, (-1, wide)).unflatten(1, (-1, high))  # (B, R, H', C, W', P, heads, d)
    return x.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(1, 4)


def _back(target: Tensor, windows: Tensor, window: list[int]) -> Tensor:
    """Undo `_windows`: write (P, G, H', W', d) into (B, h, w, P, heads, d), or without P if that
    is 1. Returns the sum of what lay outside, (P, heads, d).
    """
    (batch, height, width), (high, wide) = target.shape[:3], window
    heads = target.shape[-2]
    rows, columns = math.ceil(height / high), math.ceil(width / wide)
    x = windows.unflatten(1, (batch, rows, columns, heads)).permute(1, 2, 5, 3, 6, 0, 4, 7)
    x = x.flatten(3, 4).flatten(1, 2)  # (B, h', w', P, heads, d)
    inside = x[:, :height, :width]
    target.copy_(inside.view(target.shape) if target.dim() == 5 else inside)
    return x[:, height:].sum((0, 1, 2)) + x[:, :height, width:].sum((0, 1, 2))


@relative_attention.register_fake
def _(qkv, outside, rel_h, rel_w, window):
    return qkv.new_empty(*qkv.shape[:3], *qkv.shape[4:])


@_backward.register_fake
def _(gradient, qkv, outside, rel_h, rel_w, window):
    return tuple(torch.empty_like(x) for x in (qkv, outside, rel_h, rel_w))


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, gradient: Tensor):
    return *_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.window), None


relative_attention.register_autograd(_differentiate, setup_context=_keep)


def _operations(qkv: torch.Size, window: list[int], of_pairs: int, of_positions: int) -> int:
    """Multiplications and additions of so many products of all pairs of tokens in a window, and of
    tokens with position tables.
    """
    batch, height, width, _, heads, d = qkv
    high, wide = window
    tokens = high * wide
    windows = batch * math.ceil(height / high) * math.ceil(width / wide)
    return 2 * windows * heads * tokens * d * (of_pairs * tokens + of_positions * (high + wide))


@register_flop_formula(torch.ops.samtune.relative_attention)
def _(qkv, outside, rel_h, rel_w, window, *args, out_shape=None, **kwargs) -> int:
    return _operations(qkv, window, 2, 1)


@register_flop_formula(torch.ops.samtune.relative_attention_backward)
def _(gradient, qkv, outside, rel_h, rel_w, window, *args, out_shape=None, **kwargs) -> int:
    return _operations(qkv, window, 5, 3)
