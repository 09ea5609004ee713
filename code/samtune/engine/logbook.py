"""What a run tells the world: console, `metrics.jsonl`, `curves.png`, Weights & Biases when asked.

Only rank 0 speaks and writes; on the others every method does nothing, so callers need no `if`.
What a record is, says `records`.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from samtune.activity import now
from samtune.config import LogOptions
from samtune.engine import records
from samtune.engine.distributed import Process
from samtune.engine.wandb_run import WandbRun


class Logbook:
    """The diary of a run in `folder`, kept by rank 0.

    keep_before_epoch: what `metrics.jsonl` says of this epoch and later ones is cut, so that a
    resumed run tells nothing twice; 1 starts an empty file. keep_steps: but the lines about so many
    of this epoch's steps stay.
    config: every option of the run by name; W&B stores it, and its "prompt" is stated with every
    score, since scores under a box of the true mask are better than a model that must find it.
    """

    def __init__(
        self,
        folder: Path | None,
        process: Process,
        options: LogOptions,
        config: dict[str, Any],
        keep_before_epoch: int = 1,
        keep_steps: int = 0,
    ):
        self.folder = folder and Path(folder)
        self.is_main = process.is_main
        self.prompt, self.epochs = config.get("prompt"), config.get("epoch")
        self.records: list[dict] = []  # of epochs
        self._wandb: WandbRun | None = None
        self._drawn = -math.inf
        if self.is_main and self.folder:
            kept = records.cut(self.folder / "metrics.jsonl", keep_before_epoch, keep_steps)
            self.records = list(filter(records.is_epoch, kept))
            if options.wandb:
                self._wandb = WandbRun(self.folder, options, config, self.say)

    @classmethod
    def console(cls, process: Process) -> Logbook:
        """One that only speaks: no folder, no records."""
        return cls(None, process, LogOptions(), {})

    def say(self, text: str) -> None:
        """Print on the console, above a progress bar if one is there."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, work: Iterable | int, description: str, unit: str = "batch") -> Progress:
        """Watch over `work`: something to iterate over, or a count that `update(n)` works off.

        A bar where standard error is a terminal, else a line for about every tenth.
        """
        return Progress(work, description, unit, self.say if self.is_main else None)

    def epoch(self, record: dict[str, Any]) -> None:
        """Tell an epoch: on the console, as a line of `metrics.jsonl` (on disk when this returns;
        NaN and infinity become null), to W&B, and in `curves.png` if that is half a minute old."""
        if not self.is_main:
            return
        self.records.append(self._tell(record))
        if time.monotonic() - self._drawn > 30:
            self.curves()

    def step(self, record: dict[str, Any]) -> None:
        """Tell a step of an epoch under way: as `epoch` does, but for the picture."""
        if self.is_main:
            self._tell(record)

    def _tell(self, record: dict[str, Any]) -> dict[str, Any]:
        """To file, console and W&B; returns the record as it was written."""
        now.turns_to("telling an epoch or a step")
        record = records.plain(record if self.prompt is None else record | {"prompt": self.prompt})
        records.append(self.folder / "metrics.jsonl", record)
        self.say(records.in_words(record, self.epochs))
        if self._wandb:
            self._wandb.log(record)
        return record

    def curves(self) -> None:
        """Draw `curves.png` from all records so far; a failure is a warning, not the run's end."""
        if not (self.is_main and self.records):
            return
        now.turns_to("drawing curves.png")
        prompt = f", prompt: {self.prompt}" if self.prompt is not None else ""
        try:
            draw_curves(self.records, self.folder / "curves.png", self.folder.name + prompt)
        except Exception as error:
            self.say(f"warning: curves.png could not be drawn: {error}")
        self._drawn = time.monotonic()

    def close(self) -> None:
        """Draw the curves and finish the W&B run; waits a bounded time for its upload."""
        self.curves()
        if self._wandb:
            now.turns_to("ending the run of Weights & Biases")
            self._wandb.finish()


