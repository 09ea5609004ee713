"""`--adapter_blocks`: an adapter in some blocks only, and what that saves."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from samtune.adapters import ADAPTERS, build_model
from samtune.adapters.block_lists import choose_blocks
from samtune.adapters.options import (
    AdaptFormerOptions,
    ConvLoraOptions,
    LoraOptions,
    SamAdapterOptions,
)
from samtune.config import ModelOptions
from samtune.engine.checkpoint import load_adapted, save_adapted
from samtune.errors import UserError
from samtune.models import MODEL_TYPES
from samtune.models.anatomy import attention_blocks
from samtune.structures import Prompts
from samtune.trained import describe, options_of

FORMS = {
    "sam_adapter-parent": SamAdapterOptions(),
    "sam_adapter-official": SamAdapterOptions(variant="official"),
    "adaptformer-original": AdaptFormerOptions(dropout=0.0),
    "adaptformer-gsam": AdaptFormerOptions("gsam"),
    "adaptformer-spatial": AdaptFormerOptions("spatial", dilations="2"),
    "lora-samed": LoraOptions(),
    "lora-gsam": LoraOptions("gsam"),
    "conv_lora-original": ConvLoraOptions(),
    "conv_lora-gsam": ConvLoraOptions("gsam"),
}
CASES = [
    pytest.param(form, "tiny_t" if backbone == "tiny_vit" else "deep", id=f"{form}-{backbone}")
    for form in FORMS
    for backbone in ADAPTERS[form.split("-")[0]].backbones
    if (form, backbone) != ("adaptformer-spatial", "tiny_vit")  # which is refused
]
IMAGE = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(1)).byte()


@pytest.fixture
def deep(monkeypatch, tiny):
    """A ViT of as many blocks as attend in the small TinyViT: four."""
    monkeypatch.setitem(MODEL_TYPES, "deep", replace(tiny, depth=4))


def build(form: str, model_type: str, blocks: str):
    options = replace(FORMS[form], adapter_blocks=blocks)
    asked = ModelOptions(model_type, adapter=form.split("-")[0], image_size=64, train="adapter")
    return build_model(asked, options, "none", None, seed=1).train()


def forward(model) -> tuple[torch.Tensor, list[bool], list[int]]:
    """The loss; for each block, whether its output has a graph, and how many numbers it saved."""
    has_graph, saved, total = [], [], 0

    def note(tensor):
        nonlocal total
        total += tensor.numel()
        return tensor

    def after(block, args, output):
        has_graph.append(output.requires_grad)
        saved.append(total - sum(saved))

    def before(block, args):
        saved.append(total - sum(saved))  # what lies between the blocks is not theirs

    for block in attention_blocks(model.image_encoder):
        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        prediction = model(IMAGE, Prompts())
    loss = prediction.logits.square().mean() + sum((prediction.aux or {}).values())
    return loss, has_graph, saved[1::2]


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize(("form", "model_type"), CASES)
def test_blocks_before_the_first_adapted_one_build_no_graph(form, model_type):
    """They save nothing for a backward pass, and yet all that trains gets a gradient."""
    model = build(form, model_type, "2-3")
    loss, has_graph, saved = forward(model)
    assert has_graph == [False, False, True, True]
    assert saved[:2] == [0, 0] and min(saved[2:]) > 0
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert forward(build(form, model_type, "all"))[1] == [True] * 4


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize(("form", "model_type"), CASES)
def test_what_is_there_has_the_name_that_it_has_among_all(form, model_type):
    """All blocks by number are the default; some are a part of it, each in its own block."""
    names = {
        blocks: build(form, model_type, blocks).state_dict().keys()
        for blocks in ("all", "0-3", "0,1", "2-3", "3")
    }
    assert names["0-3"] == names["all"]
    assert names["3"] < names["2-3"] < names["all"]
    assert names["0,1"] | names["2-3"] == names["all"]


@pytest.mark.usefixtures("deep")
def test_the_parents_adapters_stand_on_both_sides_of_a_block():
    encoder = build("sam_adapter-parent", "deep", "1,3").image_encoder
    assert list(encoder.task_adapter_blocks) == ["1", "2", "3", "4"]
    encoder = build("sam_adapter-parent", "deep", "2-3").image_encoder
    assert list(encoder.task_adapter_blocks) == ["2", "3", "4"]


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("form", FORMS)
def test_a_file_loads_into_the_same_blocks_only(form, tmp_path):
    """Its metadata say which; a file for other blocks, fewer or more, is refused."""
    model, path = build(form, "deep", "2,3"), tmp_path / "best.safetensors"
    save_adapted(path, model, {})
    other = build(form, "deep", "2-3")
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    load_adapted(other, path)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    for blocks in ("all", "3", "1,2"):
        with pytest.raises(UserError, match="does not fit this model"):
            load_adapted(build(form, "deep", blocks), path)
    own = ADAPTERS[form.split("-")[0]].options
    config = {"adapter": "a", "model_type": "b", "adapter_blocks": "2,3"}
    assert options_of(describe(model, None, config), own).adapter_blocks == "2,3"


def test_lora_in_some_blocks_merges(deep):
    model = build("lora-samed", "deep", "2-3")
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            nn.init.normal_(module.weight, std=0.02)
    stock = build_model(ModelOptions("deep", adapter="decoder", image_size=64, train="adapter"),
                        ADAPTERS["decoder"].options(), "none", None, seed=1)  # fmt: skip
    stock.load_state_dict(ADAPTERS["lora"].merge(model))
    with torch.no_grad():
        expected = model.eval()(IMAGE, Prompts()).logits
        torch.testing.assert_close(stock(IMAGE, Prompts()).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("form", ["sam_adapter-official", "adaptformer-gsam", "lora-gsam"])
@pytest.mark.parametrize("text", ["4", "0,9", "2-4", "3-2"])
def test_blocks_that_are_not_there_are_refused(form, text):
    with pytest.raises(UserError, match=rf"--adapter_blocks {text}: the blocks .* are 0-3"):
        build(form, "deep", text)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", ["", "none", "auto", "1,", "last", "-1"])
def test_what_is_no_list_is_refused_at_once(form, text):
    with pytest.raises(UserError, match=rf"--adapter_blocks {text}: write it like .*'all'"):
        replace(FORMS[form], adapter_blocks=text)


def test_all_is_every_block():
    assert choose_blocks("adapter_blocks", "all", depth=3) == [0, 1, 2]
