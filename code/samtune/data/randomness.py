"""Where every random number of the data comes from: a seed and a place, never a global state.

What is drawn for a sample depends on (seed, epoch, index) alone, so it is the same for any number
of loader processes and ranks, and no two of them repeat each other.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_PURPOSES = ("order", "augment", "jitter", "crop", "objects", "prompt")  # each has its own stream


def stream(purpose: str, words: Iterable[int]) -> np.random.SeedSequence:
    """The seeds for one purpose at one place, for example ("augment", (seed, epoch, index))."""
    words = [int(word) % 2**64 for word in words]
    return np.random.SeedSequence(words, spawn_key=(_PURPOSES.index(purpose),))
