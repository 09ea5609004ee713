"""The folder of a run: what lies in it, which one is newest, which one goes on.

config.yaml         every option; `--config` reads it back
model.txt           the model's parts, what trains and what is frozen
metrics.jsonl       a line per epoch, and one about every --log_every-th step
curves.png          the epochs as a picture
best.safetensors    what was trained, at the best validation score
import.txt          what became of each tensor, where `import` made the run
last.pt             everything that `--resume` needs
last-1.pt, ...      the same from before, as many as `--keep` says
.lock               held by the process that works here
scores.json, scores.csv, examples.png, predictions/    from `evaluate`
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from samtune import run_lock
from samtune.errors import UserError
from samtune.run_lock import RunLock

ROOT = Path("checkpoints")


class RunFolder:
    """Paths inside one run's folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.model = self.path / "model.txt"
        self.metrics = self.path / "metrics.jsonl"
        self.curves = self.path / "curves.png"
        self.best = self.path / "best.safetensors"
        self.best_pth = self.path / "best.pth"
        self.last = self.path / "last.pt"
        self.lock = self.path / run_lock.NAME
        self.imported = self.path / "import.txt"
        self.scores = self.path / "scores.json"
        self.table = self.path / "scores.csv"
        self.examples = self.path / "examples.png"
        self.predictions = self.path / "predictions"

    def state(self, age: int) -> Path:
        """The run state that was the newest one `age` saves ago; 0: the newest."""
        return self.path / f"last-{age}.pt" if age else self.last

    def states(self) -> list[Path]:
        """The run states that are there, the newest first."""
        numbered = {
            int(match[1]): path
            for path in self.path.glob("last-*.pt")
            if (match := re.fullmatch(r"last-([1-9]\d{0,8})\.pt", path.name))
        }
        older = [numbered[age] for age in sorted(numbered)]
        return [self.last, *older] if self.last.exists() else older

    def occupy(self, launches: Iterable[str], new: bool) -> RunLock:
        """Make the folder where it is missing, and keep other runs out of it.

        launches: `launch_name` of each rank. new: a run is to begin in it. Raises UserError if
        another one is at work in it, if it cannot be written, or if a new run would overwrite one;
        but what its own launch began and could not save a state of may be begun again.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--output_dir {self.path} cannot be written: {error.strerror}"
            ) from None
        launches = [name for name in dict.fromkeys(launches) if name]
        again = not set(launches).isdisjoint(run_lock.launches_in(self.path))
        lock = RunLock(self.path)
        if new and (self.states() or (self.best.exists() and not again)):
            lock.withdraw()
            raise UserError(
                f"--output_dir {self.path} already holds a run: choose another folder, or go on "
                f"with it by --resume {self.path}"
            )
        lock.sign(launches)
        return lock

    def create(self) -> None:
        """Make the folder for a new run that is written at once. Raises UserError as `occupy`."""
        self.occupy((), new=True).withdraw()


def new_name(adapter: str, model_type: str) -> Path:
    """A fresh folder name; sorts by time within a year: `checkpoints/1120_082244_lora_vit_b`.

    With a number behind it where a clock that was set back gives a name that is taken.
    """
    name = f"{time.strftime('%m%d_%H%M%S')}_{adapter}_{model_type}"
    taken = (name, *(f"{name}_{number}" for number in range(2, 1000)))
    return next(path for path in (ROOT / name for name in taken) if not path.exists())


def to_resume(resume: str, output_dir: str) -> RunFolder | None:
    """The run that `--resume` means; None when 'auto' finds nothing to go on with.

    Raises UserError when a named folder holds no run.
    """
    if not resume:
        return None
    if resume != "auto":
        named = Path(resume)
        if re.fullmatch(r"last-\d+\.pt", named.name):
            raise UserError(f"--resume {resume}: name the folder; to go back to an older state, "
                            "move the newer ones away")  # fmt: skip
        folder = RunFolder(named.parent if resume.endswith(".pt") else named)
        if not folder.states():
            raise UserError(f"--resume {resume}: there is no {folder.last}")
        return folder
    if output_dir:
        folder = RunFolder(output_dir)
        return folder if folder.states() else None
    runs = sorted(filter(RunFolder.states, _runs()), key=lambda run: _saved(run.states()[0]))
    return runs[-1] if runs else None


def begun_by_this_launch(output_dir: str) -> RunFolder | None:
    """The run that the launcher of this process had begun when it started its processes before.

    None: it starts them for the first time, or for a run in another folder.
    """
    launch = run_lock.launch_name()
    if not launch:
        return None
    folders = [RunFolder(output_dir)] if output_dir else _runs()
    begun = (folder for folder in folders if launch in run_lock.launches_in(folder.path))
    return next(begun, None)


def _runs() -> list[RunFolder]:
    return [RunFolder(path) for path in sorted(ROOT.glob("*")) if path.is_dir()]


def _saved(path: Path) -> float:
    """When a file was written, by its own account; 0 for one that is not there."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def latest_save() -> float:
    """The latest date of a run's state under checkpoints/; 0 where there is none."""
    files = (path for run in _runs() for path in (run.best, *run.states()[:1]))
    return max(map(_saved, files), default=0.0)


def date_after(path: Path, earlier: float) -> None:
    """Give a file that was written just now a later date than `earlier`, if the clock has not.

    The newest run is found by date. So a clock that was set back does not make an old run newest.
    """
    if _saved(path) <= earlier:
        with contextlib.suppress(OSError):
            os.utime(path, (earlier + 1, earlier + 1))


def newest() -> RunFolder:
    """The run under checkpoints/ whose best state is newest. Raises UserError if there is none."""
    runs = sorted(ROOT.glob("*/best.safetensors"), key=_saved)
    if not runs:
        raise UserError("there is no run under checkpoints/ yet: train one with ./run.sh, or name "
                        "one with --run_dir FOLDER")  # fmt: skip
    return RunFolder(runs[-1].parent)
