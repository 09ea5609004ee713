"""The warning names what helps in this situation."""

from types import SimpleNamespace

import pytest

from samtune.config import LossOptions, Size, TrainDataOptions
from samtune.engine.throughput import Pace
from samtune.slow_data import slow_data

PACE = Pace(seconds=120.0, waited=50.0, images=100, steps=100)


def config(resolution="original", crop=0):
    return SimpleNamespace(
        loss=LossOptions(loss_resolution=resolution), data=TrainDataOptions(crop=crop)
    )


@pytest.mark.parametrize(
    ("workers", "cores", "options", "helps", "does_not"),
    [
        (4, 8, {}, "raise --workers, up to 8", "--loss_resolution"),
        (0, 1, {}, "raise --workers, up to 1", "--loss_resolution"),
        (8, 8, {}, "about the 1024 px", "--workers"),
        (8, 8, {}, "--loss_resolution frame", "--workers"),
        (8, 8, {"resolution": "frame"}, "about the 1024 px", "--loss_resolution"),
        (8, 8, {"crop": 128}, "about the 1024 px", "--loss_resolution"),
    ],
)
def test_idle_cores_come_first_then_cheaper_images(workers, cores, options, helps, does_not):
    text = slow_data(PACE, workers, cores, Size(1024, 1024), config(**options))
    assert "waited 42 % of its time for data (50 s of 120 s" in text and text.startswith("warning:")
    assert f"{workers} loader processes, {cores} cores" in text and "\n" not in text
    assert helps in text and does_not not in text
