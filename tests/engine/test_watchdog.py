"""When a watchdog bites, whom it names, and what it takes for slow only."""

import json
import os
import signal

import pytest
import torch

from samtune.activity import Activity
from samtune.engine import distributed, watchdog
from samtune.engine.distributed import Process
from samtune.engine.logbook import Logbook
from samtune.engine.watchdog import Watchdog
from samtune.errors import EXIT_LOST

CPU = torch.device("cpu")


class Board(dict):
    """The store that ranks share, as far as it is used."""

    dead = False

    def check(self, keys):
        if self.dead:
            raise RuntimeError("Connection reset by peer")
        return all(key in self for key in keys)

    def get(self, key):
        return self[key].encode()

    def set(self, key, value):
        self.check([])
        self[key] = value

    def add(self, key, amount):
        self.check([])
        self[key] = dict.get(self, key, 0) + amount
        return self[key]


class Bitten(BaseException):
    """In place of the end of the process; holds the exit code."""


@pytest.fixture
def ranks(monkeypatch):
    """Looks of the watchdogs of three ranks, with a minute's time-out, without any waiting."""
    board, dogs = Board(), {}

    def leave(code):
        raise Bitten(code)

    monkeypatch.setattr(distributed, "_board", board)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(watchdog, "ROLL_CALL", 0.0)

    def look(number, activity=None, seconds=1.0, times=1, world=3):
        """Looks of rank `number`, which is at `activity`, `seconds` after each other."""
        if number not in dogs:
            dogs[number] = Watchdog(Process(number, world, number, CPU), timeout=1)
        monkeypatch.setattr(watchdog, "now", activity or Activity())
        for _ in range(times):
            dogs[number]._look(seconds)
        return dogs[number]

    look.board = board
    return look


def at_step(step, files=()):
    activity = Activity()
    activity.reaches(step, f"step {step} (epoch 1)")
    activity.files = list(files)
    return activity


def test_the_rank_that_the_others_wait_for_is_named_with_step_and_files(ranks, capsys):
    """It waits for its batch; another one computes the step, the third is in a collective."""
    stuck, computing, waiting = at_step(12, ["a.png", "b.png"]), at_step(12, ["d.png"]), at_step(12)
    stuck.reads = waiting.waits = True
    for number, activity in enumerate((computing, stuck, waiting)):
        ranks(number, activity)
    ranks(0, computing, seconds=61), ranks(2, waiting, seconds=61)
    assert capsys.readouterr().err == "", "rank 1 may still move"
    with pytest.raises(Bitten, match=str(EXIT_LOST)):
        ranks(1, stuck, seconds=61)
    said = capsys.readouterr().err
    assert said.startswith("error: nothing has moved for 1 minutes (--timeout): rank 1 on ")
    assert "is at step 12 (epoch 1), waiting for a.png, b.png; the others wait" in said
    assert "rank 0" not in said and "rank 2" not in said


def test_while_another_rank_moves_nobody_is_stuck(ranks):
    slow = at_step(3)
    for moves in range(200):
        ranks(0, Activity(moves=moves))
        ranks(1, slow)
        ranks(2, slow)
    ranks(0, at_step(9))
    with pytest.raises(Bitten, match=str(EXIT_LOST)):
        ranks(0, at_step(9), seconds=61)


def test_only_the_first_speaks(ranks, capsys):
    stuck = at_step(3)
    ranks(0, stuck), ranks(1, stuck), ranks(0, stuck, seconds=61)
    for number in (1, 0):
        with pytest.raises(Bitten, match=str(EXIT_LOST)):
            ranks(number, stuck, seconds=61)
    assert capsys.readouterr().err.count("error: ") == 1


def test_a_silent_neighbour_is_missed_unless_it_took_its_leave(ranks, capsys):
    ranks(1, at_step(5, ["c.png"]))
    moving = iter(range(1000))
    for _ in range(119):
        ranks(0, Activity(moves=next(moving)))
    ranks(1, at_step(6, ["d.png"]))  # a late sign of life
    for _ in range(121):
        ranks(0, Activity(moves=next(moving)))
    with pytest.raises(Bitten, match=str(EXIT_LOST)):
        ranks(0, Activity(moves=next(moving)))
    said = capsys.readouterr().err
    assert "rank 1 on " in said and "last seen at step 6 (epoch 1) with d.png" in said


