"""Fixtures of prompt-free decoding for one or several classes, and of weights brought to a size."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from fixture import Fixture, close
from torch import nn

from samtune.adapters.gsam import GsamEncoder
from samtune.adapters.layers import thaw_decoder
from samtune.models import ModelType
from samtune.models.mask_decoder import ClassDecoder, decode_masks
from samtune.models.sam import build_mask_decoder, build_sam
from samtune.models.segmenter import PromptedSam
from samtune.models.weights import give_classes, load_base
from samtune.structures import Frame, Frames

OUTPUT, GRADIENT = 1e-5, 1e-3
KEY_BIAS = 1e-6  # absolute: gradients of key biases are zero up to rounding
EXACT = 1e-6  # resized tables


def classes_of(config: dict) -> int:
    """Channels of the answer: G-SAM calls one kind of object against its background two classes."""
    return config["num_classes"] if config["multimask_output"] else 1


def decoder_sizes(config: dict, fixture: Fixture) -> dict:
    """What a config says about decoder and prompts, for `ModelType`; SAM's for the rest."""
    decoder = config.get("decoder", config)
    names = {
        "num_heads": "decoder_heads",
        "mlp_dim": "decoder_mlp_dim",
        "depth": "decoder_depth",
        "iou_head_depth": "iou_head_depth",
        "iou_head_hidden_dim": "iou_head_hidden_dim",
        "num_multimask_outputs": "multimask_outputs",
    }
    sizes = {ours: decoder[name] for name, ours in names.items() if name in decoder}
    mask = fixture.tensors.get("param.prompt_encoder.mask_downscaling.3.weight")
    return sizes if mask is None else sizes | {"mask_in_chans": len(mask)}


def check_trained(fixture: Fixture, module: nn.Module) -> None:
    """What trains is what the fixture has a gradient for.

    Where the source computes masks and drops them, it stores zeros; here those networks are frozen.
    """
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    zero = fixture.json["gradients"]["identically_zero"]
    assert trained == fixture.group("grad.").keys() - set(zero)


def check_gradients(fixture: Fixture, module: nn.Module, tolerance: float) -> None:
    """Of all that trains; those of the decoder's key biases are zero up to rounding."""
    expected = fixture.group("grad.")
    trained = [n for n, p in module.named_parameters() if p.requires_grad and n in expected]
    assert trained, "nothing to compare"
    for name in trained:
        gradient = expected[name]
        actual = module.get_parameter(name).grad
        assert actual is not None, f"{name} has no gradient"
        if name.endswith("k_proj.bias"):
            assert (actual - gradient).abs().max() < KEY_BIAS, name
        else:
            close(actual, gradient, tolerance, name)


# The decoder alone


def check_decoder(fixture: Fixture, num_classes: int, layout: str) -> None:
    sizes = ModelType(
        embed_dim=8, depth=1, num_heads=1, global_blocks=(),  # an image encoder is not part of it
        prompt_embed_dim=fixture.config["transformer_dim"],
        **decoder_sizes(fixture.config, fixture),
    )  # fmt: skip
    sam = build_sam(sizes, sizes.patch_size).requires_grad_(False)
    sam.mask_decoder = build_mask_decoder(sizes)
    if num_classes > 1:
        sam.mask_decoder = ClassDecoder(sam.mask_decoder, num_classes, layout)
    decoder = sam.mask_decoder
    thaw_decoder(sam)
    decoder.load_state_dict(fixture.group("param."))
    inputs = ("image_embeddings", "image_pe", "dense_prompt_embeddings")
    features, pe, dense = (fixture[f"input.{name}"] for name in inputs)
    sparse = features.new_zeros(len(features), 0, features.shape[1])
    masks, iou = decode_masks(decoder, features, pe, sparse, dense)
    loss = masks.square().mean()
    loss.backward()
    close(masks, fixture["output.masks"], OUTPUT, "masks")
    close(iou, fixture["output.iou_pred"], OUTPUT, "iou_pred")
    close(loss.reshape(1), fixture["output.loss"], OUTPUT, "loss")
    check_trained(fixture, decoder)
    check_gradients(fixture, decoder, GRADIENT)


