"""A SAM small enough to build and train in milliseconds."""

from dataclasses import replace

import pytest

from samtune.models import MODEL_TYPES, ModelType, Stage


@pytest.fixture
def tiny(monkeypatch) -> ModelType:
    """Stock classes, 2 blocks of width 32, 64 px; also under the name `tiny` in the table."""
    sizes = replace(
        MODEL_TYPES["vit_mini"], embed_dim=32, depth=2, num_heads=2, global_blocks=(1,),
        image_size=64, window_size=3, prompt_embed_dim=32, decoder_heads=4, decoder_mlp_dim=32,
        iou_head_hidden_dim=16,
    )  # fmt: skip
    monkeypatch.setitem(MODEL_TYPES, "tiny", sizes)
    return sizes


@pytest.fixture
def tiny_t(tiny, monkeypatch) -> ModelType:
    """`tiny` with a TinyViT before its decoder: windows that need padding, and one that fits."""
    stages = (Stage(8, 1), Stage(16, 1, 2, 3), Stage(24, 2, 3, 4), Stage(32, 1, 4, 3))
    sizes = replace(
        tiny, depth=5, num_heads=4, global_blocks=(), backbone="tiny_vit", stages=stages
    )
    monkeypatch.setitem(MODEL_TYPES, "tiny_t", sizes)
    return sizes
