"""The search for the largest batch, with trials that follow a model of memory; and one real run."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml

import run_sa
from samtune import config as c
from samtune import flags
from samtune.adapters import ADAPTERS
from samtune.benchmark import run as benchmark
from samtune.data.sample_data import make_sample_set
from samtune.engine.distributed import Process
from samtune.errors import UserError
from samtune.probe import (
    MARGIN,
    Probe,
    Trial,
    advice,
    as_benchmark,
    in_words,
    run_trial,
    settle_batch_size,
    switches,
)

ALONE = Process(0, 1, 0, torch.device("cpu"))
ENTRY = Path(__file__).parents[1] / "code" / "run_sa.py"
ASKED = {
    "precision": "fp32", "activation_checkpointing": "no", "adapter": "sam_adapter",
    "model_type": "vit_b", "image_size": 0,
}  # fmt: skip


def probe_of(limit: float, base: float, per_image: float, saves=None, dies: bool = True) -> Probe:
    """Trials that take base + per_image * batch, less what `saves` says of their flags; beyond the
    limit they die without a word, or say what they took (`dies`).
    """

    def attempt(asked: dict) -> Trial:
        factor = 1.0
        for name, share in (saves or {}).items():
            factor *= share if asked.get(name, ASKED[name]) != ASKED[name] else 1
        peak = int(base + per_image * asked["batch_size"] * factor)
        return Trial(asked) if dies and peak > limit else Trial(asked, peak, 1.0)

    return Probe(ASKED, ALONE, int(limit), lambda text: None, attempt)


@pytest.mark.parametrize("dies", [True, False])
@pytest.mark.parametrize("per_image", [1, 3, 7.5, 40, 100, 899])
def test_the_largest_batch_fits_and_the_next_does_not(per_image, dies):
    probe = probe_of(1000, 50, per_image, dies=dies)
    size = probe.largest(64)
    assert size == min(64, int((1000 * (1 - MARGIN) - 50) / per_image))
    sizes = [trial.tried["batch_size"] for trial in probe.trials]
    assert len(sizes) == len(set(sizes)) <= 7, "no trial twice, and few"
    assert all(50 + per_image * size <= 1000 for size in sizes if size > 2), (
        "none that was hopeless"
    )


def test_more_memory_never_gives_a_smaller_batch():
    found = [probe_of(limit, 300, 37).largest(64) for limit in range(0, 4000, 50)]
    assert found == sorted(found) and found[0] == 0 and found[-1] == 64


def test_memory_that_does_not_grow_on_a_line():
    """Building the model sets the peak of small batches; a kernel wants more from 9 images on."""

    def attempt(asked):
        size = asked["batch_size"]
        peak = max(400, 100 + 20 * size) + (500 if size > 8 else 0)
        return Trial(asked, peak, 1.0) if peak <= 1000 else Trial(asked)

    probe = Probe(ASKED, ALONE, 1000, lambda text: None, attempt)
    assert probe.largest(64) == 15


def test_no_more_than_there_are_images():
    probe = probe_of(10**6, 1, 1)
    assert probe.largest(3) == 3 and probe_of(10**6, 1, 1).largest(1) == 1
    assert [trial.tried["batch_size"] for trial in probe.trials] == [1, 2, 3]
    assert "larger ones than 3 were not tried" in in_words(probe, 3, 3)


@pytest.mark.parametrize(
    ("saves", "switch"),
    [
        ({"precision": 0.5, "activation_checkpointing": 0.3}, {"precision": "bf16"}),
        ({"activation_checkpointing": 0.5}, {"activation_checkpointing": "global"}),
        (
            {"precision": 0.7, "activation_checkpointing": 0.7},
            {"precision": "bf16", "activation_checkpointing": "yes"},
        ),
        ({"image_size": 0.5}, {"image_size": 512}),
    ],
)
def test_the_first_switch_that_helps_is_named(monkeypatch, saves, switch):
    monkeypatch.setattr("samtune.probe.has_bf16", lambda device: True)
    probe = probe_of(1000, 0, 1500, saves)
    assert probe.largest(64) == 0
    found = probe.cheapest_switch(ASKED)
    told = {"precision": "bf16", "activation_checkpointing": "yes"} if "image_size" in saves else {}
    assert found.tried == {"batch_size": 1, **told, **switch}
    for name, value in switch.items():
        assert f"--{name} {value}" in advice(probe, found)


def test_where_nothing_helps_it_says_what_was_tried():
    probe = probe_of(1000, 2000, 1)
    assert probe.largest(8) == 0 and probe.cheapest_switch(ASKED) is None
    text = advice(probe, None)
    assert "--activation_checkpointing yes" in text and "--image_size 256" in text


def test_bf16_comes_late_where_the_processor_has_none(monkeypatch):
    for has, place in ((True, 0), (False, 2)):
        monkeypatch.setattr("samtune.probe.has_bf16", lambda device, has=has: has)
        assert list(switches(ASKED, ALONE.device))[place] == {"precision": "bf16"}
    given = ASKED | {"precision": "bf16", "activation_checkpointing": "yes"}
    assert all("image_size" in switch for switch in switches(given, ALONE.device))
    late = next(s for s in switches(ASKED | {"adapter_blocks": "all"}, ALONE.device) if len(s) > 2)
    assert late["adapter_blocks"] == "8-11"


def test_sizes_that_are_offered_are_sizes_that_the_adapter_takes():
    for name, row in ADAPTERS.items():
        asked = ASKED | {"adapter": name, "image_size": "360x240"}
        for switch in switches(asked, ALONE.device):
            if "image_size" in switch:
                sides = c.Size.read(switch["image_size"])
                assert all(side % (row.stride or 16) == 0 for side in sides), (name, sides)


def training(*argv: str) -> c.TrainConfig:
    return run_sa.read(c.TrainConfig, "train", argv)[0]


def test_a_trial_takes_the_steps_of_the_training():
    argv = ["--adapter", "gsam", "--crop", "64", "--num_classes", "3", "--accumulate", "8",
            "--warmup_steps", "50", "--freeze_peg", "yes", "--max_objects", "2",
            "--activation_checkpointing", "global"]  # fmt: skip
    config = training(*argv)
    asked = as_benchmark(config, True, (300, 500))
    timed, _ = run_sa.read(
        c.BenchmarkConfig, "benchmark", [f"--{name}={value}" for name, value in asked.items()]
    )
    assert timed.adapter == config.adapter and timed.prompts == config.prompts
    assert timed.loss == config.loss and timed.benchmark.num_classes == 3
    assert timed.model.image_size == c.Size(64, 64) and timed.model.train == "all"
    assert timed.benchmark.rows == 2 and not timed.benchmark.picture_size
    assert timed.optim == replace(config.optim, accumulate=2, warmup_steps=0)
    asked = as_benchmark(training("--num_classes", "3"), False, (300, 500))
    assert asked["rows"] == 3 and asked["picture_size"] == "300x500"
    assert asked["train"] == "adapter" and asked["accumulate"] == 1
    with pytest.raises(UserError, match="--max_objects"):
        as_benchmark(training("--objects", "component", "--max_objects", "0"), False, (9, 9))


def test_where_not_even_one_image_fits_training_says_what_would(monkeypatch):
    monkeypatch.setattr("samtune.probe.free_memory", lambda process: 1000)
    monkeypatch.setattr(
        "samtune.probe.run_trial",
        lambda asked, limit: Trial(
            asked, 2000 if asked["activation_checkpointing"] == "no" else 800, 1.0
        ),
    )
    said = []
    with pytest.raises(UserError, match="--activation_checkpointing global"):
        settle_batch_size(training(), False, 9, (9, 9), ALONE, said.append)
    assert len(said) > 2


def test_a_trial_that_takes_too_much_is_ended_and_a_mistake_is_said():
    asked = {"model_type": "vit_mini", "adapter": "decoder", "image_size": 64}
    assert run_trial(asked, limit=2**20).peak is None
    with pytest.raises(UserError, match="unknown option --batchsize"):
        run_trial({"batchsize": 1}, limit=2**40)


def test_training_with_as_many_images_as_fit(tmp_path):
    """Bounded by the training set: two images."""
    files = make_sample_set(tmp_path / "sample")
    argv = ["--batch_size", "auto", "--image_size", "64", "--epoch", "1", "--workers", "0",
            "--train_slice", ":2", "--val_slice", "2:4", "--output_dir", "run",
            "--train_image_dir", files.image_dir("train"),
            "--train_mask_dir", files.mask_dir("train")]  # fmt: skip
    done = subprocess.run(
        [sys.executable, ENTRY, "train", *argv], cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  --batch_size ") == 2 and "--batch_size auto: 2" in done.stdout
    options = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert options["batch_size"] == 2
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert record["step"] == 1, "one step of two images"


def test_auto_is_for_training(capsys):
    assert run_sa.main(["evaluate", "--batch_size", "auto"]) == 2
    assert "--batch_size auto is for training" in capsys.readouterr().err
    for words, said in (
        (["--batch_size", "auto"], "benchmark --probe"),
        (["--probe", "--evaluate"], "leave out --evaluate"),
    ):
        config, _ = run_sa.read(c.BenchmarkConfig, "benchmark", words)
        with pytest.raises(UserError, match=said):
            benchmark(config, ALONE)
    with pytest.raises(UserError, match="expected a whole number or auto, got 'all'"):
        training("--batch_size", "all")


def test_a_run_that_goes_on_keeps_its_number(tmp_path):
    file = tmp_path / "config.yaml"
    config = training("--batch_size", "6", "--activation_checkpointing")
    options = flags.dump([getattr(config, f.name) for f in fields(config)])
    assert options["activation_checkpointing"] == "yes"
    file.write_text(yaml.safe_dump(options))
    kept, parsed = run_sa.read(c.TrainConfig, "train", ["--batch_size", "auto"], str(file))
    assert kept.loader.batch_size == 6 and kept.optim.activation_checkpointing == "yes"
    assert parsed.remarks == ["--batch_size auto is ignored: the run that goes on has 6"]
    for word, meant in (("true", "yes"), ("false", "no"), ("2,4-5", "2,4-5")):
        file.write_text(f"activation_checkpointing: {word}\n")
        config, _ = run_sa.read(c.TrainConfig, "train", ["--config", str(file)])
        assert config.optim.activation_checkpointing == meant
