"""Processes are killed, hang or fail at any step: all leave, one message says why, nothing is lost.

After each fault the run goes on from what it had saved, and ends as if nothing had happened.
"""

import os
import random
import re
import signal
import time

import pytest
import torch
from engine_standins import same
from rank_faults import EPOCHS, STEPS, Ranks, die, draw_pictures, hang, import_all, training

from samtune.activity import now
from samtune.engine import distributed
from samtune.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_USER_ERROR, UserError

SOON = 0.05  # minutes, of --timeout
BAD = 7  # the image that faults are about, from the second epoch on


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "images"
    draw_pictures(folder)
    import_all()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pictures):
    """What each rank of an uninterrupted run has at its end."""
    folder = tmp_path_factory.mktemp("whole")
    ranks = Ranks(folder, training(folder / "run", pictures))
    ranks.wait()
    assert ranks.codes == [0, 0], ranks.said
    return [torch.load(folder / f"run/done{rank}.pt") for rank in (0, 1)]


@pytest.fixture
def faulty(tmp_path, pictures):
    """Launches the training of a run folder; a fault is one of `training`'s arguments."""

    def launch(timeout=5.0, **faults) -> Ranks:
        ranks = Ranks(tmp_path, training(tmp_path / "run", pictures, **faults), timeout=timeout)
        ranks.wait()
        return ranks

    return launch


@pytest.fixture
def goes_on(tmp_path, pictures, whole):
    """Checks that the run, launched again, ends as the uninterrupted one, bit for bit."""

    def check() -> None:
        again = Ranks(tmp_path / "again", training(tmp_path / "run", pictures))
        again.wait()
        assert again.codes == [0, 0], again.said
        for rank in (0, 1):
            assert same(whole[rank], torch.load(tmp_path / f"run/done{rank}.pt"))

    return check


def at(step, rank, what):
    return lambda r, s: what() if (r, s) == (rank, step) else None


def on_bad(what):
    return lambda key: what() if (key.epoch, key.index) == (1, BAD) else None


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_rank(seed, faulty, goes_on):
    """kill -9 at any step: the other one says who is gone, where it was last, and how to go on."""
    draw = random.Random(seed)
    rank, step = draw.randrange(2), draw.randint(1, EPOCHS * STEPS)
    ranks = faulty(before_step=at(step, rank, die), workers=seed % 2)
    assert ranks.codes[rank] is None and ranks.codes[1 - rank] == EXIT_LOST, ranks.said
    said = re.search(
        rf"rank {rank} (on \S+, last seen at .*, )?ended without a word \(killed\?\) while rank "
        rf"{1 - rank} was at step \d+ \(epoch \d\)", ranks.error
    )  # fmt: skip
    assert said, ranks.error
    assert ("--resume" if step > STEPS else "no state to go on with yet") in ranks.error
    goes_on()


def test_ranks_that_are_started_again_do_not_wait_for_the_dead(tmp_path, monkeypatch):
    """torchrun keeps its store, with the addresses of those that were killed, and rank 0 is first
    to read them. Which of two ranks connects to the other is chance, so there are several starts.
    """
    begin = distributed.start

    def start(timeout):
        if os.environ["RANK"] == "1":
            time.sleep(0.3)
        return begin(timeout)

    def work(process):
        distributed.barrier()
        if os.environ["TORCHELASTIC_RESTART_COUNT"] != "4":
            die()

    monkeypatch.setattr(distributed, "start", start)
    ranks = Ranks(tmp_path, work, starts=5)
    ranks.wait()
    assert ranks.codes == [0, 0], ranks.said


def test_of_three_ranks_the_killed_one_is_named(tmp_path, pictures):
    """The others lose each other too, and must not be taken for dead."""
    ranks = Ranks(tmp_path, training(tmp_path / "run", pictures, before_step=at(3, 1, die)), 3)
    ranks.wait()
    assert ranks.codes == [EXIT_LOST, None, EXIT_LOST]
    assert ranks.error.startswith("error: rank 1 on ") and ranks.error.count(" on ") == 2


@pytest.mark.slow  # on a busy machine a rank now and then dies of the signal: open
@pytest.mark.parametrize("seed", range(2))
def test_a_killed_launcher(seed, faulty, goes_on, monkeypatch):
    """Its ranks notice that they are orphans, save in the middle of an epoch, and leave."""
    step = random.Random(seed).randint(1, EPOCHS * STEPS - 1)
    signals, receive = [], distributed.StopSignal._receive
    monkeypatch.setattr(
        distributed.StopSignal,
        "_receive",
        lambda self, number, frame: (signals.append(number), receive(self, number, frame)),
    )

    def kill_launcher():
        os.kill(os.getppid(), signal.SIGKILL)
        while not signals:
            time.sleep(0.01)

    ranks = faulty(before_step=at(step, 0, kill_launcher), workers=1)
    assert ranks.codes == [EXIT_INTERRUPTED] * 2, ranks.said
    assert "Traceback" not in ranks.said
    assert ranks.said.count("torchrun is gone") == ranks.said.count("everything is saved") == 1
    goes_on()


