"""`--compile`: blocks are compiled in place, few versions of each, and nothing else changes."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from samtune import benchmark, pipeline
from samtune import config as c
from samtune.adapters import build_model
from samtune.adapters.options import (
    ConvLoraOptions,
    DecoderOptions,
    GsamOptions,
    LoraOptions,
)
from samtune.config import ModelOptions
from samtune.engine import compiling
from samtune.engine.compiling import check_compiler, compile_blocks
from samtune.engine.distributed import Process
from samtune.errors import UserError
from samtune.models.anatomy import attention_blocks, checkpoint_activations
from samtune.structures import Prompts

CPU = torch.device("cpu")
ALONE = Process(0, 1, 0, CPU)


@pytest.fixture(autouse=True)
def nothing_compiled(tiny):
    """Versions of one function are counted over all tests; and two settings are the process's."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(cache_size_limit=8, optimize_ddp=True):
        yield


def build(name: str, options, model_type: str = "tiny"):
    asked = ModelOptions(model_type, adapter=name, image_size=64, train="adapter")
    model = build_model(asked, options, "none", None, seed=1)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn(p.shape, generator=generator)
    return model.train()


def picture(height: int = 64, width: int = 64, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator).byte()


def compile_counted(model, backend: str = "eager") -> CompileCounterWithBackend:
    counter = CompileCounterWithBackend(backend)
    compile_blocks(attention_blocks(model.image_encoder), counter)
    return counter


def step(model, image) -> list[torch.Tensor]:
    """Logits and gradients, with the same random numbers each time."""
    torch.manual_seed(3)
    prediction = model(image, Prompts())
    loss = prediction.logits.float().square().mean() + sum((prediction.aux or {}).values())
    loss.backward()
    return [prediction.logits, *(p.grad for p in model.parameters() if p.requires_grad)]


def test_with_activation_checkpointing_it_compiles_and_forgets():
    """In the hard case: its terms draw random numbers and report a loss of their own."""

    def train(compiles: bool, forgets: bool):
        model, counter, kept = build("conv_lora", ConvLoraOptions()), None, []
        if compiles:
            counter = compile_counted(model, "aot_eager")
        if forgets:
            checkpoint_activations(model.image_encoder)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.append(t.numel()), t)[1], lambda t: t
        ):
            return step(model, picture()), sum(kept), counter and counter.frame_count

    plain, much, _ = train(False, False)
    both, little, graphs = train(True, True)
    assert graphs == 2, "a windowed block and a global one"
    assert little < much
    for ours, expected in zip(both, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_names_and_order_stay():
    model = build("lora", LoraOptions())
    before = list(model.state_dict()), [name for name, _ in model.named_modules()]
    compile_counted(model)
    assert before == (list(model.state_dict()), [name for name, _ in model.named_modules()])


def test_training_and_evaluation_each_compile_once():
    """Whatever their order and however often; the last batch of a set, a smaller one, once more."""
    model = build("lora", LoraOptions())
    counter, seen = compile_counted(model), []
    for training, batch in [(True, 2), (True, 2), (False, 2), (False, 2), (True, 2), (False, 3),
                            (False, 3), (True, 2), (False, 3)]:  # fmt: skip
        model.train(training)
        with torch.set_grad_enabled(training):
            model(picture(batch=batch))
        seen.append(counter.frame_count)
    assert seen == [2, 2, 4, 4, 4, 6, 6, 6, 6], "two kinds of block in each"


def test_sizes_beyond_the_limit_run_uncompiled(monkeypatch):
    """No storm: at most so many versions, the sizes that have one keep it, and all answers hold."""
    monkeypatch.setattr(compiling, "_MOST_VERSIONS", 4)
    sizes = [(64, 64), (48, 80), (96, 32), (40, 104), (72, 56), (64, 64)]
    plain = build("gsam", GsamOptions(resnet_depth=18)).eval()
    model = build("gsam", GsamOptions(resnet_depth=18)).eval()
    counter, seen = compile_counted(model), []
    for size in sizes:
        with torch.no_grad():
            torch.testing.assert_close(model(picture(*size)).logits, plain(picture(*size)).logits)
        seen.append(counter.frame_count)
    assert seen == [2, 4, 4, 4, 4, 4], "two kinds of block for each of two sizes"


def test_the_limit_is_more_than_a_small_vit_of_many_widths_needs():
    model = build("lora", LoraOptions(adapter_blocks="1-2"), "tiny_t")
    counter = compile_counted(model)
    for training, batch in [(True, 2), (False, 2), (False, 1)]:
        model.train(training)
        with torch.set_grad_enabled(training):
            model(picture(batch=batch))
    assert 8 < counter.frame_count < torch._dynamo.config.cache_size_limit


def test_a_missing_compiler_is_one_sentence(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("backend='inductor' raised:\nNo working C++ compiler\n  a trace")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with pytest.raises(UserError, match=r"^--compile: .* \(No working C\+\+ compiler\); .*g\+\+"):
        check_compiler(CPU)


@pytest.mark.parametrize("compiles", [False, True])
def test_the_benchmark_says_what_the_first_step_took(monkeypatch, compiles):
    """Compiled or not, and also where the first step is a timed one."""
    asked, compiled = [], []
    monkeypatch.setattr(benchmark, "check_compiler", asked.append)
    monkeypatch.setattr(
        pipeline,
        "compile_blocks",
        lambda blocks: (compiled.extend(blocks), compile_blocks(compiled, "eager")),
    )
    result = benchmark.run(
        c.BenchmarkConfig(
            c.BenchmarkOptions(steps=1, warmup=0),
            ModelOptions(model_type="tiny", adapter="decoder", image_size=64),
            c.LoaderOptions(batch_size=1),
            c.PromptOptions(),
            c.LossOptions(),
            c.OptimOptions(compile=compiles, tf32=True),
            c.RunOptions(),
            DecoderOptions(),
        ),
        ALONE,
    )
    assert result["compile"] is compiles and result["tf32"] is False
    assert (len(asked), len(compiled)) == ((1, 2) if compiles else (0, 0))
    assert result["first_step_seconds"] > 0


def test_the_order_is_compiled_then_forgetful_then_wrapped(monkeypatch):
    """The other way round, torch leaves the blocks uncompiled."""
    order = []
    for name in ("compile_blocks", "checkpoint_activations"):
        monkeypatch.setattr(pipeline, name, partial(lambda n, *_: order.append(n), name))
    model = build("decoder", DecoderOptions())
    options = replace(c.OptimOptions(), compile=True, activation_checkpointing="yes")
    assert pipeline.to_train(model, options, ALONE) is model
    assert order == ["compile_blocks", "checkpoint_activations"]


def test_shards_are_not_compiled():
    options = replace(c.OptimOptions(), compile=True, shard=True)
    with pytest.raises(UserError, match="--shard does not go with --compile"):
        pipeline.to_train(build("decoder", DecoderOptions()), options, ALONE)
