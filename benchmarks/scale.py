"""What N images on G GPUs would take, and what would bind, from measured rates.

    python code/run_sa.py benchmark --model_type vit_b --batch_size 8 > step.json
    python benchmarks/scale.py step.json --images 1e6 --gpus 64 --loader_rate ... --network ...

Reads the line of JSON that `run_sa.py benchmark` ends with; the other rates are flags without
defaults, since only a measurement knows them. Prints a Markdown table. docs/scale.md explains it.
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
    """What else must be known. Rates are those measured while all GPUs are at work."""

    images: float  # in the training set
    gpus: float
    loader_rate: float  # images/s that one CPU core decodes, augments and fits
    cores_per_gpu: float
    bytes_per_image: float  # of image and mask, as they lie on the disk
    storage: float  # bytes/s that the storage gives to all machines together
    network: (
        float  # bytes/s between GPUs: where there are several machines, of their network per GPU
    )
    write: float  # bytes/s with which one process writes a checkpoint


def seconds_per_epoch(step: Step, cluster: Cluster) -> dict[str, float]:
    """Each resource's time for one epoch if it alone counted; raises ValueError for rates <= 0."""
    for field in fields(cluster):
        if not getattr(cluster, field.name) > 0:
            raise ValueError(f"--{field.name} must be positive")
    if not (step.rate > 0 and step.images > 0):
        raise ValueError("the benchmark measured no images")
    gpus, images = cluster.gpus, cluster.images
    steps = math.ceil(images / (gpus * step.images))
    return {
        "GPUs": steps * step.images / step.rate,  # the last step is padded
        "loader": images / (gpus * cluster.cores_per_gpu * cluster.loader_rate),
        "storage": images * cluster.bytes_per_image / cluster.storage,
        "network": steps * traffic(step, gpus) / cluster.network,
        "checkpoint": checkpoint_bytes(step) / cluster.write,
    }


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
    """Markdown: each resource's time, the largest of those that work at the same time, the sum."""
    seconds = seconds_per_epoch(step, cluster)
    at_once = {name: time for name, time in seconds.items() if name != "checkpoint"}
    binding = max(at_once, key=at_once.get)
    epoch = at_once[binding] + seconds["checkpoint"]
    exposed = max(epoch, seconds["GPUs"] + seconds["network"] + seconds["checkpoint"])
    rows = ["| what | seconds per epoch | of the epoch | |", "| --- | ---: | ---: | --- |"]
    for name, time in seconds.items():
        mark = "binds" if name == binding else ""
        rows.append(f"| {name} | {time:,.1f} | {time / epoch:.0%} | {mark} |")
    rows += [
        f"| **epoch**, all at once | {epoch:,.1f} | 100% | |",
        f"| epoch, network not hidden | {exposed:,.1f} | {exposed / epoch:.0%} | |",
        "",
        f"{cluster.images / epoch:,.1f} images/s on {cluster.gpus:g} GPUs, "
        f"{seconds['GPUs'] / epoch:.0%} of what they could do; {step.rate:,.1f} on one.",
    ]
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", help="file that ends with the benchmark's line of JSON")
    for field in fields(Cluster):
        parser.add_argument(f"--{field.name}", type=float, required=True)
    given = vars(parser.parse_args(argv))
    try:
        print(table(Step.read(given.pop("benchmark")), Cluster(**given)))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
