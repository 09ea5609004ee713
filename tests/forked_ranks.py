"""Ranks as forks of the test's own process, which has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from typing import Any


def on_ranks(
    work: Callable, *arguments, world: int = 2, timeout: float = 600, errors: bool = False
) -> list[Any]:
    """`work(process, *arguments)` on each of `world` ranks that have met; what each returns.

    What a rank raises is raised here, or with `errors` stands in its place. Fails after `timeout`
    seconds without an answer.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = [
        context.Process(target=_rank, args=(rank, world, port, pipe[1], work, arguments))
        for rank, pipe in enumerate(pipes)
    ]
    try:
        for rank in ranks:
            rank.start()
        outcomes = [_outcome(pipe[0], rank, timeout) for rank, pipe in enumerate(pipes)]
    finally:
        for rank in ranks:
            rank.join(10 if rank.exitcode is None else 0)
            rank.kill()
    raised = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    if raised and not errors:
        raise raised[0]
    return outcomes


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _outcome(receiver, rank: int, timeout: float) -> Any:
    assert receiver.poll(timeout), f"rank {rank} says nothing for {timeout} s"
    return pickle.loads(receiver.recv_bytes())


def _rank(rank: int, world: int, port: int, sender, work: Callable, arguments: tuple) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    from samtune.engine import distributed

    process = distributed.start(timeout_minutes=10)
    try:
        outcome = work(process, *arguments)
    except Exception as error:
        outcome = error
    sender.send_bytes(pickle.dumps(outcome))
    distributed.shutdown()
