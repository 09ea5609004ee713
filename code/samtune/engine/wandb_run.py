"""Weights & Biases: a run there beside the one in the folder, when asked for."""

from __future__ import annotations

import contextlib
import netrc
import os
import ssl
import sys
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from samtune.config import LogOptions
from samtune.engine.records import is_epoch, plain

# The parent repository's names, so that old and new runs share their charts.
_WANDB_NAMES = {
    "bce": "BCE Loss", "iou_loss": "IoU Loss", "dice": "Dice Metric", "iou": "IoU Metric"
}  # fmt: skip
_WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # the defaults of its releases
_WANDB_SETTINGS = {
    "silent": True, "console": "off", "disable_git": True,
    "init_timeout": 10, "login_timeout": 1, "finish_timeout": 10,
}  # fmt: skip
_START_SECONDS, _END_SECONDS = 5, 20  # that a run waits for W&B, at most
_ANSWER_SECONDS = 5  # that a server has to answer, else the run is kept on disk


class WandbRun:
    """A W&B run that may fail: its first failure is one warning, then it keeps silent.

    All of it but the import happens in a thread of its own, so that no step waits for a server:
    `log` puts a record in line and is done. A server that does not answer, or does not take the
    run, has the run written to disk instead, with every record, for `wandb sync`. It never asks for
    a key, and captures neither console output, code, git remotes nor weights: those can hold
    secrets or need a device sync per tensor. Model parameters are not watched.
    """

    def __init__(self, folder: Path, options: LogOptions, config: dict, say: Callable[[str], None]):
        self._say, self._run, self._off = say, None, False
        self._records: SimpleQueue[dict | None] = SimpleQueue()
        self._started = Event()
        self._attempt(lambda: import_module("wandb"))  # here: a fork in mid-import would be stuck
        self._thread = Thread(target=self._serve, args=(folder, options, config), daemon=True)
        self._thread.start()
        self._started.wait(_START_SECONDS)

    def log(self, record: dict) -> None:
        """Tell an epoch, drawn over epochs, or a step. W&B leaves out steps that it knows."""
        self._records.put(record)

    def finish(self) -> None:
        """Wait until W&B has everything, but not for long: what it lacks is on disk."""
        self._records.put(None)
        self._thread.join(_END_SECONDS)
        if self._thread.is_alive() and not self._off:
            self._say(
                f"warning: Weights & Biases has not finished within {_END_SECONDS} s; what it "
                "lacks is in the run's folder wandb/, for wandb sync"
            )
            self._say = lambda text: None

    def _serve(self, folder: Path, options: LogOptions, config: dict) -> None:
        """The thread: start, pass on what comes, finish."""
        self._attempt(lambda: self._start(folder, options, config))
        self._started.set()
        while (record := self._records.get()) is not None:
            numbers = _of_epoch(record) if is_epoch(record) else _of_step(record)
            numbers = {name: value for name, value in numbers.items() if value is not None}
            self._attempt(partial(self._pass_on, numbers, record.get("step")))
        self._attempt(lambda: self._run.finish())

    def _pass_on(self, numbers: dict[str, float], step: int | None) -> None:
        self._run.log(numbers, step=step)

    def _start(self, folder: Path, options: LogOptions, config: dict) -> None:
        """Online if that is asked for and works, else on disk."""
        mode = _mode(options.wandb_mode)
        begin = partial(self._begin, folder, options.project_name, plain(config))
        failure = _tried(lambda: begin("online")) if mode == "online" else ""
        if mode != "online" or failure:
            begin("offline" if failure else mode)
        if mode == "online" and not failure:
            self._say(f"Weights & Biases: {self._run.url}")
        elif mode != "disabled":
            why = f"warning: Weights & Biases: {failure}; the run is kept on disk"
            run_folder = Path(self._run.dir).parent
            self._say(
                (why if failure else "Weights & Biases: offline")
                + f"; to upload later: wandb sync {run_folder}"
            )

    def _begin(self, folder: Path, project: str, config: dict, mode: str) -> None:
        import wandb

        # Some settings are younger than the oldest release that we support.
        known = wandb.Settings()
        settings = {k: v for k, v in _WANDB_SETTINGS.items() if hasattr(known, k)}
        with _deaf_stdin():
            self._run = wandb.init(
                project=project,
                name=folder.name,
                id=_id(folder),
                # Offline runs cannot be resumed; `wandb sync` joins those of one id.
                resume="allow" if mode == "online" else None,
                mode=mode,
                dir=os.environ.get("WANDB_DIR") or str(folder),
                config=config,
                save_code=False,
                settings=wandb.Settings(**settings),
            )
        for name in ("Train *", "Validation *", "Learning Rate", "Speed *"):
            self._run.define_metric(name, step_metric="Epoch")

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._off:
            return
        try:
            action()
        except Exception as error:
            self._off = True
            self._say(f"warning: Weights & Biases is off, training goes on: {_in_short(error)}")


def _tried(begin: Callable[[], None]) -> str:
    """Begin an online run; why that did not work, or empty."""
    import wandb

    server = wandb.setup().settings.base_url
    if not _answers(server):  # W&B itself would try for as long as it may
        return f"{urlsplit(server).netloc} does not answer"
    try:
        begin()
    except Exception as error:
        wandb.teardown()  # else it holds the run's id for the run that failed
        return _in_short(error)
    return ""


def _answers(server: str) -> bool:
    """Whether there is a web server, whatever it says."""
    try:
        with urlopen(server, timeout=_ANSWER_SECONDS):
            return True
    except HTTPError:
        return True
    except URLError as error:  # a certificate that Python does not know W&B may
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, HTTPException, ValueError):
        return False


def _in_short(error: Exception) -> str:
    """The first line of what an error says, without the key."""
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    key = os.environ.get("WANDB_API_KEY")
    return first_line.replace(key, "***") if key else first_line


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
