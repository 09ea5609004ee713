"""AdaptFormer: a bottleneck beside the MLP of every block.

Paper: "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", arXiv
2205.13535.
original: ShoufaChen/AdaptFormer 6967d67, its adapter and its place, in SAM's image encoder.
gsam: usagisukisuki/G-SAM 31dfd1c, the "AdaptFormer" that GSAM was compared with.
spatial: the same repository's SM-AdaptFormer, arXiv 2408.12406, with SAM's own attention.
The forms share the idea, not the weights; tensors carry the published names.

Deviations: decoder heads that no loss reads stay frozen; a weight that trains starts from --scale
(published: from 1), so that it too begins where the fixed one stands.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samtune.adapters.bottleneck import BottleneckAdapter, SpatialMultiscaleAdapter
from samtune.adapters.layers import AdaptedBlock, adapted_blocks, thaw_decoder
from samtune.adapters.options import AdaptFormerOptions
from samtune.errors import UserError
from samtune.models.sam import Sam
from samtune.models.segmenter import PromptedSam

# As published. The bottleneck of gsam and spatial is a quarter of the encoder's width.
_BOTTLENECK = 64
_SCALE = {"original": 0.1, "gsam": 0.5, "spatial": 0.5}


def build(sam: Sam, options: AdaptFormerOptions) -> PromptedSam:
    """Put an adapter beside the MLP of chosen blocks of a frozen Sam; thaw its mask decoder."""
    thaw_decoder(sam)
    blocks = sam.image_encoder.blocks
    for index in adapted_blocks(sam.image_encoder, options.adapter_blocks):
        blocks[index] = adapt_block(blocks[index], options)
    return PromptedSam(sam)


def adapt_block(block: nn.Module, options: AdaptFormerOptions) -> nn.Module:
    """The block with an adapter beside its MLP; its own parts keep their names.

    A block whose MLP has its norm inside (TinyViT's) is altered in place. Its MLP sees a row of
    tokens and not their grid, so that the spatial form raises UserError.
    """
    if hasattr(block, "norm2"):
        kind = OriginalBlock if options.form == "original" else NormalisedBlock
        return kind(block, options)
    if options.form == "spatial":
        raise UserError("--form spatial does not fit this --model_type; take original or gsam")
    block.mlp = NormalisingMlp(block.mlp, options)
    return block


class OriginalBlock(AdaptedBlock):
    """The adapter reads what enters the MLP's norm."""

    def __init__(self, block: nn.Module, options: AdaptFormerOptions):
        super().__init__(block)
        self.adaptmlp = OriginalAdapter(self.embed_dim, options)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        x = self.attend(x)
        return x + self.mlp(self.norm2(x)) + self.adaptmlp(x)


class NormalisedBlock(AdaptedBlock):
    """The adapter reads what the norm returns, as the MLP does."""

    def __init__(self, block: nn.Module, options: AdaptFormerOptions):
        super().__init__(block)
        self.MLP_Adapter = normalised_adapter(self.embed_dim, options)
        self.scale = options.scale or _SCALE[options.form]

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        x = self.attend(x)
        normal = self.norm2(x)
        return x + self.mlp(normal) + self.scale * self.MLP_Adapter(normal)


class NormalisingMlp(nn.Module):
    """TinyViT's MLP, which begins with its own norm, and an adapter beside it.

    No published model has this; the adapter's names are those of SAM's blocks, one level deeper.
    """

    def __init__(self, mlp: nn.Module, options: AdaptFormerOptions):
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = mlp.norm, mlp.fc1, mlp.act, mlp.fc2
        self.original = options.form == "original"
        if self.original:
            self.adaptmlp = OriginalAdapter(self.fc1.in_features, options)
        else:
            self.MLP_Adapter = normalised_adapter(self.fc1.in_features, options)
            self.scale = options.scale or _SCALE[options.form]

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), to be added to x."""
        normal = self.norm(x)
        result = self.fc2(self.act(self.fc1(normal)))
        if self.original:
            return result + self.adaptmlp(x)
        return result + self.scale * self.MLP_Adapter(normal)


class OriginalAdapter(nn.Module):
    """(..., C) -> (..., C), zero at first."""

    def __init__(self, dim: int, options: AdaptFormerOptions):
        super().__init__()
        hidden = options.bottleneck or _BOTTLENECK
        self.down_proj = nn.Linear(dim, hidden)
        self.up_proj = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(options.dropout)
        scale = options.scale or _SCALE["original"]
        self.scale = nn.Parameter(torch.full((1,), scale)) if options.learn_scale else scale
        nn.init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5))
        for zero in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(F.relu(self.down_proj(x)))  # (..., hidden)
        return self.scale * self.up_proj(hidden)


def normalised_adapter(dim: int, options: AdaptFormerOptions) -> BottleneckAdapter:
    """The adapter of the forms gsam and spatial for tokens of `dim` channels."""
    hidden = options.bottleneck or dim // 4
    if options.form == "gsam":
        return BottleneckAdapter(dim, hidden)
    dilations = [int(d) for d in options.dilations.split(",")]
    return SpatialMultiscaleAdapter(dim, hidden, dilations)
