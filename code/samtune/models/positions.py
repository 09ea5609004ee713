"""Position tables brought to another grid, as fine-tuning repositories do (SAMed e351840)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def resize_pos_embed(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, h, w, C) absolute positions -> (1, *grid, C), bilinear."""
    table = F.interpolate(
        table.permute(0, 3, 1, 2), grid, mode="bilinear", align_corners=False
    )  # (1, C, *grid)
    return table.permute(0, 2, 3, 1)


def resize_rel_pos(table: Tensor, length: int) -> Tensor:
    """(2 n - 1, C) relative positions along one axis -> (length, C), linear."""
    return F.interpolate(table.T[None], length, mode="linear", align_corners=False)[0].T
