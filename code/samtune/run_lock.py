"""Who works in a run's folder: one run at a time, and which launch started it.

`.lock` in the folder is locked by rank 0 for as long as it works there, and says who that is. The
operating system frees the lock when the process ends, however it ends. What the file says stays: a
launcher that starts its processes again (`torchrun --max-restarts`) finds by it the run that they
were at, also where the folder's name was made up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from samtune.errors import UserError

NAME = ".lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)  # as systems say it


def launch_name() -> str:
    """The launcher that started this process, told from all others by when it started; "" where
    torchrun did not start it, or the system does not say.

    Neither a clock nor a setting is asked: not the wall clock, which may jump, nor torchrun's run
    id, which may be the same in every launch, nor its count of restarts, which leaves some out.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    parent = os.getppid()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
    return f"{boot} {parent} {started}"  # ticks since the machine started


def launches_in(folder: Path) -> list[str]:
    """The launches (one per machine) of the run that was started last in this folder.

    Not for the process that holds the lock: reading the file would free it.
    """
    return _read(folder / NAME).get("launches", [])


class RunLock:
    """Holds a folder, until `release` or the process's end.

    A POSIX record lock: it reaches over NFS, and forked loader processes do not inherit it, which
    may outlive a killed rank by seconds. Closing any other handle of this process on the file would
    free it, so nothing here opens it twice.
    Raises UserError if another process holds the folder or the file cannot be written; where the
    file system has no locks, `warning` says so.
    """

    def __init__(self, folder: Path):
        self.folder, self.path, self.warning = folder, folder / NAME, ""
        self._is_new = not self.path.exists()
        try:
            self._file = open(self.path, "a+")  # noqa: SIM115 (held until `release`)
        except OSError as error:
            raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                self._file.close()
                raise UserError(_told(folder, _read(self.path))) from None
            self.warning = (
                f"warning: the disk of {folder} does not lock files ({error.strerror}): take care "
                "that no other run writes there"
            )

    def sign(self, launches: Sequence[str]) -> None:
        """Say who holds the folder. launches: `launch_name` of each machine."""
        mine = {"host": platform.node(), "process": os.getpid(), "launches": list(launches)}
        try:
            self._file.truncate(0)
            self._file.write(json.dumps(mine) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None

    def release(self) -> None:
        """Let others work in the folder."""
        self._file.close()

    def withdraw(self) -> None:
        """Release, and leave no trace: what was to be a run has not become one."""
        if self._is_new:
            self.path.unlink(missing_ok=True)
        self.release()


def _told(folder: Path, holder: dict) -> str:
    return (
        f"--output_dir {folder}: another run is at work there (process "
        f"{holder.get('process', '?')} on {holder.get('host', '?')}); wait for its end, stop it, "
        "or choose another folder"
    )


def _read(path: Path) -> dict:
    """What a lock says; nothing where it is missing or unreadable."""
    with contextlib.suppress(OSError, ValueError):
        said = json.loads(path.read_text())
        if isinstance(said, dict):
            return said
    return {}
