"""SAM-Adapter: features of the patches and of the high frequencies, added at every block.

Paper: "SAM-Adapter: Adapting Segment Anything in Underperformed Scenes", arXiv 2304.09148.
parent: Kyyle2114/SAM-Adapter-Pytorch-Implementation 66b0e9e, for box prompts.
official: tianrun-chen/SAM-Adapter-PyTorch 665145d, for no prompt and a trained no-mask vector.
The two share the idea, not the weights; tensors carry the published names.

Deviations: any image size (the parent's grid is fixed to 64 x 64); the official variant starts its
position encoding and no-mask vector from SAM's instead of random numbers; decoder heads that no
loss reads stay frozen; either variant takes a box or no prompt.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from samtune.adapters.layers import (
    AdaptedEncoder,
    high_pass,
    misread_channels,
    thaw_decoder,
)
from samtune.adapters.options import SamAdapterOptions
from samtune.models.sam import ImageEncoderViT, Sam
from samtune.models.segmenter import PromptedSam

_REDUCTION = 32  # official: the encoder's width over the adapter's


def build(sam: Sam, options: SamAdapterOptions) -> PromptedSam:
    """Put adapters around the blocks of a frozen Sam and thaw its mask decoder."""
    thaw_decoder(sam)
    if options.variant == "parent":
        sam.image_encoder = ParentEncoder(sam.image_encoder, options.tune_out, options.hidden_dim)
        return PromptedSam(sam)
    sam.image_encoder = OfficialEncoder(sam.image_encoder, options.embedding == "published")
    sam.prompt_encoder.no_mask_embed.requires_grad_(True)
    # Published checkpoints were trained with a position encoding of their own and carry it.
    frequencies = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    return PromptedSam(sam, own_keys=frozenset({frequencies}))


class ParentEncoder(AdaptedEncoder):
    """Adapters before the first block and after every block.

    tune_out: channels of the features that all adapters read. hidden_dim: channels inside each.
    The projection back to the encoder's width is shared, the one down is each adapter's own.
    """

    def __init__(self, encoder: ImageEncoderViT, tune_out: int, hidden_dim: int):
        super().__init__(encoder)
        self.patch_embed_tune = nn.Linear(self.embed_dim, tune_out)
        self.HFC_tune = nn.Linear(3 * self.patch_size**2, tune_out)
        self.task_adapter_up = nn.Linear(hidden_dim, self.embed_dim)
        self.task_adapter_blocks = nn.ModuleList(
            DownProjection(tune_out, hidden_dim) for _ in range(len(self.blocks) + 1)
        )

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, C', h, w)."""
        x = self.patch_embed(image) + self.pos_embed  # (B, h, w, C)
        patches = F.unfold(high_pass(image), self.patch_size, stride=self.patch_size)
        edges = self.HFC_tune(patches.transpose(1, 2)).unflatten(1, x.shape[1:3])
        features = self.patch_embed_tune(x) + edges  # (B, h, w, tune_out)
        first, *others = self.task_adapter_blocks
        x = x + self.task_adapter_up(first(features))
        for block, adapter in zip(self.blocks, others, strict=True):
            x = block(x) + self.task_adapter_up(adapter(features))
        return self.neck(x.permute(0, 3, 1, 2))


class DownProjection(nn.Module):
    """One adapter's own half: (..., tune_out) -> (..., hidden_dim)."""

    def __init__(self, tune_out: int, hidden_dim: int):
        super().__init__()
        self.down_projection = nn.Linear(tune_out, hidden_dim)

    def forward(self, features: Tensor) -> Tensor:
        return F.gelu(self.down_projection(features))


class OfficialEncoder(AdaptedEncoder):
    """Adapters on the input of every block.

    published: read the patches in the order of the published code, which takes a channels-last
    tensor for a channels-first one, so that a feature mixes places; else straight.
    """

    def __init__(self, encoder: ImageEncoderViT, published: bool):
        super().__init__(encoder)
        self.published = published
        self.prompt_generator = PromptGenerator(self.embed_dim, len(self.blocks), self.patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, C', h, w)."""
        patches = self.patch_embed(image)  # (B, h, w, C), before positions are added
        tokens = misread_channels(patches) if self.published else patches
        generator = self.prompt_generator
        features = generator.features(tokens, high_pass(image))  # (B, h, w, d)
        x = patches + self.pos_embed
        for index, block in enumerate(self.blocks):
            x = block(x + generator(features, index))
        return self.neck(x.permute(0, 3, 1, 2))


class PromptGenerator(nn.Module):
    """Two features of an image, and from their sum a term for every block.

    The layer per block is its own, the projection back to the encoder's width is shared.
    """

    def __init__(self, embed_dim: int, depth: int, patch_size: int):
        super().__init__()
        width = max(embed_dim // _REDUCTION, 1)
        self.embedding_generator = nn.Linear(embed_dim, width)
        self.prompt_generator = HighFrequencyEmbedding(width, patch_size)
        for index in range(depth):
            layer = nn.Sequential(nn.Linear(width, width), nn.GELU())
            self.add_module(f"lightweight_mlp_{index}", layer)
        self.shared_mlp = nn.Linear(width, embed_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def features(self, tokens: Tensor, edges: Tensor) -> Tensor:
        """(B, h, w, C) patches and (B, 3, H, W) high frequencies -> (B, h, w, d)."""
        return self.embedding_generator(tokens) + self.prompt_generator(edges)

    def forward(self, features: Tensor, index: int) -> Tensor:
        """(B, h, w, d) -> (B, h, w, C), what is added to the input of block `index`."""
        return self.shared_mlp(getattr(self, f"lightweight_mlp_{index}")(features))


class HighFrequencyEmbedding(nn.Module):
    """(B, 3, H, W) -> (B, h, w, width): a linear map of each patch."""

    def __init__(self, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)
        nn.init.normal_(self.proj.weight, std=math.sqrt(2 / (patch_size**2 * width)))
        nn.init.zeros_(self.proj.bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).permute(0, 2, 3, 1)
