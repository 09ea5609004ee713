"""metrics.jsonl: records of epochs, and of steps between them."""

import json

from samtune.engine.records import append, cut, in_words, is_epoch, plain, read_epochs


def epoch(number):
    return {"epoch": number, "step": 10 * number, "train": {"loss": 0.5}}


def step(number, of_epoch):
    return {
        "kind": "step", "epoch": number, "step": 10 * (number - 1) + of_epoch,
        "step_of_epoch": of_epoch, "lr": 1e-3, "gradient_norm": 0.25, "train": {"loss": 0.125},
        "speed": {"images_per_second": 12.345, "seconds_per_step": 0.5, "data_wait": 0.031,
                  "peak_memory_bytes": 3 * 2**30},
    }  # fmt: skip


def written(path, *records):
    for record in records:
        append(path, record)
    return path


def test_readers_of_epochs_do_not_meet_steps(tmp_path):
    path = written(tmp_path / "m.jsonl", step(1, 5), epoch(1), step(2, 5), epoch(2))
    assert read_epochs(path) == [epoch(1), epoch(2)]
    assert not is_epoch(step(1, 5)) and is_epoch({"epoch": 1})


def test_going_on_within_an_epoch_keeps_the_lines_of_the_steps_that_were_taken(tmp_path):
    records = [step(1, 4), step(1, 8), epoch(1), step(2, 4), step(2, 8), epoch(2), step(3, 4)]
    for at, kept in [((1, 0), 0), ((1, 4), 1), ((2, 0), 3), ((2, 7), 4), ((2, 8), 5), ((9, 0), 7)]:
        path = written(tmp_path / "-".join(map(str, at)), *records)
        assert cut(path, *at) == records[:kept], at
        assert [json.loads(line) for line in path.read_text().splitlines()] == records[:kept]


def test_a_step_is_one_line_on_the_console():
    assert in_words(step(2, 8), 10) == (
        "epoch 2/10 step 8  loss 0.12500  lr 1.00e-03  gradient 0.25  12.3 images/s  0.5 s/step  "
        "data wait 3 %  peak memory 3.00 GiB"
    )
    assert in_words(plain({**step(2, 8), "gradient_norm": float("inf"), "speed": {}}), None) == (
        "epoch 2 step 8  loss 0.12500  lr 1.00e-03"
    )


def test_an_epoch_is_a_line_for_each_of_training_validation_and_speed():
    record = {**epoch(1), "lr": 1e-3, "validation": {"loss": None}, "best": True}
    assert in_words({**record, "speed": {"images_per_second": 1234.56, "data_wait": 0.5}}, 3) == (
        "epoch 1/3  train       loss 0.50000  lr 1.00e-03\n"
        "           validation  loss nan  best so far\n"
        "           speed       1234.6 images/s  data wait 50 %"
    )
    assert in_words({"epoch": 1}, None) == "epoch 1"
