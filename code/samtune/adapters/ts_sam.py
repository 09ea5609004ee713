"""TS-SAM: a light side stream along the image encoder, and a decoder that fuses three scales.

Paper: "TS-SAM: Fine-Tuning Segment-Anything Model for Downstream Tasks", arXiv 2408.01835.
Source: maoyangou147/TS-SAM edd171c. Tensors carry the published names.

The side stream reads the frozen encoder's activations and changes them; what lies between is
differentiated through. SAM's prompt encoder and mask decoder have no part in it.

Deviations: any image size and width; the block lists follow the depth (vit_l and vit_mini have no
published ones); BatchNorm sees the batch of all processes, not of each alone; what a side adapter
computes and nobody reads is not returned.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samtune.adapters.block_lists import choose_blocks
from samtune.adapters.layers import AdaptedEncoder, high_pass, misread_channels
from samtune.adapters.options import TsSamOptions
from samtune.errors import UserError
from samtune.models.sam import ImageEncoderViT, Sam
from samtune.models.segmenter import NO_PROMPT, PromptedSam
from samtune.structures import Prediction, Prompts

_REFINED_BLOCKS = 12  # how many of the last blocks are refined at finer scales, where not said


def build(sam: Sam, options: TsSamOptions) -> PromptedSam:
    """Lay the side stream along a frozen Sam's encoder; put a fusion decoder behind it."""
    encoder = sam.image_encoder
    depth = len(encoder.blocks)
    width, out_chans = encoder.patch_embed.proj.out_channels, encoder.neck[0].out_channels
    sam.image_encoder = TwoStreamEncoder(
        encoder,
        csa_blocks=choose_blocks("csa_blocks", options.csa_blocks, depth, depth),
        mrm_blocks=choose_blocks("mrm_blocks", options.mrm_blocks, depth, _REFINED_BLOCKS),
        scale_factor=options.scale_factor or max(width // out_chans, 1),
        use_fft=options.use_fft,
        published=options.embedding == "published",
    )
    return TwoStreamSam(sam)


class Pyramid(NamedTuple):
    """Features on the grid of patches and on grids twice and four times as fine.

    x1: (B, 2u, h, w). x2: (B, u, 2h, 2w). x4: (B, u, 4h, 4w).
    """

    x1: Tensor
    x2: Tensor
    x4: Tensor


class TwoStreamSam(PromptedSam):
    """Takes no prompts: one row per image. Its `mask_decoder` is the fusion decoder."""

    def __init__(self, sam: Sam):
        super().__init__(sam)
        del self.prompt_encoder
        self.mask_decoder = FusionDecoder(self.image_encoder.neck[0].out_channels)

    def decode(
        self,
        features: Pyramid,
        prompts: Prompts = NO_PROMPT,
        frame_size: tuple[int, int] | None = None,
    ) -> Prediction:
        """Features of B images -> logits (R, 1, 4h, 4w); frame_size says nothing here."""
        if prompts.image_index is not None:
            features = Pyramid(*(feature[prompts.image_index] for feature in features))
        return Prediction(self.mask_decoder(features))

    def as_sam(self) -> Sam:
        """Raises UserError: there is no SAM with this decoder."""
        raise UserError(
            "--adapter ts_sam has a decoder of its own and takes no prompts, so it is no stock SAM"
        )


class TwoStreamEncoder(AdaptedEncoder):
    """SAM's encoder with convolutional side adapters (csa) and multi-scale refinement (mrm).

    csa_blocks: blocks whose output goes through a side adapter; one more stands before the first
    block and one after the neck. mrm_blocks: blocks whose output is refined, before the side
    adapter changes it; one more after the neck. Both sorted. scale_factor: the encoder's width over
    the side stream's. use_fft: high frequencies enter the side stream. published: see
    `misread_channels`.
    """

    def __init__(
        self,
        encoder: ImageEncoderViT,
        *,
        csa_blocks: Sequence[int],
        mrm_blocks: Sequence[int],
        scale_factor: int,
        use_fft: bool,
        published: bool,
    ):
        super().__init__(encoder)
        width, side = self.embed_dim, max(self.embed_dim // scale_factor, 1)
        out_chans = self.neck[0].out_channels
        self.published = published
        self.csa_places, self.mrm_places = tuple(csa_blocks), tuple(mrm_blocks)
        self.csa_embedding = nn.Linear(width, side)
        self.fft_embedding = None
        if use_fft:
            edges = nn.Conv2d(3, side, self.patch_size, stride=self.patch_size)
            self.fft_embedding = nn.Sequential(OrderedDict(proj=edges))
        self.csa_blocks = nn.ModuleList(
            SideAdapter(width, side, side) for _ in range(len(csa_blocks) + 1)
        )
        self.csa_blocks.append(SideAdapter(out_chans, side, out_chans))
        self.mrm_blocks = nn.ModuleList(
            Refinement(channels, out_chans // 2)
            for channels in [*(width for _ in mrm_blocks), out_chans]
        )

    def forward(self, image: Tensor) -> Pyramid:
        """(B, 3, H, W) normalised -> features at three scales, h = H / patch, w = W / patch."""
        patches = self.patch_embed(image)  # (B, h, w, C), before positions are added
        side = self.embed_side(patches, image)  # (B, D, h, w)
        x = patches + self.pos_embed
        first, *between, last = self.csa_blocks
        *refinements, refine_neck = self.mrm_blocks
        side, _ = first(_channels_first(x), side)
        adapters = dict(zip(self.csa_places, between, strict=True))
        refinements = dict(zip(self.mrm_places, refinements, strict=True))
        finer = None
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in refinements:
                finer = refinements[index](_channels_first(x), finer)
            if index in adapters:
                side, changed = adapters[index](_channels_first(x), side)
                x = changed.permute(0, 2, 3, 1)  # (B, h, w, C)
        features = self.neck(_channels_first(x))
        x2, x4 = refine_neck(features, finer)
        x1, _ = last(features, side)
        return Pyramid(x1, x2, x4)

    def embed_side(self, patches: Tensor, image: Tensor) -> Tensor:
        """(B, h, w, C) patches and their image -> (B, D, h, w), where the side stream begins."""
        tokens = misread_channels(patches) if self.published else patches
        side = _channels_first(self.csa_embedding(tokens))
        return side if self.fft_embedding is None else side + self.fft_embedding(high_pass(image))


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


class SideAdapter(nn.Module):
    """The side stream changes the encoder's activation and reads it, pixel by pixel.

    channels: of the activation. side, side_out: of the side stream before and after.
    """

    def __init__(self, channels: int, side: int, side_out: int):
        super().__init__()
        self.conv1 = _pointwise(side, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _pointwise(channels, side_out)
        self.bn2 = nn.BatchNorm2d(side_out)

    def forward(self, activation: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w), (B, D, h, w) -> the new side stream, the new activation."""
        activation = activation + F.relu(self.bn1(self.conv1(side)))
        return F.relu(self.bn2(self.conv2(activation))), activation


class Refinement(nn.Module):
    """(B, C, h, w) -> gated features on grids twice and four times as fine, added to a sum."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv_in = nn.Sequential(_pointwise(channels, width), nn.BatchNorm2d(width), nn.ReLU())
        self.fpn1 = nn.Sequential(*_twice(width), *_twice(width), Gate(width))
        self.fpn2 = nn.Sequential(*_twice(width), Gate(width))

    def forward(self, x: Tensor, previous: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """previous: what the refinement before returned. Returns the sums (x2, x4)."""
        x = self.conv_in(x)  # (B, u, h, w)
        x2, x4 = self.fpn2(x), self.fpn1(x)  # (B, u, 2h, 2w), (B, u, 4h, 4w)
        return (x2, x4) if previous is None else (x2 + previous[0], x4 + previous[1])


class Gate(nn.Module):
    """(B, u, h, w) -> the same, each pixel's channels scaled by -1..1 as they say themselves."""

    def __init__(self, width: int):
        super().__init__()
        self.res_gate = nn.Sequential(
            nn.Linear(width, width, bias=False),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.Tanh(),
        )
        nn.init.trunc_normal_(self.res_gate[0].weight, std=0.02)
        nn.init.trunc_normal_(self.res_gate[2].weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x * _channels_first(self.res_gate(x.permute(0, 2, 3, 1)))


class FusionDecoder(nn.Module):
    """From coarse to fine, each scale first seeing the next finer one shrunk, then in full.

    channels: of the coarsest features, twice those of the others.
    """

    def __init__(self, channels: int):
        super().__init__()
        width = channels // 2
        self.conv1 = _fuse(channels, width)
        self.conv2 = _fuse(width, width)
        self.conv4 = _fuse(width, width)
        self.conv12_1 = _fuse(channels, width)
        self.conv12_2 = _fuse(channels, width)
        self.conv24_1 = _fuse(channels, width)
        self.conv24_2 = _fuse(channels, width)
        self.conv1_1 = nn.Conv2d(width, 1, 1)

    def forward(self, features: Pyramid) -> Tensor:
        """Features of B images -> logits (B, 1, 4h, 4w)."""
        x1, x2, x4 = features
        y = self.conv12_1(torch.cat([self.conv1(x1), _halve(self.conv2(x2))], 1))  # (B, u, h, w)
        y = self.conv12_2(torch.cat([_double(y), x2], 1))  # (B, u, 2h, 2w)
        y = self.conv24_1(torch.cat([y, _halve(self.conv4(x4))], 1))
        y = self.conv24_2(torch.cat([_double(y), x4], 1))  # (B, u, 4h, 4w)
        return self.conv1_1(y)


def _pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    """A convolution of single pixels with the published starting values."""
    layer = nn.Conv2d(inputs, outputs, 1)
    nn.init.normal_(layer.weight, std=math.sqrt(2 / outputs))
    nn.init.zeros_(layer.bias)
    return layer


def _twice(width: int) -> list[nn.Module]:
    """(B, u, h, w) -> (B, u, 2h, 2w)."""
    return [nn.ConvTranspose2d(width, width, 2, stride=2), nn.BatchNorm2d(width), nn.ReLU()]


def _fuse(inputs: int, outputs: int) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2) + F.avg_pool2d(x, 2)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
