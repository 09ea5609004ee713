"""Coverage-guided fuzzing with Atheris (libFuzzer): `python tests/fuzz/fuzz_longer.py`.

Each target of `fuzz_targets.py` runs in a process of its own, forked from this one, on the bytes of
its seeds and on what libFuzzer makes of them, steered by which branches of samtune and of the
libraries that parse for it an input reaches. A case that raises anything but `UserError`, takes
longer than a minute or more than 4 GB is a defect: its bytes are kept in `--found`, and
`python tests/fuzz/fuzz_longer.py --targets NAME FILE ...` runs them again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
INSTRUMENTED = ["samtune", "PIL", "tarfile", "zipfile", "yaml", "pycocotools"]
MOST_PIXELS = 2**20  # here: pictures at the real bound would only be slow


def main() -> int:
    asked = arguments()
    sys.path[:0] = [str(HERE), str(HERE.parents[1] / "code")]
    sys.stderr.flush()
    with silent_stderr(), atheris.instrument_imports(include=INSTRUMENTED):
        import fuzz_targets

        from samtune.data import limits
    limits.MOST_PIXELS = MOST_PIXELS
    targets = fuzz_targets.TARGETS
    names = asked.targets.split(",") if asked.targets else list(targets)
    if asked.files:
        for file in asked.files:
            targets[names[0]](Path(file).read_bytes())
        return 0
    fuzz_targets.pictures()  # before forking, so that this process removes them
    seconds = asked.minutes * 60 / len(names)
    rows = [fuzz(name, targets[name], asked, seconds) for name in names]
    if asked.record:
        write_record(asked, rows)
    return int(any(row["defect"] for row in rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=0.0, help="for all targets together")
    parser.add_argument("--cases", type=int, default=1000, help="of each target, without --minutes")
    parser.add_argument("--targets", default="", help="names with commas between; empty: all")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer")
    parser.add_argument("--found", default="fuzz_found", help="folder for the bytes of defects")
    parser.add_argument("--record", default="", help="file to write the result to, as JSON")
    parser.add_argument("files", nargs="*", help="run these once instead")
    return parser.parse_args()


class silent_stderr:
    """What Atheris and libraries in C write there goes nowhere."""

    def __enter__(self):
        self.kept = os.dup(2)
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)

    def __exit__(self, *_):
        os.dup2(self.kept, 2)
        os.close(self.kept)


def fuzz(name: str, target, asked: argparse.Namespace, seconds: float) -> dict:
    """One target in a forked process; prints and returns its row."""
    with tempfile.TemporaryDirectory() as room:
        corpus, log, start = Path(room) / "corpus", Path(room) / "log", time.monotonic()
        corpus.mkdir()
        for index, seed in enumerate(target.seeds()):
            (corpus / f"seed{index}").write_bytes(seed)
        flags = [
            f"-max_total_time={seconds:.0f}" if asked.minutes else f"-runs={asked.cases}",
            f"-seed={asked.seed}", "-timeout=60", "-rss_limit_mb=4096", "-max_len=8192",
            f"-artifact_prefix={asked.found}/{name}-", "-print_final_stats=1",
        ]  # fmt: skip
        Path(asked.found).mkdir(parents=True, exist_ok=True)
        if not (child := os.fork()):
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            atheris.Setup([sys.argv[0], *flags, str(corpus)], target)
            atheris.Fuzz()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = log.read_text(errors="replace")
    cases = re.findall(r"stat::number_of_executed_units:\s*(\d+)", said)
    branches = re.findall(r"cov: (\d+)", said)
    row = {
        "target": name,
        "cases": int(cases[-1]) if cases else 0,
        "branches": int(branches[-1]) if branches else 0,
        "seconds": round(time.monotonic() - start, 1),
        "defect": status != 0,
    }
    print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if status:
        print(said[-4000:], flush=True)
    return row


def write_record(asked: argparse.Namespace, rows: list[dict]) -> None:
    packages = ("atheris", "pillow", "numpy", "torch", "safetensors", "pycocotools", "h5py")
    packages += ("opencv-python-headless", "PyYAML")
    record = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "minutes": asked.minutes,
        "seed": asked.seed,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "cases": sum(row["cases"] for row in rows),
        "defects": sum(row["defect"] for row in rows),
        "targets": rows,
    }
    Path(asked.record).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
