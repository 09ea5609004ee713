"""Dice and HD95 of each organ in each volume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from samtune.metrics.measure import Answer, Measured, Metric, defined, means
from samtune.metrics.overlap import nan_mean
from samtune.metrics.surface import hd95, surface_distances
from samtune.structures import IGNORE


@dataclass(frozen=True)
class Organs(Metric):
    """Per volume and organ (class 0 is background), then the mean over volumes, then over organs.

    empty: "published" is the rule of SAMed e351840 and TransUNet: an organ predicted where there is
    none scores Dice 1 and HD95 0, one not predicted Dice 0 and HD95 0. So a hallucination is
    rewarded and a missed organ improves HD95: comparable with their tables, not a good measure.
    "strict": Dice is undefined where both are empty and 0 where one is; HD95 is undefined where
    either is empty (`hd95_penalty` instead where exactly one is, when given). spacing: size of a
    voxel along (slice, row, column); None for voxel units, as published. combine: see
    `surface.hd95`. Sums: over volumes the Dice and the HD95 of each organ, and how many defined it.
    """

    class_names: tuple[str, ...]
    empty: str = "strict"
    hd95_penalty: float | None = None
    spacing: tuple[float, ...] | None = None
    combine: str = "joined"

    rules: ClassVar = {
        "average": "over volumes per organ, then over organs; undefined values left out",
        "hd95_percentile": "linear interpolation, both directions as `combine` says",
    }

    @property
    def columns(self) -> tuple[str, ...]:
        organs = self.class_names[1:]
        return (*(f"dice/{name}" for name in organs), *(f"HD95/{name}" for name in organs))

    @property
    def size(self) -> int:
        return 2 * len(self.columns)

    def measure(self, truth: np.ndarray, answer: Answer) -> Measured:
        """truth, answer.labels: (slices, H, W) integers."""
        labels = np.where(truth == IGNORE, 0, answer.labels)
        organs = range(1, len(self.class_names))
        dice, distance = zip(*(self.score(labels == k, truth == k) for k in organs), strict=True)
        columns = dict(zip(self.columns, (*dice, *distance), strict=True))
        return Measured(columns, defined(columns.values()))

    def score(self, predicted: np.ndarray, true: np.ndarray) -> tuple[float, float]:
        """Dice and HD95 of one organ in one volume, both masks bool."""
        sizes = np.count_nonzero(predicted), np.count_nonzero(true)
        if all(sizes):
            distances = surface_distances(predicted, true, self.spacing)
            dice = 2 * np.count_nonzero(predicted & true) / sum(sizes)
            return dice, hd95(distances, self.combine)
        if self.empty == "published":
            return (1.0, 0.0) if sizes[0] else (0.0, 0.0)
        if not any(sizes):
            return np.nan, np.nan
        return 0.0, np.nan if self.hd95_penalty is None else self.hd95_penalty

    def summarise(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        values = means(sums)  # (..., 2 organs)
        dice, distance = np.split(values, 2, axis=-1)
        named = dict(zip(self.columns, np.moveaxis(values, -1, 0), strict=True))
        return {"dice": nan_mean(dice), "HD95": nan_mean(distance), **named}
