"""The launcher passes on what a worker has said, and speaks where none could."""

import logging
import signal
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import torchrun
from samtune.errors import (
    EXIT_ABORTED,
    EXIT_CRASH,
    EXIT_INTERRUPTED,
    EXIT_LOST,
    EXIT_OUT_OF_MEMORY,
    EXIT_USER_ERROR,
)


@pytest.fixture
def run(monkeypatch):
    """torchrun's end, as if its workers had ended with these codes."""

    def launched(*codes):
        failures = {
            rank: ProcessFailure(rank, 1, code, "") for rank, code in enumerate(codes) if code
        }

        def launch(_):
            raise ChildFailedError("run_sa.py", failures)

        monkeypatch.setattr(torchrun, "launch", launch)
        return torchrun.run()

    monkeypatch.setattr(sys, "argv", ["torchrun.py", "--nproc_per_node", "gpu", "run_sa.py"])
    monkeypatch.setattr(logging, "disable", lambda level: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    return launched


@pytest.mark.parametrize(
    "codes, code",
    [
        ((EXIT_USER_ERROR, EXIT_LOST), EXIT_USER_ERROR),
        ((EXIT_LOST, EXIT_OUT_OF_MEMORY), EXIT_OUT_OF_MEMORY),
        ((EXIT_INTERRUPTED, EXIT_INTERRUPTED), EXIT_INTERRUPTED),
        ((EXIT_ABORTED, -signal.SIGTERM), EXIT_ABORTED),
        ((-signal.SIGKILL, EXIT_LOST), EXIT_LOST),
    ],
)
def test_what_a_worker_said_is_not_said_again(run, codes, code, capfd):
    assert run(*codes) == code
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "codes, code, said",
    [
        ((-signal.SIGTERM, -signal.SIGKILL), EXIT_LOST, "rank 1 ended with signal SIGKILL: "),
        ((EXIT_LOST, EXIT_CRASH), EXIT_CRASH, "rank 1 ended with exit code 1\n"),
        ((0, -signal.SIGSEGV), EXIT_CRASH, "rank 1 ended with signal SIGSEGV\n"),
    ],
)
def test_the_rank_at_fault_is_named_not_one_that_followed_it(run, codes, code, said, capfd):
    assert run(*codes) == code
    assert capfd.readouterr().err.startswith(said)
