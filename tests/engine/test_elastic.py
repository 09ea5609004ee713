"""torchrun starts the processes of a run again: it finds its folder and goes on; or is left alone.

The launcher runs in a fork of this process, which has imported what it needs.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import launch
import pytest

import torchrun
from samtune.errors import (
    EXIT_CRASH,
    EXIT_INTERRUPTED,
    EXIT_OUT_OF_MEMORY,
    EXIT_USER_ERROR,
)

HERE = Path(__file__).parent
# Ends as it is told: a number above 0 is an exit code, one below a signal; later starts end well.
WORKER = """
import os, sys
with open("starts", "a") as file:
    print(os.environ["TORCHELASTIC_RESTART_COUNT"], file=file)
ends = [int(word) for word in sys.argv[1:]]
count = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
code = ends[count] if count < len(ends) else 0
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def started(folder: Path, log: str, *arguments) -> int:
    """Our torchrun in `folder`; its process. What it and its workers say goes into `log`."""
    process = os.fork()
    if process == 0:
        code = 99
        try:
            os.chdir(folder)
            file = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1), os.dup2(file, 2)
            sys.stdout = sys.stderr = os.fdopen(file, "w")
            paths = [str(HERE), str(HERE.parents[1] / "code")]
            os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
                os.environ.pop(name, None)
            sys.argv = ["torchrun.py", *map(str, arguments)]
            code = torchrun.run()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return process


def ended(process: int, seconds: float = 600) -> int:
    """The launcher's exit code; a hang fails the test."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(process, signal.SIGTERM)
    os.waitpid(process, 0)
    raise AssertionError(f"hangs after {seconds} s")


@pytest.mark.parametrize(
    ("ends", "starts", "code"),
    [
        ([1], 2, 0),
        ([1, -signal.SIGKILL, 1], 3, EXIT_CRASH),
        ([EXIT_USER_ERROR], 1, EXIT_USER_ERROR),
        ([1, EXIT_OUT_OF_MEMORY], 2, EXIT_OUT_OF_MEMORY),
        ([EXIT_INTERRUPTED], 1, EXIT_INTERRUPTED),
        ([-signal.SIGUSR1], 1, EXIT_INTERRUPTED),
    ],
)
def test_workers_are_started_again_only_where_that_can_help(tmp_path, ends, starts, code):
    """After a crash or a kill; not after a mistake in the input or a polite end."""
    (tmp_path / "worker.py").write_text(WORKER)
    arguments = ["--standalone", "--nproc_per_node", 1, "--max_restarts", 2]
    process = started(tmp_path, "log", *arguments, "worker.py", *map(int, ends))
    assert ended(process) == code, (tmp_path / "log").read_text()
    assert (tmp_path / "starts").read_text().split() == [str(n) for n in range(starts)]
    said = (tmp_path / "log").read_text()
    assert said.count(": restart ") == starts - 1 and "Traceback" not in said
    if ends[0] == 1:
        assert "rank 0 ended with exit code 1: restart 1 of 2" in said


def check(folder: Path, ranks: int, log: str) -> None:
    """Every rank went on in the middle of the run, and ended as if nothing had happened."""
    told = [json.loads((folder / f"done{rank}").read_text()) for rank in range(ranks)]
    (run,) = (folder / "checkpoints").iterdir()
    for one in told:
        assert one["again"] and folder / one["folder"] == run
        assert 12 - 5 <= one["steps"] < 12, log
        assert all(one["same"].values()), one


def test_two_machines_go_on_after_the_loss_of_a_process(tmp_path):
    """kill -9 of one rank in the middle of an epoch: both launchers start theirs again, which find
    the run, and its last state, without a word; the end is that of an uninterrupted run, to the
    bit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = [
        started(
            tmp_path, f"log{node}", "--nnodes", 2, "--node_rank", node, "--master_addr",
            "127.0.0.1", "--master_port", port, "--nproc_per_node", 1, "--max_restarts", 2,
            HERE / "worker_elastic.py",
        )
        for node in (0, 1)
    ]  # fmt: skip
    codes = [ended(machine) for machine in machines]
    log = "".join((tmp_path / f"log{node}").read_text() for node in (0, 1))
    assert codes == [0, 0], log
    assert "rank 1 ended with signal SIGKILL: restart 1 of 2" in log
    check(tmp_path, 2, log)


@pytest.mark.slow
@pytest.mark.parametrize("by", [launch.THEIRS, launch.OURS])
def test_one_machine_goes_on_after_the_loss_of_a_process(tmp_path, by, monkeypatch):
    """With plain torchrun too."""
    monkeypatch.chdir(tmp_path)
    script = HERE / "worker_elastic.py"
    process = launch.start("--max_restarts=1", script, by=by)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    check(tmp_path, 2, out + err)
