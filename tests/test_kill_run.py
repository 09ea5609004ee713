"""kill -9 of a rank, and of torchrun, in the middle of the real command; minutes long."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from samtune.errors import EXIT_LOST

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    "--epoch", "10", "--patience", "0", "--batch_size", "1", "--image_size", "64", "--workers", "1",
]  # fmt: skip


def start(folder: Path, *flags: str) -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "MASTER"))}
    command = [sys.executable, ROOT / "code/torchrun.py", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*command, ROOT / "code/run_sa.py", "train", *FLAGS, *flags], cwd=folder, text=True,
        env=kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until_a_state_is_saved(folder: Path, run: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not (folder / "last.pt").exists():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The trained state of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    out, _ = (run := start(folder, "--output_dir", "run")).communicate(timeout=600)
    assert run.returncode == 0, out
    return torch.load(folder / "run/last.pt", weights_only=True)["model"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("seed", range(4))
def test_killed_in_its_middle_and_resumed_it_ends_as_if_nothing_had_been(tmp_path, whole, seed):
    """A rank, or torchrun itself. The pipe that is read here ends when all processes have ended."""
    draw = random.Random(seed)
    run = start(tmp_path, "--output_dir", "run")
    until_a_state_is_saved(tmp_path / "run", run)
    time.sleep(draw.uniform(0.0, 1.0))
    os.kill(children(run.pid)[draw.randrange(2)] if seed % 2 else run.pid, signal.SIGKILL)
    out, _ = run.communicate(timeout=120)
    assert "Traceback" not in out, out
    if seed % 2:
        assert run.returncode == EXIT_LOST, out
        assert out.count("error: ") + out.count(" ended with signal SIGKILL") == 1, out
    else:
        assert out.count("torchrun is gone") == out.count("everything is saved") == 1, out
    again = start(tmp_path, "--resume", "run")
    out, _ = again.communicate(timeout=600)
    assert again.returncode == 0, out
    ours = torch.load(tmp_path / "run/last.pt", weights_only=True)["model"]
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
