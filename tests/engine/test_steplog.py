"""Lines about every N-th step: the right steps, the right means, and nothing else changes."""

import math
import os
import signal

import pytest
import torch
from engine_standins import (
    METADATA,
    Diary,
    Plan,
    everything,
    fit,
    make_batches,
    new_model,
    new_trainer,
    same,
    scores_of,
)

from samtune.engine.checkpoint import Checkpoints
from samtune.engine.distributed import Process
from samtune.engine.progress import Progress, Sums
from samtune.engine.steplog import StepLog
from samtune.engine.throughput import Pace, StepMeter
from samtune.engine.transfer import Arrival
from samtune.errors import Interrupted, UserError
from samtune.run_folder import RunFolder

ALONE = Process(0, 1, 0, torch.device("cpu"))
FACTS = {"kind", "epoch", "step", "step_of_epoch", "lr", "train", "gradient_norm", "speed"}


def test_every_nth_step_of_each_epoch_is_told(tmp_path):
    _, diary, _ = fit(tmp_path, ALONE, Plan(10, 2), 2, log_every=2)
    places = [(line["epoch"], line["step"], line["step_of_epoch"]) for line in diary.lines]
    assert places == [(1, 2, 2), (1, 4, 4), (2, 7, 2), (2, 9, 4)]
    for line in diary.lines:
        assert set(line) == FACTS and line["kind"] == "step"
        assert set(line["train"]) == {"loss", "bce", "iou"}
        assert set(line["speed"]) == {
            "images_per_second", "seconds_per_step", "data_wait", "peak_memory_bytes"
        }  # fmt: skip
        assert 0 < line["gradient_norm"] < math.inf and 0 <= line["speed"]["data_wait"] <= 1


def test_lines_change_nothing_of_a_run(tmp_path):
    runs = []
    for every in (0, 1):
        (folder := tmp_path / str(every)).mkdir()
        trainer, diary, _ = fit(folder, ALONE, Plan(7, 2), 2, log_every=every)
        assert len(diary.lines) == 8 * every
        runs.append(everything(trainer, diary))
    assert same(*runs)


def test_a_line_holds_the_means_since_the_one_before(tmp_path):
    lines = {}
    for every in (1, 4, 11):
        (folder := tmp_path / str(every)).mkdir()
        _, diary, _ = fit(folder, ALONE, Plan(11, 1), 1, log_every=every)
        lines[every] = [line["train"] for line in diary.lines]
    assert [len(lines[every]) for every in (1, 4, 11)] == [11, 2, 1]
    for name, mean in diary.records[0]["train"].items():
        single = [line[name] for line in lines[1]]
        assert lines[4][0][name] == pytest.approx(sum(single[:4]) / 4, rel=1e-9)
        assert lines[4][1][name] == pytest.approx(sum(single[4:8]) / 4, rel=1e-9)
        assert lines[11][0][name] == pytest.approx(mean, rel=1e-12)


def test_a_line_is_told_when_the_next_step_is_queued():
    """Nothing waits for the device: by then its numbers have arrived."""
    diary, sums = Diary(), Sums(ALONE.device)
    log = StepLog(1, diary, StepMeter(), ALONE)
    log.start_epoch(sums)
    for step in (1, 2):
        sums.add({"loss": torch.tensor([float(step)])}, torch.ones(1))
        log.step(Progress(step=step, lr=0.1), step, sums, Arrival(torch.tensor(0.5)))
        assert len(diary.lines) == step - 1
    log.flush()
    log.flush()
    assert [line["train"]["loss"] for line in diary.lines] == [1.0, 2.0]


def stop_after_four(step):
    if step == 4:
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_was_interrupted_has_told_all_its_lines_and_goes_on_where_it_was(tmp_path):
    plan = Plan(8, 1)
    with pytest.raises(Interrupted) as caught:
        fit(tmp_path, ALONE, plan, 1, log_every=2, on_step=stop_after_four)
    assert [line["step"] for line in caught.value.diary.lines] == [2, 4]
    _, diary, _ = fit(tmp_path, ALONE, plan, 1, log_every=2, resume=True)
    assert [line["step"] for line in diary.lines] == [6, 8]
    (tmp_path / "whole").mkdir()
    _, whole, _ = fit(tmp_path / "whole", ALONE, plan, 1, log_every=2)
    for line, other in zip(caught.value.diary.lines + diary.lines, whole.lines, strict=True):
        assert line["train"] == pytest.approx(other["train"], rel=1e-12)
        assert line["gradient_norm"] == other["gradient_norm"] and line["lr"] == other["lr"]


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(UserError, match="--log_every -1"):
        StepLog(-1, Diary(), StepMeter(), ALONE)


class SlowMeter(StepMeter):
    """Half of the time is waited away."""

    def settled(self):
        return Pace(10.0, 5.0, 10, 10)


@pytest.mark.parametrize(("meter", "said"), [(SlowMeter(), ["slow: 50%"]), (StepMeter(), [])])
def test_a_slow_pipeline_is_said_once(tmp_path, meter, said):
    plan = Plan(4, 2)
    trainer = new_trainer(model := new_model(), ALONE, plan, 3)
    trainer.meter, diary = meter, Diary()
    trainer.fit(
        plan, make_batches(plan), scores_of(model), diary,
        Checkpoints(RunFolder(tmp_path), METADATA), epochs=3, patience=0,
        explain_slow_data=lambda pace: f"slow: {pace.data_wait:.0%}",
    )  # fmt: skip
    assert diary.said == said
