"""How far a score would move with other pictures: a bootstrap that never holds the pictures.

Each picture enters each replicate a Poisson(1) number of times, which for many pictures is the same
as drawing as many with replacement (Oza and Russell 2001; Chamandy et al. 2012). The number comes
from a hash of the picture's name, so it does not matter which process saw the picture, or when.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

REPLICATES = 1000
LEVEL = 0.95
UNIT_BITS = 20  # sums are held in units of 2^-20: integers add up the same in any order

# P(X <= k) of Poisson(1); what lies beyond has no double left
_POISSON = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(20)])


class Bootstrap:
    """Weighted sums of every replicate: (B, n) int64, whatever the number of pictures."""

    def __init__(self, size: int, replicates: int = REPLICATES):
        self.sums = np.zeros((replicates, size), np.int64)

    def add(self, name: str, sums: np.ndarray) -> None:
        """Let a picture enter. sums: (n,) float64, of a total below 2^43 over the set."""
        units = np.rint(np.ldexp(sums, UNIT_BITS)).astype(np.int64)
        self.sums += weights(name, len(self.sums))[:, None] * units

    def merge(self, other: Bootstrap) -> None:
        self.sums += other.sums

    def replicates(self) -> np.ndarray:
        """(B, n) float64."""
        return np.ldexp(self.sums.astype(np.float64), -UNIT_BITS)


def weights(name: str, replicates: int) -> np.ndarray:
    """(B,) int64, how often the picture of that name enters each replicate.

    From the raw stream of PCG64, which NumPy promises to keep; its distributions it does not.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")
    uniform = np.random.PCG64(seed).random_raw(replicates) / 2.0**64
    return np.searchsorted(_POISSON, uniform, side="right")


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of (B,) replicates, those that define the score; None where none does."""
    values = values[~np.isnan(values)]
    if not values.size:
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
