"""SAMs small enough to build and train in milliseconds: one per family of image encoders."""

from dataclasses import replace

from samtune.models import MODEL_TYPES, Stage

# Stock classes, 2 blocks of width 32, 64 px.
_VIT = replace(
    MODEL_TYPES["vit_mini"], embed_dim=32, depth=2, num_heads=2, global_blocks=(1,),
    image_size=64, window_size=3, prompt_embed_dim=32, decoder_heads=4, decoder_mlp_dim=32,
    iou_head_hidden_dim=16,
)  # fmt: skip
# A TinyViT before the same decoder: windows that need padding, and one that fits the grid.
_STAGES = (Stage(8, 1), Stage(16, 1, 2, 3), Stage(24, 2, 3, 4), Stage(32, 1, 4, 3))
TINY = {
    "tiny": _VIT,
    "tiny_t": replace(
        _VIT, depth=5, num_heads=4, global_blocks=(), backbone="tiny_vit", stages=_STAGES
    ),
}
