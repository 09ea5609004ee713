"""Weights & Biases: a run there beside the one in the folder, when asked for."""

from __future__ import annotations

import contextlib
import netrc
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from samtune.config import LogOptions
from samtune.engine.records import is_epoch, plain

# The parent repository's names, so that old and new runs share their charts.
_WANDB_NAMES = {
    "bce": "BCE Loss", "iou_loss": "IoU Loss", "dice": "Dice Metric", "iou": "IoU Metric"
}  # fmt: skip
_WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # the defaults of its releases
_WANDB_SETTINGS = {
    "silent": True, "console": "off", "disable_git": True,
    "init_timeout": 30, "login_timeout": 1, "finish_timeout": 60,
}  # fmt: skip


class WandbRun:
    """A W&B run that may fail: its first failure is one warning, then it keeps silent.

    It never asks for a key, waits for a server at most half a minute at the start and a minute at
    the end, and captures neither console output, code, git remotes nor weights: those can hold
    secrets or need a device sync per tensor. Model parameters are not watched.
    """

    def __init__(self, folder: Path, options: LogOptions, config: dict, say: Callable[[str], None]):
        self._say, self._run = say, None
        self._attempt(lambda: self._start(folder, options, config))

    def _start(self, folder: Path, options: LogOptions, config: dict) -> None:
        mode = _mode(options.wandb_mode)
        with _deaf_stdin():
            import wandb

            # Some settings are younger than the oldest release that we support.
            known = wandb.Settings()
            settings = {k: v for k, v in _WANDB_SETTINGS.items() if hasattr(known, k)}
            self._run = wandb.init(
                project=options.project_name,
                name=folder.name,
                id=_id(folder),
                # Offline runs cannot be resumed; `wandb sync` joins those of one id.
                resume="allow" if mode == "online" else None,
                mode=mode,
                dir=os.environ.get("WANDB_DIR") or str(folder),
                config=plain(config),
                save_code=False,
                settings=wandb.Settings(**settings),
            )
            for name in ("Train *", "Validation *", "Learning Rate", "Speed *"):
                self._run.define_metric(name, step_metric="Epoch")
        if mode == "online":
            self._say(f"Weights & Biases: {self._run.url}")
        elif mode == "offline":
            run_folder = Path(self._run.dir).parent
            self._say(f"Weights & Biases: offline; to upload later: wandb sync {run_folder}")

    def log(self, record: dict) -> None:
        """Tell an epoch, drawn over epochs, or a step. W&B leaves out steps that it knows."""
        numbers = _of_epoch(record) if is_epoch(record) else _of_step(record)
        numbers = {name: value for name, value in numbers.items() if value is not None}
        self._attempt(lambda: self._run.log(numbers, step=record.get("step")))

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


def _of_step(record: dict) -> dict[str, float | None]:
    numbers = {**(record.get("train") or {}), **(record.get("speed") or {})}
    numbers |= {name: record.get(name) for name in ("lr", "gradient_norm")}
    return {f"Step/{name}": value for name, value in numbers.items()}


def _of_epoch(record: dict) -> dict[str, float | None]:
    """The epoch's scores under the parent repository's names, and its speed."""
    numbers = {
        f"{split.title()} {_WANDB_NAMES.get(name, name.title())}": value
        for split in ("train", "validation")
        for name, value in (record.get(split) or {}).items()
    }
    numbers |= {f"Speed {name}": value for name, value in (record.get("speed") or {}).items()}
    return numbers | {"Learning Rate": record.get("lr"), "Epoch": record["epoch"]}


def _mode(mode: str) -> str:
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
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


def _id(folder: Path) -> str:
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
