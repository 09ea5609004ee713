"""Batches, prepared by loader processes while the model is at work.

How they are started. Forking is quick, and what the parent has imported is there already. But a
process that holds a CUDA context or NCCL's threads must not be forked (PyTorch says so of NCCL in
the notes to DistributedDataParallel). So on a GPU the loader processes are forked from a fork
server instead: a clean process that has imported the heavy packages once and stays for the run.

Signals. `torchrun` sends SIGTERM, and a terminal Ctrl-C, to the whole process group, so also to the
loader processes; if those died, the step that the training process wants to finish before it saves
would fail. They start with these signals blocked, and obey a SIGTERM of the training process only.

How they end. They stay from one iteration to the next, so that no epoch starts new ones. `close`
ends them, also while an iteration is under way; what they had prepared is dropped. They end by
themselves when the process that started them is gone, also if it was killed: they hold copies of
its connections, which to others would seem open for as long.

What they read is known to `activity.now`: a batch that never comes can be told by its files.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from samtune.activity import now
from samtune.data.datasets import SampleKey, collate
from samtune.errors import UserError
from samtune.structures import Batch

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_GLANCE = 0.5  # seconds between two looks whether the parent lives
_NAMED_FILES = 8
_PRELOADED = ["torch.utils.data", "cv2", "PIL.Image", "albumentations"]


def make_loader(
    dataset: Dataset,
    batches: Collection[list[SampleKey]],
    workers: int,
    pin_memory: bool = False,
    start_method: str = "",
    collate: Callable[[Sequence], Any] = collate,
) -> Loader:
    """A loader of the given batches of keys, in their order; each becomes what `collate` makes of
    its items, a `Batch`.

    Loading it again loads what `batches` then gives, by the same processes; each of them is two
    batches ahead. workers: loader processes; -1: up to 4, as the cores allow; 0: this process.
    start_method: '' decides as said above. A UserError in a loader process is raised here as it is.
    No global random state is used.
    """
    workers = min(worker_count(workers), len(batches))
    context = None
    if workers:
        start_method = start_method or ("forkserver" if torch.cuda.is_initialized() else "fork")
        context = multiprocessing.get_context(start_method)
    return Loader(
        _Batches(dataset, collate),
        batch_sampler=_Handed(batches),
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker if workers else None,
        multiprocessing_context=context,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(0),  # else one is drawn from the global generator
    )


def worker_count(workers: int) -> int:
    """What `--workers` asks for. Raises UserError for less than -1."""
    if workers < -1:
        raise UserError(f"--workers {workers}: must be -1 or more")
    return min(4, cores_per_process()) if workers == -1 else workers


def scoring_threads(workers: int) -> int:
    """Threads that score what a model answered while it answers more, under `--workers`.

    As many as loader processes, as far as there are cores; 0 where there is one.
    """
    cores = cores_per_process()
    return min(worker_count(workers), cores) if cores > 1 else 0


def cores_per_process() -> int:
    """The processor cores that this process may use, shared with torchrun's others; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class _Handed:
    """Batches of keys, and which of them were handed out and are not back yet."""

    def __init__(self, batches: Collection[list[SampleKey]]):
        self.batches = batches
        self.out: deque[tuple[int, list[SampleKey]]] = deque()  # with their numbers, oldest first

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        self.out.clear()
        for numbered in enumerate(self.batches):
            self.out.append(numbered)
            yield numbered[1]


class _Batches(Dataset):
    """Whole batches; a UserError is handed over as a value, for torch would wrap what is raised."""

    def __init__(self, dataset: Dataset, collate: Callable[[Sequence], Any]):
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[SampleKey]) -> Batch | UserError:
        files = self.files_of(keys)
        try:
            with now.reading(files):
                if hasattr(self.dataset, "__getitems__"):  # torch's name for a batch at once
                    return self.collate(self.dataset.__getitems__(keys))
                return self.collate([self.dataset[key] for key in keys])
        except UserError as error:
            return error
        except Exception as error:
            if files:
                error.args = (f"{error} (while reading {_shorten(files)})",)
            raise

    def files_of(self, keys: Sequence) -> list[str]:
        """The images of these samples, as far as the dataset knows them."""
        return self.dataset.files_of(keys) if hasattr(self.dataset, "files_of") else []


