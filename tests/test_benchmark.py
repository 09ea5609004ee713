"""`benchmark` times the trainer's own step and says what it timed, as one JSON line."""

import json
from dataclasses import replace

import pytest
import torch

from samtune import config as c
from samtune.adapters.options import DecoderOptions
from samtune.benchmark import run
from samtune.complexity import build_weightless, count_step
from samtune.config import PromptOptions, Size
from samtune.engine.distributed import Process
from samtune.engine.evaluator import Evaluator
from samtune.engine.trainer import Trainer
from samtune.errors import UserError
from samtune.losses import EveryAnswer, MaskLoss
from samtune.models import MODEL_TYPES
from samtune.random_data import random_batch

ALONE = Process(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def config(monkeypatch) -> c.BenchmarkConfig:
    monkeypatch.setitem(MODEL_TYPES, "tiny", replace(MODEL_TYPES["vit_mini"], depth=1))
    return c.BenchmarkConfig(
        c.BenchmarkOptions(steps=2, warmup=1, peak=False),
        c.ModelOptions(model_type="tiny", adapter="decoder", image_size=64),
        c.LoaderOptions(batch_size=2),
        c.PromptOptions(),
        c.LossOptions(),
        c.OptimOptions(accumulate=2),
        c.RunOptions(),
        DecoderOptions(),
    )


def test_it_runs_train_step_and_counts_images(config, capsys, monkeypatch):
    steps = []
    step = Trainer.train_step
    monkeypatch.setattr(
        Trainer, "train_step", lambda self, *a: (steps.append(a[1]), step(self, *a))
    )
    result = run(config, ALONE)
    assert steps == [4, 4, 4], "two micro-batches of two images in each of three steps"
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    product = result["images_per_second"] * result["seconds_per_step"]
    assert product == pytest.approx(4, rel=1e-2)
    assert 0 < result["trainable_parameters"] < result["total_parameters"]
    assert result["peak_memory_bytes"] > 2**20
    assert result["precision"] == "fp32" and result["train"] == "adapter"
    laps = result["seconds_of_steps"]
    assert len(laps) == 2 and min(laps) <= result["median_seconds"] <= max(laps)
    assert result["seconds_per_step"] == pytest.approx(sum(laps) / 2, rel=1e-3)


def test_the_share_of_the_peak_is_that_of_the_counted_work(config):
    quick, config = config, replace(config, benchmark=replace(config.benchmark, peak=True))
    result = run(config, ALONE)
    options = replace(config.model, train="adapter")
    model = build_weightless(options, config.adapter, 1, "box")
    batch = random_batch(2, 64, PromptOptions())
    work = count_step(model.train(), batch, EveryAnswer(MaskLoss(config.loss)))
    assert result["flops_per_step"] == 2 * work.flops, "two micro-batches"
    assert result["gmacs"] == pytest.approx(work.macs / 2 / 1e9, abs=1e-4)
    done = result["flops_per_step"] / result["median_seconds"] / result["matmul_peak_flops"]
    assert result["share_of_peak"] == pytest.approx(done, rel=0.01, abs=1e-4)
    again = replace(config, optim=replace(config.optim, activation_checkpointing="yes"))
    assert run(again, ALONE)["flops_per_step"] == result["flops_per_step"]
    assert "gmacs" not in run(quick, ALONE)


@pytest.mark.parametrize("classes", [1, 3])
def test_scoring_is_timed_as_validation_scores(config, classes, monkeypatch):
    batches, told = [], Evaluator._answer

    def answer(self, batch, features):
        assert not self.model.training and not torch.is_grad_enabled()
        batches.append(len(batch.target))
        return told(self, batch, features)

    monkeypatch.setattr(Evaluator, "_answer", answer)
    timed = c.BenchmarkOptions(2, 1, classes, rows=1 if classes > 1 else 4, evaluate=True)
    prompts = c.PromptOptions("none" if classes > 1 else "box")
    loader = replace(config.loader, decode_rows=6)
    result = run(replace(config, benchmark=timed, prompts=prompts, loader=loader), ALONE)
    assert batches == [2] * 3 if classes > 1 else [6, 2] * 3
    assert result["mode"] == "evaluate" and result["accumulate"] == 1
    assert result["trainable_parameters"] > 0 and len(result["seconds_of_steps"]) == 2
    assert result["flops_per_step"] == pytest.approx(4e9 * result["gmacs"], rel=1e-2)


def test_a_long_warm_up_of_the_learning_rate_is_no_mistake(config):
    run(replace(config, optim=replace(config.optim, warmup_steps=500)), ALONE)


@pytest.mark.parametrize("options", [{"steps": 0}, {"warmup": -1}, {"rows": 0}])
def test_mistakes(config, options):
    with pytest.raises(UserError, match=f"--{next(iter(options))}"):
        run(replace(config, benchmark=replace(config.benchmark, **options)), ALONE)


def test_a_model_with_a_mask_per_class_is_timed_with_its_own_loss(config):
    one = run(replace(config, prompts=c.PromptOptions("none")), ALONE)
    several = replace(config.benchmark, num_classes=4, steps=1, warmup=0)
    asked = replace(config, prompts=c.PromptOptions("none"), benchmark=several)
    result = run(asked, ALONE)
    assert result["num_classes"] == 4
    assert result["trainable_parameters"] > one["trainable_parameters"]


def test_the_random_batch_fills_its_frame():
    batch = random_batch(3, 64, PromptOptions())
    assert batch.image.shape == (3, 3, 64, 64) and batch.in_frame
    assert batch.target.float().mean() == 0.25
    assert batch.at_target(torch.zeros(3, 1, 16, 16))[:, 0].shape == batch.target.shape
    assert random_batch(1, 64, PromptOptions("none")).prompts.boxes is None


def test_the_random_batch_of_a_frame_that_is_not_square():
    batch = random_batch(1, (32, 64), PromptOptions("box"))
    assert batch.image.shape == (1, 3, 32, 64) and batch.frames.frame_size == (32, 64)
    (x0, y0, x1, y1), target = batch.prompts.boxes[0].int().tolist(), batch.target[0]
    assert target[y0:y1, x0:x1].all() and target.sum() == (y1 - y0) * (x1 - x0) == 16 * 32


def test_several_questions_about_each_image():
    batch = random_batch(2, 64, PromptOptions("box"), rows=5)
    assert batch.prompts.image_index.tolist() == [0] * 5 + [1] * 5
    assert batch.weight.sum() == pytest.approx(2) and len(batch.ids) == 2
    for (x0, y0, x1, y1), target in zip(batch.prompts.boxes.int(), batch.target, strict=True):
        assert target[y0:y1, x0:x1].all() and target.sum() == (y1 - y0) * (x1 - x0) > 0
    assert len({tuple(box) for box in batch.prompts.boxes.tolist()}) > 5, "random ones"
    lengths = random_batch(2, 64, PromptOptions("mixed"), rows=5).prompts.lengths
    assert list(lengths) == sorted(lengths)
    with pytest.raises(UserError, match="need a --prompt"):
        random_batch(2, 64, PromptOptions("none"), rows=5)


def test_targets_at_the_size_of_the_pictures():
    batch = random_batch(1, 64, PromptOptions("box"), picture_size=Size(100, 200))
    assert not batch.in_frame and batch.target.shape == (1, 100, 200)
    assert batch.prompts.boxes[0].tolist() == pytest.approx([16, 16, 48, 48], abs=0.5)
    assert batch.at_target(torch.zeros(1, 1, 16, 16)).shape == (1, 1, 100, 200)
