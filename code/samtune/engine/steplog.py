"""A line about every N-th step, from numbers that nothing waited for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from samtune.engine import distributed
from samtune.engine.distributed import Process
from samtune.engine.progress import Progress, Sums
from samtune.engine.throughput import StepMeter, peak_memory
from samtune.engine.transfer import Arrival
from samtune.errors import UserError


class StepLog:
    """Tells `logbook` of every `every`-th step of an epoch; 0: of none.

    A line holds the means of the epoch's sums since the line before (since the epoch's start, or
    since the run was resumed), over all ranks. They are summed and sent to the host when the step
    is queued, and told when the next one is: by then they have arrived.
    """

    def __init__(self, every: int, logbook, meter: StepMeter, process: Process):
        if every < 0:
            raise UserError(f"--log_every {every}: must be 0 or more")
        self.every, self.logbook, self.meter, self.process = every, logbook, meter, process
        self._before: Tensor | None = None
        self._line: tuple[dict[str, Any], list[str], Arrival, Arrival] | None = None

    def start_epoch(self, sums: Sums) -> None:
        """sums: those of the epoch, with what an interrupted run had added."""
        self._before = None if sums.values is None else sums.values.clone()

    def step(self, progress: Progress, steps_done: int, sums: Sums, norm: Arrival) -> None:
        """Collective. A step is queued, the `progress.step`-th of its epoch; norm: its gradient's.

        Reduces a small vector over the ranks where a line is due.
        """
        self.flush()
        if not self.every or progress.step % self.every:
            return
        since = sums.values.clone() if self._before is None else sums.values - self._before
        self._before = sums.values.clone()
        record = {
            "kind": "step",
            "epoch": progress.epoch + 1,
            "step": steps_done,
            "step_of_epoch": progress.step,
            "lr": progress.lr,
            "speed": self.meter.line().record() | {"peak_memory_bytes": peak_memory(self.process)},
        }
        self._line = record, sums.names, Arrival(distributed.all_reduce_sum(since)), norm

    def flush(self) -> None:
        """Tell the line that is on its way, if any."""
        if self._line is None:
            return
        (record, names, sums, norm), self._line = self._line, None
        means = (sums.wait()[1:] / sums.wait()[0]).tolist()
        record["train"] = dict(zip(names, means, strict=True))
        record["gradient_norm"] = norm.wait().item()
        self.logbook.step(record)
