"""`benchmark` times the trainer's own step and says what it timed, as one JSON line."""

import json
from dataclasses import replace

import pytest
import torch

from samtune import config as c
from samtune.adapters.options import DecoderOptions
from samtune.benchmark import run
from samtune.config import PromptOptions
from samtune.engine.distributed import Process
from samtune.engine.trainer import Trainer
from samtune.models import MODEL_TYPES
from samtune.random_data import random_batch

ALONE = Process(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def config(monkeypatch) -> c.BenchmarkConfig:
    monkeypatch.setitem(MODEL_TYPES, "tiny", replace(MODEL_TYPES["vit_mini"], depth=1))
    return c.BenchmarkConfig(
        c.BenchmarkOptions(steps=2, warmup=1),
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
