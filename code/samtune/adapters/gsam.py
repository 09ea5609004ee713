"""GSAM (Generalized SAM): images of any size and aspect, a CNN beside the image encoder.

Paper: "Generalized SAM: Efficient Fine-Tuning of SAM for Variable Input Image Sizes",
arXiv 2408.12406. Source: usagisukisuki/G-SAM 31dfd1c. Tensors carry the published names, the CNN's
those of the shorter of its two published spellings.

Two position convolutions take the place of SAM's position tables: one after the first block, one
over the features that the decoder reads. Nothing starts at zero, so training begins far from SAM.
Published weights want --normalisation gsam.

Deviations: the encoder's position convolution trains (published: frozen at random values by a slip,
see --freeze_peg); the CNN's last stage and classifier, which nothing reads, are not built; decoder
heads that no loss reads stay frozen; a box may be given; blocks of global attention are those of
the model type (published: 2, 5, 8, 11, right for vit_b only).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from samtune.adapters.bottleneck import BottleneckAdapter
from samtune.adapters.gsam_blocks import (
    RESNETS,
    CnnEncoder,
    FeaturePosition,
    GsamBlock,
    TokenPosition,
)
from samtune.adapters.layers import AdaptedEncoder, thaw_decoder
from samtune.adapters.options import GsamOptions
from samtune.errors import UserError
from samtune.models.sam import ImageEncoderViT, Sam
from samtune.models.segmenter import PromptedSam
from samtune.models.weights import fetch

_TORCHVISION = "https://download.pytorch.org/models/"
_CNN_SCALE = 0.5  # weight of the CNN's refined features after the last block


def build(sam: Sam, options: GsamOptions) -> PromptedSam:
    """Rebuild a frozen Sam, whose patches overlap by half, for any input size; thaw its decoder."""
    thaw_decoder(sam)
    cnn = CnnEncoder(sam.image_encoder.patch_embed.proj.out_channels, RESNETS[options.resnet_depth])
    if options.cnn_weights not in ("auto", "none"):
        cnn.load_trunk(options.cnn_weights)
    sam.image_encoder = GsamEncoder(sam.image_encoder, cnn)
    if options.freeze_peg:
        sam.image_encoder.pos_embed.requires_grad_(False)
    return Gsam(sam)


def settle(
    options: GsamOptions, download: bool, folder: Path = Path("checkpoints")
) -> tuple[GsamOptions, str]:
    """Where the CNN starts from, if that was left open, and a line that says so.

    download: fetch torchvision's weights if they are not in `folder`.
    """
    if options.cnn_weights != "auto":
        return options, ""
    resnet = RESNETS[options.resnet_depth]
    path = folder / resnet.file
    url, failure = _TORCHVISION + path.name, ""
    if download and not path.is_file():
        try:
            fetch(url, path, resnet.sha256)
        except OSError as error:
            failure = f" (they could not be fetched: {error})"
    if path.is_file():
        return replace(options, cnn_weights=str(path)), f"CNN: ImageNet weights, {path}"
    return replace(options, cnn_weights="none"), (
        f"CNN: random weights{failure}; for ImageNet's put {path.name} (from {url}) at {path}, or "
        "add --download"
    )


class Gsam(PromptedSam):
    """A Sam whose decoder gets its position encoding from a convolution of the features."""

    def __init__(self, sam: Sam):
        super().__init__(sam)
        self.positional_encoder = FeaturePosition(sam.prompt_encoder.embed_dim)

    def image_pe(self, features: Tensor) -> Tensor:
        return self.positional_encoder(features)

    def as_sam(self) -> Sam:
        """Raises UserError: stock's decoder has no place for these position encodings."""
        raise UserError(
            "--adapter gsam makes its position encodings from the features, so it is no stock SAM"
        )


class GsamEncoder(AdaptedEncoder):
    """SAM's encoder without position tables, on patches that overlap, with a CNN beside it.

    cnn: (B, 3, H, W) -> (B, C, h', w'), of any grid near the tokens'.
    """

    def __init__(self, encoder: ImageEncoderViT, cnn: nn.Module):
        super().__init__(encoder)
        self.cnn_embed = cnn
        del self.pos_embed  # the table, under whose name the published weights hold a convolution
        self.pos_embed = TokenPosition(self.embed_dim)
        self.input_Adapter = BottleneckAdapter(self.embed_dim, self.embed_dim // 4)
        self.blocks = nn.ModuleList(GsamBlock(block) for block in self.blocks)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, C', H // 8, W // 8)."""
        x = self.embed_patches(image)  # (B, h, w, C)
        x = x + self.input_Adapter(x)
        cnn = F.interpolate(self.cnn_embed(image), x.shape[1:3]).permute(0, 2, 3, 1)  # nearest
        x = x + cnn
        for index, block in enumerate(self.blocks):
            x, cnn = block(x, cnn)
            if index == 0:
                x = self.pos_embed(x)
        return self.neck((x + _CNN_SCALE * cnn).permute(0, 3, 1, 2))
