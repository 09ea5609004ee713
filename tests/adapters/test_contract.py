"""What every adapter must do, whatever it is, on every backbone that it fits."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from samtune.adapters import ADAPTERS, build_model, build_untuned
from samtune.adapters.options import (
    AdaptFormerOptions,
    ConvLoraOptions,
    GsamOptions,
    LoraOptions,
    SamAdapterOptions,
    SamusOptions,
    TsSamOptions,
)
from samtune.config import ModelOptions
from samtune.engine.checkpoint import load_adapted, save_adapted
from samtune.engine.compiling import compile_blocks
from samtune.errors import UserError
from samtune.models.anatomy import attention_blocks, checkpoint_activations
from samtune.models.sam import build_sam
from samtune.structures import Prompts

SMALL = {"gsam": GsamOptions(resnet_depth=18)}  # where the default is large
VARIANTS = [(name, SMALL.get(name, adapter.options())) for name, adapter in ADAPTERS.items()] + [
    ("sam_adapter", SamAdapterOptions(tune_out=12, hidden_dim=6)),
    ("sam_adapter", SamAdapterOptions(variant="official")),
    ("sam_adapter", SamAdapterOptions(variant="official", embedding="straight")),
    ("ts_sam", TsSamOptions(use_fft=True, embedding="straight")),
    ("ts_sam", TsSamOptions(csa_blocks="1", mrm_blocks="none", scale_factor=3)),
    ("adaptformer", AdaptFormerOptions(bottleneck=5, scale=0.3, learn_scale=True, dropout=0)),
    ("adaptformer", AdaptFormerOptions("gsam")),
    ("adaptformer", AdaptFormerOptions("spatial", bottleneck=4, dilations="2,3")),
    ("samus", SamusOptions(cnn_width=8)),
    ("samus", SamusOptions(cnn_width=8, freeze_decoder=True)),
    ("gsam", GsamOptions(resnet_depth=18, freeze_peg=True)),
    ("lora", LoraOptions(rank=2, alpha=6, targets="k,v,q", adapt_decoder=True)),
    ("lora", LoraOptions(form="gsam")),
    ("conv_lora", ConvLoraOptions(rank=2, alpha=4, experts=3)),
    ("conv_lora", ConvLoraOptions(form="gsam")),
    # Late blocks only; every form of these is in test_adapter_blocks.py.
    ("sam_adapter", SamAdapterOptions(adapter_blocks="1")),
    ("sam_adapter", SamAdapterOptions(variant="official", adapter_blocks="1")),
    ("adaptformer", AdaptFormerOptions(adapter_blocks="1")),
    ("lora", LoraOptions(adapter_blocks="1")),
    ("conv_lora", ConvLoraOptions(adapter_blocks="1")),
]
BACKBONES = {"vit": "tiny", "tiny_vit": "tiny_t"}  # the small model type of each family
MODELS = [
    pytest.param(BACKBONES[backbone], name, options, id=f"{name}-{index}-{BACKBONES[backbone]}")
    for index, (name, options) in enumerate(VARIANTS)
    for backbone in ADAPTERS[name].backbones
    if (backbone, getattr(options, "form", "")) != ("tiny_vit", "spatial")  # which is refused
]
# Tracing and compiling take seconds: one form of each adapter on each backbone, all with -m slow.
COMPILED = [
    model
    if model.values[:2] not in {earlier.values[:2] for earlier in MODELS[:place]}
    else pytest.param(*model.values, id=model.id, marks=pytest.mark.slow)
    for place, model in enumerate(MODELS)
]
# A mask decoder for classes starts anew, so it cannot stay frozen.
SEVERAL = [
    model
    for model in MODELS
    if ADAPTERS[model.values[1]].several_classes
    and not getattr(model.values[2], "freeze_decoder", False)
]
CASES = [
    pytest.param(*model.values, prompt, 1, id=f"{model.id}-{prompt}")
    for model in MODELS
    for prompt in ("box", "none")  # the others differ in the prompt encoder only
    if prompt in ADAPTERS[model.values[1]].prompts
] + [pytest.param(*model.values, "none", 3, id=f"{model.id}-classes") for model in SEVERAL]
# What an adapter leaves out of SAM; the others leave out nothing.
LEFT_OUT = {
    "ts_sam": ("prompt_encoder.", "mask_decoder."),
    "gsam": ("image_encoder.pos_embed",),
}
# What starts anew where the decoder answers with a mask per class.
ANEW = tuple(
    f"mask_decoder.{part}."
    for part in ("mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head")
)
# Training begins at SAM itself.
SILENT = [
    model
    for model in MODELS
    if model.values[1] in ("lora", "conv_lora")
    or getattr(model.values[2], "form", "") == "original"
]


@pytest.fixture
def checkpoint(tmp_path, tiny):
    """Makes base weights: no tensor at zero, which would hide what depends on it."""

    def make(model_type: str):
        torch.manual_seed(11)
        state = build_sam(model_type).state_dict()
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape).abs())
        torch.save(state, tmp_path / f"{model_type}.pth")
        return tmp_path / f"{model_type}.pth"

    return make


def asked_of(model_type: str, name: str, **changes) -> ModelOptions:
    """Frames of 64 px, also for an adapter whose own frame is another."""
    return ModelOptions(**{"model_type": model_type, "adapter": name, "image_size": 64} | changes)


def build(checkpoint, model_type, name, options, prompt, num_classes=1, seed=1, **changes):
    model_options = asked_of(model_type, name, **changes)
    base = checkpoint(model_type)
    return build_model(model_options, options, prompt, base, seed, num_classes)


def stir(model: torch.nn.Module) -> None:
    """Move what trains off its zeros, which would hide what has no effect."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn(p.shape, generator=generator)


