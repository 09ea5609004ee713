"""What every adapter must do, whatever it is."""

from functools import partial

import pytest
import torch

from samtune.adapters import ADAPTERS, build_model, build_untuned
from samtune.adapters.options import AdaptFormerOptions, SamAdapterOptions, SamusOptions
from samtune.config import ModelOptions
from samtune.engine.checkpoint import load_adapted, save_adapted
from samtune.models.sam import build_sam
from samtune.structures import Prompts

VARIANTS = [(name, adapter.options()) for name, adapter in ADAPTERS.items()] + [
    ("sam_adapter", SamAdapterOptions(tune_out=12, hidden_dim=6)),
    ("sam_adapter", SamAdapterOptions(variant="official")),
    ("sam_adapter", SamAdapterOptions(variant="official", embedding="straight")),
    ("adaptformer", AdaptFormerOptions(bottleneck=5, scale=0.3, learn_scale=True, dropout=0)),
    ("adaptformer", AdaptFormerOptions("gsam")),
    ("adaptformer", AdaptFormerOptions("spatial", bottleneck=4, dilations="2,3")),
    ("samus", SamusOptions(cnn_width=8)),
    ("samus", SamusOptions(cnn_width=8, freeze_decoder=True)),
]
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


def tiny_options(name: str, **values) -> ModelOptions:
    """The tiny SAM at 64 px, also for an adapter whose own frame is another."""
    return ModelOptions(**{"model_type": "tiny", "adapter": name, "image_size": 64} | values)


def logits_side(name: str, image_size: int = 64) -> int:
    """Four logits per patch and side; patches of 16 px may overlap."""
    return 4 * image_size // (ADAPTERS[name].stride or 16)


def leave_zero(model) -> None:
    """Move what trains off its start, where a zero may hide a gradient."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


def ask(prompt: str) -> tuple[torch.Tensor, Prompts]:
    generator = torch.Generator().manual_seed(5)
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    boxes = torch.tensor([[3.0, 5, 40, 30], [10, 2, 60, 63]])
    return image, Prompts(boxes=boxes if prompt == "box" else None)


@pytest.mark.parametrize(("name", "options", "prompt"), CASES)
@pytest.mark.parametrize("train", ["adapter", "all"])
def test_what_trains_and_what_does_not(checkpoint, name, options, prompt, train):
    """Each trainable parameter gets a gradient, and a step changes nothing else."""
    model_options = tiny_options(name, train=train)
    model = build_model(model_options, options, prompt, checkpoint, seed=1).train()
    leave_zero(model)
    image, prompts = ask(prompt)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    prediction = model(image, prompts, torch.tensor([[64, 64], [40, 64]]))
    assert prediction.logits.shape == (2, 1, logits_side(name), logits_side(name))
    prediction.logits.square().mean().backward()

    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without.isdisjoint(trainable), "distributed training would fail"
    assert without | trainable.keys() == {n for n, _ in model.named_parameters()}
    torch.optim.AdamW(trainable.values(), lr=0.01).step()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == trainable.keys()


@pytest.mark.parametrize(("name", "options", "prompt"), CASES)
def test_names_and_counts_of_the_base_stay(checkpoint, name, options, prompt):
    """What the base checkpoint brought is still there under its name, with its value."""
    model = build_model(tiny_options(name), options, prompt, checkpoint, seed=1)
    base, state = torch.load(checkpoint, weights_only=True), model.state_dict()
    resized = model.load_report.resized
    assert all("rel_pos" in key for key in resized) and bool(resized) == bool(ADAPTERS[name].stride)
    assert all(torch.equal(state[key], base[key]) for key in base.keys() - {*resized})
    assert model.base_keys | model.own_keys == base.keys()
    assert set(model.load_report.new) == state.keys() - base.keys()


@pytest.mark.parametrize(("name", "options", "prompt"), CASES)
def test_forward_in_bf16_is_finite(checkpoint, name, options, prompt):
    model = build_model(tiny_options(name), options, prompt, checkpoint, seed=1).train()
    image, prompts = ask(prompt)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(image, prompts).logits
    logits.float().square().mean().backward()
    assert logits.isfinite().all()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_another_image_size(checkpoint, name, options):
    model = build_model(tiny_options(name, image_size=96), options, "none", checkpoint, seed=1)
    logits = model(torch.zeros(1, 3, 96, 96, dtype=torch.uint8)).logits
    assert logits.shape == (1, 1, logits_side(name, 96), logits_side(name, 96))
    assert "image_encoder.blocks.1.attn.rel_pos_h" in model.load_report.resized


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_stock_predictor_takes_the_adapted_model(checkpoint, name, options):
    from segment_anything import SamPredictor

    model = build_model(tiny_options(name), options, "box", checkpoint, seed=1)
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
    model = build_model(tiny_options(name), options, "box", checkpoint, seed=1)
    torch.compiler.reset()  # the compiler keeps a few versions of a function and then gives up
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    image, prompts = ask("box")
    with torch.no_grad():
        assert torch.equal(compiled(image, prompts).logits, model(image, prompts).logits)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_what_training_changed_loads_into_a_fresh_model(checkpoint, tmp_path, name, options):
    """The adapted state is all that is needed beside the base, bit for bit."""
    build = partial(build_model, tiny_options(name), options, "none", checkpoint)
    tuned, fresh = build(seed=1), build(seed=2)
    leave_zero(tuned)
    save_adapted(tmp_path / "best.safetensors", tuned, {})
    loaded = load_adapted(fresh, tmp_path / "best.safetensors")
    frozen = {n for n, p in tuned.named_parameters() if not p.requires_grad}
    assert loaded and tuned.base_keys.isdisjoint(frozen & {*loaded})
    state = fresh.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in tuned.state_dict().items())


IDENTITIES = [
    ("adaptformer", AdaptFormerOptions()),
    ("adaptformer", AdaptFormerOptions(bottleneck=5, learn_scale=True)),
]


@pytest.mark.parametrize(("name", "options"), IDENTITIES)
def test_the_start_is_the_untuned_model(checkpoint, name, options):
    """Where the method says that training begins at SAM itself."""
    model = build_model(tiny_options(name), options, "box", checkpoint, seed=1)
    untuned = build_untuned(tiny_options(name), checkpoint, seed=1)
    image, prompts = ask("box")
    with torch.no_grad():
        expected = untuned(image, prompts).logits
        assert torch.allclose(model(image, prompts).logits, expected, atol=1e-5)
        assert torch.allclose(model.train()(image, prompts).logits, expected, atol=1e-5)
