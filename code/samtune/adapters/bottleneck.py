"""Adapters that run beside a frozen layer: down to a few channels, through a non-linearity, up.

Source: usagisukisuki/G-SAM 31dfd1c, whose names of tensors are kept; arXiv 2408.12406.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

DILATIONS = (12, 24, 36)  # as published, for the 64 x 64 grid of 1024 px


class BottleneckAdapter(nn.Module):
    """(..., C) -> (..., C) through `hidden` channels; what it returns is to be added to something.

    It starts from torch's defaults and not from zero, as published.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.D_fc1 = nn.Linear(dim, hidden)
        self.D_fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.D_fc2(F.gelu(self.D_fc1(x)))


class SpatialMultiscaleAdapter(BottleneckAdapter):
    """A bottleneck that looks around each token at several distances: (B, h, w, C) -> the same.

    dilations: spacings, in tokens, of the 3 x 3 convolutions beside the undilated one. Taps of a
    dilation that is not below the grid's side meet no data there: they get no gradient, yet act,
    with the values that they began with, on a larger grid.
    """

    def __init__(self, dim: int, hidden: int, dilations: Sequence[int] = DILATIONS):
        super().__init__(dim, hidden)
        self.aspp = SpatialPyramid(hidden, dilations)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.D_fc1(x)).permute(0, 3, 1, 2)  # (B, hidden, h, w)
        hidden = hidden + self.aspp(hidden)
        return self.D_fc2(hidden.permute(0, 2, 3, 1))


class SpatialPyramid(nn.Module):
    """Convolutions of different reach, summed; the last one sees the mean of the whole map.

    (B, C, h, w) -> (B, C, h, w).
    """

    def __init__(self, channels: int, dilations: Sequence[int]):
        super().__init__()
        self.convs = nn.ModuleList(
            Branch(nn.Conv2d(channels, channels, 3, padding=d, dilation=d, bias=False))
            for d in (1, *dilations)
        )
        self.convs.append(Branch(nn.Conv2d(channels, channels, 1, bias=False)))

    def forward(self, x: Tensor) -> Tensor:
        *local, whole = self.convs
        total = whole(x.mean((2, 3), keepdim=True))  # (B, C, 1, 1), the same for every token
        for branch in local:
            total = total + branch(x)
        return total


class Branch(nn.Module):
    """A convolution under the published name, and ReLU."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))
