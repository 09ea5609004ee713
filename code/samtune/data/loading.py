"""Batches, prepared by loader processes while the model is at work.

How they are started. Forking is quick, and what the parent has imported is there already. But a
process that holds a CUDA context or NCCL's threads must not be forked (PyTorch says so of NCCL in
the notes to DistributedDataParallel). So on a GPU the loader processes are forked from a fork
server instead: a clean process that has imported the heavy packages once and stays for the run.

Signals. `torchrun` sends SIGTERM, and a terminal Ctrl-C, to the whole process group, so also to the
loader processes; if those died, the step that the training process wants to finish before it saves
would fail. They start with these signals blocked, and obey a SIGTERM of the training process only.

How they end. They stay from one iteration to the next, so that no epoch starts new ones. `close`
ends them, also while an iteration is under way; what they had prepared is dropped.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from samtune.data.datasets import SampleKey, collate
from samtune.errors import UserError
from samtune.structures import Batch

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
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
        batch_sampler=batches,
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


class _Batches(Dataset):
    """Whole batches; a UserError is handed over as a value, for torch would wrap what is raised."""

    def __init__(self, dataset: Dataset, collate: Callable[[Sequence], Any]):
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[SampleKey]) -> Batch | UserError:
        try:
            if hasattr(self.dataset, "__getitems__"):  # torch's name for a batch at once
                return self.collate(self.dataset.__getitems__(keys))
            return self.collate([self.dataset[key] for key in keys])
        except UserError as error:
            return error


class Loader(DataLoader):
    """Raises the errors that `_Batches` hands over, and says why a loader process died.

    `contextlib.closing` ends its processes with the work; else they end with the loader.
    """

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
        with _stop_signals_blocked(), _death_explained():
            batches = super().__iter__()
        return self._checked(batches)

    def _checked(self, batches: Iterator) -> Iterator[Batch]:
        while True:
            try:
                with _death_explained():
                    batch = next(batches)
            except StopIteration:
                return
            if isinstance(batch, UserError):
                raise batch
            yield batch


@contextmanager
def _death_explained():
    """Turn torch's error about a loader process that is gone into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a loader process died ({str(error).splitlines()[0]}); if memory or shared memory "
            "(/dev/shm) is short, lower --workers, or --workers 0 for none"
        ) from None


@contextmanager
def _stop_signals_blocked():
    """Processes started inside inherit the block; a signal to this one waits until the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # torch sets its own to 1; more would compete with the other processes
    threading.Thread(target=_end_when_told_by_parent, daemon=True).start()


def _end_when_told_by_parent() -> None:
    """End this process at a SIGTERM whose sender is the process that uses the loader.

    That is how multiprocessing ends what is left over when a program exits; it then waits for it.
    """
    parent = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _as_it_is(batch):
    return batch
