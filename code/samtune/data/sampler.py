"""Which samples each process sees in each step: a plan that any number of processes can follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from samtune.data.datasets import SampleKey
from samtune.data.randomness import stream
from samtune.errors import UserError

MicroBatch = list[SampleKey]


@dataclass(frozen=True)
class TrainPlan:
    """The samples of every optimizer step of every epoch, for one of `world` processes.

    A step takes the next G = world * batch_size * accumulate samples of the epoch's random order;
    the processes take turns. So the samples of a step depend on G, not on how it is divided, every
    sample comes once per epoch, and any step can be computed without those before it: a position
    in an epoch is how many of its samples were taken, so steps of another size may follow. The last
    step of an epoch takes what is left. All processes have equally many micro-batches in a step:
    one that would have a micro-batch less gets another sample of the step again, with weight 0.
    Raises UserError if a number is below 1 or there are fewer samples than processes.
    """

    samples: int
    batch_size: int
    accumulate: int
    rank: int
    world: int
    seed: int

    def __post_init__(self):
        for flag in ("batch_size", "accumulate"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag} {getattr(self, flag)}: must be at least 1")
        if self.samples < 1:
            raise UserError("no training image is left: none of them shows an object")
        if self.samples < self.world:
            raise UserError(
                f"{self.samples} training images are too few for {self.world} processes; start at "
                f"most {self.samples}"
            )

    @property
    def samples_per_step(self) -> int:
        """G, over all processes."""
        return self.world * self.batch_size * self.accumulate

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.samples_per_step)

    def order(self, epoch: int) -> np.ndarray:
        """(samples,) indices in the order of this epoch, the same in every process."""
        return _order(self.samples, self.seed, epoch)

    def take(self, epoch: int, seen: int) -> tuple[list[MicroBatch], int]:
        """The step after the first `seen` samples of an epoch: this process's micro-batches, and
        how many samples all processes have in it."""
        taken = self.order(epoch)[seen : seen + self.samples_per_step]
        mine = [SampleKey(epoch, int(index)) for index in taken[self.rank :: self.world]]
        size, longest = self.batch_size, -(-len(taken) // self.world)
        if -(-len(mine) // size) < -(-longest // size):
            mine.append(SampleKey(epoch, int(taken[0]), weight=0.0))
        return [mine[i : i + size] for i in range(0, len(mine), size)], len(taken)

    def step(self, epoch: int, step: int) -> tuple[list[MicroBatch], int]:
        """The same, of a step of an epoch whose steps all have this size."""
        return self.take(epoch, step * self.samples_per_step)

    def batches(self, epoch: int, seen: int = 0) -> list[MicroBatch]:
        """All micro-batches of an epoch after its first `seen` samples, one after the other."""
        return list(self.one_by_one(epoch, seen))

    def one_by_one(self, epoch: int, seen: int) -> Iterator[MicroBatch]:
        """The same, made as they are asked for."""
        starts = range(seen, self.samples, self.samples_per_step)
        return (batch for start in starts for batch in self.take(epoch, start)[0])


class EpochBatches:
    """The micro-batches of a plan's epochs, for one loader that lives through all of them.

    An iteration gives those of the epoch that `begin` named last, after its first samples, made as
    they are asked for. `len` is that of a whole epoch.
    """

    def __init__(self, plan: TrainPlan):
        self.plan = plan
        self._epoch = self._seen = 0

    def begin(self, epoch: int, seen: int) -> None:
        """Say what the next iteration gives; one that is under way goes on with its own."""
        self._epoch, self._seen = epoch, seen

    def __len__(self) -> int:
        whole, left = divmod(self.plan.samples, self.plan.samples_per_step)
        return whole * self.plan.accumulate + -(-left // (self.plan.world * self.plan.batch_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        return self.plan.one_by_one(self._epoch, self._seen)


def eval_batches(samples: int, batch_size: int, rank: int, world: int) -> list[MicroBatch]:
    """Every sample once over all processes, none added: a process may have fewer, or none."""
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: must be at least 1")
    mine = [SampleKey(0, index) for index in range(rank, samples, world)]
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]


@lru_cache(maxsize=2)
def _order(samples: int, seed: int, epoch: int) -> np.ndarray:
    rng = np.random.default_rng(stream("order", (seed, epoch)))
    order = rng.permutation(samples)
    order.flags.writeable = False  # it is shared by all callers
    return order
