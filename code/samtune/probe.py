"""How many images fit into memory at once, by trial: `benchmark --probe`, `--batch_size auto`.

Each trial is two training steps of the verb `benchmark` in a process of its own: nothing of it
stays in memory, its peak is its own, and running out of memory is an answer and not the end. Where
RAM is the limit, a trial that takes more than its share is ended before the machine swaps, and is
the first that the kernel would choose to end.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

from samtune import flags
from samtune.activity import now
from samtune.adapters import ADAPTERS
from samtune.config import BenchmarkConfig, Size, TrainConfig
from samtune.data.objects import settle_objects
from samtune.engine import distributed
from samtune.engine.distributed import Process
from samtune.engine.optim import resolve_precision
from samtune.errors import EXIT_OUT_OF_MEMORY, EXIT_USER_ERROR, OutOfMemory, UserError
from samtune.machine import free_memory, has_bf16, ram_of
from samtune.models import MODEL_TYPES

ENTRY = Path(__file__).parents[1] / "run_sa.py"
MARGIN = 0.1  # of the memory stays free: other images, loader processes, fragments
MOST = {"cuda": 1024, "cpu": 64}  # images; on a CPU larger batches bring no speed
_GROWTH = 4  # how many times larger than one that fits the next trial may be
_GLANCE = 0.1  # seconds between looks at the memory of a trial
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")


class Trial(NamedTuple):
    """What was tried (flags by name) and what it took; None where it did not fit."""

    tried: dict
    peak: int | None = None  # bytes
    seconds: float | None = None  # per step

    @property
    def words(self) -> str:
        """For a person: '9.2 GiB, 1.3 s per step'."""
        return f"{self.peak / 2**30:.2f} GiB, {self.seconds:.3g} s per step"


class Probe:
    """Trials on this machine.

    asked: every flag of `benchmark` by name. limit: bytes that a process may take. say: told of
    each trial as it ends. attempt: flags -> Trial, in a process of its own unless given.
    """

    def __init__(
        self,
        asked: dict,
        process: Process,
        limit: int,
        say: Callable[[str], None],
        attempt: Callable[[dict], Trial] | None = None,
    ):
        self.asked, self.device, self.limit, self.say = asked, process.device, limit, say
        watched = limit if self.device.type == "cpu" else math.inf
        self.attempt = attempt or partial(run_trial, limit=watched)
        self.trials: list[Trial] = []

    @property
    def allowed(self) -> float:
        """Bytes that a trial which fits may take."""
        return (1 - MARGIN) * self.limit

    def fits(self, **tried) -> Trial | None:
        """Try these flags; None where they do not fit."""
        trial = self.attempt(self.asked | tried)._replace(tried=tried)
        self.trials.append(trial)
        fits = trial.peak is not None and trial.peak <= self.allowed
        took = "too much" if trial.peak is None else trial.words + ("" if fits else ": too much")
        self.say(f"  {in_flags(tried)}: {took}")
        return trial if fits else None

    def largest(self, most: int) -> int:
        """The largest batch size up to `most` that fits; 0 where not even one image does.

        What the next trial may be follows from a line through the last two that fitted, but at most
        `_GROWTH` times the last; when one does not fit, what lies between is halved.
        """
        low, high, peaks = 0, most + 1, {}
        while True:
            size = (low + high) // 2 if high <= most else self._next(low, peaks, most)
            if size <= low:
                return low
            if trial := self.fits(batch_size=size):
                low, peaks[size] = size, trial.peak
            else:
                high = size

    def _next(self, low: int, peaks: dict[int, int], most: int) -> int:
        """The next larger batch while all have fitted; `low` where the line leaves no room."""
        if low < 2:
            return min(low + 1, most)
        before, last = list(peaks)[-2:]
        per_image = max(peaks[last] - peaks[before], 0) / (last - before)
        room = (self.allowed - peaks[last]) / per_image if per_image else math.inf
        return int(min(low + room, low * _GROWTH, most))

    def cheapest_switch(self, options: dict[str, object]) -> Trial | None:
        """The first of `switches` with which one image fits."""
        tried = (self.fits(batch_size=1, **switch) for switch in switches(options, self.device))
        return next(filter(None, tried), None)


def run(config: BenchmarkConfig, process: Process) -> dict:
    """Collective. The probe that `benchmark --probe` asks for: what it says, as data."""
    options = [getattr(config, f.name) for f in fields(config)]
    asked = flags.dump(options)
    with distributed.together():
        found = None
        if process.local_rank == 0:
            say = partial(print, flush=True) if process.is_main else _keep_quiet
            probe = Probe(_for_trials(asked), process, free_memory(process), say)
            say(f"trials in {_memory(probe)}:")
            found = _look(probe, MOST[process.device.type], asked)
    found = [one for one in distributed.all_gather_objects(found) if one is not None]
    result = min(found, key=lambda one: one["probe"]["batch_size"])
    if process.is_main:
        print(result["probe"]["said"], flush=True)
    return result


def _look(probe: Probe, most: int, asked: dict) -> dict:
    """Search, and put into words and numbers what came of it."""
    size = probe.largest(most)
    switch = None if size else probe.cheapest_switch(asked)
    return {
        "probe": {
            "batch_size": size,
            "memory_bytes": probe.limit,
            "margin": MARGIN,
            "device": str(probe.device.type),
            "switch": switch and switch._asdict(),
            "trials": [trial._asdict() for trial in probe.trials],
            "said": in_words(probe, size, most) if size else advice(probe, switch),
        }
    }


def in_words(probe: Probe, size: int, most: int) -> str:
    """What was found, where something fits."""
    trial = next(t for t in probe.trials if t.tried == {"batch_size": size})
    end = f"; larger ones than {most} were not tried" if size == most else ""
    return f"the largest batch that fits is --batch_size {size}: {trial.words}{end}"


def advice(probe: Probe, switch: Trial | None) -> str:
    """What to do where not even one image fits."""
    if switch:
        return (
            f"not even one image fits into {_memory(probe)}; the cheapest change that helps is "
            f"{in_flags(switch.tried)}: {switch.words}"
        )
    return (
        f"not even one image fits into {_memory(probe)}, with none of these: "
        + "; ".join(in_flags(trial.tried) for trial in probe.trials[1:])
        + "; take a smaller --model_type, or a machine with more memory"
    )


def settle_batch_size(
    config: TrainConfig,
    scratch: bool,
    images: int,
    picture_size: tuple[int, int],
    process: Process,
    say: Callable[[str], None],
) -> int:
    """Collective. What `--batch_size auto` is: what fits on every machine, and no more than a
    process's share of the images.

    scratch: whether training starts from random weights. images: in training; picture_size: (H, W)
    of the largest, where the loss is taken. One process of each machine tries, before the others
    put anything on their device. Raises UserError on all ranks where not even one image fits, and
    names what helps.
    """
    size = None
    with distributed.together():
        if process.local_rank == 0:
            asked = as_benchmark(config, scratch, picture_size)
            probe = Probe(asked, process, free_memory(process), say)
            say(f"--batch_size auto: trials in {_memory(probe)}:")
            share = max(1, -(-images // process.world) // config.optim.accumulate)
            size = probe.largest(min(share, MOST[process.device.type]))
            if not size:
                said = advice(probe, probe.cheapest_switch(asked))
                raise OutOfMemory(said.replace("image_size", "crop") if config.data.crop else said)
    return min(found for found in distributed.all_gather_objects(size) if found)


def as_benchmark(config: TrainConfig, scratch: bool, picture_size: tuple[int, int]) -> dict:
    """The flags of `benchmark` whose steps take as much memory as those of this training."""
    groups = config.model, config.prompts, config.loss, config.optim, config.adapter
    adapter, crop = ADAPTERS[config.model.adapter], config.data.crop
    asked = flags.dump(groups) | flags.dump([adapter.without_start(config.adapter)])
    train = "all" if scratch else "adapter"
    return _for_trials(asked) | {
        "checkpoint": "none",
        "train": train if config.model.train == "auto" else config.model.train,
        "image_size": (crop or config.model.image_size).plain,
        "picture_size": 0 if crop else Size(*picture_size).plain,
        "num_classes": config.read.num_classes,
        "rows": _most_questions(config),
    }


def _most_questions(config: TrainConfig) -> int:
    """How many rows an image may have in training."""
    objects, most = settle_objects(config.read, config.prompts).objects, config.prompts.max_objects
    if config.prompts.prompt == "none" or objects == "mask":
        return 1
    if objects == "class":
        return min(most or config.read.num_classes, config.read.num_classes)
    if not most:
        raise UserError(
            "--batch_size auto: --max_objects 0 puts no bound on the questions about an image, so "
            "none on memory; set --max_objects, or a number as --batch_size"
        )
    return most


def _for_trials(asked: dict) -> dict:
    """Two steps of two micro-batches at most have everything that more of them have."""
    two = {"accumulate": min(asked["accumulate"], 2), "warmup_steps": 0}
    return asked | two | {"steps": 1, "warmup": 1, "peak": False, "probe": False}


def switches(options: dict, device) -> Iterator[dict]:
    """Flags that save memory, by what they cost: first time, then what the model can learn.

    options: the flags in use, by name.
    """
    row, size = ADAPTERS[options["adapter"]], MODEL_TYPES[options["model_type"]]
    bf16 = {"precision": "bf16"} if _in_fp32(options, device) else {}
    blocks = options["activation_checkpointing"]
    again = {} if blocks == "yes" else {"activation_checkpointing": "yes"}
    some = {"activation_checkpointing": "global"} if blocks == "no" and size.global_blocks else {}
    cheap = [bf16, some, again] if has_bf16(device) else [some, again, bf16]
    yield from filter(None, cheap)
    both = bf16 | again
    if bf16 and again:
        yield both
    if options.get("adapter_blocks") and size.backbone == "vit":
        both = both | {"adapter_blocks": f"{2 * size.depth // 3}-{size.depth - 1}"}
        yield both
    frame, grid = Size.read(options["image_size"]), row.stride or size.patch_size
    frame = frame or Size(*[row.image_size or size.image_size] * 2)
    for part in (2, 4):
        sides = [side // part // grid * grid for side in frame]
        if min(sides) >= size.patch_size:
            yield both | {"image_size": Size(*sides).plain}


def _in_fp32(options: dict, device) -> bool:
    return resolve_precision(options["precision"], device) == "fp32"


def in_flags(tried: dict) -> str:
    """As a person would type them."""
    return " ".join(f"--{name} {value}" for name, value in tried.items())


def run_trial(asked: dict, limit: float) -> Trial:
    """One `benchmark` in a process of its own, which is ended when it holds more than `limit` bytes
    of RAM. Raises UserError with what it says if it fails for another reason than memory.
    """
    now.turns_to("a trial of the memory that a step takes")
    command = [sys.executable, str(ENTRY), "benchmark"]
    command += [f"--{name}={value}" for name, value in asked.items()]
    alone = {name: v for name, v in os.environ.items() if not name.startswith(_TORCHRUN)}
    with subprocess.Popen(
        command, env=alone, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        try:
            with suppress(OSError):  # no right to, or no Linux: then it is one among others
                Path(f"/proc/{child.pid}/oom_score_adj").write_text("1000")
            out, error = _watch(child, limit)
        finally:
            child.kill()
    if child.returncode in (EXIT_OUT_OF_MEMORY, -signal.SIGKILL):
        return Trial(asked)
    if child.returncode == EXIT_USER_ERROR:
        raise UserError(error.strip().splitlines()[-1].removeprefix("error: "))
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}:\n{error}")
    result = json.loads(out.splitlines()[-1])
    return Trial(asked, result["peak_memory_bytes"], result["seconds_per_step"])


def _watch(child: subprocess.Popen, limit: float) -> tuple[str, str]:
    """What the process says until it ends, or takes too much and is ended."""
    while True:
        try:
            return child.communicate(timeout=_GLANCE)
        except subprocess.TimeoutExpired:
            if ram_of(child.pid) > limit:
                child.kill()


def _memory(probe: Probe) -> str:
    return f"{probe.limit / 2**30:.1f} GiB, of which {MARGIN:.0%} stay free"


def _keep_quiet(_: str) -> None:
    pass
