"""What is measured of the steps, on a clock that the test moves."""

import math

import pytest
import torch

from samtune.engine.distributed import Process
from samtune.engine.throughput import Pace, StepMeter, peak_memory, speed_of_epoch

ALONE = Process(0, 1, 0, torch.device("cpu"))


class Clock:
    """Seconds pass where the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def batches(clock, seconds):
    """A loader that takes so long for each batch."""
    for one in seconds:
        clock.now += one
        yield one


def steps(meter, clock, waits, work=1.0, images=4):
    """An epoch whose steps wait, then work."""
    meter.start()
    for _ in meter.watch(batches(clock, waits)):
        clock.now += work
        meter.step(images)


def test_waiting_is_told_from_working():
    meter = StepMeter(clock := Clock())
    clock.now += 77  # validation, say
    steps(meter, clock, [3.0, 0.0, 1.0], work=2.0)
    assert meter.epoch() == Pace(seconds=10.0, waited=4.0, images=12, steps=3)
    assert meter.epoch().data_wait == 0.4
    record = meter.epoch().record()
    assert record == {"images_per_second": 1.2, "seconds_per_step": 10 / 3, "data_wait": 0.4}


def test_the_loaders_start_is_waited_for_as_well():
    class Loader:
        def __iter__(self):
            clock.now += 5  # processes start
            return iter("ab")

    meter = StepMeter(clock := Clock())
    assert list(meter.watch(Loader())) == ["a", "b"]
    assert meter.epoch().waited == 5


def test_lines_and_epochs_are_measured_apart_and_a_new_epoch_starts_both():
    meter = StepMeter(clock := Clock())
    for first in (0.5, 0.25):
        meter.start()
        watched = meter.watch(batches(clock, [first, 0.0, 2.0]))
        for number, _ in enumerate(watched):
            clock.now += 1
            meter.step(2)
            if number == 0:
                assert meter.line() == Pace(first + 1, first, 2, 1)
        assert meter.line() == Pace(4.0, 2.0, 4, 2)
        assert meter.epoch() == Pace(first + 5, first + 2, 6, 3)


def test_a_slow_start_is_no_slow_pipeline():
    """What the first steps wait says nothing about the rest; few steps say nothing at all."""
    meter = StepMeter(clock := Clock())
    steps(meter, clock, [60.0] + [0.0] * 13)
    assert meter.settled() is None
    steps(meter, clock, [60.0] + [0.0] * 14)
    assert meter.settled() == Pace(10.0, 0.0, 40, 10) and meter.epoch().data_wait == 0.8
    steps(meter, clock, [1.0] * 15)
    assert meter.settled().data_wait == 0.5


def test_an_epoch_without_a_step_has_no_pace():
    """A run that was interrupted before validation goes on with nothing but that."""
    record, settled = speed_of_epoch(StepMeter(Clock()), ALONE)
    assert math.isnan(record["images_per_second"]) and math.isnan(record["seconds_per_step"])
    assert record["data_wait"] == 0 and settled is None


def test_the_rank_that_waits_longest_speaks_for_all(monkeypatch):
    fast, slow = Pace(10.0, 1.0, 80, 20), Pace(10.0, 6.0, 80, 20)
    of_ranks = [(fast, None, 5), (slow, slow, 3)]
    monkeypatch.setattr(
        "samtune.engine.throughput.distributed.all_gather_objects", lambda _: of_ranks
    )
    record, settled = speed_of_epoch(StepMeter(Clock()), ALONE)
    assert record == {
        "images_per_second": 8.0, "seconds_per_step": 0.5, "data_wait": 0.6, "peak_memory_bytes": 5,
    }  # fmt: skip
    assert settled == slow


def test_peak_memory_on_a_cpu_is_what_was_resident():
    before = peak_memory(ALONE)
    held = torch.ones(2**25)  # 128 MiB
    assert peak_memory(ALONE) >= before >= 2**25 and held.sum() == 2**25


def test_a_loader_that_fails_is_measured_until_then():
    def broken():
        clock.now += 1
        yield 1
        clock.now += 2
        raise ValueError("broken")

    meter = StepMeter(clock := Clock())
    with pytest.raises(ValueError, match="broken"):
        list(meter.watch(broken()))
    assert meter.epoch().waited == 3
