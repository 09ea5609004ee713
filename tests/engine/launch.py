"""Start a script on several processes, as a user would: with torchrun."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


THEIRS = ("-m", "torch.distributed.run")
OURS = (str(ROOT / "code" / "torchrun.py"),)


def start(script: str | Path, *arguments, processes: int = 2, by=THEIRS) -> subprocess.Popen:
    """torchrun's process, or that of our own; its output is text on stdout and stderr."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "code"), str(ROOT / "tests" / "engine")]),
    }
    command = [sys.executable, *by, "--standalone"]
    command += [f"--nproc_per_node={processes}", str(script), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def torchrun(script, *arguments, processes: int = 2, timeout: float = 120):
    """Run to the end; returns (exit code, stdout, stderr). Fails the test after `timeout` s."""
    process = start(script, *arguments, processes=processes)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        out, err = process.communicate()
        raise AssertionError(f"{script} hangs after {timeout} s\n{out}\n{err}") from None
    return process.returncode, out, err
