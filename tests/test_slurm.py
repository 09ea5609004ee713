"""slurm/train.sbatch, with programs in place of Slurm's that do what its manual says of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# srun: the command on each machine, signals forwarded, the highest exit code of all.
SRUN = """
import os, signal, subprocess, sys
command = [word for i, word in enumerate(sys.argv[1:]) if i or not word.startswith("--")]
tasks = []
signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
for node in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
    tasks.append(subprocess.Popen(command, env=os.environ | {"SLURM_NODEID": str(node)}))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """
import sys
if sys.argv[1:] == ["show", "hostnames", "gpu[07-08]"]:
    print("gpu07\\ngpu08", flush=True)
else:
    open("requeued", "a").write(" ".join(sys.argv[1:]) + "\\n")
"""
# torchrun: says what it was told, then waits for a warning as a run does.
TORCHRUN = """
import json, os, signal, sys, time
def stop(*_):
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
rank = sys.argv[sys.argv.index("--node_rank") + 1]
open(f"told{rank}.part", "w").write(json.dumps(sys.argv[1:]))
os.rename(f"told{rank}.part", f"told{rank}")
if "1e-4" in sys.argv:
    time.sleep(60)
sys.exit(1)
"""


@pytest.fixture
def job(tmp_path):
    """Starts the script as sbatch would, in a folder that it was submitted from."""
    for name in ("run.sh", "setup.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "code").mkdir()
    (tmp_path / "code/torchrun.py").write_text(TORCHRUN)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(f"#!{sys.executable}\n{text}")
        (programs / name).chmod(0o755)
    spool = shutil.copy(ROOT / "slurm/train.sbatch", tmp_path / "slurm_script")  # as slurmd does
    slurm = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64", "SLURM_SUBMIT_DIR": str(tmp_path),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix,
    }  # fmt: skip
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "MASTER"))}
    return lambda *flags: subprocess.Popen(
        ["bash", spool, *flags], cwd="/", env=kept | slurm, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def told(folder: Path, node: int) -> list[str]:
    deadline = time.monotonic() + 60
    while not (folder / f"told{node}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return json.loads((folder / f"told{node}").read_text())


def test_a_job_whose_time_is_over_saves_and_is_requeued(job, tmp_path):
    """One torchrun per machine, which find each other; the warning reaches both."""
    process = job("--lr", "1e-4")
    for node in (0, 1):
        words = told(tmp_path, node)
        assert words[:10] == [
            "--nnodes", "2", "--node_rank", str(node), "--master_addr", "gpu07",
            "--master_port", "24711", "--nproc_per_node", "8",
        ]  # fmt: skip
        assert words[words.index("--output_dir") + 1] == "checkpoints/slurm_4711"
        assert words[-4:] == ["--resume", "auto", "--lr", "1e-4"]
    process.send_signal(signal.SIGUSR1)  # to the shell alone: --signal=B:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"


def test_a_job_that_fails_by_itself_is_not_requeued(job, tmp_path):
    process = job()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1, out
    assert not (tmp_path / "requeued").exists()


def test_the_script_asks_slurm_for_what_it_counts_on():
    text = (ROOT / "slurm/train.sbatch").read_text()
    asked = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {"--ntasks-per-node=1", "--requeue", "--signal=B:USR1@120"} <= set(asked)
    assert text.index("#SBATCH") < text.index("set -uo")  # sbatch reads no further
