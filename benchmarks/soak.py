"""A long run under torchrun, watched: does any of its processes grow, or leave something behind?

    python benchmarks/soak.py                     # 2,000 steps of vit_mini on two processes
    python benchmarks/soak.py --steps 200 --output /tmp/soak.json

Trains on the sample set at a small frame, with loader processes, validation, checkpoints and lines
in the log as in any run, and reads from `/proc` every few seconds, of each process of the launch,
the memory that is its own (not shared with others), its open files and its threads. Writes what
became of them and a verdict; the exit code is 1 if something grew. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks/results/soak/2-processes.json"
STEPS_PER_EPOCH = 12  # of the sample set's 24 images, on two processes
# A process is flat whose median of the last quarter exceeds that of the second one by no more.
GROWTH_SHARE, GROWTH_BYTES = 0.02, 8 * 2**20  # of its memory; the larger of the two
GROWTH_FILES = 4  # batches on their way from a loader process are open files
GROWTH_THREADS = 0


@dataclass(frozen=True)
class Look:
    """A process at a moment. seconds: since the launch; memory: bytes that are its own."""

    seconds: float
    pid: int
    role: str
    memory: int
    files: int
    threads: int
    zombie: bool


@dataclass(frozen=True)
class Life:
    """What became of one process: medians of its second and its last quarter."""

    role: str
    seconds: float
    looks: int
    memory: tuple[float, float]
    files: tuple[float, float]
    threads: tuple[float, float]

    @property
    def faults(self) -> list[str]:
        """What grew, in words."""
        allowed = max(GROWTH_BYTES, GROWTH_SHARE * self.memory[0])
        limits = {"memory": allowed, "files": GROWTH_FILES, "threads": GROWTH_THREADS}
        return [
            f"{self.role}: {name} grew from {early:.0f} to {late:.0f}"
            for name, limit in limits.items()
            for early, late in [getattr(self, name)]
            if late - early > limit
        ]


def look(pid: int, role: str, seconds: float) -> Look | None:
    """A process as it is now; None if it has ended."""
    folder = Path(f"/proc/{pid}")
    try:
        status = (folder / "status").read_text()
        state = re.search(r"^State:\s+(\S)", status, re.M)[1]
        if state == "Z":
            return Look(seconds, pid, role, 0, 0, 0, True)
        threads = int(re.search(r"^Threads:\s+(\d+)", status, re.M)[1])
        own = re.findall(r"^Private_\w+:\s+(\d+) kB", (folder / "smaps_rollup").read_text(), re.M)
        files = len(os.listdir(folder / "fd"))
    except (OSError, TypeError):
        return None
    return Look(seconds, pid, role, 1024 * sum(map(int, own)), files, threads, False)


def children_of(pid: int) -> list[int]:
    """The processes that this one started and that it has not yet buried."""
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    except OSError:  # it has ended meanwhile
        pass
    return sorted(found)


def family(launcher: int) -> dict[int, str]:
    """The launch's processes and their roles: 'launcher', 'rank 1', 'rank 1, loader 0'."""
    roles, ranks = {launcher: "launcher"}, []
    for pid in children_of(launcher):
        try:
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((w[5:].decode() for w in words if w.startswith(b"RANK=")), None)
        roles[pid] = f"rank {rank}" if rank else "launcher's child"
        ranks += [pid] if rank else []
    for rank in ranks:
        for index, pid in enumerate(children_of(rank)):
            roles[pid] = f"{roles[rank]}, loader {index}"
    return roles


def watch(launch: subprocess.Popen, every: float, limit: float) -> list[Look]:
    """Look at all processes until the launch ends; it is killed after `limit` seconds."""
    looks, began = [], time.monotonic()
    while launch.poll() is None:
        seconds = time.monotonic() - began
        if seconds > limit:
            launch.kill()
            raise RuntimeError(f"the run has not ended after {limit:.0f} s")
        seen = (look(pid, role, seconds) for pid, role in family(launch.pid).items())
        looks += filter(None, seen)
        time.sleep(every)
    return looks


def lives(looks: Sequence[Look]) -> list[Life]:
    """What became of each process that lived for at least half of the time, by role."""
    by_pid: dict[int, list[Look]] = defaultdict(list)
    for one in looks:
        if not one.zombie:
            by_pid[one.pid].append(one)
    end = max((one.seconds for one in looks), default=0.0)
    found = []
    for seen in by_pid.values():
        span = seen[-1].seconds - seen[0].seconds
        if len(seen) < 8 or span < end / 2:
            continue
        quarter = len(seen) // 4
        second, last = seen[quarter : 2 * quarter], seen[-quarter:]
        middles = {
            name: (median(getattr(x, name) for x in second), median(getattr(x, name) for x in last))
            for name in ("memory", "files", "threads")
        }
        found.append(Life(seen[0].role, round(span, 1), len(seen), **middles))
    return sorted(found, key=lambda life: life.role)


