"""The verb `compare`: train several adapters under one budget, and lay their scores side by side.

Each adapter is trained, scored and timed by the very commands that a user would give, in processes
of its own, so that memory is each one's own.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import yaml

from samtune.adapters import ADAPTERS
from samtune.config import LoaderOptions, LossOptions, OptimOptions, PromptOptions
from samtune.engine.records import read_epochs
from samtune.errors import UserError
from samtune.run_folder import RunFolder

ENTRY = Path(__file__).parents[1] / "run_sa.py"
COLUMNS = ("adapter", "trainable parameters", "seconds per epoch", "peak memory, MiB")
_TIMED = (LoaderOptions, PromptOptions, LossOptions, OptimOptions)  # what a step depends on


def run(adapters: list[str], output_dir: str, argv: list[str]) -> str:
    """Compare; write compare.json and compare.md into `output_dir`. Returns the table.

    argv: flags of `train` and of each adapter's own that all of them take. An adapter whose run is
    there already is not trained again. Raises UserError if one of them cannot be trained, or if
    there is nothing to score them on.
    """
    root = Path(output_dir)
    rows = []
    for name in adapters:
        folder = RunFolder(root / name)
        if not folder.scores.exists():
            print(f"== {name}", flush=True)
            _call("train", "--adapter", name, "--output_dir", str(folder.path), *argv)
        if not folder.scores.exists():
            raise UserError(f"{folder.path} has no scores to compare: say what is to be tested")
        rows.append(_row(name, folder))
    (root / "compare.json").write_text(json.dumps(rows, indent=2) + "\n")
    table = format_table(rows)
    (root / "compare.md").write_text(table)
    return table


def format_table(rows: list[dict]) -> str:
    """Markdown with the headlines of the protocol, best first by the first of them."""
    headlines = list(rows[0]["scores"])
    columns = (*COLUMNS, *headlines)
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lower = rows[0]["lower_is_better"]

    def rank(row: dict) -> float:
        value = row["scores"][headlines[0]]
        return math.inf if value is None else value if lower else -value

    for row in sorted(rows, key=rank):
        scores = (row["scores"][name] for name in headlines)
        lines.append(
            f"`{row['adapter']}` | {row['trainable_parameters']:,} | "
            f"{row['seconds_per_epoch']:.1f} | {row['peak_memory_bytes'] / 2**20:,.0f} | "
            + " | ".join("-" if value is None else f"{value:.4f}" for value in scores)
        )
    return "".join(f"| {line} |\n" for line in lines)


def _row(name: str, folder: RunFolder) -> dict:
    """What the table says of one adapter: scores and time of its run, memory of its steps."""
    sets = json.loads(folder.scores.read_text())
    sets = {"": sets} if "tuned" in sets else sets  # several test sets are scored apart
    one = next(iter(sets.values()))
    epochs = read_epochs(folder.metrics)
    speed = json.loads(_call("benchmark", *as_trained(folder, one), capture=True).splitlines()[-1])
    headlines = {
        f"{test} {score}".strip(): headline
        for test, scores in sets.items()
        for score, headline in scores["headlines"]["tuned"].items()
    }
    return {
        "adapter": name,
        "trainable_parameters": speed["trainable_parameters"],
        "seconds_per_epoch": statistics.median(epoch["seconds"] for epoch in epochs),
        "peak_memory_bytes": speed["peak_memory_bytes"],
        "scores": {score: headline["value"] for score, headline in headlines.items()},
        "lower_is_better": next(iter(headlines.values()))["better"] == "lower",
        "best_epoch": next(e["epoch"] for e in reversed(epochs) if e["best"]),
        "device": speed["device"],
    }


def as_trained(folder: RunFolder, scores: dict) -> list[str]:
    """Flags of `benchmark` for steps as the run took them, but from random weights."""
    options = yaml.safe_load(folder.config.read_text())
    groups = (*_TIMED, ADAPTERS[options["adapter"]].options)
    names = [f.name for group in groups for f in fields(group)]
    told = {name: options[name] for name in (*names, "adapter", "model_type", "class_layout")}
    auto = "adapter" if scores["base_sha256"] else "all"
    told |= {
        "train": auto if options["train"] == "auto" else options["train"],
        "image_size": options["crop"] or options["image_size"],
        "num_classes": options["num_classes"],
        "steps": 3,
        "warmup": 1,
    }
    return [f"--{name}={value}" for name, value in told.items()]


def _call(verb: str, *flags: str, capture: bool = False) -> str:
    """One command of samtune; its output is passed on, or returned."""
    command = [sys.executable, str(ENTRY), verb, *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        raise UserError(f"{verb} {' '.join(flags)} ended with exit code {done.returncode}")
    return done.stdout or ""
