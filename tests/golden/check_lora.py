"""Fixtures of LoRA and Conv-LoRA, in the forms of SAMed, autogluon and G-SAM."""

from __future__ import annotations

import torch
from check_models import check_gradients, gradient_names, model_type, record, rename
from fixture import Fixture, close
from torch import nn

from samtune.adapters import ADAPTERS
from samtune.adapters.conv_lora import ConvLoRAQKV, HeadwiseConvLoRA, NoisyGate
from samtune.adapters.options import ConvLoraOptions, LoraOptions
from samtune.adapters.projections import HeadwiseLowRank
from samtune.models.sam import build_sam

OUTPUT, GRADIENT, EXACT = 1e-5, 1e-4, 1e-12
ENCODER = "image_encoder."
QKV = ENCODER + "blocks.0.attn.qkv."
GATE = QKV + "lora_moe_gating."


def build_encoder(fixture: Fixture, adapter: str, options) -> nn.Module:
    """The adapted encoder with the fixture's tensors; published names are relative to it."""
    sam = build_sam(model_type(fixture.config)).requires_grad_(False)
    encoder = ADAPTERS[adapter].build(sam, options).image_encoder
    encoder.load_state_dict(ours(fixture.group("param."), adapter))
    return encoder.eval()


def ours(published: dict, adapter: str, place: str = ENCODER) -> dict:
    """Published names of a part's tensors to ours, both relative to where it stands in a model."""
    renamed = rename({place + name: t for name, t in published.items()}, adapter)
    return {name.removeprefix(place): tensor for name, tensor in renamed.items()}


def check_all_gradients(fixture: Fixture, module: nn.Module, gradients: dict) -> None:
    """Stored gradients; what the loss does not reach in the fixture has none or zero here."""
    unreached = set(fixture.json["gradients"]["not_reached_by_the_loss"])
    assert gradient_names(module) == gradients.keys() | {
        name for name in unreached if not name.endswith(("gating.mean", "gating.std"))
    }
    for name in gradient_names(module) - gradients.keys():
        gradient = module.get_parameter(name).grad
        assert gradient is None or not gradient.any(), f"{name} has a gradient"
    check_gradients(module, gradients, GRADIENT)


def check_encoder(fixture: Fixture, adapter: str, options) -> nn.Module:
    """Features, what each block returns, loss and gradients."""
    encoder = build_encoder(fixture, adapter, options)
    calls = record(encoder, {f"output.block{i}": f"blocks.{i}" for i in range(len(encoder.blocks))})
    features = encoder(fixture["input.image"])
    loss = features.square().mean()
    loss.backward()
    close(features, fixture["output.out"], OUTPUT, "out")
    close(loss.reshape(1), fixture["output.loss"], OUTPUT, "loss")
    for name, (result,) in calls.items():
        close(result, fixture[name], OUTPUT, name)
    check_all_gradients(fixture, encoder, ours(fixture.group("grad."), adapter))
    return encoder


def check_module(fixture: Fixture, module: nn.Module, x: torch.Tensor) -> None:
    """Output, loss and gradients of a part alone, whose names are the published ones."""
    out = module(x)
    loss = out.square().mean()
    loss.backward()
    close(out.reshape(fixture["output.out"].shape), fixture["output.out"], OUTPUT, "out")
    close(loss.reshape(1), fixture["output.loss"], OUTPUT, "loss")
    check_all_gradients(fixture, module, fixture.group("grad."))


def check_lora_samed_encoder(fixture: Fixture) -> None:
    config = fixture.config
    options = LoraOptions(rank=config["rank"], alpha=config["alpha_over_r"] * config["rank"])
    check_encoder(fixture, "lora", options)


def check_lora_gsam_encoder(fixture: Fixture) -> None:
    check_encoder(fixture, "lora", LoraOptions(form="gsam"))


def check_lora_gsam_module(fixture: Fixture) -> None:
    module = HeadwiseLowRank(fixture.config["in_dim"])
    assert module.width == fixture.config["bottleneck"]
    module.load_state_dict(fixture.group("param."))
    check_module(fixture, module, fixture["input.x"])


def check_conv_lora_autogluon_encoder(fixture: Fixture) -> None:
    config = fixture.config
    options = ConvLoraOptions(rank=config["r"], alpha=config["alpha"], experts=config["experts"])
    encoder = check_encoder(fixture, "conv_lora", options)
    gates = [name for name, m in encoder.named_modules() if isinstance(m, NoisyGate)]
    calls = record(encoder, {name: name for name in gates})
    with torch.no_grad():
        encoder(fixture["input.image"])
    balance = sum(result[1] for (result,) in calls.values())
    close(balance.reshape(1), fixture["output.moe_loss_sum"], OUTPUT, "moe_loss_sum")


def check_conv_lora_autogluon_module(fixture: Fixture) -> None:
    config = fixture.config
    stock = nn.Linear(config["in"], config["out"]).requires_grad_(False)
    module = ConvLoRAQKV(stock, config["r"], config["alpha"] / config["r"], config["experts"])
    module.load_state_dict(ours(fixture.group("param."), "conv_lora", QKV))
    calls = record(module, {"gate": "lora_moe_gating"})
    check_module(fixture, module.eval(), fixture["input.x"])
    ((chosen, balance),) = calls["gate"]
    assert torch.equal(chosen, fixture["output.gates"].argmax(1))
    close(balance.reshape(1), fixture["output.moe_loss"], OUTPUT, "moe_loss")


def check_conv_lora_autogluon_gate_training(fixture: Fixture) -> None:
    gate = NoisyGate(fixture.config["r"], fixture.config["experts"])
    gate.load_state_dict(ours(fixture.group("param."), "conv_lora", GATE))
    chosen, balance = gate(fixture["input.feats"].mean((2, 3)), fixture["input.noise"])
    loss = balance.square()
    loss.backward()
    assert torch.equal(chosen, fixture["output.gates"].argmax(1))
    close(balance.reshape(1), fixture["output.moe_loss"], OUTPUT, "moe_loss")
    close(loss.reshape(1), fixture["output.loss"], OUTPUT, "loss")
    check_all_gradients(fixture, gate, fixture.group("grad."))


def check_conv_lora_gsam_encoder(fixture: Fixture) -> None:
    check_encoder(fixture, "conv_lora", ConvLoraOptions(form="gsam"))


def check_conv_lora_gsam_module(fixture: Fixture) -> None:
    config = fixture.config
    module = HeadwiseConvLoRA(config["in_dim"])
    module.load_state_dict(fixture.group("param."))
    x = fixture["input.x"].unflatten(1, (config["H"], config["W"]))
    check_module(fixture, module, x[:, :, :, None])  # one head


CHECKS = {
    "lora_samed_encoder": check_lora_samed_encoder,
    "lora_gsam_encoder": check_lora_gsam_encoder,
    "lora_gsam_module": check_lora_gsam_module,
    "conv_lora_autogluon_encoder": check_conv_lora_autogluon_encoder,
    "conv_lora_autogluon_module": check_conv_lora_autogluon_module,
    "conv_lora_autogluon_gate_training": check_conv_lora_autogluon_gate_training,
    "conv_lora_gsam_encoder": check_conv_lora_gsam_encoder,
    "conv_lora_gsam_module": check_conv_lora_gsam_module,
}
