"""What a run tells the world: console, `metrics.jsonl`, `curves.png`, Weights & Biases when asked.

Only rank 0 speaks and writes; on the others every method does nothing, so callers need no `if`.

A record is one epoch: {"epoch": 3, "train": {"loss": ..., "bce": ..., "iou_loss": ..., "dice": ...,
"iou": ...}, "validation": {the same names}, "lr": ..., "best": True, ...}. Epochs count from 1;
"best" is true where the epoch was the best so far; any part may be missing.
"""

from __future__ import annotations

import contextlib
import json
import math
import netrc
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import nn
from tqdm import tqdm

from samtune.config import LogOptions
from samtune.engine.distributed import Process


class Logbook:
    """The diary of a run in `folder`, kept by rank 0.

    keep_before_epoch: what `metrics.jsonl` says of this epoch and later ones is cut, so that a
    resumed run does not tell an epoch twice; 1 starts an empty file.
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
    ):
        self.folder = folder and Path(folder)
        self.is_main = process.is_main
        self.prompt, self.epochs = config.get("prompt"), config.get("epoch")
        self.records: list[dict] = []
        self._wandb: _Wandb | None = None
        self._drawn = -math.inf
        if self.is_main and self.folder:
            self.records = _cut(self.folder / "metrics.jsonl", keep_before_epoch)
            if options.wandb:
                self._wandb = _Wandb(self.folder, options, config, self.say)

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
        record = _plain(record if self.prompt is None else record | {"prompt": self.prompt})
        self.records.append(record)
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.say(_lines(record, self.epochs))
        if self._wandb:
            self._wandb.log(record)
        if time.monotonic() - self._drawn > 30:
            self.curves()

    def curves(self) -> None:
        """Draw `curves.png` from all records so far; a failure is a warning, not the run's end."""
        if not (self.is_main and self.records):
            return
        prompt = f", prompt: {self.prompt}" if self.prompt is not None else ""
        try:
            draw_curves(self.records, self.folder / "curves.png", self.folder.name + prompt)
        except Exception as error:
            self.say(f"warning: curves.png could not be drawn: {error}")
        self._drawn = time.monotonic()

    def close(self) -> None:
        """Draw the curves and finish the W&B run; waits at most a minute for its upload."""
        self.curves()
        if self._wandb:
            self._wandb.finish()


class Progress:
    """A progress bar, or plain lines in a log; silent where `say` is None."""

    SECONDS_BETWEEN_LINES = 2.0

    def __init__(
        self, work: Iterable | int, description: str, unit: str, say: Callable[[str], None] | None
    ):
        self.work = range(work) if isinstance(work, int) else work
        self.total = len(self.work) if hasattr(self.work, "__len__") else None
        self.description, self.say = description, say
        self.done, self._told = 0, 0
        self._start = self._last_line = time.monotonic()
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


# --- metrics.jsonl -------------------------------------------------------------------------------


def _cut(path: Path, epoch: int) -> list[dict]:
    """Keep the records before `epoch`, in the file (atomically) and as the answer.

    A line that is not valid JSON was being written when the run was killed: it goes as well.
    """
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if record["epoch"] < epoch:
                kept.append(record)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return kept


