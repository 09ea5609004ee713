"""Scores of a grey map cut at many thresholds: E-measure, F-measure, and overlap by threshold.

The map is stretched to 0..1 per picture, then cut adaptively (at twice its mean), at 1/2, and at
each of the 256 grey values. A set's mean and maximum are those of the curve averaged over pictures,
not averages of each picture's own mean and maximum. Definitions: F, Achanta et al. 2009; E, Fan et
al. 2018; as lartpang/PySODMetrics ac5b1fc computes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from samtune.metrics.measure import Answer, GreyMap, Measured, Metric, ratio

EPS = float(np.finfo(np.float64).eps)
LEVELS = 256


class Counts(NamedTuple):
    """Pixels of a picture cut at T thresholds: tp, fp (T,); fn, tn likewise."""

    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    tn: np.ndarray


@dataclass(frozen=True)
class Curve(Metric):
    """One score as a function of the threshold.

    kind: "E", "F", "iou", "dice" or "BER" (here a fraction of 1). beta2: F's weight of precision,
    beta squared; the literature's is 0.3. stretch: whether each map is stretched first. Sums: the
    number of pictures, the adaptive and the halved score, the curve, the pooled counts at 1/2.
    """

    kind: str
    beta2: float = 0.3
    stretch: bool = True

    rules: ClassVar = {
        "thresholds": "adaptive: map >= min(2 * mean, 1); binary: map > 1/2; curve: "
        "floor(255 * map) >= 255 - k, k = 0..255",
        "empty_truth": "F, iou, dice: 0; E: the share of pixels answered as background; BER: 0.5 "
        "and more (a class that is missing counts as missed)",
    }

    size = 3 + LEVELS + 4

    @property
    def columns(self) -> tuple[str, ...]:
        return (f"{self.kind}_adaptive", f"{self.kind}_binary", f"{self.kind}_mean")

    def measure(self, truth: np.ndarray, answer: Answer) -> Measured:
        adaptive, halves, levels = answer.once(_cuts, truth, self.stretch)
        adaptive, binary, curve = self.score(adaptive)[0], self.score(halves)[0], self.score(levels)
        columns = dict(zip(self.columns, (adaptive, binary, curve.mean()), strict=True))
        pooled = [count[0] for count in halves]
        return Measured(columns, np.array([1, adaptive, binary, *curve, *pooled], np.float64))

    def score(self, counts: Counts) -> np.ndarray:
        """(T,) scores of the counts."""
        if self.kind == "F":
            return f_measure(counts, self.beta2)
        return SCORES[self.kind](counts)

    def summarise(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        sums, kind = np.asarray(sums, np.float64), self.kind
        mean = ratio(sums[..., 1 : 3 + LEVELS], sums[..., :1])
        curve = mean[..., 2:]
        scores = {
            f"{kind}_adaptive": mean[..., 0],
            f"{kind}_binary": mean[..., 1],
            f"{kind}_mean": curve.mean(-1),
            f"{kind}_max": curve.max(-1),
        }
        if kind != "E":  # E compares within a picture; counts of many do not make one
            counts = Counts(*np.moveaxis(sums[..., -4:], -1, 0))
            pooled = np.where(sums[..., 0] > 0, self.score(counts), np.nan)
            scores[f"{kind}_binary_pooled"] = pooled
        return scores


def _cuts(truth: np.ndarray, answer: Answer, stretch: bool) -> tuple[Counts, Counts, Counts]:
    """The map cut adaptively (1,), at 1/2 (1,), at each level (256,): once for all kinds."""
    picture = answer.once(GreyMap, truth, stretch)
    grey, true = picture.values, picture.hits
    adaptive = cut(grey >= min(2 * grey.mean(dtype=np.float64), 1), true)
    return adaptive, cut(grey > 0.5, true), cut_at_levels(grey, true)


def cut(mask: np.ndarray, true: np.ndarray) -> Counts:
    """Counts of one boolean answer (N,) against the truth (N,), each (1,)."""
    tp = np.count_nonzero(mask & true)
    fp = np.count_nonzero(mask) - tp
    fn = np.count_nonzero(true) - tp
    return Counts(*(np.array([float(n)]) for n in (tp, fp, fn, true.size - tp - fp - fn)))


def cut_at_levels(grey: np.ndarray, true: np.ndarray) -> Counts:
    """Counts (256,) of (N,) values in 0..1; entry k counts floor(255 v) >= 255 - k."""
    level = (grey * 255).astype(np.uint8)
    found, inside = (
        np.cumsum(np.bincount(part, minlength=LEVELS)[::-1]) for part in (level, level[true])
    )
    tp, fp = inside.astype(np.float64), (found - inside).astype(np.float64)
    return Counts(tp, fp, tp[-1] - tp, fp[-1] - fp)


def e_measure(counts: Counts) -> np.ndarray:
    """Enhanced alignment of the cut and the true mask (T,); a perfect cut scores N / (N - 1), and
    of a single pixel 1, which the published code divides by next to nothing.

    Every pixel belongs to one of four kinds, so four terms make the sum over pixels.
    """
    tp, fp, fn, tn = counts
    size = tp + fp + fn + tn
    if (tp + fn == 0).all():  # nothing to find
        total = fn + tn
    elif (fp + tn == 0).all():  # nothing else
        total = tp + fp
    else:
        answered, true = (tp + fp) / size, (tp + fn) / size
        kinds = ((tp, 1, 1), (fp, 1, 0), (fn, 0, 1), (tn, 0, 0))
        total = sum(count * _alignment(a - answered, t - true) for count, a, t in kinds)
    return total / (np.maximum(size, 2) - 1 + EPS)


def _alignment(answer: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return (2 * answer * truth / (answer**2 + truth**2 + EPS) + 1) ** 2 / 4


def f_measure(counts: Counts, beta2: float) -> np.ndarray:
    """(1 + b2) P R / (b2 P + R) of each cut; 0 where nothing is found."""
    tp, fp, fn, _ = counts
    precision, recall = ratio(tp, tp + fp, 0), ratio(tp, tp + fn, 0)
    return ratio((1 + beta2) * precision * recall, beta2 * precision + recall, 0)


def _iou(counts: Counts) -> np.ndarray:
    return ratio(counts.tp, counts.tp + counts.fp + counts.fn, 0)


def _dice(counts: Counts) -> np.ndarray:
    return ratio(2 * counts.tp, 2 * counts.tp + counts.fp + counts.fn, 0)


def _balanced_error(counts: Counts) -> np.ndarray:
    tp, fp, fn, tn = counts
    return 1 - (ratio(tp, tp + fn, 0) + ratio(tn, tn + fp, 0)) / 2


SCORES = {"E": e_measure, "iou": _iou, "dice": _dice, "BER": _balanced_error}
