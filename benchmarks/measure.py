"""What the peers share: their command line, the batch they are given, the clock, the JSON line.

The same as `run_sa.py benchmark`, flag for flag and key for key, so that a peer is measured exactly
as samtune is. Nothing of samtune is imported here.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def parse(description: str, adapters: tuple[str, ...], model_types: tuple[str, ...], argv):
    """The flags that every peer takes."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--model_type", choices=model_types, default="vit_b")
    parser.add_argument("--adapter", choices=adapters, default=adapters[0])
    parser.add_argument("--image_size", type=int, default=1024, help="side of a square, pixels")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps before")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=0, help="0: OMP_NUM_THREADS, or torch's own")
    parser.add_argument("--evaluate", type=_yes, default=False, help="time a forward pass, scored")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def _yes(text: str) -> bool:
    return {"yes": True, "no": False}[text]


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_batch(batch_size: int, side: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """Noise with a square object each: images (B, 3, S, S) uint8, masks (B, S, S) uint8 of 0 and 1,
    boxes (B, 4) float32 x0, y0, x1, y1.
    """
    image = torch.randint(0, 256, (batch_size, 3, side, side), dtype=torch.uint8)
    near, far = side // 4, 3 * side // 4
    target = torch.zeros(batch_size, side, side, dtype=torch.uint8)
    target[:, near:far, near:far] = 1
    boxes = torch.tensor([[near, near, far, far]] * batch_size, dtype=torch.float32)
    return image.to(device), target.to(device), boxes.to(device)


def run(
    program: str,
    step: Callable[[], None],
    model: nn.Module,
    cost: dict[str, float],
    args: argparse.Namespace,
) -> dict:
    """Time `--steps` calls of `step` after `--warmup` untimed ones; print one JSON line.

    cost: what `count_gmacs` counted. A GPU's shortage of memory is an answer as well.
    """
    try:
        clock = _time(step, args)
    except torch.OutOfMemoryError:
        print(json.dumps({"failed": "out of memory"}), flush=True)
        raise SystemExit(1) from None
    parameters = list(model.parameters())
    on_gpu = torch.cuda.is_available()
    result = {
        "program": program,
        "images_per_second": round(args.batch_size / clock["seconds_per_step"], 4),
        **clock,
        "gmacs": cost["gmacs"],
        "flops_per_step": round(
            2e9 * args.batch_size * cost["gmacs" if args.evaluate else "step_gmacs"]
        ),
        "mode": "evaluate" if args.evaluate else "train",
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
        **{name: getattr(args, name) for name in ("adapter", "model_type", "image_size")},
        **{name: getattr(args, name) for name in ("batch_size", "precision", "steps")},
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
    }
    print(json.dumps(result), flush=True)
    return result


def _time(step: Callable[[], None], args: argparse.Namespace) -> dict:
    """Seconds of the first step and of each timed one, their mean, and peak memory in bytes."""
    seconds = []
    for count in range(args.warmup + args.steps):
        if count == args.warmup and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - start, 6))
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    timed = seconds[args.warmup :]
    return {
        "seconds_per_step": round(statistics.mean(timed), 6),
        "median_seconds": round(statistics.median(timed), 6),
        "seconds_of_steps": timed,
        "first_step_seconds": seconds[0],
        "peak_memory_bytes": peak,
    }


def count_gmacs(build: Callable[[], nn.Module], step: Callable, side: int) -> dict[str, float]:
    """Thousand millions of multiply-accumulates of one image: of a forward pass, and of all that a
    training step computes (forward and backward), counted where they reach a kernel.

    build: makes the model. step(model, batch): forward and loss, which it returns. Nothing is
    computed and no memory taken: all tensors are on the "meta" device. Matrix products,
    convolutions and both products of every attention count, nothing else, as in samtune's counter.
    """
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        model = build().to("meta")  # stock makes some of its constants on the CPU
        batch = random_batch(1, side, "meta")
        with FlopCounterMode(display=False) as forward:
            loss = step(model, batch)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    macs = [counter.get_total_flops() / 2e9 for counter in (forward, backward)]
    return {"gmacs": round(macs[0], 3), "step_gmacs": round(sum(macs), 3)}
