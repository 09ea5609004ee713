"""SAM's parts and sizes. This file is a table and imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

_OFFICIAL = "https://dl.fbaipublicfiles.com/segment_anything/"


# What becomes of a pixel of 0..255: (mean, deviation) per channel, by the name of --normalisation.
# It belongs to the weights: those of SAM, those that were trained on 0..1 (MedSAM), and those of
# usagisukisuki/G-SAM 31dfd1c.
NORMALISATIONS = {
    "sam": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "unit": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    "gsam": ((118.83, 120.105, 96.9), (49.725, 49.47, 48.96)),
}


class Stage(NamedTuple):
    """One stage of a TinyViT: `blocks` of `width` channels that attend to windows of `window`.

    The first stage only convolves; its heads and windows mean nothing.
    """

    width: int
    blocks: int
    heads: int = 1
    window: int = 7


@dataclass(frozen=True)
class ModelType:
    """The numbers that make one size of SAM, and where its published weights lie.

    embed_dim, depth, num_heads, mlp_ratio: the image encoder's width, blocks, heads and MLP factor.
    global_blocks: the blocks that attend to the whole grid, the others to windows of `window_size`
    tokens. image_size, patch_size: pixels. prompt_embed_dim: channels of features and prompts.
    decoder_*, iou_head_*: the mask decoder; multimask_outputs: its masks beside the first one.
    backbone: the family of the image encoder, 'vit' or 'tiny_vit'; adapters say which they fit.
    stages: of a 'tiny_vit', whose embed_dim and num_heads are those of the last stage and whose
    depth is the blocks of all.
    file, url, sha256: the official checkpoint; empty where there is none. Without a digest the url
    is a page for people, and nothing is fetched from it.
    """

    embed_dim: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]
    image_size: int = 1024
    window_size: int = 14
    patch_size: int = 16
    mlp_ratio: float = 4.0
    prompt_embed_dim: int = 256
    mask_in_chans: int = 16
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256
    multimask_outputs: int = 3
    backbone: str = "vit"
    stages: tuple[Stage, ...] = ()
    file: str = ""
    url: str = ""
    sha256: str = ""


MODEL_TYPES: dict[str, ModelType] = {
    "vit_b": ModelType(
        embed_dim=768, depth=12, num_heads=12, global_blocks=(2, 5, 8, 11),
        file="sam_vit_b_01ec64.pth",
        url=_OFFICIAL + "sam_vit_b_01ec64.pth",
        sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": ModelType(
        embed_dim=1024, depth=24, num_heads=16, global_blocks=(5, 11, 17, 23),
        file="sam_vit_l_0b3195.pth",
        url=_OFFICIAL + "sam_vit_l_0b3195.pth",
        sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": ModelType(
        embed_dim=1280, depth=32, num_heads=16, global_blocks=(7, 15, 23, 31),
        file="sam_vit_h_4b8939.pth",
        url=_OFFICIAL + "sam_vit_h_4b8939.pth",
        sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    # MobileSAM: a distilled image encoder before SAM's own prompt encoder and mask decoder.
    "vit_t": ModelType(
        embed_dim=320, depth=12, num_heads=10, global_blocks=(), backbone="tiny_vit",
        stages=(Stage(64, 2), Stage(128, 2, 4, 7), Stage(160, 6, 5, 14), Stage(320, 2, 10, 7)),
        file="mobile_sam.pt",
        url="https://github.com/ChaoningZhang/MobileSAM",
    ),
    # Small enough to train from random weights on two cores. Windows of 8 divide its grid of 16.
    "vit_mini": ModelType(
        embed_dim=160, depth=6, num_heads=5, global_blocks=(2, 5), image_size=256, window_size=8,
        prompt_embed_dim=128, decoder_mlp_dim=512, iou_head_hidden_dim=128,
    ),
}  # fmt: skip
