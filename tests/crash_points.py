"""Faults of writing, made on purpose: a kill or a full disk at any moment of any file operation.

`in_fork` runs a function in a copy of this process. `Faults` counts what is done to files there (a
part of a file written, a flush to the disk, a new name, a link, a removal) and strikes at one.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from samtune.engine import durable

SKIP = 77  # exit code of a fork that could not do what it was to do
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000  # of linux/sched.h
_READ_ONLY, _REMOUNT, _BIND = 1, 32, 4096  # of linux/mount.h


def in_fork(function: Callable[[], object]) -> int:
    """What a copy of this process ended with after `function`: 0, 1 for an exception, minus the
    signal that killed it. Skips the test where it asked for that."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except SystemExit as wanted:
            code = wanted.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == SKIP:
        pytest.skip("this system lets nobody mount a disk of his own")
    return code


class Faults:
    """Strikes at the operation with number `at`, counted from 0; -1: never. `done` counts them."""

    def __init__(self, at: int, strike: Callable[[], None]):
        self.at, self.strike, self.done = at, strike, 0

    def __call__(self) -> bool:
        """Count an operation; True if it is to fail."""
        self.done += 1
        return self.done - 1 == self.at

    def wrapped(self, operation: Callable) -> Callable:
        def counted(*arguments, **options):
            if self():
                self.strike()
            return operation(*arguments, **options)

        return counted


@contextmanager
def faults(monkeypatch, at: int, strike: Callable[[], None]):
    """Inside, what is done to files through `os` and `durable.Disk` counts, and one fails.

    A write that fails leaves half of its bytes.
    """
    counted = Faults(at, strike)

    class Failing(io.FileIO):
        def write(self, content):
            if counted():
                super().write(memoryview(content)[: len(content) // 2])
                strike()
            return super().write(content)

    durable.Disk.__bases__ = (Failing,)
    try:
        with monkeypatch.context() as patched:
            removals = () if strike is full_disk else ("unlink",)  # they need no room
            for name in ("fsync", "replace", "link", *removals):
                patched.setattr(os, name, counted.wrapped(getattr(os, name)))
            yield counted
    finally:
        durable.Disk.__bases__ = (io.FileIO,)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def mount(folder: Path, size: int = 0) -> None:
    """In a fork: put a disk of `size` bytes of its own on a folder; 0: make the folder read-only.

    Nobody else sees it, and it goes with the process. Leaves by `SKIP` where that is not allowed.
    """
    system, target = ctypes.CDLL(None, use_errno=True), str(folder).encode()
    if system.unshare(_NEW_MOUNTS) and system.unshare(_NEW_MOUNTS | _NEW_USER):
        raise SystemExit(SKIP)
    if size:
        failed = system.mount(b"none", target, b"tmpfs", 0, b"size=%d" % size)
    else:
        failed = system.mount(target, target, None, _BIND, None) or system.mount(
            b"none", target, None, _REMOUNT | _BIND | _READ_ONLY, None
        )
    if failed:
        raise SystemExit(SKIP)
