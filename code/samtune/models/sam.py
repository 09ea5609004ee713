"""A `segment_anything` Sam of any size, from the table of model types.

All classes are stock but the image encoder's blocks and all attentions, which have stock's
parameters and values.
"""

from __future__ import annotations

from functools import partial

import torch
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from segment_anything.modeling.common import LayerNorm2d as LayerNorm2d  # for adapters too
from torch import nn

from samtune.config import Size
from samtune.errors import UserError
from samtune.models import MODEL_TYPES, NORMALISATIONS, ModelType
from samtune.models.attention import Block, RelativeAttention
from samtune.models.mask_decoder import fuse_attention


def build_sam(
    model_type: str | ModelType,
    image_size: int | tuple[int, int] = 0,
    stride: int = 0,
    normalisation: str = "sam",
) -> Sam:
    """Stock SAM with random weights, in eval mode.

    image_size: (S_h, S_w) of the input in pixels, or the side of a square; 0 takes the type's own.
    stride: see `build_image_encoder`. normalisation: a name in `NORMALISATIONS`. The caller seeds
    torch. Raises UserError for an unknown type, a size that is no multiple of the stride, or a
    stride for a backbone that has none.
    """
    model_type = resolve_model_type(model_type)
    image_size = Size.read(image_size) or Size.read(model_type.image_size)
    if stride and model_type.backbone != "vit":
        raise UserError(f"patches of a {model_type.backbone} cannot overlap: take another type")
    step = stride or model_type.patch_size
    if any(side < 1 or side % step for side in image_size):
        raise UserError(
            f"--image_size {image_size}: each side must be a positive multiple of {step} pixels, "
            f"the {'step between' if stride else 'side of'} patches"
        )
    grid = (image_size.height // step, image_size.width // step)
    mean, deviation = NORMALISATIONS[normalisation]
    sam = Sam(
        image_encoder=build_image_encoder(model_type, image_size, stride),
        prompt_encoder=build_prompt_encoder(model_type, grid, stride),
        mask_decoder=build_mask_decoder(model_type),
        pixel_mean=mean,
        pixel_std=deviation,
    )
    return sam.eval()


def resolve_model_type(model_type: str | ModelType) -> ModelType:
    """The row of `MODEL_TYPES`, or the given row itself."""
    if isinstance(model_type, ModelType):
        return model_type
    if model_type not in MODEL_TYPES:
        raise UserError(f"--model_type {model_type}: choose from {', '.join(MODEL_TYPES)}")
    return MODEL_TYPES[model_type]


def build_image_encoder(
    model_type: ModelType, image_size: int | tuple[int, int], stride: int = 0
) -> nn.Module:
    """(B, 3, S_h, S_w) normalised image -> (B, prompt_embed_dim, S_h / patch, S_w / patch).

    SAM's own ImageEncoderViT, or a TinyViTEncoder, which has no stride, where that is the type's
    backbone. image_size: (S_h, S_w), or the side of a square. stride: pixels between patches that
    overlap; 0 for patches side by side. With a stride the grid is S / stride, relative positions
    are made for it, and absolute ones keep the type's own grid: an adapter that asks for this
    brings both image and absolute positions to the grid itself. `img_size`, which stock reads, is
    the longest side.
    """
    image_size = Size.read(image_size)
    if model_type.backbone == "tiny_vit":
        from samtune.models.tiny_vit import build_tiny_vit  # it takes timm, which nobody else does

        return build_tiny_vit(model_type, max(image_size))
    patch = model_type.patch_size
    encoder = ImageEncoderViT(
        img_size=patch,  # stock makes tables for squares only: they are made below
        patch_size=patch,
        embed_dim=model_type.embed_dim,
        depth=model_type.depth,
        num_heads=model_type.num_heads,
        mlp_ratio=model_type.mlp_ratio,
        out_chans=model_type.prompt_embed_dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=model_type.window_size,
        global_attn_indexes=model_type.global_blocks,
    )
    encoder.img_size = max(image_size)
    if stride:
        encoder.patch_embed.proj.stride = (stride, stride)
    grid = tuple(side // (stride or patch) for side in image_size)
    own = model_type.image_size // patch
    _make_position_tables(encoder, grid, (own, own) if stride else grid)
    return encoder


def _make_position_tables(
    encoder: ImageEncoderViT, grid: tuple[int, int], absolute_grid: tuple[int, int]
) -> None:
    """Give each axis of a grid of tokens relative positions of its own length, and take ours.

    Stock starts the absolute table at zero, because weights are always loaded over it.
    """
    for index, block in enumerate(encoder.blocks):
        block.attn = RelativeAttention(block.attn)
        encoder.blocks[index] = Block(block)
        if block.window_size == 0:  # the others have tables of their window
            width = block.attn.rel_pos_h.shape[1]
            block.attn.rel_pos_h = nn.Parameter(torch.zeros(2 * grid[0] - 1, width))
            block.attn.rel_pos_w = nn.Parameter(torch.zeros(2 * grid[1] - 1, width))
    channels = encoder.pos_embed.shape[-1]
    encoder.pos_embed = nn.Parameter(torch.zeros(1, *absolute_grid, channels))
    nn.init.trunc_normal_(encoder.pos_embed, std=0.02)


def build_prompt_encoder(
    model_type: ModelType, grid: tuple[int, int], stride: int = 0
) -> PromptEncoder:
    """Prompts in a frame of `grid` patches (rows, columns) -> sparse tokens and a dense map.

    stride: pixels between patches; 0 for patches side by side.
    """
    height, width = grid
    step = stride or model_type.patch_size
    return PromptEncoder(
        embed_dim=model_type.prompt_embed_dim,
        image_embedding_size=(height, width),
        input_image_size=(height * step, width * step),
        mask_in_chans=model_type.mask_in_chans,
    )


def build_mask_decoder(model_type: ModelType) -> MaskDecoder:
    """Features and prompt tokens -> mask logits at four times the grid; see `decode_masks`."""
    return MaskDecoder(
        transformer_dim=model_type.prompt_embed_dim,
        transformer=fuse_attention(
            TwoWayTransformer(
                depth=model_type.decoder_depth,
                embedding_dim=model_type.prompt_embed_dim,
                num_heads=model_type.decoder_heads,
                mlp_dim=model_type.decoder_mlp_dim,
            )
        ),
        num_multimask_outputs=model_type.multimask_outputs,
        iou_head_depth=model_type.iou_head_depth,
        iou_head_hidden_dim=model_type.iou_head_hidden_dim,
    )
