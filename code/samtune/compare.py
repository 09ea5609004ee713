"""The verb `compare`: train several adapters under one budget, and lay their scores side by side.

Each adapter is trained, scored and timed by the very commands that a user would give, in processes
of its own, so that memory is each one's own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from samtune.errors import UserError
from samtune.run_folder import RunFolder

ENTRY = Path(__file__).parents[1] / "run_sa.py"
COLUMNS = (
    "adapter", "trainable parameters", "seconds per epoch", "peak memory, MiB", "Dice", "IoU",
)  # fmt: skip


def run(adapters: list[str], output_dir: str, argv: list[str]) -> str:
    """Compare; write compare.json and compare.md into `output_dir`. Returns the table.

    argv: flags of `train` and of each adapter's own that all of them take. An adapter whose run is
    there already is not trained again. Raises UserError if one of them cannot be trained.
    """
    root = Path(output_dir)
    rows = []
    for name in adapters:
        folder = RunFolder(root / name)
        if not folder.scores.exists():
            print(f"== {name}", flush=True)
            _call("train", "--adapter", name, "--output_dir", str(folder.path), *argv)
        rows.append(_row(name, folder, argv))
    (root / "compare.json").write_text(json.dumps(rows, indent=2) + "\n")
    table = format_table(rows)
    (root / "compare.md").write_text(table)
    return table


def format_table(rows: list[dict]) -> str:
    """Markdown, best Dice first."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for row in sorted(rows, key=lambda row: -row["dice"]):
        lines.append(
            f"`{row['adapter']}` | {row['trainable_parameters']:,} | "
            f"{row['seconds_per_epoch']:.1f} | {row['peak_memory_bytes'] / 2**20:,.0f} | "
            f"{row['dice']:.4f} | {row['iou']:.4f}"
        )
    return "".join(f"| {line} |\n" for line in lines)


def _row(name: str, folder: RunFolder, argv: list[str]) -> dict:
    """What the table says of one adapter: scores and time of its run, memory of its steps."""
    scores = json.loads(folder.scores.read_text())["tuned"]
    epochs = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    timed = _call(
        "benchmark", "--adapter", name, "--steps", "3", "--warmup", "1", "--train",
        _trained(folder), *_only(argv, "model_type", "image_size", "batch_size", "precision",
                                 "prompt"), capture=True,
    )  # fmt: skip
    speed = json.loads(timed.splitlines()[-1])
    return {
        "adapter": name,
        "trainable_parameters": speed["trainable_parameters"],
        "seconds_per_epoch": statistics.median(epoch["seconds"] for epoch in epochs),
        "peak_memory_bytes": speed["peak_memory_bytes"],
        "dice": scores["dice"],
        "iou": scores["iou"],
        "best_epoch": next(e["epoch"] for e in reversed(epochs) if e["best"]),
        "device": speed["device"],
    }


def _trained(folder: RunFolder) -> str:
    """What trained in the run: 'all' from random weights, else what --train says."""
    scores = json.loads(folder.scores.read_text())
    if scores["train"] != "auto":
        return scores["train"]
    return "adapter" if scores["base_sha256"] else "all"


def _only(argv: list[str], *names: str) -> list[str]:
    """The flags of these names, with their values."""
    return [word for flag, value in pairwise(argv) if flag[2:] in names for word in (flag, value)]


def _call(verb: str, *flags: str, capture: bool = False) -> str:
    """One command of samtune; its output is passed on, or returned."""
    command = [sys.executable, str(ENTRY), verb, *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        raise UserError(f"{verb} {' '.join(flags)} ended with exit code {done.returncode}")
    return done.stdout or ""