def check_gsam_decoder(fixture: Fixture) -> None:
    check_decoder(fixture, classes_of(fixture.config), "gsam")


def check_samed_decoder(fixture: Fixture) -> None:
    config = fixture.config
    assert config["masks_returned"] == config["foreground_classes"] + 1
    check_decoder(fixture, config["masks_returned"], "samed")


# The whole prompt-free SAM


def check_prompt_free_sam(fixture: Fixture) -> None:
    config, vit = fixture.config, fixture.config["vit"]
    sizes = ModelType(
        embed_dim=vit["embed_dim"], depth=vit["depth"], num_heads=vit["num_heads"],
        global_blocks=tuple(vit["global_attn_indexes"]), window_size=vit["window_size"],
        image_size=vit["img_size"], patch_size=vit["patch_size"], mlp_ratio=vit["mlp_ratio"],
        prompt_embed_dim=vit["out_chans"], **decoder_sizes(config, fixture),
    )  # fmt: skip
    sam = build_sam(sizes).requires_grad_(False)
    if classes_of(config) > 1:
        give_classes(sam, classes_of(config), "gsam", None)
    thaw_decoder(sam)
    model = PromptedSam(sam).eval()
    model.load_state_dict(fixture.group("param."))
    logits = model.decode(model.image_encoder(fixture["input.image"])).logits
    size = (vit["img_size"],) * 2
    masks = Frames.collate([Frame(size, size)], size).to_frame(logits)
    loss = masks.square().mean()
    loss.backward()
    close(logits, fixture["output.low_res"], OUTPUT, "low_res")
    close(masks, fixture["output.masks"], OUTPUT, "masks")
    close(loss.reshape(1), fixture["output.loss"], OUTPUT, "loss")
    check_trained(fixture, model)
    check_gradients(fixture, model, GRADIENT)


# Weights at another size


def check_weight_adaptation(fixture: Fixture) -> None:
    """Both loaders' rules, through the loading of a whole checkpoint that holds the tables."""
    given, config = fixture.group("input."), fixture.config
    tables = {name: table for name, table in given.items() if name.endswith("rel_pos_h")}
    source = 2 * config["src_grid"] - 1
    blocks = {int(name.split(".")[2]): len(table) for name, table in tables.items()}
    sizes = ModelType(
        embed_dim=config["dim"], depth=max(blocks) + 1,
        num_heads=config["dim"] // config["head_dim"],
        global_blocks=tuple(index for index, rows in blocks.items() if rows == source),
        window_size=next(((rows + 1) // 2 for rows in blocks.values() if rows != source), 14),
        image_size=config["src_grid"] * 16, prompt_embed_dim=16, decoder_mlp_dim=16,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sam.pth")
        torch.save(build_sam(sizes).state_dict() | given, path)
        samed = build_sam(sizes, config["samed_target_grid"] * 16)
        gsam = build_sam(sizes, config["gsam_target_token_grid"] * 8, stride=8)
        load_base(samed, path), load_base(gsam, path)
    gsam.image_encoder = GsamEncoder(gsam.image_encoder, nn.Identity())
    for rule, sam in {"samed": samed, "gsam": gsam}.items():
        state = sam.state_dict()
        for name, expected in fixture.group(f"output.{rule}.").items():
            close(state[name], expected, EXACT, f"{rule} {name}")
    assert "image_encoder.pos_embed" not in gsam.state_dict()


CHECKS = {
    "multiclass_decoder_binary": check_gsam_decoder,
    "multiclass_decoder_multiclass": check_gsam_decoder,
    "multiclass_decoder_samed": check_samed_decoder,
    "prompt_free_sam_binary": check_prompt_free_sam,
    "prompt_free_sam_multiclass": check_prompt_free_sam,
    "sam_weight_adaptation": check_weight_adaptation,
}
