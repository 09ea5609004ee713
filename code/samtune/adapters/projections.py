"""SAM's fused q, k, v projection with something beside it; stock's weights keep stock's names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from samtune.models.anatomy import QkvLayout

PARTS = ("q", "k", "v")
_OUTER_SCALE = 0.5  # of G-SAM's terms, beside their own 1 / bottleneck


class HostedLinear(nn.Linear):
    """A base for projections with more in them: stock's own weight and bias hang on this module.

    looks_around: whether what becomes of a token depends on those around it.
    """

    looks_around = False

    def __init__(self, stock: nn.Linear):
        super().__init__(stock.in_features, stock.out_features, device="meta")
        self.weight, self.bias = stock.weight, stock.bias


class HeadwiseQKV(HostedLinear):
    """G-SAM's place for an adapter: after the projection, on each head's q, k and v.

    q' = q + term_q(q) / 2, likewise k and v; one term serves all heads. make: head size -> term,
    which maps (..., heads, d) to the same shape.
    """

    def __init__(
        self,
        stock: nn.Linear,
        layout: QkvLayout,
        make: Callable[[int], nn.Module],
    ):
        super().__init__(stock)
        self.layout = layout
        head_dim = stock.out_features // (3 * layout.num_heads)
        self.lora_q, self.lora_k, self.lora_v = make(head_dim), make(head_dim), make(head_dim)
        self.looks_around = self.lora_q.looks_around

    @property
    def terms(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.lora_q, self.lora_k, self.lora_v

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3 C)."""
        parts = self.layout.split(super().forward(x))
        return self.layout.join([self._adapt(*p) for p in zip(parts, self.terms, strict=True)])

    def _adapt(self, part: Tensor, term: nn.Module) -> Tensor:
        """(..., C) of all heads -> the same."""
        heads = part.unflatten(-1, (self.layout.num_heads, -1))
        return part + _OUTER_SCALE * term(heads).flatten(-2)


class HeadwiseLowRank(nn.Module):
    """x -> x A B / m for every head, m = d / 4: G-SAM's low-rank term, zero at the start.

    `bottleneck` is what a subclass does between A and B.
    """

    looks_around = False

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