def loss_of(prediction) -> torch.Tensor:
    """Of the logits and of what the adapter adds."""
    return prediction.logits.float().square().mean() + sum((prediction.aux or {}).values())


def logits_side(name: str, frame: int) -> int:
    """Four logits per patch and side; patches may overlap."""
    return 4 * frame // (ADAPTERS[name].stride or 16)


def resized_by(model_type: str, name: str) -> set[str]:
    """What a frame of 64 px resizes, which only patches that overlap do."""
    if not ADAPTERS[name].stride:
        return set()
    return {f"image_encoder.blocks.1.attn.rel_pos_{axis}" for axis in "hw"}


def everything(model) -> dict[str, torch.Tensor]:
    """Parameters and buffers, also those that are not saved."""
    return dict([*model.named_parameters(), *model.named_buffers()])


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


@pytest.mark.parametrize(("model_type", "name", "options", "prompt", "num_classes"), CASES)
@pytest.mark.parametrize("train", ["adapter", "prompt_encoder", "all"])
def test_what_trains_and_what_does_not(
    checkpoint, model_type, name, options, prompt, num_classes, train
):
    """Each trainable parameter gets a gradient, and a step changes nothing else."""
    if (name, train) == ("ts_sam", "prompt_encoder"):  # which it does not have
        return
    model = build(checkpoint, model_type, name, options, prompt, num_classes, train=train).train()
    stir(model)
    image, prompts = ask(prompt)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: t.clone() for n, t in everything(model).items()}
    prediction = model(image, prompts, torch.tensor([[64, 64], [40, 64]]))
    side = logits_side(name, 64)
    assert prediction.logits.shape == (2, num_classes, side, side)
    loss_of(prediction).backward()

    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without.isdisjoint(trainable), "distributed training would fail"
    assert without | trainable.keys() == {n for n, _ in model.named_parameters()}
    torch.optim.AdamW(trainable.values(), lr=0.01).step()
    changed = {n for n, t in everything(model).items() if not torch.equal(t, before[n])}
    assert changed == trainable.keys() | moving_buffers(model)


@pytest.mark.parametrize(("model_type", "name", "options", "prompt", "num_classes"), CASES)
def test_names_and_counts_of_the_base_stay(
    checkpoint, model_type, name, options, prompt, num_classes
):
    """What the base checkpoint brought is still there under its name, with its value."""
    model = build(checkpoint, model_type, name, options, prompt, num_classes)
    base, state = torch.load(checkpoint(model_type), weights_only=True), model.state_dict()
    left_out = {key for key in base if key.startswith(LEFT_OUT.get(name, ("no such part",)))}
    anew = {key for key in base if num_classes > 1 and key.startswith(ANEW)}
    kept, resized = base.keys() - left_out - anew, resized_by(model_type, name)
    assert all(torch.equal(state[key], base[key]) for key in kept - resized)
    assert model.base_keys | model.own_keys == kept
    report = model.load_report
    assert set(report.loaded) == kept - resized
    assert set(report.resized) == resized
    assert set(report.reset) == anew & state.keys()
    assert set(report.new) == state.keys() - kept - anew
    assert set(report.unused) == left_out | anew - state.keys()


