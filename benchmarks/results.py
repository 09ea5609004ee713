"""The files of `benchmarks/results/`: one per kind of machine, a record per cell and round.

{"machine": {...}, "records": [{"group", "cell", "round", "settings", "date", "versions",
"measured": {...}} or "failed" instead of "measured", ...]}. Neither host names nor paths.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent / "results"
OUT_OF_MEMORY = "out of memory"


class Spread(NamedTuple):
    """Median and extremes of what several rounds measured."""

    middle: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: list[float]) -> Spread | None:
        return cls(median(values), min(values), max(values), len(values)) if values else None


class Results:
    """What one machine measured. Written at every `add`, whole or not at all."""

    def __init__(self, path: Path):
        self.path = path
        content = json.loads(path.read_text()) if path.exists() else {}
        self.machine: dict[str, Any] = content.get("machine", {})
        self.records: list[dict[str, Any]] = content.get("records", [])

    def add(self, record: dict[str, Any]) -> None:
        """Put a record in the place of the one of the same group, cell and round."""
        self.records = [r for r in self.records if _place(r) != _place(record)] + [record]
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = {"machine": self.machine}
        lines = ",\n".join(json.dumps(record) for record in self.records)
        text = json.dumps(head)[:-1] + f', "records": [\n{lines}\n]}}\n'
        draft = self.path.with_suffix(".tmp")
        draft.write_text(text)
        os.replace(draft, self.path)

    def measured(self, group: str, cell: str, index: int) -> dict[str, Any] | None:
        """The record of a cell in a round that is an answer: figures, or too little memory."""
        for record in self.records:
            if _place(record) == (group, cell, index):
                answered = "measured" in record or record["failed"] == OUT_OF_MEMORY
                return record if answered else None
        return None

    def values(self, group: str, cell: str, key: str) -> dict[int, float]:
        """Round -> what it measured under `key`."""
        found = {
            r["round"]: figure(r, key)
            for r in self.records
            if (r["group"], r["cell"]) == (group, cell) and "measured" in r
        }
        return {index: found[index] for index in sorted(found) if found[index] is not None}

    def spread(self, group: str, cell: str, key: str) -> Spread | None:
        return Spread.of(list(self.values(group, cell, key).values()))

    def ratio(self, group: str, cell: str, base: str, key: str) -> Spread | None:
        """`cell` over `base`, round by round."""
        above, below = self.values(group, cell, key), self.values(group, base, key)
        return Spread.of([above[i] / below[i] for i in above if i in below])

    def share_of_peak(self, record: dict[str, Any]) -> float | None:
        """Operations of a step's products per second, over those of a large matrix product.

        As the program itself found, else by the machine's own figure; None where it did not count.
        """
        measured = record.get("measured", {})
        if "share_of_peak" in measured:
            return measured["share_of_peak"]
        peak = self.machine.get("matmul_flops", {}).get(measured.get("precision"))
        if not (peak and "flops_per_step" in measured):
            return None
        return measured["flops_per_step"] / measured["seconds_per_step"] / peak


def figure(record: dict[str, Any], key: str) -> float | None:
    """What a record measured; `seconds_per_image` also where it measured images per second."""
    measured = record["measured"]
    if key == "seconds_per_image" and "images_per_second" in measured:
        return 1 / measured["images_per_second"]
    return measured.get(key)


def _place(record: dict[str, Any]) -> tuple[str, str, int]:
    return record["group"], record["cell"], record["round"]


def load_all(folder: Path = FOLDER) -> list[Results]:
    """All machines, CPUs first; results of `--preset quick` say nothing and are left out."""
    paths = (path for path in sorted(folder.glob("*.json")) if not path.stem.endswith("-quick"))
    return sorted((Results(path) for path in paths), key=lambda r: r.machine["device"] != "cpu")
