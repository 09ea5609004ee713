"""What this machine has and what a process takes of it: memory, and products of matrices."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch

from samtune.engine.distributed import Process
from samtune.engine.optim import NUMBERS

# Sides of the square matrices that are multiplied: large enough for the device to be at its best.
_SIDE = {"cuda": 8192, "cpu": 1024}
_PRODUCTS = 7
_CGROUPS = {  # by version: where it is mounted, and its files of limit, use and cached files
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("", "memory.max", "memory.current", "inactive_file"),
}


class Stopwatch:
    """Seconds between marks, as the device passes them; no mark makes the host wait."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list = []

    def mark(self) -> None:
        """Now: on a GPU when it has done what was queued until now."""
        if not self.on_gpu:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def laps(self) -> list[float]:
        """Seconds from each mark to the next. Waits until the device has passed the last one."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.on_gpu:
            return [after - before for before, after in pairs]
        self.marks[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def matmul_peak(device: torch.device, precision: str) -> float:
    """Operations per second, 2 n^3 for a product of two n x n matrices: the median of several.

    precision: 'fp32' (with TF32 where that is switched on), 'bf16' or 'fp16'. Takes under a second.
    """
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(NUMBERS[precision]) for _ in range(2))
    for _ in range(2):  # libraries choose their kernel in the first call
        a @ b
    watch = Stopwatch(device)
    watch.mark()
    for _ in range(_PRODUCTS):
        a @ b
        watch.mark()
    return 2 * side**3 / statistics.median(watch.laps())


def device_name(process: Process) -> str:
    """What the steps ran on."""
    if process.device.type == "cuda":
        return torch.cuda.get_device_name(process.device)
    return f"CPU, {torch.get_num_threads()} threads"


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices itself; elsewhere that is slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return any(
            name in Path("/proc/cpuinfo").read_text() for name in ("avx512_bf16", "amx_bf16")
        )
    except OSError:
        return False


def free_memory(process: Process) -> int:
    """Bytes that this process may still take: on its GPU, or its share of the machine's RAM."""
    if process.device.type == "cuda":
        return torch.cuda.mem_get_info(process.device)[0]
    return free_ram() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def free_ram(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of RAM that can be taken without swapping and within the limits of a container."""
    facts = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    free = int(facts["MemAvailable"].split()[0]) * 1024
    return max(0, min([free, *_free_in_groups(proc, cgroups)]))


def _free_in_groups(proc: Path, cgroups: Path) -> list[int]:
    """What each memory cgroup that this process is in leaves; unlimited ones may be left out."""
    free = []
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        mount, *files = _CGROUPS[1 if kinds else 2]
        root = cgroups / mount
        group = root / path.lstrip("/")
        # Inside a container the path may be the host's: the groups that can be seen are read.
        for folder in (group, *(p for p in group.parents if p == root or root in p.parents)):
            free += _free_in_group(folder, *files)
    return free


def _free_in_group(folder: Path, limit: str, used: str, cached: str) -> list[int]:
    """[bytes left], cached files not counting as taken; [] where there is no limit."""
    try:
        most = int((folder / limit).read_text())
        taken = int((folder / used).read_text())
        facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not visible, or "max"
        return []
    return [most - taken + int(facts.get(cached, 0))]


def ram_of(pid: int) -> int:
    """Bytes that another process has in RAM or in swap; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line[:6] in ("VmRSS:", "VmSwap"))