@pytest.mark.parametrize(("model_type", "name", "options", "prompt", "num_classes"), CASES)
def test_what_was_tuned_comes_back_bit_for_bit(
    checkpoint, tmp_path, model_type, name, options, prompt, num_classes
):
    """The file holds what trains and its statistics, by names that do not depend on the seed."""
    model = build(checkpoint, model_type, name, options, prompt, num_classes).train()
    stir(model)
    image, prompts = ask(prompt)
    loss_of(model(image, prompts)).backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    save_adapted(tmp_path / "best.safetensors", model, {})
    other = build(checkpoint, model_type, name, options, prompt, num_classes, seed=2)
    loaded = load_adapted(other, tmp_path / "best.safetensors")
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    state = model.state_dict()
    assert set(loaded) == trains | moving_buffers(model) | (state.keys() - model.base_keys)
    assert all(torch.equal(tensor, state[n]) for n, tensor in other.state_dict().items())
    with torch.no_grad():
        assert torch.equal(other(image, prompts).logits, model.eval()(image, prompts).logits)


@pytest.mark.parametrize(("model_type", "name", "options", "prompt", "num_classes"), CASES)
def test_forward_in_bf16_is_finite(checkpoint, model_type, name, options, prompt, num_classes):
    model = build(checkpoint, model_type, name, options, prompt, num_classes).train()
    image, prompts = ask(prompt)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(image, prompts)
    loss_of(prediction).backward()
    assert prediction.logits.isfinite().all()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_foreign_file_is_refused(checkpoint, tmp_path, name):
    """That of any other adapter, and one for another number of classes."""
    own = dict(VARIANTS[: len(ADAPTERS)])
    path = tmp_path / "best.safetensors"
    save_adapted(path, build(checkpoint, "tiny", name, own[name], "none"), {})
    others = [build(checkpoint, "tiny", n, own[n], "none") for n in ADAPTERS if n != name]
    if ADAPTERS[name].several_classes:
        others.append(build(checkpoint, "tiny", name, own[name], "none", num_classes=3))
    for other in others:
        before = {n: t.clone() for n, t in other.state_dict().items()}
        with pytest.raises(UserError, match=r"best\.safetensors does not fit this model"):
            load_adapted(other, path)
        assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())


@pytest.mark.parametrize(("model_type", "name", "options", "prompt", "num_classes"), CASES)
def test_accumulation_is_a_larger_batch(checkpoint, model_type, name, options, prompt, num_classes):
    """No image knows of its neighbours (but through a BatchNorm, whose statistics rest here)."""
    model = build(checkpoint, model_type, name, options, prompt, num_classes).double()
    stir(model)
    image, prompts = ask(prompt)
    trainable = [p for p in model.parameters() if p.requires_grad]

    def gradients(rows: slice):
        boxes = None if prompts.boxes is None else prompts.boxes[rows]
        logits = model(image[rows], Prompts(boxes=boxes)).logits
        # What serves training alone (the noise of a gate) has no gradient here: it counts as zero.
        return torch.autograd.grad(logits.square().sum(), trainable, materialize_grads=True)

    one, two, both = (gradients(rows) for rows in (slice(0, 1), slice(1, 2), slice(0, 2)))
    largest = max(gradient.abs().max().item() for gradient in both)
    for first, second, joined in zip(one, two, both, strict=True):
        torch.testing.assert_close(first + second, joined, rtol=1e-6, atol=1e-12 * largest)


@pytest.mark.parametrize(("model_type", "name", "options"), MODELS)
def test_another_image_size(checkpoint, model_type, name, options):
    model = build(checkpoint, model_type, name, options, "none", image_size=96)
    logits = model(torch.zeros(1, 3, 96, 96, dtype=torch.uint8)).logits
    assert logits.shape == (1, 1, logits_side(name, 96), logits_side(name, 96))
    assert model.image_size == (96, 96)
    assert bool(model.load_report.resized) == (model_type == BACKBONES["vit"])