class Progress:
    """A progress bar, or plain lines in a log; silent where `say` is None."""

    SECONDS_BETWEEN_LINES = 2.0

    def __init__(
        self, work: Iterable | int, description: str, unit: str, say: Callable[[str], None] | None
    ):
        self.work = range(work) if isinstance(work, int) else work
        self.total = len(self.work) if hasattr(self.work, "__len__") else None
        self.description, self.unit, self.say = description, unit, say
        self.done, self._told = 0, 0
        self._start = self._last_line = time.monotonic()
        now.begins(f"{description}: {unit} 0 of {self.total}")
        self._bar = None
        if say and sys.stderr.isatty():
            self._bar = tqdm(
                total=self.total, desc=description, unit=unit, leave=False, dynamic_ncols=True
            )

    def __iter__(self) -> Iterator:
        with self:
            for item in self.work:
                yield item
                self.update(1)

    def update(self, count: int) -> None:
        self.done += count
        now.reaches(self.done, f"{self.description}: {self.unit} {self.done} of {self.total}")
        if self._bar:
            self._bar.update(count)
        elif self.say and self.total:
            self._line()

    def _line(self) -> None:
        tenth, now = 10 * self.done // self.total, time.monotonic()
        if tenth == self._told or now - self._last_line < self.SECONDS_BETWEEN_LINES:
            return
        self._told, self._last_line = tenth, now
        left = (now - self._start) / self.done * (self.total - self.done)
        self.say(
            f"{self.description}: {self.done}/{self.total} ({100 * self.done // self.total} %), "
            f"{tqdm.format_interval(left)} left"
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.close()


def parameter_summary(model: nn.Module) -> str:
    """A table of the model's parts and, as its last line, how many parameters train."""
    import torchinfo

    table = torchinfo.summary(
        model, depth=2, verbose=0, col_names=("num_params", "trainable"), row_settings=["var_names"]
    )
    layers = str(table).split("Total params")[0].rstrip()
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = 100 * trainable / max(total, 1)
    return (
        f"{layers}\nparameters: {trainable:,} trainable ({share:.2f} %), "
        f"{total - trainable:,} frozen, {total:,} in all"
    )


# --- curves.png ----------------------------------------------------------------------------------

_COLOURS = {"train": "#8a94a6", "validation": "#1f6feb", "lr": "#b7791f", "best": "#2da44e"}


def draw_curves(records: list[dict], path: Path, title: str) -> None:
    """Draw loss, IoU, Dice and learning rate over epochs as small multiples into a PNG.

    The last record that says "best" is marked. Epochs without a number leave a gap.
    """
    _draw_figure(records, path, title)
    gc.collect()  # a figure holds itself, and Python looks for such seldom in a large process


def _draw_figure(records: list[dict], path: Path, title: str) -> None:
    # No pyplot: a figure of its own needs neither a display nor a backend to be chosen.
    from matplotlib.figure import Figure

    best = next((r["epoch"] for r in reversed(records) if r.get("best")), None)
    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    panels = {"loss": "loss", "lr": "learning rate", "iou": "IoU", "dice": "Dice"}
    for (name, label), axes in zip(panels.items(), figure.subplots(2, 2).flat, strict=True):
        _draw_panel(axes, records, name, best)
        axes.set_ylabel(label)
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=140)
    os.replace(temporary, path)


def _draw_panel(axes, records: list[dict], name: str, best: int | None) -> None:
    epochs = [record["epoch"] for record in records]
    for split in ("lr",) if name == "lr" else ("train", "validation"):
        scores = [r if split == "lr" else r.get(split) or {} for r in records]
        values = [math.nan if s.get(name) is None else s[name] for s in scores]
        if all(math.isnan(value) for value in values):
            continue
        marker = "o" if len(values) <= 30 else ""
        axes.plot(epochs, values, marker=marker, markersize=3, label=split, color=_COLOURS[split])
        if split == "validation" and best is not None:
            value = values[epochs.index(best)]
            label = f"best: epoch {best}, {value:.4g}"
            axes.plot(best, value, "o", color=_COLOURS["best"], markersize=7, zorder=4, label=label)
    if best is not None:
        axes.axvline(best, color=_COLOURS["best"], linestyle="--", linewidth=1, zorder=1)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    axes.grid(True, color="#e6e8ec", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if name == "lr":
        axes.yaxis.set_major_formatter("{x:.1e}")
        axes.set_ylim(bottom=0)
    elif axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False)
