"""torchrun, with the exit code of the workers, and restarts only where they can help.

torchrun answers every failed worker with a traceback of its own and exit code 1. Here the worker
has already said what is wrong, so its code is passed on and torchrun stays silent; a signal
(Ctrl-C, a scheduler's SIGTERM or SIGUSR1) reaches the workers, which save their state and end with
`EXIT_INTERRUPTED`. Arguments are torchrun's. `torchrun code/run_sa.py` works just as well.

`--max_restarts N` starts the workers again after a defect or a kill; they go on from their last
state. Not after what a worker has said itself: a user's mistake would be made again, and who was
told to stop should stop.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api
from torch.distributed.run import parse_args
from torch.distributed.run import run as launch

from samtune.errors import (
    EXIT_ABORTED,
    EXIT_CRASH,
    EXIT_INTERRUPTED,
    EXIT_LOST,
    EXIT_OUT_OF_MEMORY,
    EXIT_USER_ERROR,
)

SAID_BY_THE_WORKER = (EXIT_USER_ERROR, EXIT_OUT_OF_MEMORY, EXIT_INTERRUPTED, EXIT_ABORTED)
# A worker that was warned when there was nothing to save yet, or no more, dies of the warning.
FINAL = {*SAID_BY_THE_WORKER, -signal.SIGUSR1}


class Agent(LocalElasticAgent):
    """What of torchrun watches over the workers of this machine and starts them again."""

    def _monitor_workers(self, worker_group):
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            if FINAL.intersection(failure.exitcode for failure in result.failures.values()):
                self._remaining_restarts = 0
            elif self._remaining_restarts:
                rank, first = min(result.failures.items(), key=_guilt)
                done = worker_group.spec.max_restarts - self._remaining_restarts
                print(
                    f"rank {rank} ended with {_describe(first.exitcode)}: restart {done + 1} of "
                    f"{worker_group.spec.max_restarts}", file=sys.stderr, flush=True,
                )  # fmt: skip
        return result


def run() -> int:
    """Run torchrun on `sys.argv`. Returns the exit code of the first worker that failed."""
    logging.disable(logging.ERROR)  # torchrun's own account of a worker's end
    arguments = parse_args(sys.argv[1:])
    if arguments.nproc_per_node.isdigit():  # else torchrun takes one thread per process, and warns
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = (cores or 1) // int(arguments.nproc_per_node)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    signal.signal(signal.SIGUSR1, pass_on)
    api.LocalElasticAgent = Agent  # torchrun offers no other place to put it in
    try:
        launch(arguments)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for code in SAID_BY_THE_WORKER:
            if code in codes:
                return code
        if -signal.SIGUSR1 in codes:
            return EXIT_INTERRUPTED
        if EXIT_LOST in codes and EXIT_CRASH not in codes:
            return EXIT_LOST
        rank, first = min(error.failures.items(), key=_guilt)
        killed = first.exitcode == -signal.SIGKILL
        hint = ": somebody ended it, or the system for want of memory" if killed else ""
        print(f"rank {rank} ended with {_describe(first.exitcode)}{hint}", file=sys.stderr)
        if killed:
            return EXIT_LOST
        return first.exitcode if first.exitcode > 0 else EXIT_CRASH
    except SignalException:
        return EXIT_INTERRUPTED
    return 0


def pass_on(number: int, frame) -> None:
    """Slurm's warning before the end, which torchrun keeps to itself: tell the workers, and wait.

    SIGTERM torchrun does pass on, but kills who has not saved within half a minute. Where the
    system does not say who the workers are, that must do.
    """
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    workers = children.read_text().split() if children.exists() else []
    for worker in workers:
        os.kill(int(worker), number)
    if not workers:
        os.kill(os.getpid(), signal.SIGTERM)


def _guilt(failure: tuple[int, ProcessFailure]) -> tuple[bool, int]:
    """Smaller is likelier the cause: others follow it, or are ended for it."""
    consequences = (EXIT_LOST, -signal.SIGTERM)
    return failure[1].exitcode in consequences, failure[1].timestamp


def _describe(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


if __name__ == "__main__":
    sys.exit(run())
