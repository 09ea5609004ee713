"""The states from which a run can go on: the newest and some before it, each whole or not there.

`last.pt` is the newest, `last-1.pt` the one before it, and so on. While a new one is written all
others stay; their names move on only when it has been read back. A state that is damaged, however
that came about, is passed over for the one before, and that is said.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from samtune.engine.durable import checksum, require_written, write_atomically
from samtune.errors import UserError
from samtune.run_folder import RunFolder
from samtune.tensor_files import read_tensors

_CHECKSUM = "checksum"  # its name in a state's file


class RunStates:
    """The run states in a folder, of which the newest `keep` stay.

    Raises UserError if `keep` is less than 1.
    """

    def __init__(self, folder: RunFolder, keep: int = 2):
        if keep < 1:
            raise UserError(f"--keep {keep}: must be at least 1, the newest state")
        self.folder, self.keep = folder, keep
        self._damaged: set[Path] = set()

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a new state; it becomes the newest one, and the oldest of too many goes.

        Raises UserError if it cannot be written: then all others are as they were.
        """
        save_run_state(self.folder.last, state, before_naming=self._move_on)
        for path in self.folder.states()[self.keep :]:
            with contextlib.suppress(OSError):  # the next save tries again
                path.unlink()
        self._damaged.clear()

    def _move_on(self) -> None:
        """Give each state the name of the one before it; `last.pt` is there all the time."""
        whole = [path for path in self.folder.states() if path not in self._damaged]
        for age, path in reversed(list(enumerate(whole[: self.keep], 1))):
            older = self.folder.state(age)
            if path == self.folder.last:
                _also_call(path, older)
            elif path != older:
                os.replace(path, older)

    def load(self) -> tuple[dict[str, Any], Path, str]:
        """The newest state that is whole, where it lies, and a warning about newer ones, else "".

        Raises UserError if none is.
        """
        complaints = []
        for path in self.folder.states():
            try:
                state = load_run_state(path)
            except UserError as error:
                complaints.append(str(error))
                self._damaged.add(path)
                continue
            said = f"warning: {'; '.join(complaints)}; the run goes on from {path}, saved before it"
            return state, path, said if complaints else ""
        what = "; ".join(complaints) or "there is none"
        raise UserError(
            f"{self.folder.path} holds no state to go on from: {what}; start the run anew in "
            "another --output_dir"
        )


def save_run_state(
    path: str | Path, state: Mapping[str, Any], before_naming: Callable[[], Any] | None = None
) -> None:
    """Write a dict of tensors and plain values, with its checksum, atomically, and read it back.

    before_naming: called when the file is whole, before it gets its name.
    """
    expected = checksum(state)

    def check(written: Path) -> None:
        require_written(written, checksum(load_run_state(written)), expected)
        if before_naming:
            before_naming()

    content = {_CHECKSUM: expected, **state}
    write_atomically(path, lambda file: torch.save(content, file), check)


def load_run_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_run_state` wrote, on the CPU; files from before checksums as they are.

    Raises UserError if it is missing, damaged or something else.
    """
    try:
        state = read_tensors(path)
    except UserError:
        raise
    except Exception:  # no end of errors comes out of a pickle in which a byte is wrong
        raise UserError(f"{path} is damaged") from None
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{path} is not the state of a run")
    expected = state.pop(_CHECKSUM, None)
    if expected is not None and checksum(state) != expected:
        raise UserError(f"{path} is damaged: its content does not have the checksum it was given")
    return state


def _also_call(path: Path, name: Path) -> None:
    """Give a file a second name, which may be another's; without hard links its only one."""
    link = name.with_name(f".part.{name.name}")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without them
        os.replace(path, name)
        return
    try:
        os.replace(link, name)
    finally:
        with contextlib.suppress(OSError):
            link.unlink(missing_ok=True)  # it stays where both were names of one file
