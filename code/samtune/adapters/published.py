"""Published names of tensors that no single pattern turns into ours. Imports nothing heavy."""

from __future__ import annotations

_MOST_BLOCKS = 32  # vit_h
_DECODER_LAYERS = 2
_DECODER_ATTENTION = {
    "sa": "self_attn",
    "cti": "cross_attn_token_to_image",
    "cit": "cross_attn_image_to_token",
}


def samed_renames() -> tuple[tuple[str, str], ...]:
    """(pattern, our name) for each low-rank tensor of a SAMed file, which counts them through.

    Encoder: `w_a_000` is block 0's q, `w_a_001` its v, `w_a_002` block 1's q. Decoder likewise per
    layer and kind of attention, and the final attention by letters.
    """
    rows = []
    for index in range(2 * _MOST_BLOCKS):
        part = "qv"[index % 2]
        linear = f"image_encoder.blocks.{index // 2}.attn.qkv.linear"
        rows += [(f"^w_{m}_{index:03d}$", f"{linear}_{m}_{part}.weight") for m in "ab"]
    transformer = "mask_decoder.transformer"
    for short, attention in _DECODER_ATTENTION.items():
        for index in range(2 * _DECODER_LAYERS):
            part = f"{transformer}.layers.{index // 2}.{attention}.{'qv'[index % 2]}_proj"
            rows += [(f"^{short}_{m}_{index:03d}$", f"{part}.linear_{m}.weight") for m in "ab"]
    final = f"{transformer}.final_attn_token_to_image"
    rows += [
        (f"^fati_{part}{m}$", f"{final}.{part}_proj.linear_{m}.weight")
        for part in "qv"
        for m in "ab"
    ]
    return tuple(rows)
