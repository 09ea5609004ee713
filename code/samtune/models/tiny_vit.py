"""TinyViT as SAM's image encoder: MobileSAM's `vit_t`, made of timm's parts.

Papers: TinyViT, arXiv 2207.10666; MobileSAM, arXiv 2306.14289.
Source: ChaoningZhang/MobileSAM 34bbbfd; timm (Apache-2.0) holds the blocks.
Tensors carry MobileSAM's names, so its file loads as it is but for the classifier, which nothing
here reads.

Deviations: any image size; the bias table is looked up in every forward. Both the published code
and timm keep a copy of the looked-up table in eval mode, which goes stale when weights are loaded
and cuts the table off from its gradient.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import Attention, ConvNorm, TinyVit, TinyVitBlock
from torch import Tensor, nn
from torch.nn import functional as F

from samtune.models import ModelType
from samtune.models.prefix import Stage


def build_tiny_vit(model_type: ModelType, image_size: int) -> TinyViTEncoder:
    """A TinyViT encoder of any size with random weights. image_size: the frame's longest side."""
    widths, blocks, heads, windows = zip(*model_type.stages, strict=True)
    trunk = TinyVit(
        num_classes=0,
        embed_dims=widths,
        depths=blocks,
        num_heads=heads,
        window_sizes=windows,
        mlp_ratio=model_type.mlp_ratio,
        drop_path_rate=0.0,
    )
    return TinyViTEncoder(trunk, model_type.prompt_embed_dim, image_size)


class TinyViTEncoder(nn.Module):
    """The stages of a timm TinyViT at stride 16, and SAM's neck, under MobileSAM's names.

    timm merges at the start of a stage, MobileSAM at the end of the one before; and the last
    merging keeps the grid, as SAM's features lie on S / 16.
    """

    def __init__(self, trunk: TinyVit, out_chans: int, image_size: int):
        super().__init__()
        self.img_size = image_size
        stem = trunk.patch_embed
        self.patch_embed = nn.Sequential(
            OrderedDict(seq=nn.Sequential(stem.conv1, stem.act, stem.conv2))
        )
        merging = [stage.downsample for stage in trunk.stages[1:]]
        merging[-1].conv2.conv.stride = (1, 1)
        self.layers = nn.ModuleList(
            Layer(stage.blocks, downsample)
            for stage, downsample in zip(trunk.stages, [*merging, nn.Identity()], strict=True)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(trunk.num_features, out_chans, 1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )
        for block in self.blocks:
            block.attn = WindowAttention(block.attn)
        _rename_convolutions(self)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that attend, in order; the first layer has none of them."""
        return [block for layer in self.layers if layer.attends for block in layer.blocks]

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, out_chans, H / 16, W / 16)."""
        x = self.patch_embed(image)  # (B, C, H / 4, W / 4)
        for layer in self.layers:
            x = layer(x)
        return self.neck(x)

    def stages(self) -> list[Stage]:
        """The forward as a chain, block by block; see `prefix.stages_of`."""
        first, last = (Stage((part,), part) for part in (self.patch_embed, self.neck))
        return [first, *(stage for layer in self.layers for stage in layer.stages()), last]


class Layer(nn.Module):
    """A stage's blocks, then the merging to the next stage's width and grid."""

    def __init__(self, blocks: nn.Sequential, downsample: nn.Module):
        super().__init__()
        self.blocks = blocks
        self.downsample = downsample
        self.attends = isinstance(blocks[0], TinyVitBlock)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        if self.attends:  # such blocks want channels last
            x = self.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            x = self.blocks(x)
        return self.downsample(x)

    def stages(self) -> list[Stage]:
        """The forward as a chain; each link (B, C, h, w) -> (B, C', h', w')."""
        run = _channels_first if self.attends else (lambda block: block)
        chain = [Stage((block,), run(block)) for block in self.blocks]
        if isinstance(self.downsample, nn.Identity):
            return chain
        return [*chain, Stage((self.downsample,), self.downsample)]


def _channels_first(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """A block of channels-last pictures as a function of channels-first ones."""
    return lambda x: block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class WindowAttention(nn.Module):
    """timm's parameters under their names; equal to timm's forward up to rounding.

    `qkv` reads whole windows, (B', window, window, C), as it does in SAM's ViT.
    """

    head_major = True  # see `anatomy.QkvLayout`

    def __init__(self, stock: Attention):
        super().__init__()
        self.num_heads = stock.num_heads
        self.window = stock.resolution[0]
        self.norm = stock.norm
        self.qkv = stock.qkv
        self.proj = stock.proj
        self.attention_biases = stock.attention_biases  # (heads, window^2)

    def forward(self, x: Tensor) -> Tensor:
        """(B', window^2, C) -> the same shape; B' counts windows."""
        windows = self.norm(x).unflatten(1, (self.window, self.window))
        qkv = self.qkv(windows).flatten(1, 2).unflatten(2, (self.num_heads, 3, -1))
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)  # (B', heads, window^2, d) each
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.position_bias().to(q.dtype))
        return self.proj(x.transpose(1, 2).flatten(2))

    def position_bias(self) -> Tensor:
        """(heads, window^2, window^2): the table's entry |dy| * window + |dx| of each pair."""
        position = torch.arange(self.window, device=self.attention_biases.device)
        distance = (position[:, None] - position).abs()  # (window, window)
        index = distance[:, None, :, None] * self.window + distance[:, None]  # (y, x, y', x')
        return self.attention_biases[:, index.flatten(2).flatten(0, 1)]


def _rename_convolutions(encoder: nn.Module) -> None:
    """MobileSAM calls the two halves of a convolution with BatchNorm `c` and `bn`."""
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ConvNorm):
                setattr(parent, name, nn.Sequential(OrderedDict(c=child.conv, bn=child.bn)))
