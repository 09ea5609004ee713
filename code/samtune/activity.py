"""What this process is doing now: noted as it goes on, read by who must say why nothing moves.

A note is a few assignments, without a lock and without a wait for the device. It is read by another
thread (`engine/watchdog.py`); one that is a moment old does no harm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Activity:
    """doing: in words, for people. files: of the batch at hand, or that is waited for. moves: grows
    with every note; while it stands still, so does the process. work, done: how many pieces of work
    were begun, and how far the latest is: ranks that work together count alike. reads: is the batch
    still to come? waits: is this process in a collective, for the others? run: the run's folder.
    """

    doing: str = "its start"
    files: Sequence[str] = ()
    moves: int = 0
    work: int = 0
    done: int = 0
    reads: bool = False
    waits: bool = False
    run: str = ""

    def begins(self, doing: str) -> None:
        """The next piece of work that every rank has."""
        self.work += 1
        self.reaches(0, doing)

    def reaches(self, done: int, doing: str) -> None:
        """The work goes on, and is here."""
        self.done, self.files = done, ()
        self.turns_to(doing)

    def turns_to(self, doing: str) -> None:
        """Something in between, which only some ranks have, and which may take long."""
        self.doing = doing
        self.moves += 1

    @contextmanager
    def reading(self, files: Sequence[str]) -> Iterator[None]:
        """Inside, a batch of these files is read or waited for; after it, they are at work."""
        self.files, self.reads = files, True
        self.moves += 1
        try:
            yield
        finally:
            self.reads = False
            self.moves += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this process waits for the others. Also a decorator."""
        self.waits = True
        self.moves += 1
        try:
            yield
        finally:
            self.waits = False
            self.moves += 1

    def position(self) -> list[int]:
        """Whose is the smallest is behind: the others wait for it."""
        has_batch = bool(self.files) and not self.reads
        return [int(self.waits), self.work, self.done, int(has_batch)]


now = Activity()