@pytest.mark.parametrize("world", [1, 2])
def test_a_rank_that_hangs_is_named_with_its_step(tmp_path, pictures, world):
    """In its main thread, while the other one waits for it in a collective."""
    last = world - 1
    work = training(tmp_path / "run", pictures, before_step=at(8, last, hang))
    ranks = Ranks(tmp_path, work, world, timeout=SOON)
    ranks.wait()
    assert ranks.codes == [EXIT_LOST] * world
    who = rf"rank {last} on \S+ is at" if world == 2 else "the process is at"
    epoch = 2 if world == 2 else 1
    assert re.match(
        rf"error: nothing has moved for 0.05 minutes \(--timeout\): {who} step 8 \(epoch {epoch}\)"
        + ("; the others wait" if world == 2 else ""),
        ranks.error,
    ), ranks.error


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_hangs_is_told_with_its_files(workers, faulty, goes_on):
    ranks = faulty(SOON, fault=on_bad(hang), workers=workers)
    assert ranks.codes == [EXIT_LOST] * 2, ranks.said
    said = re.search(r"rank \d on \S+ is at step \d+ \(epoch 2\), waiting for (.*?);", ranks.error)
    assert said and f"/s{BAD}.png" in said[1], ranks.error
    goes_on()


def test_a_killed_loader_process_is_told_with_its_files(faulty, goes_on):
    """As by a lack of memory, wherever the training is when torch raises it."""
    ranks = faulty(fault=on_bad(die), workers=1)
    assert sorted(ranks.codes) == [EXIT_USER_ERROR, EXIT_LOST], ranks.said
    assert "a loader process died" in ranks.error and f"/s{BAD}.png" in ranks.error
    assert "--workers" in ranks.error
    goes_on()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_goes_missing(workers, faulty, goes_on, pictures):
    image, aside = pictures / f"s{BAD}.png", pictures / "aside"
    try:
        ranks = faulty(fault=on_bad(lambda: image.rename(aside) and None), workers=workers)
        assert sorted(ranks.codes) == [EXIT_USER_ERROR, EXIT_LOST], ranks.said
        assert ranks.error == f"error: {image}: there is no such file"
    finally:
        aside.rename(image)
    goes_on()


def test_a_defect_in_a_loader_process_names_the_files(faulty, goes_on):
    """It keeps its traceback, for it is to be reported; all leave nevertheless."""
    ranks = faulty(fault=on_bad(lambda: 1 / 0), workers=1)
    assert sorted(ranks.codes) == [1, EXIT_LOST]
    assert ranks.said.count("Traceback (most recent call last)") == 2, "the loader's and the rank's"
    assert re.search(rf"division by zero \(while reading .*s{BAD}.png", ranks.said)
    goes_on()


def test_a_nan_on_one_rank(faulty, goes_on):
    ranks = faulty(fault=on_bad(lambda: float("nan")))
    assert ranks.codes == [EXIT_USER_ERROR] * 2
    assert re.match(
        rf"error: step \d+ \(epoch 2\): bce not finite for images/s{BAD}.png", ranks.error
    )
    goes_on()


def test_slow_work_of_rank_0_is_no_hang(faulty):
    """Longer than --timeout, while the other rank waits: it says now and then that it goes on."""
    pieces = [f"piece {number}" for number in range(4)]

    def validate(rank):
        while rank == 0 and pieces:
            now.turns_to(pieces.pop())
            time.sleep(0.4 * 60 * SOON)

    ranks = faulty(SOON, validate=validate)
    assert ranks.codes == [0, 0], ranks.said


def test_a_rank_that_cannot_leave_is_ended_after_another_failed(tmp_path):
    """Its main thread hangs elsewhere, say on a GPU, and sees no broken connection."""

    def work(process):
        if process.rank == 0:
            raise UserError("this image is broken")
        hang()

    ranks = Ranks(tmp_path, work)
    ranks.wait()
    assert ranks.codes == [EXIT_USER_ERROR, EXIT_LOST]
    assert ranks.error == "error: this image is broken"


def test_a_rank_from_which_nothing_is_heard(tmp_path):
    """Frozen, or on a machine that is gone: no connection breaks, but its signs of life end."""

    def freeze(process):
        if process.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        hang()

    ranks = Ranks(tmp_path, freeze, SILENCE=2.0)
    deadline = time.monotonic() + 300
    try:
        while ranks.codes[0] is None:
            assert time.monotonic() < deadline, ranks.said
            time.sleep(0.05)
    finally:
        os.kill(ranks.pid(1), signal.SIGCONT)
    ranks.wait()
    assert ranks.codes == [EXIT_LOST] * 2
    assert "rank 1" in ranks.error and "ended without a word" in ranks.error
