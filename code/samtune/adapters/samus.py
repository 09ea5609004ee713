"""SAMUS: a convolution branch beside SAM's encoder, read by the blocks of global attention.

Paper: "SAMUS: Adapting Segment Anything Model for Clinically-Friendly and Generalizable Ultrasound
Image Segmentation", arXiv 2309.06824. Source: xianlin7/SAMUS 030ed07; the encoder in
usagisukisuki/G-SAM 31dfd1c is the same. Tensors carry the published names.

Deviations: the mask decoder trains unless --freeze_decoder asks for the published way, with the
heads that no loss reads frozen; any image size and aspect, the published being 256 x 256 px: the
position table is halved as often as it is larger than the grid on both axes, and resized where that
does not hit it.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from samtune.adapters.bottleneck import BottleneckAdapter
from samtune.adapters.layers import AdaptedEncoder, thaw_decoder
from samtune.adapters.options import SamusOptions
from samtune.errors import UserError
from samtune.models.attention import Block
from samtune.models.mask_decoder import ClassDecoder
from samtune.models.positions import resize_pos_embed
from samtune.models.sam import ImageEncoderViT, LayerNorm2d, Sam
from samtune.models.segmenter import PromptedSam

_SCALE = 0.5  # of the adapter beside the MLP, and of the branch in the last sum


def build(sam: Sam, options: SamusOptions) -> PromptedSam:
    """Give a frozen Sam, whose patches overlap, the branch and its adapters."""
    encoder = sam.image_encoder = SamusEncoder(sam.image_encoder, options.cnn_width)
    for block in encoder.blocks:
        if isinstance(block, CrossBranchBlock):
            block.attn.rel_pos_h.requires_grad_(True)
            block.attn.rel_pos_w.requires_grad_(True)
    if not options.freeze_decoder:
        thaw_decoder(sam)
    elif isinstance(sam.mask_decoder, ClassDecoder):
        raise UserError("--freeze_decoder: a decoder for classes starts anew, so it must train")
    return PromptedSam(sam)


class SamusEncoder(AdaptedEncoder):
    """Patches that overlap by half, and a convolution branch that comes to the same grid.

    cnn_width: channels of the branch at full size.
    """

    def __init__(self, encoder: ImageEncoderViT, cnn_width: int):
        super().__init__(encoder)
        dim = self.embed_dim
        self.cnn_embed = ConvBranch(cnn_width, dim, halvings=int(math.log2(self.stride)))
        larger = self.pos_embed.shape[1] * self.stride // self.img_size  # than the grid, times
        self.post_pos_embed = Halvings([dim] * max(larger.bit_length(), 1))
        self.input_Adapter = BottleneckAdapter(dim, dim // 4)
        for index, block in enumerate(self.blocks):
            if block.window_size == 0:
                self.blocks[index] = CrossBranchBlock(block)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised, sides multiples of the stride -> (B, C', h, w)."""
        branch = self.cnn_embed(image)  # (B, C, h, w)
        x = self.embed_patches(image)  # (B, h, w, C)
        x = x + self.input_Adapter(x)
        x = x + self.positions(x.shape[1:3])
        for block in self.blocks:
            if isinstance(block, CrossBranchBlock):
                x, branch = block(x, branch)
            else:
                x = block(x)
        return self.neck(x.permute(0, 3, 1, 2) + _SCALE * branch)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """(1, h, w, C): SAM's table brought to the grid."""
        table, times = self.pos_embed, 2 ** len(self.post_pos_embed.downs)
        wanted = (grid[0] * times, grid[1] * times)
        if table.shape[1:3] != wanted:
            table = resize_pos_embed(table, wanted)
        return self.post_pos_embed(table.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class CrossBranchBlock(Block):
    """A block of global attention whose tokens ask the branch first; it refines the branch, too."""

    def __init__(self, block: nn.Module):
        super().__init__(block)
        dim = self.embed_dim
        self.Space_Adapter = CrossAttention(dim, self.attn.num_heads)
        self.refine_Adapter = ConvNormGelu(dim, dim)
        self.MLP_Adapter = BottleneckAdapter(dim, dim // 4)

    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, w, C) tokens and the (B, C, h, w) branch -> both."""
        tokens = self.norm1(x)
        tokens = tokens + self.Space_Adapter(tokens, branch.permute(0, 2, 3, 1))
        x = x + self.attn(tokens)
        normal = self.norm2(x)
        x = x + self.mlp(normal) + _SCALE * self.MLP_Adapter(normal)
        return x, self.refine_Adapter(branch)


class CrossAttention(nn.Module):
    """Tokens (B, h, w, C) ask those of another map of the same grid; no relative positions."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """(B, h, w, C) twice -> (B, h, w, C)."""
        q, k, v = self._heads(self.q(x)), self._heads(self.k(source)), self._heads(self.v(source))
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, heads, h w, d)
        return self.proj(attended.transpose(1, 2).reshape(x.shape))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, heads, h w, d)."""
        return x.flatten(1, 2).unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class Halvings(nn.Module):
    """(B, C, H, W), each side halved once for every step in `channels`."""

    def __init__(self, channels: list[int]):
        super().__init__()
        self.downs = nn.ModuleList(Halving(before, after) for before, after in pairwise(channels))

    def forward(self, x: Tensor) -> Tensor:
        for down in self.downs:
            x = down(x)
        return x


class ConvBranch(Halvings):
    """(B, 3, H, W) -> (B, dim, H / 2^n, W / 2^n): one convolution at full size, then n halvings.

    Channels double at each halving, the last of which goes to `dim`.
    """

    def __init__(self, width: int, dim: int, halvings: int):
        super().__init__([*(width * 2**i for i in range(halvings)), dim])
        self.inc = ConvNormGelu(3, width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inc(x))


class Halving(nn.Module):
    """(B, before, H, W) -> (B, after, H / 2, W / 2)."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), *conv_norm_gelu(before, after))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class ConvNormGelu(nn.Module):
    """(B, before, H, W) -> (B, after, H, W)."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.conv = nn.Sequential(*conv_norm_gelu(before, after))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def conv_norm_gelu(before: int, after: int) -> tuple[nn.Module, ...]:
    """A 3 x 3 convolution, a norm over the channels of each place, GELU."""
    conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
    return conv, LayerNorm2d(after), nn.GELU()
