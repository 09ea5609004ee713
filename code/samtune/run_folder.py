"""The folder of a run: what lies in it, which one is newest, which one goes on.

config.yaml         every option; `--config` reads it back
model.txt           the model's parts, what trains and what is frozen
metrics.jsonl       a line per epoch, and one about every --log_every-th step
curves.png          the epochs as a picture
best.safetensors    what was trained, at the best validation score
import.txt          what became of each tensor, where `import` made the run
last.pt             everything that `--resume` needs
scores.json, scores.csv, examples.png, predictions/    from `evaluate`
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from samtune.errors import UserError

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
        self.imported = self.path / "import.txt"
        self.scores = self.path / "scores.json"
        self.table = self.path / "scores.csv"
        self.examples = self.path / "examples.png"
        self.predictions = self.path / "predictions"

    def create(self) -> None:
        """Make the folder. Raises UserError if it holds a trained state or cannot be written."""
        if self.best.exists() or self.last.exists():
            raise UserError(
                f"--output_dir {self.path} already holds a run: choose another folder, or go on "
                f"with it by --resume {self.path}"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".write-test-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"--output_dir {self.path} cannot be written: {error.strerror}"
            ) from None


def new_name(adapter: str, model_type: str) -> Path:
    """A fresh folder name; sorts by time within a year: `checkpoints/1120_082244_lora_vit_b`."""
    return ROOT / f"{time.strftime('%m%d_%H%M%S')}_{adapter}_{model_type}"


def to_resume(resume: str, output_dir: str) -> RunFolder | None:
    """The run that `--resume` means; None when 'auto' finds nothing to go on with.

    Raises UserError when a named folder holds no run.
    """
    if not resume:
        return None
    if resume != "auto":
        folder = RunFolder(Path(resume).parent if resume.endswith(".pt") else resume)
        if not folder.last.exists():
            raise UserError(f"--resume {resume}: there is no {folder.last}")
        return folder
    if output_dir:
        folder = RunFolder(output_dir)
        return folder if folder.last.exists() else None
    runs = sorted(ROOT.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    return RunFolder(runs[-1].parent) if runs else None


def newest() -> RunFolder:
    """The run under checkpoints/ whose best state is newest. Raises UserError if there is none."""
    runs = sorted(ROOT.glob("*/best.safetensors"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("there is no run under checkpoints/ yet: train one with ./run.sh, or name "
                        "one with --run_dir FOLDER")  # fmt: skip
    return RunFolder(runs[-1].parent)
