"""The stock path of `benchmarks/` computes what samtune computes, so that only speed differs."""

import pytest
import torch

import stock
from samtune.adapters import ADAPTERS, build_model
from samtune.benchmark import random_batch
from samtune.config import LossOptions, ModelOptions, PromptOptions
from samtune.losses import MaskLoss

SIDE = 64


def both(adapter: str, tiny):
    """(samtune's model, the stock path's) with the same weights, the new ones not zero."""
    options = {"form": "gsam"} if adapter == "lora" else {}
    model = build_model(
        ModelOptions(model_type="tiny", adapter=adapter, image_size=SIDE, train="adapter"),
        ADAPTERS[adapter].options(**options), "box", None, 0,
    )  # fmt: skip
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_B", "rel_pos_h", "rel_pos_w")):
            torch.nn.init.normal_(parameter, std=0.1)
    size = stock.Size(
        tiny.embed_dim, tiny.depth, tiny.num_heads, tiny.global_blocks, tiny.window_size,
        tiny.prompt_embed_dim, tiny.decoder_heads, tiny.decoder_mlp_dim, tiny.iou_head_hidden_dim,
    )  # fmt: skip
    peer = stock.build(size, SIDE, adapter)
    peer.load_state_dict({stock_name(n): tensor for n, tensor in model.state_dict().items()})
    return model, peer


def stock_name(name: str) -> str:
    """Of a tensor: G-SAM's maps hang on the attention there and on its projection here."""
    for part in "qkv":
        name = name.replace(f"attn.qkv.lora_{part}.lora_", f"attn.{part}_")
    return name


@pytest.mark.parametrize("adapter", stock.ADAPTERS)
def test_the_stock_path_computes_the_same(tiny, adapter):
    model, peer = both(adapter, tiny)
    batch = random_batch(2, SIDE, PromptOptions())
    prediction = model(batch.image, batch.prompts)
    losses, _ = MaskLoss(LossOptions())(prediction, batch)
    losses.mean().backward()

    masks = stock.segment(peer, batch.image, batch.prompts.boxes)
    ours = batch.at_target(prediction.logits)[:, 0]
    assert ours.std() > 1e-3 and not torch.equal(ours[0], ours[1])
    torch.testing.assert_close(ours, torch.stack(masks), atol=1e-5, rtol=1e-4)
    loss = stock.loss_of(masks, batch.target)
    torch.testing.assert_close(losses.mean(), loss, atol=1e-6, rtol=1e-6)
    loss.backward()

    theirs = dict(peer.named_parameters())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    for name, parameter in trained.items():
        expected = theirs[stock_name(name)].grad
        assert expected is not None, name
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-3, msg=name)


def test_the_stock_path_trains_and_scores(tiny):
    _, peer = both("decoder", tiny)
    args = stock.measure.parse("", stock.ADAPTERS, ("vit_mini",), ["--image_size", str(SIDE)])
    before = {n: p.clone() for n, p in peer.named_parameters()}
    stock.step_of(peer, args, torch.device("cpu"))()
    moved = {n for n, p in peer.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(name.startswith("mask_decoder.") for name in moved)
    args.evaluate = True
    loss, iou, dice = stock.step_of(peer, args, torch.device("cpu"))()
    assert loss > 0 and 0 <= iou <= dice <= 1


def test_its_products_are_those_that_samtune_counts():
    from samtune.complexity import count_macs

    size = stock.SIZES["vit_mini"]
    counted = stock.cost(size, 128, "sam_adapter")
    options = ModelOptions(model_type="vit_mini", adapter="sam_adapter", image_size=128)
    adapter_options = ADAPTERS["sam_adapter"].options()
    model = build_model(options, adapter_options, "box", None, 0)
    ours = count_macs(model, (128, 128), "box") / 1e9
    assert counted["gmacs"] == pytest.approx(ours, rel=0.05), "stock also makes unread masks"
    assert 1.5 < counted["step_gmacs"] / counted["gmacs"] < 3
