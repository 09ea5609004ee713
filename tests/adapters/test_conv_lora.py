"""What the fixtures of Conv-LoRA do not show."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from samtune.adapters import ADAPTERS, build_model
from samtune.adapters.conv_lora import (
    ConvLoRAQKV,
    HeadwiseConvLoRA,
    NoisyGate,
    adapt_qkv,
    scaled_convolution,
)
from samtune.adapters.options import ConvLoraOptions
from samtune.config import ModelOptions
from samtune.errors import UserError
from samtune.models.anatomy import QkvLayout
from samtune.models.sam import build_sam

UNREAD = 132_612 + 419_424  # IoU head and three hyper-networks, frozen here


def as_published(x, weight, bias, scale: int):
    """(N, r, h, w): resize, convolve, GELU, resize."""
    y = F.interpolate(x, scale_factor=scale, mode="bicubic") if scale > 1 else x
    y = F.gelu(F.conv2d(y, weight, bias, padding=1))
    return F.interpolate(y, x.shape[-2:], mode="bicubic") if scale > 1 else y


@pytest.mark.parametrize("grid", [(5, 5), (4, 7), (1, 1), (1, 3)])
def test_only_the_enlarged_pixels_that_are_read(grid):
    """The same values and gradients as the maps that are resized as a whole, at every scale."""
    torch.manual_seed(0)
    scales = range(1, 12)
    z = torch.randn(len(scales), *grid, 3, requires_grad=True, dtype=torch.float64)
    weight = torch.randn(len(scales), 3, 3, 3, 3, requires_grad=True, dtype=torch.float64)
    bias = torch.randn(len(scales), 3, requires_grad=True, dtype=torch.float64)
    actual = scaled_convolution(z, weight, bias, torch.tensor(scales))
    maps = z.permute(0, 3, 1, 2)
    expected = torch.cat(
        [as_published(maps[i : i + 1], weight[i], bias[i], s) for i, s in enumerate(scales)]
    ).permute(0, 2, 3, 1)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    gradients = (
        torch.autograd.grad(out, (z, weight, bias), upstream, retain_graph=True)
        for out in (actual, expected)
    )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_expert_that_nobody_chose_has_a_zero_gradient():
    module = ConvLoRAQKV(nn.Linear(8, 24), 2, 1.0, 4).eval()  # a tie: all windows to one expert
    nn.init.ones_(module.lora_B)
    module(torch.randn(3, 4, 4, 8)).square().mean().backward()
    moved = [bool(e[0].weight.grad.any()) for e in module.lora_moe_experts]
    assert sum(moved) == 1


def test_noise_moves_the_choice_in_training_only():
    torch.manual_seed(0)
    gate = NoisyGate(2, 8)
    features = torch.randn(64, 2)
    chosen, balance = gate(features, None)
    assert len(chosen.unique()) == 1 and balance.item() == pytest.approx(2 * 0.01 * 8)
    chosen, balance = gate(features, torch.randn(64, 8))
    assert len(chosen.unique()) == 8 and balance.item() < 0.01


def test_balance_is_a_term_of_the_loss_in_training(tiny):
    model = build_model(
        ModelOptions(model_type="tiny", adapter="conv_lora"), ConvLoraOptions(), "none", None, 1
    )
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    assert model(image).aux is None
    prediction = model.train()(image)
    assert prediction.aux.keys() == {"balance"} and prediction.aux["balance"].shape == ()
    layers = [m for m in model.modules() if isinstance(m, ConvLoRAQKV)]
    assert len(layers) == tiny.depth
    assert all(layer._balance is None for layer in layers), "it would keep the whole graph"
    prediction.aux["balance"].backward()
    assert all(layer.lora_moe_gating.w_noise.grad.any() for layer in layers)


def test_gsams_convolutions_are_those_of_resized_maps():
    torch.manual_seed(0)
    module = HeadwiseConvLoRA(16).double()
    nn.init.normal_(module.lora_B)
    x = torch.randn(2, 5, 7, 3, 16, dtype=torch.float64)
    z = (x @ module.lora_A).permute(0, 3, 4, 1, 2).flatten(0, 1)
    outputs = []
    for scale in range(1, 5):
        conv = getattr(module, f"expert{scale}")["conv"]
        outputs.append(F.interpolate(conv(F.interpolate(z, scale_factor=scale)), (5, 7)))
    gates = module.gate["conv"](z).relu().softmax(1)
    mixed = sum(gates[:, i : i + 1] * output for i, output in enumerate(outputs))
    expected = mixed.unflatten(0, (2, 3)).permute(0, 3, 4, 1, 2) @ module.lora_B / 4
    torch.testing.assert_close(module(x), expected)


ORIGINAL = {"vit_b": 119_232, "vit_l": 312_192, "vit_h": 514_560}
GSAM = {"vit_b": 428_688, "vit_l": 857_376, "vit_h": 1_766_784}


@pytest.mark.parametrize("name", ORIGINAL)
@pytest.mark.parametrize(("form", "table"), [("original", ORIGINAL), ("gsam", GSAM)])
def test_parameter_counts(name, form, table):
    with torch.device("meta"):
        sam = build_sam(name).requires_grad_(False)
        model = ADAPTERS["conv_lora"].build(sam, ConvLoraOptions(form=form))
    own = sum(p.numel() for p in model.image_encoder.parameters() if p.requires_grad)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert own == table[name] and trainable == own + 4_058_340 - UNREAD


def test_published_starting_values():
    torch.manual_seed(0)
    module = adapt_qkv(nn.Linear(400, 1200), QkvLayout(4, False), ConvLoraOptions(rank=50))
    assert module.lora_A.abs().max().item() == pytest.approx(1 / 20, rel=0.01)
    gate = module.lora_moe_gating
    still = [module.lora_B, gate.w_gate, gate.w_noise]
    still += [expert[0].bias for expert in module.lora_moe_experts]
    assert not any(p.any() for p in still)
    assert all(expert[0].weight.any() for expert in module.lora_moe_experts)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"form": "gsam", "experts": 4}, "--experts means nothing with --form gsam"),
        ({"experts": 1}, "--experts must be at least 2"),
        ({"alpha": 0}, "--alpha above 0"),
    ],
)
def test_options_that_cannot_be(values, message):
    with pytest.raises(UserError, match=message):
        ConvLoraOptions(**values)