def _plain(value: Any) -> Any:
    """What JSON can say: numbers of any library as Python's, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)


def _lines(record: dict, epochs: int | None) -> str:
    """One epoch on the console: a line of training scores and one of validation scores."""
    head = f"epoch {record['epoch']}" + (f"/{epochs}" if epochs else "")
    remarks = {
        "train": "" if record.get("lr") is None else f"lr {record['lr']:.2e}",
        "validation": "best so far" if record.get("best") else "",
    }
    lines = []
    for split, remark in remarks.items():
        scores = (record.get(split) or {}).items()
        numbers = [f"{k} {'nan' if v is None else format(v, '.5f')}" for k, v in scores]
        if numbers:
            indent = " " * len(head) if lines else head
            lines.append("  ".join([indent, f"{split:10}", *numbers, remark]).rstrip())
    return "\n".join(lines or [head])


# --- curves.png ----------------------------------------------------------------------------------

_COLOURS = {"train": "#8a94a6", "validation": "#1f6feb", "lr": "#b7791f", "best": "#2da44e"}


def draw_curves(records: list[dict], path: Path, title: str) -> None:
    """Draw loss, IoU, Dice and learning rate over epochs as small multiples into a PNG.

    The last record that says "best" is marked. Epochs without a number leave a gap.
    """
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


# --- Weights & Biases ----------------------------------------------------------------------------

# The parent repository's names, so that old and new runs share their charts.
_WANDB_NAMES = {
    "bce": "BCE Loss", "iou_loss": "IoU Loss", "dice": "Dice Metric", "iou": "IoU Metric"
}  # fmt: skip
_WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # the defaults of its releases
_WANDB_SETTINGS = {
    "silent": True, "console": "off", "disable_git": True,
    "init_timeout": 30, "login_timeout": 1, "finish_timeout": 60,
}  # fmt: skip


class _Wandb:
    """A W&B run that may fail: its first failure is one warning, then it keeps silent.

    It never asks for a key, waits for a server at most half a minute at the start and a minute at
    the end, and captures neither console output, code, git remotes nor weights: those can hold
    secrets or need a device sync per tensor. Model parameters are not watched.
    """

    def __init__(self, folder: Path, options: LogOptions, config: dict, say: Callable[[str], None]):
        self._say, self._run = say, None
        self._attempt(lambda: self._start(folder, options, config))

    def _start(self, folder: Path, options: LogOptions, config: dict) -> None:
        mode = _wandb_mode(options.wandb_mode)
        with _deaf_stdin():
            import wandb

            # Some settings are younger than the oldest release that we support.
            known = wandb.Settings()
            settings = {k: v for k, v in _WANDB_SETTINGS.items() if hasattr(known, k)}
            self._run = wandb.init(
                project=options.project_name,
                name=folder.name,
                id=_wandb_id(folder),
                # Offline runs cannot be resumed; `wandb sync` joins those of one id.
                resume="allow" if mode == "online" else None,
                mode=mode,
                dir=os.environ.get("WANDB_DIR") or str(folder),
                config=_plain(config),
                save_code=False,
                settings=wandb.Settings(**settings),
            )
        if mode == "online":
            self._say(f"Weights & Biases: {self._run.url}")
        elif mode == "offline":
            run_folder = Path(self._run.dir).parent
            self._say(f"Weights & Biases: offline; to upload later: wandb sync {run_folder}")

    def log(self, record: dict) -> None:
        self._attempt(lambda: self._run.log(_wandb_record(record), step=record["epoch"]))

    def finish(self) -> None:
        self._attempt(lambda: self._run.finish())
        self._run = None

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._say is None:
            return
        try:
            action()
        except Exception as error:
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            if key := os.environ.get("WANDB_API_KEY"):
                first_line = first_line.replace(key, "***")
            self._say(f"warning: Weights & Biases is off, training goes on: {first_line}")
            self._say = None


def _wandb_record(record: dict) -> dict[str, float]:
    """The epoch's numbers under the parent repository's names."""
    numbers = {
        f"{split.title()} {_WANDB_NAMES.get(name, name.title())}": value
        for split in ("train", "validation")
        for name, value in (record.get(split) or {}).items()
    }
    numbers["Learning Rate"] = record.get("lr")
    return {name: value for name, value in numbers.items() if value is not None}


def _wandb_mode(mode: str) -> str:
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    return "online" if _has_wandb_key() else "offline"


def _has_wandb_key() -> bool:
    """Whether the environment or a netrc file holds a key for the W&B server; keeps no key."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    hosts = [urlsplit(server).netloc] if server else _WANDB_HOSTS
    for name in [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            known = netrc.netrc(Path(name).expanduser()).hosts
            if any(host in known for host in hosts):
                return True
    return False


def _wandb_id(folder: Path) -> str:
    """One id per run folder, so that a resumed run goes on in the same charts."""
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text().strip()


@contextlib.contextmanager
def _deaf_stdin() -> Iterator[None]:
    """Without a terminal to read from, W&B raises where it would ask for a key and wait."""
    stdin = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = stdin
