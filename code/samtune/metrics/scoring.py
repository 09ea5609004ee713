"""Scoring: pictures in, one at a time; headlines with intervals, counts and conventions out.

What is kept of a picture is a row of a table. The rest are sums of fixed length, added up as
integers, so that the result is the same to the last bit however pictures were dealt to processes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import NamedTuple

import numpy as np

from samtune.errors import UserError
from samtune.metrics.bootstrap import LEVEL, REPLICATES, Bootstrap, interval, weights
from samtune.metrics.curves import Curve
from samtune.metrics.instances import AveragePrecision, SegmentationAccuracy
from samtune.metrics.measure import INSTANCES, Answer, Measured, Metric, RankedMetric
from samtune.metrics.overlap import Overlap, PooledOverlap
from samtune.metrics.protocols import choose, lower_is_better
from samtune.metrics.saliency import MeanAbsoluteError, StructureMeasure, WeightedF
from samtune.metrics.semantic import Classes, SoftClasses
from samtune.metrics.shadow import BalancedError
from samtune.metrics.surface import BoundaryIoU
from samtune.metrics.volumes import Organs
from samtune.structures import IGNORE

METRICS: dict[str, type[Metric]] = {
    metric.__name__: metric
    for metric in (
        AveragePrecision, BalancedError, BoundaryIoU, Classes, Curve, MeanAbsoluteError, Organs,
        Overlap, PooledOverlap, SegmentationAccuracy, SoftClasses, StructureMeasure, WeightedF,
    )
}  # fmt: skip
FIXED_BITS = 64  # totals are Python integers in units of 2^-64: exact, of any size
OWN_COLUMNS = ("id", "group", "empty_truth", "ignored_pixels")


class Entry(NamedTuple):
    """A picture or volume, measured: its row of the table, and per metric what it adds."""

    row: dict
    measured: list[Measured]


class Scoring:
    """Scores of a set under one protocol; picklable, so that processes can send theirs to one.

    protocol, mode: names in `protocols.PROTOCOLS`. num_classes: 1 for one foreground, else the
    number of class ids, with class_names one each (their numbers when empty). settings: by name of
    a metric, further settings of it, e.g. {"Organs": {"spacing": (5.0, 0.7, 0.7)}}. Raises
    UserError where protocol and classes do not fit.
    """

    def __init__(
        self,
        protocol: str,
        num_classes: int = 1,
        class_names: Sequence[str] = (),
        mode: str = "",
        settings: dict[str, dict] | None = None,
        replicates: int = REPLICATES,
    ):
        self.name = protocol
        self.protocol, self.mode_name, self.mode = choose(protocol, mode, num_classes)
        names = tuple(class_names) or tuple(str(k) for k in range(num_classes))
        if self.protocol.classes > 1 and len(set(names)) != num_classes:
            raise UserError(
                f"{len(set(names))} different class names for --num_classes {num_classes}: "
                "give each class its own"
            )
        self.metrics = [
            build_metric(kind, {**fields, **(settings or {}).get(kind, {})}, names)
            for kind, fields in self.mode.metrics
        ]
        ends = np.cumsum([metric.size for metric in self.metrics]).tolist()
        self.parts = [slice(e - m.size, e) for e, m in zip(ends, self.metrics, strict=True)]
        self.totals = [0] * ends[-1]
        self.bootstrap = Bootstrap(ends[-1], replicates)
        self.rows: dict[str, dict] = {}
        self.ranked: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.open: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}

    def add(self, id: str, truth: np.ndarray, answer: Answer, group: str = "") -> None:
        """Score a picture, or keep a slice until its volume is complete.

        truth: (H, W) integers, class ids or 0 and 1, `IGNORE` unread; for instances (M, H, W) bool.
        group: the volume of a slice (needed there), else what pictures share that are no
        independent draws (a video, a patient): the bootstrap draws groups as a whole. Raises
        ValueError for an id that came before, an answer of another size, or an absent form.
        """
        if self.protocol.unit != "volume":
            self.enter(self.measure(id, truth, answer, group))
            return
        self._check_size(id, truth, answer)
        slices = self.open.setdefault(group or id, {})
        if id in slices or (group or id) in self.rows:
            raise ValueError(f"{id} is scored twice, or after its volume {group} was complete")
        slices[id] = (truth.astype(np.uint8), answer.labels.astype(np.uint8))

    def complete(self, group: str) -> None:
        """Score a volume whose slices have all been added, in the order of their ids, and let its
        slices go. A volume dealt over several processes is left open and completed by `result`.
        """
        self.enter(self.measure_volume(group, self.open.pop(group)))

    def measure_volume(self, group: str, slices: dict[str, tuple[np.ndarray, np.ndarray]]) -> Entry:
        """`measure` of a volume's slices, as `open` keeps them."""
        ordered = [slices[id] for id in sorted(slices, key=_natural)]
        truth, labels = (np.stack(part) for part in zip(*ordered, strict=True))
        return self.measure(group, truth, Answer(labels=labels))

    def measure(self, id: str, truth: np.ndarray, answer: Answer, group: str = "") -> Entry:
        """What `add` enters, and most of its time. Changes nothing, so threads may call it."""
        self._check_size(id, truth, answer)
        answer = replace(answer, shared={})
        instances = self.protocol.answer == INSTANCES
        ignored = 0 if instances else int(np.count_nonzero(truth == IGNORE))
        unread = ignored == truth.size and not instances
        measured = [m.nothing() if unread else m.measure(truth, answer) for m in self.metrics]
        row = {
            "id": id,
            "group": group,
            "empty_truth": self._is_empty(truth, unread),
            "ignored_pixels": ignored,
            **{name: float(v) for one in measured for name, v in one.columns.items()},
        }
        return Entry(row, measured)

    def enter(self, entry: Entry) -> None:
        """Take in what was measured. Raises ValueError for an id that came before."""
        row, measured = entry
        id = row["id"]
        if id in self.rows:
            raise ValueError(f"{id} is scored twice")
        self.rows[id] = row
        sums = np.concatenate([one.sums for one in measured]).astype(np.float64)
        fixed = map(int, np.ldexp(sums, FIXED_BITS).tolist())
        self.totals = [total + value for total, value in zip(self.totals, fixed, strict=True)]
        self.bootstrap.add(row["group"] or id, sums)
        self._keep_ranked(id, measured)

    def _check_size(self, id: str, truth: np.ndarray, answer: Answer) -> None:
        if truth.shape[-2:] != answer.shape(self.protocol.answer):
            raise ValueError(f"{id}: the answer is not as large as the truth, {truth.shape[-2:]}")

    def _is_empty(self, truth: np.ndarray, unread: bool) -> bool:
        """Nothing to find: no foreground, no object; with classes, no read pixel."""
        if self.protocol.answer == INSTANCES:
            return not len(truth)
        if self.protocol.classes > 1 and self.protocol.unit == "picture":
            return unread
        return not ((truth != 0) & (truth != IGNORE)).any()

    def _keep_ranked(self, id: str, measured: list[Measured]) -> None:
        kept = [(one.ranked, one.sums) for one in measured if one.ranked is not None]
        if kept:
            self.ranked[id] = kept

    def merge(self, others: Iterable[Scoring]) -> Scoring:
        """Take in what others (of the same protocol) scored; the order does not matter.

        Raises ValueError when two of them scored the same picture.
        """
        for other in others:
            if other.metrics != self.metrics:
                raise ValueError("two protocols cannot be merged")
            if twice := self.rows.keys() & other.rows.keys():
                raise ValueError(f"scored twice: {sorted(twice)[:5]}")
            self.rows |= other.rows
            self.ranked |= other.ranked
            self.totals = [a + b for a, b in zip(self.totals, other.totals, strict=True)]
            self.bootstrap.merge(other.bootstrap)
            for group, slices in other.open.items():
                mine = self.open.setdefault(group, {})
                if twice := (mine.keys() & slices.keys()) | ({group} & self.rows.keys()):
                    raise ValueError(f"scored twice: {sorted(twice)[:5]}")
                mine |= slices
        return self

    def table(self) -> list[dict]:
        """A row per picture or volume, sorted by id: `OWN_COLUMNS`, then the metrics' columns."""
        return [self.rows[id] for id in sorted(self.rows)]

    def result(self) -> dict:
        """Completes open volumes; what JSON can hold, None where a number is undefined.

        "scores": every score of the protocol by name. "headlines": of the main ones value,
        interval (None with fewer than two independent pictures), better ("higher" or "lower").
        "protocol", "counts", "policy", "bootstrap", "versions": how they came about.
        """
        for group in sorted(self.open):
            self.complete(group)
        scores, replicates = self._scores()
        draws = len({row["group"] or row["id"] for row in self.rows.values()})
        headlines = {
            name: {
                "value": _number(scores[name]),
                "interval": interval(replicates[name]) if draws > 1 else None,
                "better": "lower" if lower_is_better(name) else "higher",
            }
            for name in self.mode.headlines
        }
        return {
            "protocol": self._protocol(),
            "headlines": headlines,
            "scores": {name: _number(value) for name, value in scores.items()},
            "counts": self._counts(),
            "policy": self._policy(),
            "bootstrap": {
                "level": LEVEL,
                "replicates": len(self.bootstrap.sums),
                "draws": draws,
                "rule": "percentiles; Poisson(1) weights from SHA-256 of the group or id",
            },
            "versions": {name: version(name) for name in ("numpy", "scipy")},
        }

    def _scores(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Each score of the set, and of each replicate (B,)."""
        sums = np.array([total / (1 << FIXED_BITS) for total in self.totals])
        replicates = self.bootstrap.replicates()
        scores, drawn, ranked = {}, {}, 0
        for metric, part in zip(self.metrics, self.parts, strict=True):
            if isinstance(metric, RankedMetric):
                scores |= self._rank(metric, ranked, np.ones((1, len(self.rows))))
                drawn |= self._rank(metric, ranked, self._weights())
                ranked += 1
            else:
                scores |= metric.summarise(sums[part])
                drawn |= metric.summarise(replicates[:, part])
        return {name: float(np.squeeze(value)) for name, value in scores.items()}, drawn

    def _rank(self, metric: RankedMetric, index: int, weight: np.ndarray) -> dict[str, np.ndarray]:
        nothing = metric.nothing()
        kept = [self.ranked[id][index] for id in sorted(self.rows)]
        tables = [nothing.ranked, *(table for table, _ in kept)]
        sums = np.stack([nothing.sums, *(sums for _, sums in kept)])
        return metric.rank(tables, sums, np.pad(weight, ((0, 0), (1, 0))))

    def _weights(self) -> np.ndarray:
        """(B, U) how often each picture, sorted by id, enters each replicate."""
        count = len(self.bootstrap.sums)
        draws = (weights(row["group"] or row["id"], count) for row in self.table())
        drawn = [weight.astype(np.uint8) for weight in draws]  # below 20, and there are many
        return np.stack(drawn, 1) if drawn else np.zeros((count, 0))

    def _protocol(self) -> dict:
        return {
            "name": self.name,
            "mode": self.mode_name,
            "convention": self.mode.summary,
            "resolution": self.mode.resolution,
            "unit": self.protocol.unit,
        }

    def _counts(self) -> dict:
        rows = self.table()
        columns = [name for metric in self.metrics for name in metric.columns]
        undefined = {name: sum(math.isnan(row[name]) for row in rows) for name in columns}
        return {
            f"{self.protocol.unit}s": len(rows),
            "empty_truths": sum(row["empty_truth"] for row in rows),
            "ignored_pixels": sum(row["ignored_pixels"] for row in rows),
            "undefined": {name: count for name, count in undefined.items() if count},
        }

    def _policy(self) -> list[dict]:
        return [{"metric": type(metric).__name__, **metric.policy()} for metric in self.metrics]


def build_metric(kind: str, fields: dict, class_names: tuple[str, ...]) -> Metric:
    """One metric by its name; metrics of several classes get the names."""
    metric = METRICS[kind]
    if "class_names" in metric.__dataclass_fields__:
        fields = {"class_names": class_names, **fields}
    return metric(**fields)


def nearest(truth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(..., H, W) -> (..., *size), the pixel under each centre, as Pillow's NEAREST.

    For protocols whose resolution is `protocols.SQUARE`; no default number resizes the truth.
    """
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(np.int64)
        for old, new in zip(truth.shape[-2:], size, strict=True)
    )
    return truth[..., rows[:, None], columns]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _natural(id: str) -> list:
    """Sorts slice_10 behind slice_9."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in _digits(id)]


def _digits(id: str) -> list[str]:
    return [part for part in re.split(r"(\d+)", id) if part]
