"""`compare` trains adapters by the commands of a user, and tells them apart in one table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from samtune.compare import format_table

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
        assert row["dice"] == scores["tuned"]["dice"]
    assert rows[0]["trainable_parameters"] < rows[1]["trainable_parameters"]
    assert (tmp_path / "both/compare.md").read_text() == format_table(rows)


def test_the_best_comes_first():
    row = {"trainable_parameters": 1000, "seconds_per_epoch": 1.25, "peak_memory_bytes": 2**30}
    table = format_table(
        [row | {"adapter": "a", "dice": 0.5, "iou": 0.4}, row | {"adapter": "b", "dice": 0.75,
                                                                "iou": 0.6}]
    )  # fmt: skip
    assert table.splitlines()[2] == "| `b` | 1,000 | 1.2 | 1,024 | 0.7500 | 0.6000 |"


@pytest.mark.parametrize("argv", [["--adapters", "lora_x", "--output_dir", "x"], []])
def test_mistakes_are_sentences(tmp_path, argv):
    done = call(tmp_path, *argv)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
