"""The parts of GSAM: its CNN, its attention with pooled keys, its block, its position convolutions.

Source: usagisukisuki/G-SAM 31dfd1c, whose names of tensors are kept; arXiv 2408.12406. The CNN:
torchvision's ResNet (arXiv 1512.03385). MobileConv and squeeze-excitation: arXiv 1801.04381,
1709.01507. Position convolutions: arXiv 2102.10882.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from samtune.adapters.bottleneck import SpatialMultiscaleAdapter
from samtune.errors import UserError
from samtune.models.attention import Block, RelativeAttention, in_windows
from samtune.models.positions import resize_rel_pos
from samtune.models.sam import LayerNorm2d
from samtune.tensor_files import read_state_dict

POOLED = 3  # keys and values are averaged to a grid of this side
ADAPTER_SCALE = 0.5  # weight of the adapter beside each MLP


class ResNet(NamedTuple):
    """The sizes of a ResNet's stem and first three stages.

    file, sha256: torchvision's ImageNet weights (IMAGENET1K_V1); the name ends in the beginning of
    the digest.
    """

    block: type[BasicBlock] | type[Bottleneck]
    blocks: tuple[int, ...]
    stem: int = 64
    planes: tuple[int, ...] = (64, 128, 256)
    file: str = ""
    sha256: str = ""


RESNETS = {
    18: ResNet(
        BasicBlock,
        (2, 2, 2),
        file="resnet18-f37072fd.pth",
        sha256="f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
    ),
    50: ResNet(
        Bottleneck,
        (3, 4, 6),
        file="resnet50-0676ba61.pth",
        sha256="0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
    ),
    101: ResNet(
        Bottleneck,
        (3, 4, 23),
        file="resnet101-63fe2227.pth",
        sha256="63fe2227b86e8f1f2063f43a75c84d195911b6a0eace650907dd3dc62dd49a0a",
    ),
}


class CnnEncoder(nn.Module):
    """(B, 3, H, W) -> (B, C, ~H / 8, ~W / 8): a ResNet without pooling and last stage, projected.

    Sides are rounded up at each of the three halvings.
    """

    def __init__(self, embed_dim: int, sizes: ResNet):
        super().__init__()
        self.conv1 = nn.Conv2d(3, sizes.stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(sizes.stem)
        width = sizes.stem
        for index, (planes, blocks) in enumerate(zip(sizes.planes, sizes.blocks, strict=True)):
            stage = _stage(sizes.block, width, planes, blocks, stride=2 if index else 1)
            self.add_module(f"res{index + 2}", stage)
            width = planes * sizes.block.expansion
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.conv_f = nn.Conv2d(width, embed_dim, 1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(image)))
        return self.conv_f(self.res4(self.res3(self.res2(x))))

    def load_trunk(self, path: str | Path) -> None:
        """Take all but the projection from a torchvision ResNet of the same depth.

        Raises UserError when the file is missing or holds something else.
        """
        if not Path(path).is_file():
            raise UserError(
                f"--cnn_weights {path}: no such file; put torchvision's IMAGENET1K_V1 weights "
                "there, or start from random weights with --cnn_weights none"
            )
        stages = {f"layer{n}": f"res{n + 1}" for n in (1, 2, 3)}
        given = {}
        for name, tensor in read_state_dict(path).items():
            part, _, rest = name.partition(".")
            given[f"{stages.get(part, part)}.{rest}"] = tensor
        wanted = {n: t for n, t in self.state_dict().items() if not n.startswith("conv_f.")}
        for name, tensor in wanted.items():
            if name not in given or given[name].shape != tensor.shape:
                raise UserError(
                    f"--cnn_weights {path}: no torchvision ResNet of --resnet_depth ({name} is "
                    "missing or of another shape)"
                )
        self.load_state_dict({name: given[name] for name in wanted}, strict=False)


def _stage(
    block: type[BasicBlock] | type[Bottleneck], width: int, planes: int, blocks: int, stride: int
) -> nn.Sequential:
    """Residual blocks from `width` channels to `planes` times the block's expansion."""
    out = planes * block.expansion
    shortcut = None
    if stride != 1 or width != out:
        shortcut = nn.Sequential(
            nn.Conv2d(width, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out)
        )
    first = block(width, planes, stride, shortcut)
    return nn.Sequential(first, *(block(out, planes) for _ in range(blocks - 1)))


