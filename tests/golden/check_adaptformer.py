"""Fixtures of AdaptFormer in its three forms."""

from __future__ import annotations

import torch
from check_models import model_type, record
from fixture import Fixture, close

from samtune.adapters.adaptformer import OriginalAdapter, adapt_block
from samtune.adapters.bottleneck import DILATIONS, SpatialMultiscaleAdapter
from samtune.adapters.options import AdaptFormerOptions
from samtune.models.sam import build_image_encoder

OUTPUT, GRADIENT, KEY_BIAS = 1e-5, 1e-4, 1e-6


def check_loss_and_gradients(
    fixture: Fixture, module: torch.nn.Module, output: torch.Tensor
) -> None:
    """The stored gradients are those of exactly what trains; of key biases they are rounding."""
    close(output, fixture["output.out"], OUTPUT, "out")
    loss = output.square().mean()
    close(loss, fixture["output.loss"].squeeze(), OUTPUT, "loss")
    loss.backward()
    gradients, notes = fixture.group("grad."), fixture.json["gradients"]
    without = {*notes["not_reached_by_the_loss"], *notes["identically_zero"]}
    trains = {n for n, p in module.named_parameters() if p.requires_grad}
    assert trains - without == gradients.keys() - without
    for name, expected in gradients.items():
        actual = module.get_parameter(name).grad
        if name.split(".")[-2:] == ["k", "bias"]:
            assert (actual - expected).abs().max() < KEY_BIAS, name
        else:
            close(actual, expected, GRADIENT, name)


def original_options(config: dict) -> AdaptFormerOptions:
    dropout = config.get("dropout_in_training", AdaptFormerOptions.dropout)
    return AdaptFormerOptions(
        bottleneck=config["bottleneck"], scale=config["scale"], dropout=dropout
    )


def check_original_block(fixture: Fixture) -> None:
    """The published block has plain attention; only what follows it is the product's."""
    config, x = fixture.config, fixture["input.x"]
    adapter = OriginalAdapter(config["dim"], original_options(config)).eval()
    adapter.load_state_dict(fixture.group("param.adaptmlp."))
    close(adapter(x), fixture["output.adapter"], OUTPUT, "adapter")

    block = stock_like_block(fixture)
    adapted = adapt_block(block, original_options(config)).eval()
    adapted.adaptmlp.load_state_dict(fixture.group("param.adaptmlp."))
    output = adapted(x[:, None])[:, 0]  # one row of tokens is a grid of height 1
    check_loss_and_gradients(fixture, adapted, output)


def stock_like_block(fixture: Fixture) -> torch.nn.Module:
    """SAM's block with the fixture's weights: separate q, k, v joined, relative positions zero."""
    config, param = fixture.config, fixture.group("param.")
    sizes = {
        "img_size": 16, "embed_dim": config["dim"], "depth": 1, "num_heads": config["heads"],
        "global_attn_indexes": [0], "out_chans": 8,
        "mlp_ratio": len(param["fc1.bias"]) / config["dim"],
    }  # fmt: skip
    block = build_image_encoder(model_type(sizes), 16).blocks[0].requires_grad_(False)
    state = block.state_dict()
    for kind in ("weight", "bias"):
        q, k, v = (param[f"attn.{part}_proj.{kind}"] for part in "qkv")
        state[f"attn.qkv.{kind}"] = torch.cat([q, k, v])
        state[f"attn.proj.{kind}"] = param[f"attn.proj.{kind}"]
        state[f"mlp.lin1.{kind}"] = param[f"fc1.{kind}"]
        state[f"mlp.lin2.{kind}"] = param[f"fc2.{kind}"]
        for norm in ("norm1", "norm2"):
            state[f"{norm}.{kind}"] = param[f"{norm}.{kind}"]
    block.load_state_dict(state)
    return block


def check_encoder(fixture: Fixture, options: AdaptFormerOptions) -> None:
    config = fixture.config
    encoder = build_image_encoder(model_type(config), config["img_size"]).requires_grad_(False)
    for index, block in enumerate(encoder.blocks):
        encoder.blocks[index] = adapt_block(block, options)
    encoder.load_state_dict(fixture.group("param."))
    blocks = {
        f"output.block{i}": f"blocks.{i}"
        for i in range(config["depth"])
        if f"output.block{i}" in fixture
    }
    calls = record(encoder.eval(), blocks)
    output = encoder(fixture["input.image"])
    for name, (result,) in calls.items():
        close(result, fixture[name], OUTPUT, name)
    check_loss_and_gradients(fixture, encoder, output)


def check_original_encoder(fixture: Fixture) -> None:
    check_encoder(fixture, original_options(fixture.config))


def hidden_of(config: dict) -> int:
    """Written as `dim*0.25` or as a number; 0 stands for the default, a quarter."""
    text = str(config["bottleneck"])
    if not text.startswith("dim*"):
        return int(text)
    return int(config["embed_dim"] * float(text.removeprefix("dim*")))


def check_gsam_encoder(fixture: Fixture) -> None:
    config = fixture.config
    options = AdaptFormerOptions("gsam", bottleneck=hidden_of(config), scale=config["scale"])
    check_encoder(fixture, options)


def check_spatial_encoder(fixture: Fixture) -> None:
    config = fixture.config
    dilations = ",".join(map(str, config.get("dilations", DILATIONS)))
    options = AdaptFormerOptions(
        "spatial", bottleneck=hidden_of(config), scale=config["scale"], dilations=dilations
    )
    check_encoder(fixture, options)


def check_spatial_module(fixture: Fixture) -> None:
    config = fixture.config
    module = SpatialMultiscaleAdapter(config["dim"], config["hidden"], config["dilations"])
    module.load_state_dict(fixture.group("param."))
    check_loss_and_gradients(fixture, module, module(fixture["input.x"]))


CHECKS = {
    "adaptformer_original_block": check_original_block,
    "adaptformer_original_encoder": check_original_encoder,
    "adaptformer_gsam_encoder": check_gsam_encoder,
    "sm_adaptformer_module": check_spatial_module,
    "sm_adaptformer_encoder": check_spatial_encoder,
}
