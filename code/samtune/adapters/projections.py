"""SAM's fused q, k, v projection with something beside it; stock's weights keep stock's names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

PARTS = ("q", "k", "v")
_OUTER_SCALE = 0.5  # of G-SAM's terms, beside their own 1 / bottleneck


class HostedLinear(nn.Linear):
    """A base for projections with more in them: stock's own weight and bias hang on this module."""

    def __init__(self, stock: nn.Linear):
        super().__init__(stock.in_features, stock.out_features, device="meta")
        self.weight, self.bias = stock.weight, stock.bias


def split_parts(fused: Tensor, num_heads: int, head_major: bool) -> tuple[Tensor, ...]:
    """(..., 3 C) -> views of q, k and v, each (..., heads, d).

    head_major: the order of the 3 C channels: each head's q, k, v together (TinyViT) instead of q
    of all heads, then k, then v (SAM's ViT).
    """
    if head_major:
        return fused.unflatten(-1, (num_heads, 3, -1)).unbind(-2)
    return fused.unflatten(-1, (3, num_heads, -1)).unbind(-3)


def join_parts(parts: Sequence[Tensor], head_major: bool) -> Tensor:
    """The inverse of `split_parts`: three of (..., heads, d) -> (..., 3 C)."""
    return torch.stack(tuple(parts), dim=-2 if head_major else -3).flatten(-3)


class HeadwiseQKV(HostedLinear):
    """G-SAM's place for an adapter: after the projection, on each head's q, k and v.

    q' = q + term_q(q) / 2, likewise k and v; one term serves all heads. make: head size -> term,
    which maps (..., heads, d) to the same shape.
    """

    def __init__(
        self,
        stock: nn.Linear,
        num_heads: int,
        head_major: bool,
        make: Callable[[int], nn.Module],
    ):
        super().__init__(stock)
        self.num_heads, self.head_major = num_heads, head_major
        head_dim = stock.out_features // (3 * num_heads)
        self.lora_q, self.lora_k, self.lora_v = make(head_dim), make(head_dim), make(head_dim)

    @property
    def terms(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.lora_q, self.lora_k, self.lora_v

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3 C)."""
        parts = split_parts(super().forward(x), self.num_heads, self.head_major)
        adapted = [p + _OUTER_SCALE * term(p) for p, term in zip(parts, self.terms, strict=True)]
        return join_parts(adapted, self.head_major)


class HeadwiseLowRank(nn.Module):
    """x -> x A B / m for every head, m = d / 4: G-SAM's low-rank term, zero at the start.

    `bottleneck` is what a subclass does between A and B.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.width = int(head_dim / 4)
        self.lora_A = nn.Parameter(torch.empty(head_dim, self.width))
        self.lora_B = nn.Parameter(torch.zeros(self.width, head_dim))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return self.bottleneck(x @ self.lora_A) @ self.lora_B / self.width

    def bottleneck(self, x: Tensor) -> Tensor:
        return x
