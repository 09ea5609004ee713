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
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from samtune.adapters.layers import (
    AdaptedEncoder,
    adapted_blocks,
    high_pass,
    misread_channels,
    thaw_decoder,
)
from samtune.adapters.options import SamAdapterOptions
from samtune.models.prefix import Stage
from samtune.models.sam import ImageEncoderViT, Sam
from samtune.models.segmenter import PromptedSam

_REDUCTION = 32  # official: the encoder's width over the adapter's


def build(sam: Sam, options: SamAdapterOptions) -> PromptedSam:
    """Put adapters around the blocks of a frozen Sam and thaw its mask decoder."""
    thaw_decoder(sam)
    encoder, published = sam.image_encoder, options.embedding == "published"
    chosen = adapted_blocks(encoder, options.adapter_blocks)
    if options.variant == "parent":
        sam.image_encoder = ParentEncoder(encoder, options.tune_out, options.hidden_dim, chosen)
        return PromptedSam(sam)
    sam.image_encoder = OfficialEncoder(encoder, published, chosen)
    sam.prompt_encoder.no_mask_embed.requires_grad_(True)
    # Published checkpoints were trained with a position encoding of their own and carry it.
    frequencies = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    return PromptedSam(sam, own_keys=frozenset({frequencies}))


class ParentEncoder(AdaptedEncoder):
    """Adapters before and after each of the chosen blocks, one between two neighbours.

    tune_out: channels of the features that all adapters read. hidden_dim: channels inside each.
    chosen: numbers of blocks. The projection back to the encoder's width is shared, the one down is
    each adapter's own. Adapter i stands before block i, the last one behind the last block; there
    are those alone that stand beside a chosen block, under the names that they have among all.
    """

    def __init__(
        self, encoder: ImageEncoderViT, tune_out: int, hidden_dim: int, chosen: Sequence[int]
    ):
        super().__init__(encoder)
        self.patch_embed_tune = nn.Linear(self.embed_dim, tune_out)
        self.HFC_tune = nn.Linear(3 * self.patch_size**2, tune_out)
        self.task_adapter_up = nn.Linear(hidden_dim, self.embed_dim)
        places = sorted({place for index in chosen for place in (index, index + 1)})
        self.task_adapter_blocks = nn.ModuleDict(
            {str(place): DownProjection(tune_out, hidden_dim) for place in places}
        )

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, C', h, w)."""
        x = self.embed(image)
        features = self.features(image, x)
        x = self.adapt(x, features, 0)
        for index, block in enumerate(self.blocks):
            x = self.adapt(block(x), features, index + 1)
        return self.neck(x.permute(0, 3, 1, 2))

    def embed(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, C) patches with positions."""
        return self.patch_embed(image) + self.pos_embed

    def features(self, image: Tensor, x: Tensor) -> Tensor:
        """An image and its patches -> (B, h, w, tune_out), what all adapters read."""
        patches = F.unfold(high_pass(image), self.patch_size, stride=self.patch_size)
        edges = self.HFC_tune(patches.transpose(1, 2)).unflatten(1, x.shape[1:3])
        return self.patch_embed_tune(x) + edges

    def beside(self, image: Tensor) -> Tensor:
        """The same of an image alone; see `stages`."""
        return self.features(image, self.embed(image))

    def stages(self, features: Tensor | None) -> list[Stage]:
        """The forward as a chain; see `prefix.stages_of`. features: of `beside`."""
        chain = [Stage((self.patch_embed, self.pos_embed), self.embed)]
        for place in range(len(self.blocks) + 1):
            if str(place) in self.task_adapter_blocks:
                parts = self.task_adapter_blocks[str(place)], self.task_adapter_up
                run = partial(self.adapt, features=features, place=place)
                chain.append(Stage(parts, run))
            chain += [Stage((block,), block) for block in self.blocks[place : place + 1]]
        return [*chain, self.last_stage()]

    def adapt(self, x: Tensor, features: Tensor, place: int) -> Tensor:
        """(B, h, w, C) -> the same, with the term of the adapter at this place, if there is one."""
        if (name := str(place)) not in self.task_adapter_blocks:
            return x
        return x + self.task_adapter_up(self.task_adapter_blocks[name](features))


class DownProjection(nn.Module):
    """One adapter's own half: (..., tune_out) -> (..., hidden_dim)."""

    def __init__(self, tune_out: int, hidden_dim: int):
        super().__init__()
        self.down_projection = nn.Linear(tune_out, hidden_dim)

    def forward(self, features: Tensor) -> Tensor:
        return F.gelu(self.down_projection(features))


class OfficialEncoder(AdaptedEncoder):
    """Adapters on the input of each of the chosen blocks, by number.

    published: read the patches in the order of the published code, which takes a channels-last
    tensor for a channels-first one, so that a feature mixes places; else straight.
    """

    def __init__(self, encoder: ImageEncoderViT, published: bool, chosen: Sequence[int]):
        super().__init__(encoder)
        self.published, self.chosen = published, frozenset(chosen)
        self.prompt_generator = PromptGenerator(self.embed_dim, chosen, self.patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, C', h, w)."""
        patches = self.patch_embed(image)  # (B, h, w, C), before positions are added
        tokens = misread_channels(patches) if self.published else patches
        features = self.prompt_generator.features(tokens, high_pass(image))  # (B, h, w, d)
        x = patches + self.pos_embed
        for index in range(len(self.blocks)):
            x = self.run_block(x, features, index)
        return self.neck(x.permute(0, 3, 1, 2))

    def run_block(self, x: Tensor, features: Tensor, index: int) -> Tensor:
        """(B, h, w, C) -> the same, with the block's term before it, if it has one."""
        if index in self.chosen:
            x = x + self.prompt_generator(features, index)
        return self.blocks[index](x)

    def beside(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, d), what all terms are made of; see `stages`."""
        patches = self.patch_embed(image)
        tokens = misread_channels(patches) if self.published else patches
        return self.prompt_generator.features(tokens, high_pass(image))

    def stages(self, features: Tensor | None) -> list[Stage]:
        """The forward as a chain; see `prefix.stages_of`. features: of `beside`."""
        first = (self.patch_embed, self.pos_embed)
        chain = [Stage(first, lambda image: self.patch_embed(image) + self.pos_embed)]
        for index, block in enumerate(self.blocks):
            parts = (self.prompt_generator, block) if index in self.chosen else (block,)
            chain.append(Stage(parts, partial(self.run_block, features=features, index=index)))
        return [*chain, self.last_stage()]


class PromptGenerator(nn.Module):
    """Two features of an image, and from their sum a term for each of the chosen blocks.

    The layer per block is its own, the projection back to the encoder's width is shared.
    """

    def __init__(self, embed_dim: int, chosen: Sequence[int], patch_size: int):
        super().__init__()
        width = max(embed_dim // _REDUCTION, 1)
        self.embedding_generator = nn.Linear(embed_dim, width)
        self.prompt_generator = HighFrequencyEmbedding(width, patch_size)
        for index in chosen:
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
