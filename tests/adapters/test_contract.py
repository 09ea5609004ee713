"""What every adapter must do, whatever it is."""

from functools import partial

import pytest
import torch

from samtune.adapters import ADAPTERS, build_model, build_untuned
from samtune.adapters.options import ConvLoraOptions, LoraOptions, SamAdapterOptions
from samtune.config import ModelOptions
from samtune.engine.checkpoint import load_adapted, save_adapted
from samtune.models.sam import build_sam
from samtune.structures import Prompts

VARIANTS = [(name, adapter.options()) for name, adapter in ADAPTERS.items()] + [
    ("sam_adapter", SamAdapterOptions(tune_out=12, hidden_dim=6)),
    ("sam_adapter", SamAdapterOptions(variant="official")),
    ("sam_adapter", SamAdapterOptions(variant="official", embedding="straight")),
    ("lora", LoraOptions(rank=2, alpha=6, targets="k,v,q", adapt_decoder=True)),
    ("lora", LoraOptions(form="gsam")),
    ("conv_lora", ConvLoraOptions(rank=2, alpha=4, experts=3)),
    ("conv_lora", ConvLoraOptions(form="gsam")),
]
SILENT = ("lora", "conv_lora")  # the start is SAM itself
CASES = [
    pytest.param(name, options, prompt, id=f"{name}-{index}-{prompt}")
    for index, (name, options) in enumerate(VARIANTS)
    for prompt in ADAPTERS[name].prompts
]


@pytest.fixture
def checkpoint(tmp_path, tiny):
    torch.manual_seed(11)
    path = tmp_path / "tiny.pth"
    torch.save(build_sam(tiny).state_dict(), path)
    return path


def ask(prompt: str) -> tuple[torch.Tensor, Prompts]:
    generator = torch.Generator().manual_seed(5)
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    boxes = torch.tensor([[3.0, 5, 40, 30], [10, 2, 60, 63]])
    return image, Prompts(boxes=boxes if prompt == "box" else None)


def stir(model: torch.nn.Module) -> None:
    """Move what trains off its zeros, which would hide what has no effect."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize(("name", "options", "prompt"), CASES)
@pytest.mark.parametrize("train", ["adapter", "all"])
def test_what_trains_and_what_does_not(checkpoint, name, options, prompt, train):
    """Each trainable parameter gets a gradient, and a step changes nothing else."""
    model_options = ModelOptions(model_type="tiny", adapter=name, train=train)
    model = build_model(model_options, options, prompt, checkpoint, seed=1).train()
    image, prompts = ask(prompt)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    stir(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    prediction = model(image, prompts, torch.tensor([[64, 64], [40, 64]]))
    assert prediction.logits.shape == (2, 1, 16, 16)
    (prediction.logits.square().mean() + sum((prediction.aux or {}).values())).backward()

    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without.isdisjoint(trainable), "distributed training would fail"
    assert without | trainable.keys() == {n for n, _ in model.named_parameters()}
    torch.optim.AdamW(trainable.values(), lr=0.01).step()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == trainable.keys()


@pytest.mark.parametrize(("name", "options", "prompt"), CASES)
def test_names_and_counts_of_the_base_stay(checkpoint, name, options, prompt):
    """What the base checkpoint brought is still there under its name, with its value."""
    model_options = ModelOptions(model_type="tiny", adapter=name)
    model = build_model(model_options, options, prompt, checkpoint, seed=1)
    base, state = torch.load(checkpoint, weights_only=True), model.state_dict()
    assert all(torch.equal(state[key], base[key]) for key in base)
    assert model.base_keys | model.own_keys == base.keys()
    assert set(model.load_report.new) == state.keys() - base.keys()


@pytest.mark.parametrize(("name", "options"), [v for v in VARIANTS if v[0] in SILENT])
def test_the_start_is_sam(checkpoint, name, options):
    model_options = ModelOptions(model_type="tiny", adapter=name)
    image, prompts = ask("box")
    with torch.no_grad():
        adapted = build_model(model_options, options, "box", checkpoint, seed=1)(image, prompts)
        expected = build_untuned(model_options, checkpoint, seed=1)(image, prompts)
    assert torch.equal(adapted.logits, expected.logits)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_what_was_tuned_round_trips(checkpoint, tmp_path, name, options):
    """The file holds no base tensor, and the model that reads it answers bit for bit the same."""
    model_options = ModelOptions(model_type="tiny", adapter=name)
    model, again = (build_model(model_options, options, "box", checkpoint, s) for s in (1, 2))
    stir(model)
    save_adapted(tmp_path / "best.safetensors", model, {})
    names = load_adapted(again, tmp_path / "best.safetensors")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained <= set(names) <= trained | model.own_keys
    image, prompts = ask("box")
    with torch.no_grad():
        assert torch.equal(again(image, prompts).logits, model(image, prompts).logits)


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
    assert model(torch.zeros(1, 3, 96, 96, dtype=torch.uint8)).logits.shape == (1, 1, 24, 24)
    assert "image_encoder.pos_embed" in model.load_report.resized


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_stock_predictor_takes_the_adapted_model(checkpoint, name, options):
    from segment_anything import SamPredictor

    model_options = ModelOptions(model_type="tiny", adapter=name)
    model = build_model(model_options, options, "box", checkpoint, seed=1)
    image, prompts = ask("box")
    predictor = SamPredictor(model.as_sam())
    predictor.set_image(image[0].permute(1, 2, 0).contiguous().numpy())
    _, _, logits = predictor.predict(box=prompts.boxes[0].numpy(), multimask_output=False)
    with torch.no_grad():
        expected = model(image, prompts).logits[0]
    assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-5)


@pytest.fixture
def nothing_compiled():
    """The limit of compiled versions of one function counts those of earlier tests."""
    torch.compiler.reset()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_encoder_and_decoder_trace_as_one_graph(checkpoint, name, options):
    """torch.compile meets nothing that it must leave to Python."""
    model_options = ModelOptions(model_type="tiny", adapter=name)
    model = build_model(model_options, options, "box", checkpoint, seed=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    image, prompts = ask("box")
    with torch.no_grad():
        assert torch.equal(compiled(image, prompts).logits, model(image, prompts).logits)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_blocks_compile_in_training(checkpoint, name, options):
    """Each block is one graph forward and backward, with the values and gradients of plain Python.

    Random numbers are drawn alike in both.
    """
    model_options = ModelOptions(model_type="tiny", adapter=name)
    image, prompts = ask("box")

    def train(compiled: bool):
        model = build_model(model_options, options, "box", checkpoint, seed=1).train()
        stir(model)
        if compiled:
            for block in model.image_encoder.blocks:
                block.compile(backend="eager", fullgraph=True)
        torch.manual_seed(3)
        prediction = model(image, prompts)
        (prediction.logits.square().mean() + sum((prediction.aux or {}).values())).backward()
        return prediction.logits, [p.grad for p in model.parameters() if p.requires_grad]

    (expected, gradients), (logits, compiled_gradients) = train(False), train(True)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert all(map(partial(torch.allclose, atol=1e-5), compiled_gradients, gradients))
