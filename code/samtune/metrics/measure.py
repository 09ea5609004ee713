"""What a metric is: per picture some columns and a vector of sums, and a rule from sums to scores.

Sums of different pictures, processes and folds add up, so a score of any part of a set comes from
the same rule as that of the whole; a bootstrap replicate is one more such sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from samtune.structures import IGNORE

BINARY, LABELS, SOFT, INSTANCES = "probability", "labels", "class_probability", "instances"


@dataclass(frozen=True)
class Answer:
    """What a model says about one picture, at the resolution at which it is scored.

    probability: (H, W) float, 0..1, of the foreground. labels: (H, W) integers, class ids.
    class_probability: (K, H, W) float, sums to 1 over K. masks: (N, H, W) bool with scores (N,),
    one per object found. A protocol reads one of these forms (`Protocol.answer`). shared: what
    metrics have computed for each other; None: each computes for itself.
    """

    probability: np.ndarray | None = None
    labels: np.ndarray | None = None
    class_probability: np.ndarray | None = None
    masks: np.ndarray | None = None
    scores: np.ndarray | None = None
    shared: dict | None = None

    def once(self, make: Callable, truth: np.ndarray, *settings):
        """make(truth, answer, *settings), which several metrics need: computed once for them all
        where `shared` says that only one truth is compared with this answer.
        """
        if self.shared is None:
            return make(truth, self, *settings)
        key = (make, *settings)
        if key not in self.shared:
            self.shared[key] = make(truth, self, *settings)
        return self.shared[key]

    def shape(self, form: str) -> tuple[int, ...]:
        """(H, W) of the answer in the given form; ValueError when the form is absent."""
        return self.array(form).shape[-2:]

    def array(self, form: str) -> np.ndarray:
        """The answer in the given form; ValueError when it is absent."""
        array = self.masks if form == INSTANCES else getattr(self, form)
        if array is None:
            raise ValueError(f"the protocol scores {form}, and the answer has none")
        return array


@dataclass(frozen=True)
class Measured:
    """One picture (or volume), measured.

    columns: for the table of pictures, NaN where undefined. sums: (n,) float64, add up. ranked:
    what a `RankedMetric` keeps of the picture.
    """

    columns: dict[str, float]
    sums: np.ndarray
    ranked: np.ndarray | None = None


@dataclass(frozen=True)
class Metric:
    """A frozen dataclass: its fields are the convention, and `policy` states them.

    rules: sentences about empty and undefined cases, for the record.
    """

    rules: ClassVar[dict[str, str]] = {}

    @property
    def size(self) -> int:
        """n, the length of the sums."""
        raise NotImplementedError

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of one picture."""
        raise NotImplementedError

    def measure(self, truth: np.ndarray, answer: Answer) -> Measured:
        """Score one picture. truth: (H, W) integers, `IGNORE` unread, at least one pixel read."""
        raise NotImplementedError

    def summarise(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """(..., n) sums -> named scores, each (...), NaN where nothing defines it."""
        raise NotImplementedError

    def policy(self) -> dict:
        """The convention as data that JSON can hold."""
        return {**asdict(self), **self.rules}

    def nothing(self) -> Measured:
        """What a picture without a single read pixel measures."""
        return Measured(dict.fromkeys(self.columns, np.nan), np.zeros(self.size))


@dataclass(frozen=True)
class MeanMetric(Metric):
    """A metric whose score is the mean of its columns over the pictures that define them.

    Sums: the C columns (0 where undefined), then how many pictures defined each.
    """

    @property
    def size(self) -> int:
        return 2 * len(self.columns)

    def values(self, truth: np.ndarray, answer: Answer) -> dict[str, float]:
        """The columns of one picture."""
        raise NotImplementedError

    def measure(self, truth: np.ndarray, answer: Answer) -> Measured:
        columns = self.values(truth, answer)
        return Measured(columns, defined(columns.values()))

    def summarise(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self.columns, np.moveaxis(means(sums), -1, 0), strict=True))


@dataclass(frozen=True)
class RankedMetric(Metric):
    """A metric over all objects of a set in the order of their scores: no sum of pictures holds it.

    Each picture keeps a small table (`Measured.ranked`: a row per object found, no masks).
    """

    def rank(self, ranked: list[np.ndarray], sums: np.ndarray, weights: np.ndarray) -> dict:
        """U pictures' tables and sums (U, n), (B, U) weights -> named scores, each (B,)."""
        raise NotImplementedError


def defined(values) -> np.ndarray:
    """C values, some NaN -> (2 C,) sums: the values with 0 for NaN, then 1 where defined."""
    values = np.fromiter(values, np.float64)
    known = ~np.isnan(values)
    return np.concatenate([np.where(known, values, 0), known])


def means(sums: np.ndarray) -> np.ndarray:
    """(..., 2 C) sums of `defined` -> (..., C) means, NaN where no picture defined the value."""
    total, count = np.split(np.asarray(sums, np.float64), 2, axis=-1)
    return ratio(total, count)


def ratio(numerator, denominator, empty: float = np.nan) -> np.ndarray:
    """Element-wise quotient in float64, `empty` where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(
        np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    )
    result = np.full(numerator.shape, empty, np.float64)
    return np.divide(numerator, denominator, out=result, where=denominator != 0)


def foreground(truth: np.ndarray, answer: Answer, threshold: float) -> tuple[np.ndarray, ...]:
    """(predicted, true, read), each (H, W) bool; the first two False where nothing is read."""
    read = truth != IGNORE
    return (answer.probability > threshold) & read, truth == 1, read


class GreyMap:
    """The map that the saliency family scores, beside the truth.

    grey: (H, W), `stretched` if asked. true, read: (H, W) bool. values, hits: (N,) the map and the
    truth where it is read. wide: grey as float64.
    """

    def __init__(self, truth: np.ndarray, answer: Answer, stretch: bool):
        self.read, self.true = truth != IGNORE, truth == 1
        self.grey = stretched(answer.probability, self.read, stretch)
        self.whole = bool(self.read.all())

    def where_read(self, values: np.ndarray) -> np.ndarray:
        """(H, W) -> (N,)"""
        return values.reshape(-1) if self.whole else values[self.read]

    @cached_property
    def wide(self) -> np.ndarray:
        return self.grey.astype(np.float64)

    @cached_property
    def values(self) -> np.ndarray:
        return self.where_read(self.grey)

    @cached_property
    def hits(self) -> np.ndarray:
        return self.where_read(self.true)


def stretched(probability: np.ndarray, read: np.ndarray, stretch: bool = True) -> np.ndarray:
    """The map that the saliency family scores: min to 0 and max to 1 over the read pixels.

    A constant map stays. In the map's own precision, for a float32 map falls into the bins that the
    published evaluations put it in. Pixels that are not read become 0.
    """
    whole = read.all()  # then there is nothing to pick out or to blank
    if stretch:
        seen = probability if whole else probability[read]
        low, high = seen.min(), seen.max()
        if high > low:
            probability = (probability - low) / (high - low)
    return probability if whole else np.where(read, probability, probability.dtype.type(0))
