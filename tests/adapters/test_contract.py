"""What every adapter must do, whatever it is."""

import pytest
import torch

from samtune.adapters import ADAPTERS, build_model
from samtune.adapters.options import GsamOptions, SamAdapterOptions
from samtune.config import ModelOptions
from samtune.engine.checkpoint import load_adapted, save_adapted
from samtune.errors import UserError
from samtune.models.sam import build_sam
from samtune.structures import Prompts

SMALL = {"gsam": GsamOptions(resnet_depth=18)}  # where the default is large
VARIANTS = [(name, SMALL.get(name, row.options())) for name, row in ADAPTERS.items()] + [
    ("sam_adapter", SamAdapterOptions(tune_out=12, hidden_dim=6)),
    ("sam_adapter", SamAdapterOptions(variant="official")),
    ("sam_adapter", SamAdapterOptions(variant="official", embedding="straight")),
    ("gsam", GsamOptions(resnet_depth=18, freeze_peg=True)),
]
CASES = [
    pytest.param(name, options, prompt, id=f"{name}-{index}-{prompt}")
    for index, (name, options) in enumerate(VARIANTS)
    for prompt in ADAPTERS[name].prompts
]
# What an adapter leaves out of SAM; the others leave out nothing.
LEFT_OUT = {"gsam": {"image_encoder.pos_embed"}}
# What it brings to another grid, whatever the image size.
RESIZED = {"gsam": {f"image_encoder.blocks.1.attn.rel_pos_{axis}" for axis in "hw"}}
NO_STOCK_SAM = ("gsam",)


@pytest.fixture
def checkpoint(tmp_path, tiny):
    torch.manual_seed(11)
    path = tmp_path / "tiny.pth"
    torch.save(build_sam(tiny).state_dict(), path)
    return path


def grid(name: str, side: int) -> int:
    """Patches along a side of the frame."""
    return side // (ADAPTERS[name].stride or 16)


def moving_buffers(model) -> set[str]:
    """The statistics of what trains."""
    return {
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
        for buffer, _ in module.named_buffers(recurse=False)
    }


def ask(prompt: str) -> tuple[torch.Tensor, Prompts]:
    generator = torch.Generator().manual_seed(5)
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    boxes = torch.tensor([[3.0, 5, 40, 30], [10, 2, 60, 63]])
    return image, Prompts(boxes=boxes if prompt == "box" else None)


@pytest.mark.parametrize(("name", "options", "prompt"), CASES)
@pytest.mark.parametrize("train", ["adapter", "all"])
def test_what_trains_and_what_does_not(checkpoint, name, options, prompt, train):
    """Each trainable parameter gets a gradient, and a step changes nothing else."""
    model_options = ModelOptions(model_type="tiny", adapter=name, train=train)
    model = build_model(model_options, options, prompt, checkpoint, seed=1).train()
    image, prompts = ask(prompt)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    prediction = model(image, prompts, torch.tensor([[64, 64], [40, 64]]))
    assert prediction.logits.shape == (2, 1, 4 * grid(name, 64), 4 * grid(name, 64))
    prediction.logits.square().mean().backward()

    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without.isdisjoint(trainable), "distributed training would fail"
    assert without | trainable.keys() == {n for n, _ in model.named_parameters()}
    torch.optim.AdamW(trainable.values(), lr=0.01).step()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == trainable.keys() | moving_buffers(model)


@pytest.mark.parametrize(("name", "options", "prompt"), CASES)
def test_names_and_counts_of_the_base_stay(checkpoint, name, options, prompt):
    """What the base checkpoint brought is still there under its name, with its value."""
    model_options = ModelOptions(model_type="tiny", adapter=name)
    model = build_model(model_options, options, prompt, checkpoint, seed=1)
    base, state = torch.load(checkpoint, weights_only=True), model.state_dict()
    left_out, resized = LEFT_OUT.get(name, set()), RESIZED.get(name, set())
    kept = base.keys() - left_out
    assert all(torch.equal(state[key], base[key]) for key in kept - resized)
    assert model.base_keys | model.own_keys == kept
    assert set(model.load_report.new) == state.keys() - kept
    assert set(model.load_report.unused) == left_out
    assert set(model.load_report.resized) == resized


@pytest.mark.parametrize(("name", "options", "prompt"), CASES)
def test_what_was_tuned_comes_back_bit_for_bit(checkpoint, tmp_path, name, options, prompt):
    """The file holds what is not the base's, by names that do not depend on the seed."""
    model_options = ModelOptions(model_type="tiny", adapter=name)
    model = build_model(model_options, options, prompt, checkpoint, seed=1).train()
    image, prompts = ask(prompt)
    model(image, prompts).logits.square().mean().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    save_adapted(tmp_path / "best.safetensors", model, {})
    other = build_model(model_options, options, prompt, checkpoint, seed=2)
    loaded = load_adapted(other, tmp_path / "best.safetensors")
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    new = model.state_dict().keys() - model.base_keys
    assert set(loaded) == trains | moving_buffers(model) | new
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in other.state_dict().items())


@pytest.mark.parametrize(("name", "options", "prompt"), CASES)
def test_forward_in_bf16_is_finite(checkpoint, name, options, prompt):
    model_options = ModelOptions(model_type="tiny", adapter=name)
    model = build_model(model_options, options, prompt, checkpoint, seed=1).train()
    image, prompts = ask(prompt)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(image, prompts).logits
    logits.float().square().mean().backward()
    assert logits.isfinite().all()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_another_image_size(checkpoint, name, options):
    model_options = ModelOptions(model_type="tiny", adapter=name, image_size=96)
    model = build_model(model_options, options, "none", checkpoint, seed=1)
    side = 4 * grid(name, 96)
    assert model(torch.zeros(1, 3, 96, 96, dtype=torch.uint8)).logits.shape == (1, 1, side, side)
    assert model.image_size == 96
    given = {*model.load_report.resized, *model.load_report.unused}
    assert "image_encoder.pos_embed" in given


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_stock_predictor_takes_the_adapted_model(checkpoint, name, options):
    from segment_anything import SamPredictor

    model_options = ModelOptions(model_type="tiny", adapter=name)
    model = build_model(model_options, options, "box", checkpoint, seed=1)
    if name in NO_STOCK_SAM:
        with pytest.raises(UserError, match=f"--adapter {name} .* no stock SAM"):
            model.as_sam()
        return
    image, prompts = ask("box")
    predictor = SamPredictor(model.as_sam())
    predictor.set_image(image[0].permute(1, 2, 0).contiguous().numpy())
    _, _, logits = predictor.predict(box=prompts.boxes[0].numpy(), multimask_output=False)
    with torch.no_grad():
        expected = model(image, prompts).logits[0]
    assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_encoder_and_decoder_trace_as_one_graph(checkpoint, name, options):
    """torch.compile meets nothing that it must leave to Python."""
    torch._dynamo.reset()  # it counts how often one function is compiled anew
    model_options = ModelOptions(model_type="tiny", adapter=name)
    model = build_model(model_options, options, "box", checkpoint, seed=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    image, prompts = ask("box")
    with torch.no_grad():
        assert torch.equal(compiled(image, prompts).logits, model(image, prompts).logits)
