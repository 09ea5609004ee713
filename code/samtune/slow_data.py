"""What to change when the model waits for its data: a warning that fits the situation."""

from __future__ import annotations

from samtune.config import Size, TrainConfig
from samtune.engine.throughput import Pace


def slow_data(pace: Pace, workers: int, cores: int, image_size: Size, config: TrainConfig) -> str:
    """One line: how long was waited, and what helps.

    pace: of an epoch's steps, without its first. workers: loader processes of a training process;
    cores: processor cores that it may use. image_size: the model's frame. While there are cores
    left they are the remedy, for they change no result; else each image has to cost less.
    """
    waited = (
        f"warning: the model waited {100 * pace.data_wait:.0f} % of its time for data "
        f"({pace.waited:.0f} s of {pace.seconds:.0f} s; {workers} loader processes, {cores} cores)"
    )
    if workers < cores:
        return f"{waited}: raise --workers, up to {cores}"
    ways = [f"store the training images at about the {image_size.plain} px that the model sees"]
    if config.loss.loss_resolution == "original" and not config.data.crop:
        ways.append("where they stay larger, try --loss_resolution frame")
    return f"{waited}, all in use: {'; '.join(ways)}"
