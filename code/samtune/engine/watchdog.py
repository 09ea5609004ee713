"""No run hangs: beside each rank a thread watches that work goes on, and ends it where it does not.

A rank that is killed, or stuck in a driver, a loader or a disk that does not answer, leaves the
others in a collective, where no Python runs. So a thread of each rank publishes what the rank does
(`activity.now`) on the board that the ranks share, looks at that of the next rank, and ends its own
process where nothing can come any more. One rank says why, and who is behind.

What takes long is no hang. Time counts from the latest move of any rank, and all that may take long
moves: steps and batches of every kind, each file that is checked, and what rank 0 does alone (a
line of the log, a picture, the end of a W&B run) says so when it begins.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any, TypeVar

from samtune.activity import now
from samtune.engine import distributed
from samtune.engine.distributed import Process
from samtune.errors import EXIT_LOST
from samtune.run_folder import RunFolder

Answer = TypeVar("Answer")
Note = Mapping[str, Any]  # what a rank publishes, see `Watchdog._note`

BEAT = 1.0  # seconds between two looks
SILENCE = 120.0  # seconds without a sign of the next rank, or of the board: it is gone
FAREWELL = 90.0  # seconds to leave in after another rank has failed; a W&B run may end meanwhile
ROLL_CALL = 5.0  # seconds in which a rank that lives shows itself
_ANSWER = 10.0  # seconds that the board, a disk or the terminal may take to answer
_NAMED_FILES = 8


class Watchdog(AbstractContextManager):
    """Entered by every rank, for as long as it works. timeout: minutes without any move.

    It ends the process with `EXIT_LOST`. Where torchrun itself is gone, the process gets a SIGTERM
    instead, as from torchrun: a training saves its state and stops.
    """

    def __init__(self, process: Process, timeout: float):
        self.process, self.limit, self.board = process, 60 * timeout, distributed.board()
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._orphan = False
        self._beats, self._moves = 0, now.moves
        self._next_beats = 0  # of the next rank
        # How long, in seconds: no move of this rank, no sign of the next one, no word from the
        # board; and since when another rank has failed.
        self._still = self._silent = self._cut = self._failed = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        """This rank leaves, and says so: its silence means nothing from now on."""
        self._stop.set()
        self._thread.join(_ANSWER)
        if self.board is not None:
            _answer(lambda: self._publish(left=True))

    def _watch(self) -> None:
        if self.board is not None:
            _answer(self._publish)  # who is killed within the first beat has a name already
        before = time.monotonic()
        while not self._stop.wait(BEAT):
            passed = time.monotonic() - before
            before += passed
            self._look(min(passed, 2 * BEAT))  # who was stopped for a while (Ctrl-Z) was not stuck

    def _look(self, passed: float) -> None:
        """passed: seconds since the look before."""
        self._beats += 1
        self._still = self._still + passed if now.moves == self._moves else 0.0
        self._moves = now.moves
        if self._launcher and os.getppid() != self._launcher:
            self._launcher, self._orphan = None, True
            self._obey()
        if self.board is not None:
            self._listen(passed)
        if self._still > self.limit and not self._others_move():
            self._end(self._stuck)

    def _listen(self, passed: float) -> None:
        """Exchange signs of life, and leave where the others are gone."""
        asked = time.monotonic()
        heard = _answer(self._exchange)
        self._cut = self._cut + passed + time.monotonic() - asked if heard is None else 0.0
        if self._cut > SILENCE and not self._orphan:
            self._end(lambda: f"no word from {os.environ['MASTER_ADDR']} any more. {_advice()}")
        if heard is None:
            return
        note, failed = heard
        beats = note["beats"] if note else 0
        alive = beats != self._next_beats or (note and note["left"])
        self._silent, self._next_beats = 0.0 if alive else self._silent + passed, beats
        if self._silent > SILENCE:
            self._end(lambda: self._gone({self._next: note}))
        self._failed = self._failed + passed if failed else 0.0
        if min(self._failed, self._still) > FAREWELL:  # it has spoken; this rank cannot leave
            os._exit(EXIT_LOST)

    @property
    def _next(self) -> int:
        return (self.process.rank + 1) % self.process.world

    def _exchange(self) -> tuple[Note | None, int]:
        """The next rank's note, and how many ranks have failed."""
        self._publish()
        return self._read(self._next), self.board.add("failed", 0)

    def _publish(self, left: bool = False) -> None:
        self.board.set(f"rank {self.process.rank}", json.dumps(self._note(left)))

    def _read(self, rank: int) -> Note | None:
        key = f"rank {rank}"
        return json.loads(self.board.get(key)) if self.board.check([key]) else None

    def _note(self, left: bool = False) -> dict[str, Any]:
        """What this rank does. still: seconds without a move. left: has it gone in good order?"""
        files = [str(file) for file in now.files]
        return {
            "beats": self._beats, "still": self._still, "left": left, "host": platform.node(),
            "position": now.position(), "doing": now.doing, "reads": now.reads, "waits": now.waits,
            "files": files[:_NAMED_FILES], "more": len(files[_NAMED_FILES:]),
        }  # fmt: skip

    def _notes(self) -> dict[int, Note | None]:
        """Those of the other ranks."""
        return {r: self._read(r) for r in range(self.process.world) if r != self.process.rank}

    def _others_move(self) -> bool:
        notes = (_answer(self._notes) or {}) if self.board is not None else {}
        return any(n and not n["left"] and n["still"] <= self.limit for n in notes.values())

    def _obey(self) -> None:
        """The launcher is gone, and with it whoever would end this process. End as it asks to."""
        if self.process.local_rank == 0:
            _say("torchrun is gone: the run ends; a training saves its state first")
        os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, why: Callable[[], str]) -> None:
        """End this process; the first rank to come here says why."""
        why = _answer(why) or "another process does not answer any more"
        speaks = _answer(distributed.first_to_fail)
        if speaks or (speaks is None and self.process.local_rank == 0):
            _say(f"error: {why}")
        else:
            time.sleep(ROLL_CALL)  # torchrun would end the one that speaks
        os._exit(EXIT_LOST)

    def _stuck(self) -> str:
        """Nothing moves: who is behind, and where."""
        notes = {self.process.rank: self._note()}
        if self.board is not None:
            notes |= {r: n for r, n in self._notes().items() if n and not n["left"]}
        least = min(note["position"] for note in notes.values())
        behind = {rank: note for rank, note in notes.items() if note["position"] == least}
        who = "; ".join(f"{self._name(r, n)} is at {_in_words(n)}" for r, n in behind.items())
        others = "; the others wait" if len(behind) < len(notes) else ""
        return (
            f"nothing has moved for {self.limit / 60:g} minutes (--timeout): {who}{others}. "
            + _advice()
        )

    def _gone(self, notes: Mapping[int, Note | None]) -> str:
        """notes: the last ones of ranks from which nothing is heard."""
        who = " and ".join(
            self._name(rank, note) + (f", last seen at {_in_words(note)}," if note else "")
            for rank, note in notes.items()
        )
        return (
            f"{who} ended without a word (killed?) while rank {self.process.rank} was at "
            f"{_in_words(self._note())}. {_advice()}"
        )

    def _name(self, rank: int, note: Note | None) -> str:
        if self.process.world == 1:
            return "the process"
        return f"rank {rank} on {note['host']}" if note else f"rank {rank}"

    def account(self, error: Exception) -> str:
        """What became of the others, now that a collective failed with `error`.

        Waits until each has shown itself or was silent for too long. After this rank has left.
        """
        silent = (_answer(self._notes) or {}) if self.board is not None else {}
        deadline = time.monotonic() + ROLL_CALL
        while silent and time.monotonic() < deadline:
            time.sleep(BEAT / 2)
            notes = _answer(self._notes) or {}
            silent = {
                rank: before
                for rank, before in silent.items()
                if not (note := notes.get(rank)) or not (note["left"] or _newer(note, before))
            }
        if silent:
            return self._gone(silent)
        return (
            f"the processes lost each other while rank {self.process.rank} was at "
            f"{_in_words(self._note())} ({str(error).splitlines()[0]}). {_advice()}"
        )


def _newer(note: Note, before: Note | None) -> bool:
    return before is None or note["beats"] != before["beats"]


def _in_words(note: Note) -> str:
    files = ", ".join(note["files"]) + (f" and {note['more']} more" if note["more"] else "")
    if note["waits"]:
        return f"{note['doing']}, waiting for the others"
    if note["reads"]:
        return f"{note['doing']}, waiting for {files or 'its images'}"
    return f"{note['doing']} with {files}" if files else note["doing"]


def _advice() -> str:
    """How to go on."""
    if not now.run:
        return "Nothing was lost: launch it again"
    if not RunFolder(now.run).states():
        return f"{now.run} holds no state to go on with yet: launch it again"
    return f"What is in {now.run} is whole: --resume {now.run} goes on from it"


def _say(text: str) -> None:
    _answer(lambda: print(text, file=sys.stderr, flush=True))


def _answer(ask: Callable[[], Answer]) -> Answer | None:
    """What `ask` returns; None where it fails, or does not answer in time."""
    answers = []

    def run() -> None:
        with suppress(RuntimeError, OSError):
            answers.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_ANSWER)
    return answers[0] if answers else None
