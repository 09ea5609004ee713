"""`metrics.jsonl`: a record per line, on disk before anybody else hears of it.

The record of an epoch has no "kind": {"epoch": 3, "step": 150, "train": {"loss": ..., "bce": ...,
...}, "validation": {the same names}, "lr": ..., "best": True, "speed": {...}, ...}. That of a step
within one: {"kind": "step", "epoch": 3, "step": 130, "step_of_epoch": 30, "train": {...}, "lr":
..., "gradient_norm": ..., "speed": {...}}. Epochs and steps count from 1; "best" is true where the
epoch was the best so far; any part may be missing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_epochs(path: Path) -> list[dict]:
    """The records of epochs in a file, in their order."""
    return [record for record in _records(path) if is_epoch(record)]


def _records(path: Path) -> Iterator[dict]:
    """The records in a file, in their order.

    What is none is passed over: a line that was being written when the run was killed, or that a
    dying disk has turned into noise.
    """
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            _place(record)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        yield record


def _place(record: dict) -> tuple[float, float]:
    """(epoch, step of it) that a record is about; raises what another value of JSON makes it."""
    step = math.inf if is_epoch(record) else record["step_of_epoch"]
    return record["epoch"] + 0, step + 0


def is_epoch(record: dict) -> bool:
    """Whether a record is about an epoch, not about a step within one."""
    return record.get("kind") != "step"


def append(path: Path, record: dict) -> None:
    """Add a plain record. An epoch's is on disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        if is_epoch(record):
            file.flush()
            os.fsync(file.fileno())


def cut(path: Path, epoch: int, steps: int = 0) -> list[dict]:
    """Keep the records before `epoch` and those of its first `steps` steps, in the file
    (atomically) and as the answer. A line that is no record goes as well.
    """
    if not path.exists():
        return []
    kept = [record for record in _records(path) if _place(record) <= (epoch, steps)]
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return kept


def plain(value: Any) -> Any:
    """What JSON can say: numbers of any library as Python's, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)


def in_words(record: dict, epochs: int | None) -> str:
    """A record on the console: an epoch as a line of training scores, one of validation scores and
    one of its speed; a step as one line. epochs: how many there will be.
    """
    head = f"epoch {record['epoch']}" + (f"/{epochs}" if epochs else "")
    train, validation = _scores(record, "train"), _scores(record, "validation")
    speed = _speed(record.get("speed") or {})
    lr = [] if record.get("lr") is None else [f"lr {record['lr']:.2e}"]
    if not is_epoch(record):
        norm = record.get("gradient_norm")
        norm = [] if norm is None else [f"gradient {norm:.3g}"]
        return "  ".join([f"{head} step {record['step_of_epoch']}", *train, *lr, *norm, *speed])
    best = ["best so far"] if record.get("best") else []
    lines = {
        "train": train and [*train, *lr],
        "validation": validation and [*validation, *best],
        "speed": speed,
    }
    told = ["  ".join([f"{name:10}", *parts]) for name, parts in lines.items() if parts]
    return f"\n{' ' * len(head)}  ".join([f"{head}  {told[0]}", *told[1:]]) if told else head


def _scores(record: dict, split: str) -> list[str]:
    scores = (record.get(split) or {}).items()
    return [f"{name} {'nan' if v is None else format(v, '.5f')}" for name, v in scores]


def _speed(speed: dict) -> list[str]:
    words = {
        "images_per_second": lambda value: f"{_short(value)} images/s",
        "seconds_per_step": lambda value: f"{_short(value)} s/step",
        "data_wait": lambda value: f"data wait {100 * value:.0f} %",
        "peak_memory_bytes": lambda value: f"peak memory {value / 2**30:.2f} GiB",
    }
    return [say(speed[name]) for name, say in words.items() if speed.get(name) is not None]


def _short(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"
