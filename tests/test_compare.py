"""`compare` trains adapters by the commands of a user, and tells them apart in one table."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import run_sa
from samtune import config as c
from samtune import flags
from samtune.compare import as_trained, format_table
from samtune.config import Size
from samtune.run_folder import RunFolder

ENTRY = Path(__file__).parents[1] / "code" / "run_sa.py"


def call(folder, *argv):
    return subprocess.run(
        [sys.executable, ENTRY, "compare", *argv], cwd=folder, text=True, capture_output=True
    )


def test_two_adapters_under_one_budget(tmp_path):
    flags = ["--epoch", "1", "--batch_size", "8", "--image_size", "64", "--workers", "0"]
    done = call(tmp_path, "--adapters", "decoder,sam_adapter", "--output_dir", "both", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "both/compare.json").read_text())
    assert [row["adapter"] for row in rows] == ["decoder", "sam_adapter"]
    for row in rows:
        scores = json.loads((tmp_path / "both" / row["adapter"] / "scores.json").read_text())
        assert row["scores"] == {name: scores["tuned"][name] for name in ("iou", "dice")}
    assert rows[0]["trainable_parameters"] < rows[1]["trainable_parameters"]
    assert (tmp_path / "both/compare.md").read_text() == format_table(rows)


def test_the_best_comes_first():
    row = {"trainable_parameters": 1000, "seconds_per_epoch": 1.25, "peak_memory_bytes": 2**30}
    rows = [
        row | {"adapter": name, "scores": {"istd BER": score, "dice": None}}
        for name, score in (("a", 0.5), ("b", 0.75), ("c", None))
    ]
    best, *_, last = format_table([r | {"lower_is_better": False} for r in rows]).splitlines()[2:]
    assert best == "| `b` | 1,000 | 1.2 | 1,024 | 0.7500 | - |" and "`c`" in last
    lines = format_table([r | {"lower_is_better": True} for r in rows]).splitlines()
    assert "| istd BER | dice |" in lines[0] and "`a`" in lines[2] and "`c`" in lines[4]


def test_steps_are_timed_as_the_run_took_them(tmp_path):
    """From the run's own file, so that options of the adapter and what a data set says count."""
    argv = ["--adapter", "gsam", "--prompt", "none", "--crop", "64", "--resnet_depth", "18",
            "--freeze_peg", "yes", "--class_weights", "1,2,3", "--accumulate", "2"]  # fmt: skip
    trained, _ = run_sa.read(c.TrainConfig, "train", [*argv, "--num_classes", "3"])
    folder = RunFolder(tmp_path)
    options = flags.dump([getattr(trained, f.name) for f in fields(trained)])
    folder.config.write_text(yaml.safe_dump(options))
    told = as_trained(folder, {"base_sha256": ""})
    timed, _ = run_sa.read(c.BenchmarkConfig, "benchmark", told)
    assert timed.adapter == trained.adapter and timed.optim == trained.optim
    assert timed.loss == trained.loss and timed.prompts == trained.prompts
    assert timed.model.image_size == Size(64, 64) and timed.model.train == "all"
    assert timed.benchmark.num_classes == 3


@pytest.mark.parametrize(
    "argv",
    [
        ["--adapters", "lora_x", "--output_dir", "x"],
        [],
        ["--adapters", "decoder,lora", "--output_dir", "x", "--rank", "4"],
        ["--output_dir", "x", "--train_image_dir", "a", "--train_mask_dir", "b"],
    ],
)
def test_mistakes_are_sentences(tmp_path, argv):
    done = call(tmp_path, *argv)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr and not (tmp_path / "x").exists()