def faults(looks: Sequence[Look], left: Sequence[int] = ()) -> list[str]:
    """All that is wrong, in words; empty: nothing. left: processes that outlived the launch."""
    wrong = [fault for life in lives(looks) for fault in life.faults]
    zombies = [(one.pid, one.role, one.seconds) for one in looks if one.zombie]
    for pid, role in dict.fromkeys((pid, role) for pid, role, _ in zombies):
        times = [seconds for p, _, seconds in zombies if p == pid]
        if len(times) > 1:  # once: its parent had not yet looked
            wrong.append(f"{role} was dead and not buried for {times[-1] - times[0]:.0f} s")
    if left:
        wrong.append(f"{len(left)} processes outlived the launch")
    if not any(life.role.startswith("rank") for life in lives(looks)):
        wrong.append("no rank was seen for long enough")
    return wrong


def run(steps: int, image_size: int, workers: int, every: float, limit: float) -> dict:
    """Train and watch; what a results file says."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        command = [
            sys.executable, str(ROOT / "code/torchrun.py"), "--standalone", "--nproc_per_node=2",
            str(ROOT / "code/run_sa.py"), "train", "--model_type", "vit_mini", "--image_size",
            str(image_size), "--batch_size", "1", "--workers", str(workers), "--patience", "0",
            "--epoch", str(-(-steps // STEPS_PER_EPOCH)), "--output_dir", "run", "--lr", "1e-4",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with (Path(folder) / "said").open("w") as said:
            launch = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT
            )
        looks = watch(launch, every, limit)
        text = (Path(folder) / "said").read_text()
        if launch.returncode:
            raise RuntimeError(f"the run ended with {launch.returncode}:\n{text[-3000:]}")
        lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
    left = [pid for pid in {one.pid for one in looks} if Path(f"/proc/{pid}").exists()]
    epochs = [record for record in records if record.get("kind") != "step"]
    return {
        "steps": epochs[-1]["step"],
        "epochs": len(epochs),
        "losses": [round(epochs[index]["train"]["loss"], 4) for index in (0, -1)],
        "seconds": round(looks[-1].seconds, 1),
        "image_size": image_size,
        "workers": workers,
        "date": date.today().isoformat(),
        "versions": {"torch": version("torch")},
        "processes": [asdict(life) for life in lives(looks)],
        "faults": faults(looks, left),
    }


def table(result: dict) -> str:
    """Markdown for `benchmarks/results/soak/README.md`."""
    rows = "\n".join(
        f"| {life['role']} | "
        + " | ".join(
            f"{early / unit:.{digits}f} -> {late / unit:.{digits}f}"
            for (early, late), unit, digits in (
                (life["memory"], 2**20, 1), (life["files"], 1, 0), (life["threads"], 1, 0)
            )
        )
        + " |"
        for life in result["processes"]
    )  # fmt: skip
    verdict = "flat" if not result["faults"] else "; ".join(result["faults"])
    return f"""# A long run, watched

Made by `python benchmarks/soak.py`: {result["steps"]:,} steps of `vit_mini` at \
{result["image_size"]} px on two processes with {result["workers"]} loader process(es) each for \
training and for validation, {result["epochs"]} epochs with validation and checkpoints, \
{result["seconds"]:.0f} s, torch {result["versions"]["torch"]}, {result["date"]}. Medians of the \
second and of the last quarter of the time; memory is what a process shares with no other. Flat is \
a growth of at most {GROWTH_BYTES / 2**20:.0f} MiB or {GROWTH_SHARE:.0%}, of {GROWTH_FILES} files \
(batches on their way are some) and of no thread, no dead process that nobody buried, none that \
outlives the launch.

| process | memory, MiB | open files | threads |
|---|---|---|---|
{rows}

Verdict: {verdict}.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps, at least")
    parser.add_argument("--image_size", type=int, default=64, help="the model's frame, pixels")
    parser.add_argument("--workers", type=int, default=1, help="loader processes per rank")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("--limit", type=float, default=3600, help="seconds, then it is ended")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file to write")
    given = parser.parse_args(argv)
    result = run(given.steps, given.image_size, given.workers, given.every, given.limit)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    given.output.with_name("README.md").write_text(table(result))
    print(table(result))
    return bool(result["faults"])


if __name__ == "__main__":
    sys.exit(main())
