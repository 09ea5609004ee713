"""The balanced error of shadow detection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from samtune.metrics.measure import Answer, Measured, Metric, defined, foreground, means, ratio
from samtune.metrics.overlap import quarters

NAMES = ("BER", "shadow_error", "non_shadow_error")


@dataclass(frozen=True)
class BalancedError(Metric):
    """BER in percent: the mean of the shares of shadow and of non-shadow that were missed.

    `BER` and its parts pool the pixels of the whole set, as the shadow literature does
    (xw-hu/CUHK-Shadow e58784a); `BER_image_mean` averages the BER of each picture, as the test
    scripts of SAM-Adapter and TS-SAM do. The two differ a lot. threshold_8bit: shadow is
    255 * probability > threshold, without any stretch. Sums: the four pixel counts of
    `overlap.quarters`, then three sums over pictures and three counts.
    """

    threshold_8bit: int = 125

    rules: ClassVar = {
        "pooled": "BER, shadow_error, non_shadow_error: all pixels of the set as one picture",
        "one_class_missing": "the picture's own BER is undefined and left out of *_image_mean; "
        "its pixels count in the pooled figures",
    }

    size = 10
    columns = NAMES

    def measure(self, truth: np.ndarray, answer: Answer) -> Measured:
        counts = quarters(*foreground(truth, answer, self.threshold_8bit / 255))
        rates = np.array(_errors(counts))
        if np.isnan(rates).any():
            rates[:] = np.nan
        columns = dict(zip(NAMES, rates.tolist(), strict=True))
        return Measured(columns, np.concatenate([counts, defined(rates)]))

    def summarise(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        sums = np.asarray(sums, np.float64)
        pooled, per_picture = _errors(sums[..., :4]), means(sums[..., 4:])
        images = {f"{name}_image_mean": per_picture[..., k] for k, name in enumerate(NAMES)}
        return {**dict(zip(NAMES, pooled, strict=True)), **images}


def _errors(counts: np.ndarray) -> tuple[np.ndarray, ...]:
    """(..., 4) counts -> BER, shadow error, non-shadow error, each (...), in percent."""
    tp, fp, fn, tn = np.moveaxis(counts, -1, 0)
    shadow, other = 100 * ratio(fn, tp + fn), 100 * ratio(fp, tn + fp)
    return (shadow + other) / 2, shadow, other