@pytest.mark.parametrize(("model_type", "name", "options"), MODELS)
def test_a_frame_that_is_not_square(checkpoint, model_type, name, options):
    """Every part of it works forward and backward, and each axis has positions of its own."""
    prompt = ADAPTERS[name].prompts[0]
    model = build(checkpoint, model_type, name, options, prompt, image_size=(48, 80)).train()
    stir(model)
    image = torch.randint(0, 256, (2, 3, 48, 80), dtype=torch.uint8)
    prediction = model(image, ask(prompt)[1], torch.tensor([[48, 80], [48, 33]]))
    loss_of(prediction).backward()
    step = ADAPTERS[name].stride or 16
    assert prediction.logits.shape == (2, 1, 4 * 48 // step, 4 * 80 // step)
    assert prediction.logits.isfinite().all()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.image_size == (48, 80)
    if model_type == BACKBONES["vit"] and not ADAPTERS[name].any_size:
        attention = model.image_encoder.blocks[1].attn  # of the whole grid
        lengths = len(attention.rel_pos_h), len(attention.rel_pos_w)
        assert lengths == (2 * 48 // step - 1, 2 * 80 // step - 1)
    with pytest.raises(UserError, match="stock SAM"):
        model.as_sam()


@pytest.mark.parametrize(("model_type", "name", "options"), SILENT)
def test_the_start_is_sam_in_a_frame_that_is_not_square(checkpoint, model_type, name, options):
    model = build(checkpoint, model_type, name, options, "box", image_size=(48, 80))
    size = asked_of(model_type, name, image_size=(48, 80))
    untuned = build_untuned(size, checkpoint(model_type), seed=1)
    image = torch.randint(0, 256, (2, 3, 48, 80), dtype=torch.uint8)
    with torch.no_grad():
        expected = untuned(image, ask("box")[1]).logits
        assert torch.allclose(model(image, ask("box")[1]).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "name", "options"),
    [model for model in MODELS if "box" in ADAPTERS[model.values[1]].prompts],
)
def test_the_stock_predictor_takes_the_adapted_model(checkpoint, model_type, name, options):
    from segment_anything import SamPredictor

    model = build(checkpoint, model_type, name, options, "box")
    if name == "gsam":
        with pytest.raises(UserError, match="no stock SAM"):
            model.as_sam()
        return
    image, prompts = ask("box")
    predictor = SamPredictor(model.as_sam())
    predictor.set_image(image[0].permute(1, 2, 0).contiguous().numpy())
    _, _, logits = predictor.predict(box=prompts.boxes[0].numpy(), multimask_output=False)
    with torch.no_grad():
        expected = model(image, prompts).logits[0]
    assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-5)


@pytest.mark.parametrize(("model_type", "name", "options"), SILENT)
def test_the_start_is_sam(checkpoint, model_type, name, options):
    """Where the method says so, in training too."""
    model = build(checkpoint, model_type, name, options, "box")
    untuned = build_untuned(asked_of(model_type, name), checkpoint(model_type), seed=1)
    image, prompts = ask("box")
    with torch.no_grad():
        expected = untuned(image, prompts).logits
        assert torch.allclose(model(image, prompts).logits, expected, atol=1e-5)
        assert torch.allclose(model.train()(image, prompts).logits, expected, atol=1e-5)


@pytest.fixture
def nothing_compiled():
    """The limit of compiled versions of one function counts those of earlier tests."""
    torch.compiler.reset()
    counters.clear()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(("model_type", "name", "options"), COMPILED)
def test_encoder_and_decoder_trace_as_one_graph(checkpoint, model_type, name, options):
    """torch.compile meets nothing that it must leave to Python."""
    prompt = ADAPTERS[name].prompts[0]
    model = build(checkpoint, model_type, name, options, prompt)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    image, prompts = ask(prompt)
    with torch.no_grad():
        assert torch.equal(compiled(image, prompts).logits, model(image, prompts).logits)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(("model_type", "name", "options"), COMPILED)
def test_blocks_compile_in_training(checkpoint, model_type, name, options):
    """Each block is one graph forward and backward, with the values and gradients of plain Python.

    Random numbers are drawn alike in both.
    """
    prompt = ADAPTERS[name].prompts[0]
    image, prompts = ask(prompt)

    def train(compiled: bool):
        model = build(checkpoint, model_type, name, options, prompt).train()
        stir(model)
        names = list(model.state_dict())
        if compiled:
            compile_blocks(attention_blocks(model.image_encoder), "eager")
        torch.manual_seed(3)
        prediction = model(image, prompts)
        loss_of(prediction).backward()
        assert list(model.state_dict()) == names
        return prediction.logits, [p.grad for p in model.parameters() if p.requires_grad]

    (expected, gradients), (logits, compiled_gradients) = train(False), train(True)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    assert torch.allclose(logits, expected, atol=1e-5)
    assert all(map(partial(torch.allclose, atol=1e-5), compiled_gradients, gradients))


@pytest.mark.parametrize(("model_type", "name", "options"), MODELS)
def test_activation_checkpointing_changes_nothing_but_memory(checkpoint, model_type, name, options):
    prompt = ADAPTERS[name].prompts[0]
    image, prompts = ask(prompt)

    def train(forgets: str):
        model = build(checkpoint, model_type, name, options, prompt, train="all").train()
        stir(model)
        checkpoint_activations(model.image_encoder, forgets)
        kept = []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.append(t.numel()), t)[1], lambda t: t
        ):
            prediction = model(image, prompts)
        loss_of(prediction).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        return [prediction.logits, *gradients], sum(kept)

    (plain, much), (forgetful, little), (partly, less) = map(train, ("no", "yes", "1"))
    assert all(map(torch.equal, forgetful, plain)) and all(map(torch.equal, partly, plain))
    assert little < less < much