def test_who_took_its_leave_is_not_missed(ranks):
    ranks(1, at_step(5))._publish(left=True)
    assert json.loads(ranks.board["rank 1"])["left"]
    for moves in range(300):
        ranks(0, Activity(moves=moves))


def test_after_another_rank_failed_there_is_time_to_leave_and_nothing_to_say(ranks, capsys):
    ranks(1, Activity())._publish(left=True)
    ranks(0, Activity()).limit = 1000
    distributed.first_to_fail()
    for moves in range(200):
        ranks(0, Activity(moves=moves))
    ranks(0, stuck := at_step(7), times=50)
    with pytest.raises(Bitten, match=str(EXIT_LOST)):
        ranks(0, stuck, times=50)
    assert capsys.readouterr().err == ""


def test_without_the_board_a_rank_ends_but_an_orphan_may_save(ranks, monkeypatch, capsys):
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    signals = []
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append(number))
    monkeypatch.setattr(os, "getppid", lambda: 1)
    ranks(1, Activity())
    ranks(0, Activity())._launcher = 77
    ranks.board.dead = True
    for moves in range(200):
        ranks(0, Activity(moves=moves))
    assert signals == [signal.SIGTERM], "once, as from torchrun"
    assert capsys.readouterr().err.count("torchrun is gone") == 1
    with pytest.raises(Bitten, match=str(EXIT_LOST)):
        for moves in range(200):
            ranks(1, Activity(moves=moves))


def test_one_process_alone_is_watched_too(monkeypatch, ranks, capsys):
    monkeypatch.setattr(distributed, "_board", None)
    with pytest.raises(Bitten, match=str(EXIT_LOST)):
        ranks(0, at_step(2, ["a.png"]), times=62, world=1)
    assert "(--timeout): the process is at step 2 (epoch 1) with a.png." in capsys.readouterr().err


def test_the_advice_names_the_run_and_what_it_holds(ranks, tmp_path, monkeypatch):
    activity = Activity(run=str(tmp_path))
    monkeypatch.setattr(watchdog, "now", activity)
    assert "no state to go on with yet" in watchdog._advice()
    (tmp_path / "last.pt").touch()
    assert f"--resume {tmp_path} goes on" in watchdog._advice()


def test_many_files_are_named_in_part():
    note = {"files": list("abc"), "more": 5, "doing": "step 1", "waits": False, "reads": False}
    assert watchdog._in_words(note) == "step 1 with a, b, c and 5 more"


def test_positions_tell_who_is_behind():
    """Reading before computing, computing before waiting, an earlier step before a later one."""
    reading, computing, waiting, later = (at_step(4, ["a"]) for _ in range(4))
    reading.reads, waiting.waits = True, True
    later.reaches(5, "step 5")
    order = [reading, computing, later, waiting]
    assert sorted([waiting, later, computing, reading], key=Activity.position) == order


def test_notes_of_progress_bars_move_and_are_taken_back(monkeypatch):
    """Ranks that do not speak note the same."""
    from samtune.engine import logbook

    for rank in (0, 1):
        activity = Activity()
        monkeypatch.setattr(logbook, "now", activity)
        with Logbook.console(Process(rank, 2, rank, CPU)).progress(3, "checking", "file") as bar:
            bar.update(1)
            bar.update(1)
        assert (activity.work, activity.done, activity.moves) == (1, 2, 3)
        assert activity.doing == "checking: file 2 of 3"
    with activity.reading(["a.png"]):
        assert activity.reads and activity.position()[3] == 0
    assert not activity.reads and activity.position()[3] == 1
    with pytest.raises(ZeroDivisionError), activity.waiting():
        assert activity.waits and activity.position()[0] == 1
        raise ZeroDivisionError
    assert not activity.waits
