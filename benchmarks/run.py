"""The benchmark suite: measure what is not measured yet, and keep it in `benchmarks/results/`.

    python benchmarks/run.py                       # the preset that fits this machine
    python benchmarks/run.py --list                # what there is, and how long it takes
    python benchmarks/run.py --only sam_adapter --rounds 5 --again

Every cell is a process of its own, and its figures are on disk as soon as it ends: interrupt at any
time, and go on later. Cells that are compared run in turn; a round that was cut short is run again
as a whole. Afterwards `python benchmarks/report.py` puts tables and chart into the README.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

from grid import MINUTES, PRESETS, Cell, Group
from results import FOLDER, OUT_OF_MEMORY, Results

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "samtune": "code/run_sa.py benchmark",
    "help": "code/run_sa.py --help",
    **{name: f"benchmarks/{name}.py" for name in ("stock", "hf_peft", "epochs", "attention")},
}
TORCHRUN = "code/torchrun.py --standalone --nproc_per_node"
NO_MEMORY = ("out of memory", "memory is too small", "MemoryError", "can't allocate memory")
LIMIT = {"cpu": 3600, "cuda": 240}  # seconds that a cell may take before it is ended


class Job(NamedTuple):
    """Cells of one round that are run one after the other."""

    group: Group
    index: int
    cells: tuple[Cell, ...]


def main(argv: list[str]) -> int:
    args = _parse(argv)
    machine = json.loads(_python(["benchmarks/machine.py"]).splitlines()[-1])
    preset = args.preset or ("gpu" if machine["device"] == "cuda" else "cpu")
    suffix = "-quick" if preset == "quick" else ""
    results = Results(Path(args.results or FOLDER / f"{machine['kind']}{suffix}.json"))
    results.machine = {**machine, "matmul_flops": _best_of(machine, results.machine)}
    groups = _chosen(preset, args)
    todo = [job for group in groups for job in _jobs(results, group, args.again)]
    print(_introduction(results, groups, todo, preset), flush=True)
    if args.list:
        return 0
    results.write()
    minutes = MINUTES[preset] if args.minutes is None else args.minutes
    ends = time.monotonic() + 60 * (minutes or math.inf)
    for place, job in enumerate(todo):
        group, index, cells = job
        if time.monotonic() + _seconds([job]) > ends:
            print(f"{group.name}, {cells[0].name}: no time is left for it", flush=True)
            continue
        left = _minutes(_seconds(todo[place:]))
        print(f"[{place + 1}/{len(todo)}] {group.title}, round {index + 1}; {left} to go")
        for cell in cells:
            record = measure_and_keep(results, group, index, cell)
            print(f"    {cell.name:>18}  {_in_words(record)}", flush=True)
    print(f"in {results.path.name}; now: python benchmarks/report.py", flush=True)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu where there is one, or cpu")
    parser.add_argument("--only", default="", help="names of groups, with commas between")
    parser.add_argument("--rounds", type=int, default=0, help="of each group; 0: as it says")
    parser.add_argument(
        "--minutes", type=float, help="begin nothing that would take longer; 0: all"
    )
    parser.add_argument("--again", action="store_true", help="measure what is measured already")
    parser.add_argument("--list", action="store_true", help="say what would be done")
    parser.add_argument("--results", default="", help="file; default: one per kind of machine")
    return parser.parse_args(argv)


def _chosen(preset: str, args: argparse.Namespace) -> list[Group]:
    names = [name for name in args.only.split(",") if name]
    known = {group.name for groups in PRESETS.values() for group in groups}
    if unknown := set(names) - known:
        raise SystemExit(f"--only {min(unknown)}: there are {', '.join(sorted(known))}")
    groups = [group for group in PRESETS[preset] if group.name in names or not names]
    if names and len(groups) < len(names):
        raise SystemExit(f"--only {args.only}: preset {preset} has not all of them; see --preset")
    return [replace(group, rounds=args.rounds or group.rounds) for group in groups]


def _jobs(results: Results, group: Group, again: bool = False) -> list[Job]:
    """What is left of a group: rounds, each as a whole, or cells that stand apart."""
    jobs = []
    for index in range(group.rounds):
        left = [cell for cell in group.cells if again or not _done(results, group, index, cell)]
        if group.apart:
            jobs += [Job(group, index, (cell,)) for cell in left]
        elif left:
            jobs.append(Job(group, index, group.cells))
    return jobs


def _done(results: Results, group: Group, index: int, cell: Cell) -> bool:
    """Whether there is an answer to these very settings."""
    record = results.measured(group.name, cell.name, index)
    return record is not None and record["settings"] == cell.settings


def measure_and_keep(results: Results, group: Group, index: int, cell: Cell) -> dict:
    """The record of a cell in a round, on disk when this returns."""
    lacking = _lacking(cell, results.machine)
    outcome = {"failed": lacking} if lacking else measure(cell, results.machine)
    record = {
        "group": group.name, "cell": cell.name, "round": index, "settings": cell.settings,
        "date": date.today().isoformat(), "versions": results.machine["versions"], **outcome,
    }  # fmt: skip
    results.add(record)
    return record


def _lacking(cell: Cell, machine: dict) -> str:
    """Why this machine cannot run a cell; empty where it can."""
    if cell.program == "hf_peft" and not {"transformers", "peft"} <= set(machine["versions"]):
        return "needs pip install -r benchmarks/requirements.txt"
    if "bf16" in cell.flags and not machine["bf16"]:
        return "this processor has no bf16"
    return ""


def measure(cell: Cell, machine: dict) -> dict:
    """{"measured": figures} or {"failed": why}. Where memory is too small, half the batch again."""
    outcome = _run(cell, machine)
    size = _flag(cell, "--batch_size")
    if outcome.get("failed") == OUT_OF_MEMORY and size > 1:
        flags = cell.flags.replace(f"--batch_size {size}", f"--batch_size {size // 2}")
        smaller = measure(replace(cell, flags=flags), machine)
        if "measured" in smaller:
            smaller["measured"].setdefault("batch_size", size // 2)
            smaller["measured"]["too_large_batch_size"] = size
            return smaller
    return outcome


def _flag(cell: Cell, name: str) -> int:
    words = cell.flags.split()
    return int(words[words.index(name) + 1]) if name in words else 0


def _run(cell: Cell, machine: dict) -> dict:
    """One process: its last line, how long it took, and its peak memory if it does not say so."""
    torchrun = f"{TORCHRUN} {cell.processes} " if cell.processes else ""
    command = shlex.split(torchrun + PROGRAMS[cell.program] + " " + cell.flags)
    environment = {**os.environ, "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    environment["OMP_NUM_THREADS"] = str(cell.threads or machine["cores"])
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as mistakes:
        start = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=said, stderr=mistakes,
            start_new_session=True,
        )  # fmt: skip
        code, usage = _wait(child, LIMIT[machine["device"]])
        wall = time.perf_counter() - start
        said.seek(0), mistakes.seek(0)
        if code:
            return {"failed": _why(code, mistakes.read() + said.read())}
        measured = {"wall_seconds": round(wall, 3)}
        if cell.program != "help":
            measured |= json.loads(said.read().strip().splitlines()[-1])
        measured.setdefault("peak_memory_bytes", usage.ru_maxrss * 1024)  # Linux counts KiB
    return {"measured": _without_places(measured)}


def _wait(child: subprocess.Popen, limit: float) -> tuple[int | None, resource.struct_rusage]:
    """Exit code, None where time ran out, and resource usage; what is ended is ended with all that
    it started, on Ctrl-C too.
    """
    ends, code = time.monotonic() + limit, None
    try:
        while time.monotonic() < ends:
            done, status, usage = os.wait4(child.pid, os.WNOHANG)
            if done:
                child.returncode = code = os.waitstatus_to_exitcode(status)
                return code, usage
            time.sleep(0.01)
    finally:
        if code is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return None, resource.getrusage(resource.RUSAGE_CHILDREN)


def _why(code: int | None, text: str) -> str:
    """That time or memory ran out, or the last line of what a failed process said."""
    if code is None:
        return "took too long"
    # Where a CPU's memory runs out, the system ends the process.
    if code == -signal.SIGKILL or any(sign in text for sign in NO_MEMORY):
        return OUT_OF_MEMORY
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1].replace(str(ROOT), ".")[:200] if lines else "ended without a word"


def _without_places(measured: dict) -> dict:
    """The figures, without text that names a folder."""
    return {k: v for k, v in measured.items() if not (isinstance(v, str) and "/" in v)}


def _best_of(machine: dict, before: dict) -> dict:
    """Peaks: the best that was ever seen here, since other work can only lower them."""
    old = before.get("matmul_flops", {})
    return {name: max(flops, old.get(name, 0)) for name, flops in machine["matmul_flops"].items()}


def _python(command: list[str]) -> str:
    """What a script prints, with as many threads as the cells get."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, check=True, text=True,
        stdout=subprocess.PIPE,
    ).stdout  # fmt: skip


