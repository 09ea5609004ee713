"""Calls made beside the caller: their order, their bound, their errors."""

import threading

import pytest

from samtune import threads as threads_module
from samtune.errors import UserError
from samtune.threads import InOrder


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_are_taken_in_the_order_of_the_calls(threads):
    """The later calls end first."""
    ends, taken = [threading.Event() for _ in range(12)], []
    for end in ends if not threads else ends[-3:]:
        end.set()

    def call(index):
        assert ends[index].wait(20)
        if threads == 3:  # each lets the one before it go
            ends[index - 1].set()
        return index

    work = InOrder(threads, taken.append)
    for index in range(12) if threads != 3 else (9, 10, 11):
        ends[index].set() if threads == 1 else None
        work.put(call, index)
    work.finish()
    assert taken == (list(range(12)) if threads != 3 else [9, 10, 11])


def test_no_more_calls_are_pending_than_the_bound_allows(monkeypatch):
    monkeypatch.setattr(threads_module, "PENDING_BYTES", 100)
    taken = []
    work = InOrder(2, taken.append)
    pending = []
    for index, size in enumerate([30] * 5 + [1] * 20 + [400, 400]):
        work.put(int, index, size=size)
        pending.append((len(work.pending), work.held))
    assert max(count for count, _ in pending[:5]) == 3  # 30 bytes each, of 100
    assert max(count for count, _ in pending) == 8  # four calls a thread
    assert pending[-1] == (1, 400), "one that is larger than the bound runs alone"
    work.finish()
    assert taken == list(range(27)) and work.held == 0


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_is_raised_when_its_turn_comes_and_nothing_is_taken_after_it(threads):
    def call(index):
        if index == 2:
            raise UserError("c.png cannot be written")
        return index

    taken = []
    work = InOrder(threads, taken.append)
    with pytest.raises(UserError, match=r"c\.png"):
        for index in range(30):
            work.put(call, index)
        work.finish()
    assert taken == [0, 1]


def test_an_interrupt_lets_go_of_what_is_pending():
    hold = threading.Event()

    def interrupted(result):
        raise KeyboardInterrupt

    work = InOrder(1, interrupted)
    work.put(int)
    work.put(hold.wait, 20)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(8):
            work.put(int)
    assert not work.pending
    hold.set()
