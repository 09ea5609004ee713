"""What the tensors of a published file say: our names for them, and which flags it was made with.

Works on names and shapes alone and imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from samtune.models import ModelType

# Layers by Hugging Face's names, and their numbers in SAM's sequences.
_NECK = {"conv1": 0, "layer_norm1": 1, "conv2": 2, "layer_norm2": 3}
_MASK_EMBED = {"conv1": 0, "layer_norm1": 1, "conv2": 3, "layer_norm2": 4, "conv3": 6}
_UPSCALING = {"conv1": 0, "layer_norm": 1, "conv2": 3}
_MLP = {"proj_in": 0, r"layers\.0": 1, "proj_out": 2}

Shapes = Mapping[str, tuple[int, ...]]

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


def hugging_face_renames(names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """(pattern, SAM's name) for the tensors of Hugging Face's SamModel, which autogluon's are, too.

    Empty for a file with other names, some of which mean something else there. Any number of
    leading `model.` goes too. What an adapter adds inside `attn` keeps its name.
    Source: huggingface/transformers 09cb93d, models/sam/convert_sam_to_hf.py.
    """
    outer = r"^(?:model\.)*"
    if not any(re.match(rf"{outer}vision_encoder\.", name) for name in names):
        return ()
    vision, prompt, decoder = (
        rf"{outer}{part}\." for part in ("vision_encoder", "prompt_encoder", "mask_decoder")
    )
    frequencies = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    rows = [
        (rf"{vision}patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
        (rf"{vision}pos_embed$", "image_encoder.pos_embed"),
        (rf"{vision}layers\.(\d+)\.layer_norm", r"image_encoder.blocks.\1.norm"),
        (rf"{vision}layers\.", "image_encoder.blocks."),
        (rf"{outer}shared_image_embedding\.positional_embedding$", frequencies),
        (rf"{prompt}shared_embedding\.positional_embedding$", frequencies),
        (rf"{prompt}point_embed\.", "prompt_encoder.point_embeddings."),
        (rf"{decoder}(transformer\..*)layer_norm", r"mask_decoder.\1norm"),
    ]
    mlp = r"((?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.)"
    for start, ours, layers in (  # names of layers there, their numbers here
        (rf"{vision}neck\.", "image_encoder.neck.", _NECK),
        (rf"{prompt}mask_embed\.", "prompt_encoder.mask_downscaling.", _MASK_EMBED),
        (rf"{decoder}upscale_", "mask_decoder.output_upscaling.", _UPSCALING),
        (decoder + mlp, r"mask_decoder.\1layers.", _MLP),
    ):
        rows += [(rf"{start}{name}\.", f"{ours}{number}.") for name, number in layers.items()]
    unwrapped = (r"^(?:model\.)+(prompt_encoder|mask_decoder)\.", r"\1.")
    whole = [(rf"{pattern.rstrip('$')}(?P<rest>.*)$", rf"{ours}\g<rest>") for pattern, ours in rows]
    return (*whole, (unwrapped[0] + r"(.*)$", unwrapped[1] + r"\2"))


# The first row that any name of a file matches says what made it: (pattern, adapter, options).
_SIGNS = (
    (r"image_encoder\.cnn_embed\.(backbone|res2)\.", "gsam", {}),
    (r"image_encoder\.cnn_embed\.inc\.", "samus", {}),
    (r"image_encoder\.csa_embedding\.", "ts_sam", {}),
    (r"image_encoder\.prompt_generator\.", "sam_adapter", {"variant": "official"}),
    (r"image_encoder\.HFC_tune\.", "sam_adapter", {"variant": "parent"}),
    (r".*\.MLP_Adapter\.aspp\.", "adaptformer", {"form": "spatial"}),
    (r".*\.MLP_Adapter\.", "adaptformer", {"form": "gsam"}),
    (r".*\.adaptmlp\.", "adaptformer", {"form": "original"}),
    (r".*\.lora_moe_gating\.w_gate", "conv_lora", {"form": "original"}),
    (r".*\.lora_[qkv]\.expert1\.", "conv_lora", {"form": "gsam"}),
    (r".*\.lora_[qkv]\.lora_A", "lora", {"form": "gsam"}),
    (r"w_a_\d{3}$|.*\.linear_a_[qkv]\.", "lora", {"form": "samed"}),
    (r"(.*\.)?mask_decoder\.", "decoder", {}),
)
# (adapter, one of our names, option, axis of its shape that is the option's value)
_SIZES = (
    ("sam_adapter", r"image_encoder\.HFC_tune\.weight", "tune_out", 0),
    ("sam_adapter", r"image_encoder\.task_adapter_up\.weight", "hidden_dim", 1),
    ("adaptformer", r".*\.(D_fc1|adaptmlp\.down_proj)\.weight", "bottleneck", 0),
    ("samus", r"image_encoder\.cnn_embed\.inc\.conv\.0\.weight", "cnn_width", 0),
    ("lora", r"image_encoder\..*\.linear_a_[qkv]\.weight", "rank", 0),
    ("conv_lora", r".*\.qkv\.lora_A", "rank", 0),
    ("conv_lora", r".*\.lora_moe_gating\.w_gate", "experts", 1),
)
# (adapter, one of our names, option that is on where there is such a tensor)
_SWITCHES = (
    ("ts_sam", r"image_encoder\.fft_embedding\.", "use_fft"),
    ("lora", r"mask_decoder\..*\.linear_a\.weight", "adapt_decoder"),
)
_RESNET_DEPTHS = {2: 18, 6: 50, 23: 101}  # by the blocks of its third stage


def made_by(names: Iterable[str]) -> tuple[str, dict] | None:
    """The adapter that a file's own names belong to, and the options that they show.

    None where they say nothing.
    """
    names = list(names)
    for pattern, adapter, options in _SIGNS:
        if any(re.match(pattern, name) for name in names):
            return adapter, options
    return None


def options_shown(adapter: str, shapes: Shapes) -> dict:
    """Options of the adapter that tensors, under our names, show by their shapes or presence."""
    shown = {}
    for owner, pattern, option, axis in _SIZES:
        found = (n for n in shapes if owner == adapter and re.fullmatch(pattern, n))
        values = {shapes[name][axis] for name in found}
        if len(values) == 1:  # several: it follows each block's width
            shown[option] = values.pop()
    for owner, pattern, option in _SWITCHES:
        if owner == adapter:
            shown[option] = any(re.match(pattern, name) for name in shapes)
    side = shapes.get("image_encoder.csa_embedding.weight")
    if adapter == "ts_sam" and side:
        shown["scale_factor"] = side[1] // side[0]
    if adapter == "gsam":
        found = (re.match(r"image_encoder\.cnn_embed\.res4\.(\d+)\.", name) for name in shapes)
        blocks = 1 + max((int(match[1]) for match in found if match), default=-1)
        if blocks in _RESNET_DEPTHS:
            shown["resnet_depth"] = _RESNET_DEPTHS[blocks]
    return shown


def classes_shown(shapes: Shapes, stock_masks: int) -> Collection[tuple[int, str]]:
    """(classes, layout) of the mask decoder in a file, by our names; one class: SAM's own decoder.

    stock_masks: of SAM's own decoder. As many classes in SAMed's layout look the same, so both are
    answers then. Empty where the file holds no such decoder.
    """
    ious, masks = (shapes.get(f"mask_decoder.{n}.weight") for n in ("iou_token", "mask_tokens"))
    if ious is None or masks is None:
        return ()
    if ious[0] > 1:
        return ((ious[0], "gsam"),)
    if masks[0] == stock_masks:
        return ((1, ""), (masks[0], "samed"))
    return ((masks[0], "samed"),)


def frame_shown(shapes: Shapes, row: ModelType, stride: int = 0) -> tuple[int, int] | None:
    """(height, width), pixels, of the frame that the position tables in a file are made for.

    stride: of patches that overlap, whose relative positions show it; 0 where the absolute ones do.
    None where the file holds none of them.
    """
    if not stride:
        table = shapes.get("image_encoder.pos_embed")
        return table and (table[1] * row.patch_size, table[2] * row.patch_size)
    if not row.global_blocks:
        return None
    block = f"image_encoder.blocks.{row.global_blocks[0]}.attn.rel_pos_"
    tables = [shapes.get(block + axis) for axis in "hw"]
    if None in tables:
        return None
    height, width = ((rows + 1) // 2 * stride for rows, _ in tables)
    return height, width
