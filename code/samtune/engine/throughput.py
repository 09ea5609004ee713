"""How fast training is, and how much of its time it waits for data."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import TypeVar

import torch

from samtune.engine import distributed
from samtune.engine.distributed import Process

Item = TypeVar("Item")

SLOW_DATA = 0.2  # share of an epoch's time from which on waiting for data is worth a warning
_SETTLING_STEPS = 5  # the loader has nothing ready yet, and kernels are chosen
_ENOUGH_STEPS = 10  # fewer say nothing about an epoch


@dataclass(frozen=True)
class Pace:
    """What some steps took.

    seconds: of the host's clock. waited: those of them in which this process waited for batches; a
    GPU may have been at work meanwhile. images: of all ranks, each once.
    """

    seconds: float = 0.0
    waited: float = 0.0
    images: int = 0
    steps: int = 0

    def __sub__(self, earlier: Pace) -> Pace:
        return Pace(*(a - b for a, b in zip(astuple(self), astuple(earlier), strict=True)))

    @property
    def data_wait(self) -> float:
        """The share of the time, 0 to 1, in which this process waited for batches."""
        return self.waited / self.seconds if self.seconds > 0 else 0.0

    def record(self) -> dict[str, float]:
        """For the log; NaN where no step was taken."""
        return {
            "images_per_second": self.images / self.seconds if self.seconds > 0 else math.nan,
            "seconds_per_step": self.seconds / self.steps if self.steps else math.nan,
            "data_wait": self.data_wait,
        }


class StepMeter:
    """Measures the steps of an epoch on the host: `start`, then `watch` and `step` as they come.

    clock: seconds from anywhere. The host is at most a step ahead of a GPU, so over many steps its
    time is the GPU's.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.start()

    def start(self) -> None:
        """An epoch's steps begin: what lay before (validation, saving) is not theirs."""
        self._started, self._waited = self.clock(), 0.0
        self._images = self._steps = 0
        self._line = Pace()
        self._settled: Pace | None = None

    def leave_out(self, seconds: float) -> None:
        """So much of the time since the start was not the steps': a save between two of them."""
        self._started += seconds

    def watch(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches, and how long each was waited for, the loader's start included."""
        began, iterator = self.clock(), iter(batches)
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self._waited += self.clock() - began
            yield batch
            began = self.clock()

    def step(self, images: int) -> None:
        """A step was taken, over so many images of all ranks."""
        self._steps += 1
        self._images += images
        if self._steps == _SETTLING_STEPS:
            self._settled = self.epoch()

    def epoch(self) -> Pace:
        """Of the epoch's steps so far."""
        return Pace(self.clock() - self._started, self._waited, self._images, self._steps)

    def line(self) -> Pace:
        """Of the steps since this was asked last, or since the epoch's first."""
        now = self.epoch()
        since, self._line = now - self._line, now
        return since

    def settled(self) -> Pace | None:
        """Of the epoch's steps without its first; None while they are too few to judge by."""
        if self._settled is None:
            return None
        since = self.epoch() - self._settled
        return since if since.steps >= _ENOUGH_STEPS else None


def speed_of_epoch(meter: StepMeter, process: Process) -> tuple[dict[str, float], Pace | None]:
    """Collective. The epoch's pace for its record, and the settled pace of the rank whose data is
    slowest: all others wait for that one. data_wait and peak memory: the largest of all ranks.
    """
    mine = meter.epoch(), meter.settled(), peak_memory(process)
    paces, settled, peaks = zip(*distributed.all_gather_objects(mine), strict=True)
    record = paces[0].record() | {
        "data_wait": max(pace.data_wait for pace in paces),
        "peak_memory_bytes": max(peaks),
    }
    slowest = max((pace for pace in settled if pace), key=lambda pace: pace.data_wait, default=None)
    return record, slowest


def peak_memory(process: Process) -> int:
    """Bytes: allocated on the GPU since its peak was last reset, or resident in RAM since the start
    (this process without its loader processes)."""
    if process.device.type == "cuda":
        return torch.cuda.max_memory_allocated(process.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
