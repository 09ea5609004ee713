"""What N images on G GPUs would take, and what would bind, from measured rates.

    python code/run_sa.py benchmark --model_type vit_b --batch_size 8 > step.json
    python benchmarks/scale.py step.json --images 1e6 --gpus 64 --loader_rate ... --network ...

Reads the line of JSON that `run_sa.py benchmark` ends with. The other rates are flags without
defaults, since only a measurement knows them; of one that is left out the table says only how high
it must be. Prints a Markdown table. docs/scale.md explains it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path

FLOAT32 = 4  # bytes; parameters, gradients and moments are held in it
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Step:
    """What a benchmark measured: images/s of one GPU, images of one GPU per optimizer step."""

    rate: float
    images: int
    micro_batches: int
    trainable: int
    parameters: int
    shard: bool

    @classmethod
    def read(cls, path: str | Path) -> Step:
        """From a file whose last line is the benchmark's. Raises ValueError if it is not."""
        lines = Path(path).read_text().strip().splitlines()
        try:
            line = json.loads(lines[-1])
            return cls(
                rate=line["images_per_second"] / line["processes"],
                images=line["batch_size"] * line["accumulate"],
                micro_batches=line["accumulate"],
                trainable=line["trainable_parameters"],
                parameters=line["total_parameters"],
                shard=line.get("shard", False),
            )
        except (IndexError, KeyError, TypeError, ValueError) as error:
            said = f"{path}: its last line is not that of `run_sa.py benchmark` ({error!r})"
            raise ValueError(said) from None


@dataclass(frozen=True)
class Cluster:
    """What else must be known. Rates are those measured while all GPUs are at work; None: unknown.

    loader_rate: images/s that one CPU core decodes, augments and fits. bytes_per_image: of image
    and mask, as they lie on the disk. Bytes/s: storage of all machines together; network per GPU,
    where there are several machines; write of the process that writes a checkpoint.
    """

    images: float
    gpus: float
    cores_per_gpu: float
    bytes_per_image: float
    loader_rate: float | None = None
    storage: float | None = None
    network: float | None = None
    write: float | None = None


REQUIRED = ("images", "gpus", "cores_per_gpu", "bytes_per_image")
# What works beside the GPUs, its rate, and the unit of that rate.
BESIDE = {
    "loader": ("loader_rate", "{:,.3g} images/s a core"),
    "storage": ("storage", "{:,.3g} GB/s"),
    "network": ("network", "{:,.3g} GB/s a GPU"),
}
_GIGA = {"loader_rate": 1, "storage": 1e9, "network": 1e9}


def work_per_epoch(step: Step, cluster: Cluster) -> dict[str, float]:
    """What an epoch asks of each resource, in the unit of its rate; of the GPUs, seconds.

    Raises ValueError for numbers that are not positive.
    """
    for field in fields(cluster):
        value = getattr(cluster, field.name)
        if value is not None and not value > 0:
            raise ValueError(f"--{field.name} must be positive")
    if not (step.rate > 0 and step.images > 0):
        raise ValueError("the benchmark measured no images")
    gpus, images = cluster.gpus, cluster.images
    steps = math.ceil(images / (gpus * step.images))
    return {
        "GPUs": steps * step.images / step.rate,  # the last step is padded
        "loader": images / (gpus * cluster.cores_per_gpu),
        "storage": images * cluster.bytes_per_image,
        "network": steps * traffic(step, gpus),
        "checkpoint": checkpoint_bytes(step),
    }


def seconds_per_epoch(step: Step, cluster: Cluster) -> dict[str, float | None]:
    """Each resource's time for one epoch if it alone counted; None where its rate is unknown."""
    rates = {"GPUs": 1.0, "checkpoint": cluster.write}
    rates |= {name: getattr(cluster, field) for name, (field, _) in BESIDE.items()}
    work = work_per_epoch(step, cluster)
    return {name: amount / rates[name] if rates[name] else None for name, amount in work.items()}


def needed(step: Step, cluster: Cluster) -> dict[str, str]:
    """The least rate of each resource beside the GPUs with which they need not wait, in words."""
    work = work_per_epoch(step, cluster)
    least = {name: work[name] / work["GPUs"] for name in BESIDE}
    return {name: unit.format(least[name] / _GIGA[field]) for name, (field, unit) in BESIDE.items()}


def traffic(step: Step, gpus: float) -> float:
    """Bytes that each GPU sends per optimizer step (rings: a sum over n ranks is 2 (n-1)/n long).

    DDP sums gradients. With shards, parameters are gathered for the forward pass and again for the
    backward pass of each micro-batch, and gradients are summed into their parts.
    """
    gradients, parameters = FLOAT32 * step.trainable, FLOAT32 * step.parameters
    ring = (gpus - 1) / gpus
    if not step.shard:
        return ring * 2 * gradients
    return ring * (2 * parameters * step.micro_batches + gradients)


def checkpoint_bytes(step: Step) -> float:
    """last.pt and best.safetensors of one epoch: what trains with its moments, and what trains."""
    return FLOAT32 * step.trainable * (2 + ADAM_MOMENTS)


def table(step: Step, cluster: Cluster) -> str:
    """Markdown: each resource's time and the rate that it needs; what binds of those whose rates
    are known and which work at the same time; the sum."""
    seconds = seconds_per_epoch(step, cluster)
    known = {name: time for name, time in seconds.items() if time is not None}
    at_once = {name: time for name, time in known.items() if name != "checkpoint"}
    binding = max(at_once, key=at_once.get)
    writing = known.get("checkpoint", 0.0)
    epoch = at_once[binding] + writing
    rows = ["| what | seconds per epoch | | the GPUs need |", "| --- | ---: | --- | ---: |"]
    least = needed(step, cluster)
    for name, time in seconds.items():
        said = "not measured" if time is None else f"{time:,.1f}"
        mark = "binds" if name == binding else ""
        rows.append(f"| {name} | {said} | {mark} | {least.get(name, '')} |")
    rows.append(f"| **epoch**, all at once | {epoch:,.1f} | | |")
    if "network" in known:
        exposed = max(epoch, seconds["GPUs"] + seconds["network"] + writing)
        rows.append(f"| epoch, network not hidden | {exposed:,.1f} | | |")
    rows += [
        "",
        f"{cluster.images / epoch:,.1f} images/s on {cluster.gpus:g} GPUs, "
        f"{seconds['GPUs'] / epoch:.0%} of what they could do; {step.rate:,.3g} on one.",
    ]
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", help="file that ends with the benchmark's line of JSON")
    for field in fields(Cluster):
        parser.add_argument(f"--{field.name}", type=float, required=field.name in REQUIRED)
    given = vars(parser.parse_args(argv))
    try:
        print(table(Step.read(given.pop("benchmark")), Cluster(**given)))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
