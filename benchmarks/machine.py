"""What this machine is and how fast it multiplies matrices, as one JSON line.

    python benchmarks/machine.py

The line names neither the machine nor its folders: device, cores, memory, versions, and per number
format the operations per second (two per multiply-accumulate) of a large matrix product, the peak
of which every other figure is a share.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version

import torch

PEERS = ("torch", "torchvision", "segment-anything", "timm", "transformers", "peft")
SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices
ROUNDS = 7  # the best one counts: it is a peak


def describe() -> dict:
    """All that a table needs to say of the machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    cores = len(os.sched_getaffinity(0))
    words = [name] if device == "cuda" else [device, name, str(cores), "cores"]
    return {
        "kind": re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-"),
        "device": device,
        "name": name,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(device),
        "bf16": device == "cuda" or _flags() >= {"avx512_bf16"} or "amx_bf16" in _flags(),
        "python": platform.python_version(),
        "versions": {name: found for name in PEERS if (found := _version(name))},
        "matmul_flops": {name: round(flops) for name, flops in peaks(device).items()},
    }


def peaks(device: str) -> dict[str, float]:
    """Operations per second of a square matrix product, by number format."""
    formats = {"fp32": torch.float32, "bf16": torch.bfloat16}
    found = {name: matmul_flops(device, dtype) for name, dtype in formats.items()}
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        found["tf32"] = matmul_flops(device, torch.float32)
        torch.backends.cuda.matmul.allow_tf32 = False
    return found


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    side = SIDE[device]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(ROUNDS + 2):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds[2:])


def _memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpuinfo(field: str) -> str:
    try:
        with open("/proc/cpuinfo") as file:
            found = re.search(rf"^{field}\s*: (.*)$", file.read(), re.M)
    except OSError:
        found = None
    return found.group(1).strip() if found else ""


def _processor() -> str:
    return _cpuinfo("model name") or platform.machine()


def _flags() -> set[str]:
    return set(_cpuinfo("flags").split())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps(describe()))
