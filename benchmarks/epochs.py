"""Time whole epochs of `run_sa.py train` on pictures made up for the purpose, as one JSON line.

    python benchmarks/epochs.py --images 16 --epoch 3 --model_type vit_b --cache_features fp32

Takes --images, --picture_size and --first_step; all other flags go to `train`. An epoch is training
and validation (one picture to every eight), files read and written as in any run. With --first_step
only the time from launch, under torchrun, until an epoch of one step is on record.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=16, help="training pictures")
    parser.add_argument("--picture_size", type=int, default=1024, help="their side, pixels")
    parser.add_argument("--first_step", action="store_true", help="time launch to first step")
    args, rest = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        validation = max(1, args.images // 8)
        draw(root, args.images + validation, args.picture_size)
        flags = [
            *("--train_image_dir", root / "image", "--train_mask_dir", root / "mask"),
            *("--train_slice", f":{args.images}", "--val_slice", f"{args.images}:"),
            *("--checkpoint", "none", "--train", "adapter", "--output_dir", root / "run"),
            *rest,
        ]
        seconds, records = train([str(flag) for flag in flags], root / "run", args.first_step)
    of_epochs = [record["seconds"] for record in records]
    per_image = _later(of_epochs, args.images + validation)
    result = {
        "launch_seconds": round(seconds, 3),
        "epoch_seconds": [round(s, 4) for s in of_epochs],
        "images": args.images,
        "seconds_per_image": per_image,
        "images_per_second": round(1 / per_image, 4),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "train_loss": [record["train"]["loss"] for record in records],
    }
    print(json.dumps(result), flush=True)


def _later(seconds: list[float], images: int) -> float:
    """Mean seconds per image of the epochs after the first, or of the only one."""
    later = seconds[1:] or seconds
    return round(sum(later) / len(later) / images, 6)


def draw(root: Path, count: int, side: int) -> None:
    """Smooth colours with an ellipse each, and its mask of 0 and 255, as PNG; seeded."""
    rng = np.random.default_rng(0)
    for name in ("image", "mask"):
        (root / name).mkdir()
    for index in range(count):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
        mask = np.zeros((side, side), np.uint8)
        centre = [int(c) for c in rng.integers(side // 3, 2 * side // 3, 2)]
        axes = [int(a) for a in rng.integers(side // 10, side // 4, 2)]
        cv2.ellipse(mask, centre, axes, float(rng.integers(180)), 0, 360, 255, -1)
        image[mask > 0] //= 2
        cv2.imwrite(str(root / "image" / f"{index:05}.png"), image)
        cv2.imwrite(str(root / "mask" / f"{index:05}.png"), mask)


def train(flags: list[str], run: Path, until_first: bool) -> tuple[float, list[dict]]:
    """Seconds until the first record is on disk (else until the end); the records of epochs."""
    launcher = ["torchrun.py", "--standalone", "--nproc_per_node", "1"] if until_first else []
    scripts = [*launcher, "run_sa.py"]
    scripts = [str(ROOT / "code" / s) if s.endswith(".py") else s for s in scripts]
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *scripts, "train", *flags], cwd=run.parent,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    seconds, records = None, run / "metrics.jsonl"
    while until_first and seconds is None and child.poll() is None:
        if records.exists() and records.stat().st_size:
            seconds = time.perf_counter() - start
        time.sleep(0.02)
    _, said = child.communicate()
    if child.returncode:
        raise SystemExit(said[-2000:] or f"train ended with exit code {child.returncode}")
    seconds = seconds or time.perf_counter() - start
    lines = map(json.loads, records.read_text().splitlines())
    return seconds, [line for line in lines if "seconds" in line]  # not those of single steps


if __name__ == "__main__":
    main(sys.argv[1:])