class PooledAttention(RelativeAttention):
    """Every token attends to 3 x 3 averages of its window, or of the grid. Stock's parameters."""

    def forward(self, x: Tensor, window_size: int = 0) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        if window_size:
            return in_windows(self, x, window_size)
        grid = x.shape[1:3]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, h, w, 3, heads, d)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5).unbind(0)  # (B, heads, h, w, d) each
        down = torch.einsum("bnhwd,hkd->bnhwk", q, _by_pooled_key(self.rel_pos_h, grid[0]))
        across = torch.einsum("bnhwd,wkd->bnhwk", q, _by_pooled_key(self.rel_pos_w, grid[1]))
        bias = down[..., :, None] + across[..., None, :]  # (B, heads, h, w, 3, 3)
        x = F.scaled_dot_product_attention(
            q.flatten(2, 3), pool(k).flatten(2, 3), pool(v).flatten(2, 3),
            attn_mask=bias.flatten(4).flatten(2, 3),
        )  # fmt: skip
        return self.proj(x.transpose(1, 2).reshape(*x.shape[:1], *grid, -1))


def pool(x: Tensor) -> Tensor:
    """(..., h, w, d) -> (..., 3, 3, d): adaptive average pooling, cells repeated on smaller grids.

    As products with zeros and ones, which half precision holds exactly, and whose backward pass is
    deterministic on a GPU, unlike that of torch's pooling.
    """
    down, across = (_in_cell(length, x.device) for length in x.shape[-3:-1])
    count = down.sum(1)[:, None] * across.sum(1)  # (3, 3) tokens in each cell
    sums = torch.einsum("kh,...hwd,lw->...kld", down.to(x.dtype), x, across.to(x.dtype))
    return sums / count[..., None].to(sums.dtype)


def _in_cell(length: int, device: torch.device) -> Tensor:
    """(3, length) int64, 1 where a position belongs to a cell; cells may share positions."""
    cell = torch.arange(POOLED, device=device)[:, None]
    position = torch.arange(length, device=device)
    first, end = cell * length // POOLED, -(-(cell + 1) * length // POOLED)
    return ((position >= first) & (position < end)).long()


def _by_pooled_key(table: Tensor, length: int) -> Tensor:
    """(n, d) relative positions -> (length, 3, d): the entry for query i and pooled key j.

    In exact arithmetic floor(i a - j b + 2 b) with a = max(3 / length, 1), b = max(length / 3, 1).
    A query at its own key reads row 2 length / 3, off the table's centre; the weights are published
    so, and the last rows are never read.
    """
    longer = max(length, POOLED)
    if len(table) != 2 * longer - 1:
        table = resize_rel_pos(table, 2 * longer - 1)
    query = torch.arange(length, device=table.device)[:, None]
    key = torch.arange(POOLED, device=table.device)
    return table[longer * (POOLED * query + (2 - key) * length) // (POOLED * length)]


class GsamBlock(Block):
    """SAM's block with pooled attention and an adapter that looks around, beside the MLP.

    Blocks of global attention also refine the CNN's features, and train their relative positions.
    """

    def __init__(self, block: nn.Module):
        super().__init__(block)
        self.attn = PooledAttention(self.attn)
        self.MLP_Adapter = SpatialMultiscaleAdapter(self.embed_dim, self.embed_dim // 4)
        if self.window_size == 0:
            self.refine_Adapter = Refinement(self.embed_dim)
            self.attn.rel_pos_h.requires_grad_(True)
            self.attn.rel_pos_w.requires_grad_(True)

    def forward(self, x: Tensor, cnn: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, w, C) tokens and CNN features -> the same; the latter do not enter the former."""
        if self.window_size == 0:
            cnn = self.refine_Adapter(cnn.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.attend(x)
        normed = self.norm2(x)
        return x + self.mlp(normed) + ADAPTER_SCALE * self.MLP_Adapter(normed), cnn


class Refinement(nn.Module):
    """(B, C, h, w) -> (B, C, h, w): a MobileConv beside a squeeze-excitation, and no shortcut."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = dim // 8
        self.conv = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False), LayerNorm2d(hidden), nn.GELU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            LayerNorm2d(hidden), nn.GELU(),
            nn.Conv2d(hidden, dim, 1, bias=False), LayerNorm2d(dim), nn.GELU(),
        )  # fmt: skip
        self.se = SqueezeExcitation(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.se(x)


class SqueezeExcitation(nn.Module):
    """(B, C, h, w) -> (B, C, h, w), each channel scaled by what the means of all say."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim // 4)
        self.fc2 = nn.Linear(dim // 4, dim)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fc2(F.relu(self.fc1(x.mean((2, 3))))).sigmoid()
        return x * weight[..., None, None]


class TokenPosition(nn.Module):
    """(B, h, w, C) -> the same, with what a 3 x 3 convolution per channel sees added.

    Zeros beyond the border tell a token where it is, on a grid of any size.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class FeaturePosition(nn.Module):
    """(B, C, h, w) -> (B, C, h, w): the position encoding of features, made from themselves."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)