class Loader(DataLoader):
    """Raises the errors that `_Batches` hands over, and says why a loader process died.

    With `with`, its processes end with the work, and the death of one is explained wherever it is
    noticed: torch raises it in the midst of whatever the main thread does. Without, they end with
    the loader.
    """

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        iterator = self._iterator
        said = self._explained(error) if iterator is not None else None
        try:
            self.close()
        except RuntimeError as late:  # a death that torch noticed only here
            self._iterator = iterator
            said = said or self._explained(late)
            self.close()
            if not said:
                raise
        if said:
            raise said from None

    def close(self) -> None:
        """End the loader processes, whatever they are at. Iterating again starts new ones."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:  # torch keeps one only where there are processes
            iterator._shutdown_workers()

    def __iter__(self) -> Iterator[Batch]:
        if self.num_workers and self.multiprocessing_context.get_start_method() == "forkserver":
            os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network on import
            self.multiprocessing_context.set_forkserver_preload(_PRELOADED)
            resource_tracker.ensure_running()  # it unblocks signals when it starts
        with _stop_signals_blocked(), self._death_explained():
            batches = super().__iter__()
        return self._checked(batches)

    def _checked(self, batches: Iterator) -> Iterator[Batch]:
        handed = self.batch_sampler.out
        while True:
            try:
                # Without processes the batch is yet to be chosen: `_Batches` names its files.
                files = self.dataset.files_of(handed[0][1]) if handed else ()
                with now.reading(files), self._death_explained():
                    batch = next(batches)
            except StopIteration:
                return
            handed.popleft()
            if isinstance(batch, UserError):
                raise batch
            yield batch

    @contextmanager
    def _death_explained(self):
        try:
            yield
        except RuntimeError as error:
            if said := self._explained(error):
                raise said from None
            raise
        except (ConnectionError, EOFError):  # a batch whose process died before it was fetched
            raise self._explained(self._find_dead()) or UserError(
                "a loader process broke off; lower --workers, or --workers 0 for none"
            ) from None

    def _find_dead(self) -> RuntimeError:
        """In torch's words, which processes are gone; the news of it may still be on its way."""
        workers = [] if self._iterator is None else self._iterator._workers
        gone = wait([worker.sentinel for worker in workers], timeout=5)
        pids = ", ".join(str(worker.pid) for worker in workers if worker.sentinel in gone)
        return RuntimeError(f"DataLoader worker (pid(s) {pids}) exited unexpectedly")

    def _explained(self, error: BaseException | None) -> UserError | None:
        """Torch's error about processes of this loader that are gone, with the files they had."""
        match = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        if not match:
            return None
        dead = {int(pid) for pid in match[1].split(",")}
        workers = [] if self._iterator is None else self._iterator._workers
        # Torch deals batches to its processes in turn.
        turns = {turn for turn, worker in enumerate(workers) if worker.pid in dead}
        if workers and not turns:
            return None  # another loader's
        out = self.batch_sampler.out if turns else ()
        lost = [keys for number, keys in out if number % len(workers) in turns]
        files = _shorten([file for keys in lost for file in self.dataset.files_of(keys)])
        return UserError(
            f"a loader process died ({str(error).splitlines()[0].strip()})"
            + (f", which had {files} to read" if files else "")
            + "; if memory or shared memory (/dev/shm) is short, lower --workers, or --workers 0 "
            "for none"
        )


def _shorten(files: Sequence[str]) -> str:
    more = len(files) - _NAMED_FILES
    return ", ".join(files[:_NAMED_FILES]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _stop_signals_blocked():
    """Processes started inside inherit the block; a signal to this one waits until the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_: int) -> None:
    sys.excepthook = _tell_of_error
    cv2.setNumThreads(0)  # torch sets its own to 1; more would compete with the other processes
    threading.Thread(target=_end_when_told_by_parent, daemon=True).start()


def _tell_of_error(kind: type, error: BaseException, traceback) -> None:
    """As Python does; but a killed parent, whose question about a tensor breaks off, is no error of
    this process. A thread of multiprocessing's tells of it here."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _end_when_told_by_parent() -> None:
    """End this process at a SIGTERM whose sender is the process that uses the loader, or when that
    is gone.

    The first is how multiprocessing ends what is left over when a program exits; it then waits for
    it. A killed parent leaves its children to another process; a fork server ends with its owner.
    """
    parent, born_of = multiprocessing.parent_process().pid, os.getppid()
    while os.getppid() == born_of:
        told = signal.sigtimedwait({signal.SIGTERM}, _GLANCE)
        if told and told.si_pid == parent:
            break
    os._exit(0)


def _as_it_is(batch):
    return batch