def _seconds(jobs: list[Job]) -> int:
    """About how long they take."""
    return sum(cell.seconds for job in jobs for cell in job.cells)


def _minutes(seconds: float) -> str:
    return f"about {max(1, round(seconds / 60))} min"


def _in_words(record: dict) -> str:
    if "failed" in record:
        return f"failed: {record['failed']}"
    measured = record["measured"]
    seconds = next(
        measured[key]
        for key in ("seconds_per_step", "seconds_per_image", "launch_seconds", "wall_seconds")
        if key in measured
    )
    memory = measured.get("peak_memory_bytes", 0) / 2**30
    return f"{seconds:9.3f} s  {memory:6.2f} GiB"


def _introduction(results: Results, groups, todo, preset: str) -> str:
    machine = results.machine
    peaks = (f"{n} {f / 1e12:.3g}" for n, f in machine["matmul_flops"].items())
    lines = [
        f"{machine['name']}, {machine['cores']} cores, torch {machine['versions']['torch']}; "
        f"matrix products, TFLOP/s: {', '.join(peaks)}",
        f"preset {preset}: {len(todo)} rounds or cells left, {_minutes(_seconds(todo))}",
    ]
    for group in groups:
        left = [job for job in todo if job.group is group]
        said = f"{_minutes(_seconds(left))} left" if left else "done"
        lines.append(f"  {group.name:<20} {said:<20} {group.title}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
