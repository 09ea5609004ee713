"""A training step does what the formula says; a run stops, saves and goes on as it should."""

import inspect
import math
import os
import re
import signal
import time
from dataclasses import replace

import pytest
import torch
from engine_standins import (
    METADATA,
    Diary,
    Plan,
    criterion,
    everything,
    fit,
    make_batches,
    new_model,
    new_trainer,
    run_steps,
    same,
    scores_of,
)

from crash_points import in_fork
from samtune.config import OptimOptions
from samtune.engine.checkpoint import Checkpoints, adapted_state, load_adapted
from samtune.engine.distributed import Process
from samtune.engine.progress import Progress, Sums
from samtune.engine.run_states import load_run_state
from samtune.engine.trainer import Trainer
from samtune.errors import Interrupted, UserError
from samtune.run_folder import RunFolder
from samtune.structures import Prompts

CPU = torch.device("cpu")
ALONE = Process(0, 1, 0, CPU)


def batch_of(plan, epoch=0):
    return next(iter(make_batches(plan)(epoch, 0)))


def kill_at(step, number=signal.SIGTERM):
    return lambda now: os.kill(os.getpid(), number) if now == step else None


# --- one step ------------------------------------------------------------------------------------


def test_a_step_is_adamw_on_the_weighted_mean_of_the_rows():
    """Written out in plain torch; the row of weight 0 leaves no trace."""
    plan = Plan(3, 3)
    batch = replace(batch_of(plan), weight=torch.tensor([1.0, 0.0, 1.0]))
    trainer = new_trainer(model := new_model(), ALONE, plan, optim=OptimOptions(lr=0.01))
    by_hand = new_model()
    trained = [p for p in by_hand.parameters() if p.requires_grad]
    total, _ = criterion(by_hand(batch.image, batch.prompts, None), batch)
    ((total[0] + total[2]) / 2).backward()
    weights = [p for p in trained if p.dim() > 1]
    groups = [
        {"params": weights, "weight_decay": 0.01},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=0.01).step()
    trainer.train_step([batch], 2)
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_clipping_bounds_the_gradient_of_the_whole_step():
    plan = Plan(4, 2, accumulate=2)
    norms = []
    for clip_norm in (0.0, 1e-3):
        trainer = new_trainer(new_model(), ALONE, plan, clip_norm=clip_norm)
        trainer.optimizer.register_step_pre_hook(
            lambda optimizer, *_: norms.append(
                math.hypot(*(p.grad.norm() for g in optimizer.param_groups for p in g["params"]))
            )
        )
        run_steps(trainer, plan, 1)
    assert norms[0] > 1e-2 and norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_sums_hold_no_graph_and_equal_the_mean_over_samples():
    """The parent's running sums kept the graph of every iteration alive (defect D3)."""
    plan = Plan(5, 2)
    trainer = new_trainer(new_model(aux=True), ALONE, plan, optim=OptimOptions(lr=1e-12))
    run_steps(trainer, plan, 1)
    assert trainer.sums.values.dtype is torch.float64
    assert trainer.sums.values.grad_fn is None and not trainer.sums.values.requires_grad
    means = trainer.sums.means()
    model, losses = new_model(aux=True), []
    for batch in make_batches(plan)(0, 0):
        prediction = model(batch.image, batch.prompts, None)
        losses += (criterion(prediction, batch)[0] + prediction.aux["size"]).tolist()
    assert means["loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert means["loss"] == pytest.approx(2 * means["bce"] + means["size"], rel=1e-6)
    assert 0 <= means["iou"] <= 1


def test_what_is_watched_of_a_step_holds_no_graph_and_no_images():
    """Memory stays flat over iterations."""
    plan = Plan(2, 2)
    trainer = new_trainer(new_model(aux=True), ALONE, plan)
    trainer.train_step([batch_of(plan)], 2)
    (files, index, losses), *more = trainer._watched.seen
    assert not more and index is None and all(isinstance(file, str) for file in files)
    assert all(value.grad_fn is None and value.numel() == 2 for value in losses.values())


def test_frozen_parts_stay_in_eval_mode_through_a_run(tmp_path):
    """Their BatchNorm statistics do not drift (defect D13)."""
    before = new_model().state_dict()
    trainer, *_ = fit(tmp_path, ALONE, Plan(4, 2), 2)
    after = trainer.model.state_dict()
    for name in before:
        if name.startswith("image_encoder."):
            assert torch.equal(before[name], after[name]), name


def test_bf16_runs_on_a_cpu_and_keeps_float32_weights():
    plan = Plan(4, 2)
    trainer = new_trainer(model := new_model(), ALONE, plan, precision="bf16")
    run_steps(trainer, plan, 1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert math.isfinite(trainer.sums.means()["loss"])


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="--precision fp16"):
        new_trainer(new_model(), ALONE, Plan(4, 2), precision="fp16")


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_nan_names_step_loss_and_file_and_leaves_the_last_good_state(tmp_path):
    fit(tmp_path, ALONE, Plan(6, 2), 1)
    best, last = ((tmp_path / n).read_bytes() for n in ("best.safetensors", "last.pt"))
    with pytest.raises(UserError, match=r"step [4-6] \(epoch 2\): bce not finite for images/s4"):
        fit(tmp_path, ALONE, Plan(6, 2), 2, resume=True, broken=(4,))
    assert (tmp_path / "best.safetensors").read_bytes() == best
    assert (tmp_path / "last.pt").read_bytes() == last
    state = load_run_state(tmp_path / "last.pt")["model"]
    assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("bad", range(6))
def test_a_nan_in_any_step_is_found_before_anything_is_saved(tmp_path, bad):
    """Also in the last step of an epoch, and when a signal comes right after it."""
    with pytest.raises(UserError, match=f"not finite for images/s{bad}.png"):
        fit(tmp_path, ALONE, Plan(6, 1), 1, broken=(bad,), on_step=kill_at(6))
    assert list(tmp_path.iterdir()) == []


def test_a_gradient_that_is_not_finite_though_the_loss_is_names_the_step():
    plan = Plan(2, 2)
    trainer = new_trainer(model := new_model(), ALONE, plan)
    model.adapter[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    trainer.train_step([batch_of(plan)], 2)
    with pytest.raises(UserError, match=r"step 1 \(epoch 1\): the gradient is not finite.*s[01]"):
        trainer.check()


def test_the_file_of_a_row_is_found_through_the_rows_image_index():
    plan = Plan(3, 3)
    batch = batch_of(plan)
    target = batch.target.clone()
    target[1, 0, 0] = float("nan")
    batch = replace(batch, target=target, prompts=Prompts(image_index=torch.tensor([0, 2, 2])))
    trainer = new_trainer(new_model(), ALONE, plan)
    trainer.train_step([batch], 3)
    with pytest.raises(UserError) as caught:
        trainer.check()
    assert f"for {batch.paths[2]}." in str(caught.value)


def test_too_little_gpu_memory_says_what_to_lower(tmp_path):
    def exhausted(prediction, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More words.")

    plan = Plan(4, 2)
    trainer = new_trainer(new_model(), ALONE, plan)
    trainer.criterion = exhausted
    with pytest.raises(UserError, match=r"--batch_size.*--accumulate.*--image_size.*bf16"):
        trainer.fit(
            plan, make_batches(plan), scores_of(trainer.model), Diary(),
            Checkpoints(RunFolder(tmp_path), METADATA), epochs=1,
        )  # fmt: skip


def test_a_folder_that_cannot_be_written_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"missing.*could not be written"):
        fit(tmp_path / "missing", ALONE, Plan(4, 2), 1)


# --- epochs, best, early stopping ----------------------------------------------------------------


def test_one_epoch_writes_a_best_checkpoint(tmp_path):
    """The parent's patience was 0 for one epoch, and nothing was saved (defect D9)."""
    _, diary, result = fit(tmp_path, ALONE, Plan(4, 2), 1, patience=-1)
    assert (tmp_path / "best.safetensors").exists()
    assert (result.best_epoch, result.epochs, result.stopped_early) == (1, 1, False)
    assert [record["best"] for record in diary.records] == [True]


@pytest.mark.parametrize(
    ("patience", "scores", "told", "best"),
    [
        (-1, [3, 4, 5, 1, 1, 1], 6, 4),  # half of 6 epochs
        (-1, [3, 4, 5, 6, 1, 1], 4, 1),
        (2, [3, 4, 5, 1, 1, 1], 3, 1),
        (2, [3, 4, 2, 2, 2, 1], 5, 3),
        (0, [3, 4, 5, 6, 7, 2], 6, 6),
        (1, [3, 3, 1, 1, 1, 1], 2, 1),
        (6, [3, math.nan, 2, math.nan, math.nan, 9], 6, 3),
        (1, [math.nan, 3, 2, 1, 1, 1], 1, 1),
        (2, [math.nan, 3, 2, 4, 4, 4], 5, 3),
    ],
)
def test_early_stopping_counts_epochs_without_improvement(tmp_path, patience, scores, told, best):
    """The epoch that triggers it is told and saved like any other (defect D10)."""
    _, diary, result = fit(tmp_path, ALONE, Plan(2, 2), 6, patience=patience, scores=scores)
    assert [record["epoch"] for record in diary.records] == list(range(1, told + 1))
    assert result.best_epoch == best and result.stopped_early == (told < 6)
    assert load_run_state(tmp_path / "last.pt")["progress"]["epoch"] == told


def test_the_improving_epoch_is_saved_even_if_it_is_the_last_before_stopping(tmp_path):
    """Best on disk is the best epoch's weights, not those of the end (defect D10)."""
    kept = {}

    class Folder(Checkpoints):
        def save_best(self, model, **facts):
            super().save_best(model, **facts)
            kept.update(adapted_state(model), epoch=facts["epoch"])

    plan = Plan(4, 2)
    trainer = new_trainer(model := new_model(), ALONE, plan, 4)
    folder = Folder(RunFolder(tmp_path), METADATA)
    validate = scores_of(model, [3.0, 1.0, 2.0, 2.0])
    trainer.fit(plan, make_batches(plan), validate, Diary(), folder, epochs=4, patience=1)
    assert kept.pop("epoch") == 2
    load_adapted(fresh := new_model(), folder.folder.best)
    assert same(adapted_state(fresh), kept)
    assert not same(adapted_state(model), kept)


@pytest.mark.parametrize(
    ("best_by", "scores", "best"),
    [("loss", [2, 1, 3], 2), ("iou", [0.2, 0.1, 0.3], 3), ("dice", [0.5, 0.5, 0.4], 1)],
)
def test_loss_is_better_when_lower_and_scores_when_higher(best_by, scores, best):
    progress = Progress()
    for epoch, score in enumerate(scores):
        progress.epoch = epoch
        progress.judge(score, best_by)
    assert progress.best_epoch == best


def test_the_learning_rate_told_per_epoch_falls_to_its_floor(tmp_path):
    """It neither stays constant nor rises again, however few steps an epoch has (defect D4)."""
    for samples in (2, 9):
        (tmp_path / str(samples)).mkdir()
        _, diary, _ = fit(tmp_path / str(samples), ALONE, Plan(samples, 2), 4)
        lrs = [record["lr"] for record in diary.records]
        assert lrs == sorted(lrs, reverse=True) and len(set(lrs)) == 4 and lrs[-1] == 0


def test_a_record_has_training_and_validation_side_by_side(tmp_path):
    _, diary, _ = fit(tmp_path, ALONE, Plan(5, 2), 2)
    record = diary.records[1]
    assert record["epoch"] == 2 and record["step"] == 6
    assert set(record["train"]) == {"loss", "bce", "iou"}
    assert all(type(value) is float for value in record["train"].values())
    assert set(record["validation"]) == {"loss", "iou"}


# --- interruption and resume ---------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_once_and_ends_the_run_between_two_steps(tmp_path, monkeypatch, number):
    saves = []
    save = Checkpoints.save_last
    monkeypatch.setattr(Checkpoints, "save_last", lambda *a: (saves.append(1), save(*a)))
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"--resume {tmp_path}"):
        fit(tmp_path, ALONE, Plan(8, 2), 2, on_step=kill_at(2, number))
    assert len(saves) == 1
    state = load_run_state(tmp_path / "last.pt")
    assert (state["progress"]["epoch"], state["progress"]["step"]) == (0, 2)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("step", [1, 4, 5, 8, 11, 12])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, step):
    """Weights, optimizer, metrics and random numbers, from any step: the first, the last of an
    epoch (4, 8), with another number of loader workers and other random numbers before (D22)."""
    plan = Plan(7, 2)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = everything(*fit(tmp_path / "whole", ALONE, plan, 4)[:2])
    with pytest.raises(Interrupted) as caught:
        fit(tmp_path / "parts", ALONE, plan, 4, on_step=kill_at(step))
    workers = 2 if step == 5 else 0
    trainer, diary, _ = fit(
        tmp_path / "parts", ALONE, plan, 4, resume=True, seed=9, workers=workers
    )
    diary.records[:0] = caught.value.diary.records
    parts = everything(trainer, diary)
    for part in whole:
        assert same(whole[part], parts[part]), part
    files = [(tmp_path / name / "best.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_a_signal_in_validation_ends_it_and_the_next_launch_begins_it_again(tmp_path, monkeypatch):
    """Bounded by a batch, not by the validation set; the epoch's steps are not taken again."""
    plan = Plan(7, 2)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = everything(*fit(tmp_path / "whole", ALONE, plan, 3)[:2])
    finish = Trainer._finish_epoch

    def finishing(self, validate, *arguments):
        def validating():
            if self.progress.epoch == 1:
                signal.raise_signal(signal.SIGUSR1)
            if self.is_asked_to_stop():  # as the evaluator finds out between two batches
                raise Interrupted("scoring was interrupted")
            return validate()

        return finish(self, validating, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_finish_epoch", finishing)
        with pytest.raises(Interrupted, match="in epoch 2 after 4 of its steps") as caught:
            fit(tmp_path / "parts", ALONE, plan, 3)
    assert [record["epoch"] for record in caught.value.diary.records] == [1]
    trainer, diary, _ = fit(tmp_path / "parts", ALONE, plan, 3, resume=True, seed=9)
    assert diary.steps == plan.steps_per_epoch
    diary.records[:0] = caught.value.diary.records
    assert same(whole, everything(trainer, diary))


def test_a_signal_at_the_very_end_of_the_last_epoch_is_not_lost(tmp_path, monkeypatch):
    """What comes after training, scoring, does not begin; the next launch does only that."""
    save = Checkpoints.save_last

    def saving(self, state):
        save(self, state)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save_last", saving)
        with pytest.raises(Interrupted, match=r"interrupted after the last epoch; .*--resume"):
            fit(tmp_path, ALONE, Plan(4, 2), 1)
    _, diary, result = fit(tmp_path, ALONE, Plan(4, 2), 1, resume=True)
    assert diary.steps == 0 and result.epochs == 1


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock on which each step takes a minute; the wall clock jumps about."""
    now, train_step = [0.0], Trainer.train_step

    def step(self, *arguments):
        train_step(self, *arguments)
        now[0] += 60

    monkeypatch.setattr(Trainer, "train_step", step)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 1e9 - 7 * now[0])


@pytest.mark.parametrize(
    ("minutes", "positions"),
    [
        (0, [(1, 0), (2, 0)]),
        (3, [(0, 3), (0, 6), (1, 0), (1, 3), (1, 6), (2, 0)]),
        (5, [(0, 5), (1, 0), (1, 5), (2, 0)]),
        (0.5, [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (1, 0)]),
        (60, [(1, 0), (2, 0)]),
    ],
)
def test_long_epochs_are_saved_within(tmp_path, monkeypatch, clock, minutes, positions):
    """So many minutes after the last save, whatever the wall clock says; and nothing else moves."""
    plan, saves = Plan(7, 1), []
    for name in ("plain", "saved"):
        (tmp_path / name).mkdir()
    plain = everything(*fit(tmp_path / "plain", ALONE, plan, 2)[:2])
    save = Checkpoints.save_last

    def saving(self, state):
        saves.append((state["progress"]["epoch"], state["progress"]["step"]))
        save(self, state)

    monkeypatch.setattr(Checkpoints, "save_last", saving)
    saved = everything(*fit(tmp_path / "saved", ALONE, plan, 2, save_every=60 * minutes)[:2])
    assert saves[: len(positions)] == positions
    assert same(plain, saved)


def test_killed_within_an_epoch_a_run_goes_on_from_its_last_save(tmp_path, clock):
    """kill -9 leaves no chance to save: bit for bit from the state that was there."""
    plan = Plan(9, 1)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = everything(*fit(tmp_path / "whole", ALONE, plan, 2)[:2])

    def killed(step):
        if step == 9 + 6:
            os.kill(os.getpid(), signal.SIGKILL)

    parts = {"folder": tmp_path / "parts", "process": ALONE, "plan": plan, "epochs": 2}
    assert in_fork(lambda: fit(**parts, on_step=killed, save_every=120)) == -signal.SIGKILL
    progress = load_run_state(tmp_path / "parts" / "last.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 4)
    trainer, diary, _ = fit(**parts, resume=True, seed=9)
    assert diary.steps == 5
    diary.records[:0] = whole["records"][:1]
    assert same(whole, everything(trainer, diary))


def test_a_damaged_last_state_costs_what_was_done_since_the_one_before(tmp_path, clock):
    """The run goes on from that, and ends as if nothing had happened."""
    plan = Plan(6, 1)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = everything(*fit(tmp_path / "whole", ALONE, plan, 1)[:2])
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", ALONE, plan, 1, on_step=kill_at(5), save_every=120)
    last = tmp_path / "parts" / "last.pt"
    last.write_bytes(last.read_bytes()[:-500])
    trainer, diary, _ = fit(tmp_path / "parts", ALONE, plan, 1, resume=True, seed=9)
    assert diary.steps == 2
    assert same(whole, everything(trainer, diary))


def test_killed_after_an_epoch_and_resumed_equals_uninterrupted(tmp_path):
    """Without any chance to save: 2 + 2 epochs are 4, early stopping's counter included."""
    plan = Plan(5, 2)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    scores = [3.0, 4.0, 5.0, 6.0]
    options = {"patience": 3, "scores": scores}
    whole = everything(*fit(tmp_path / "whole", ALONE, plan, 4, **options)[:2])

    def killed(step):
        if step == 2 * plan.steps_per_epoch + 2:
            raise ArithmeticError

    with pytest.raises(ArithmeticError) as caught:
        fit(tmp_path / "parts", ALONE, plan, 4, on_step=killed, **options)
    options["scores"] = scores[2:]
    trainer, diary, result = fit(tmp_path / "parts", ALONE, plan, 4, resume=True, **options)
    diary.records[:0] = caught.value.diary.records
    assert same(whole, everything(trainer, diary))
    assert result.best_epoch == 1 and result.epochs == 4


def test_resuming_a_finished_run_does_nothing(tmp_path):
    fit(tmp_path, ALONE, Plan(4, 2), 2)
    before = (tmp_path / "last.pt").read_bytes()
    _, diary, result = fit(tmp_path, ALONE, Plan(4, 2), 2, resume=True)
    assert diary.steps == 0 and diary.records == [] and result.epochs == 2
    assert (tmp_path / "last.pt").read_bytes() == before


def test_resuming_a_run_that_stopped_early_does_nothing(tmp_path):
    fit(tmp_path, ALONE, Plan(4, 2), 4, patience=1, scores=[1, 2])
    _, diary, result = fit(tmp_path, ALONE, Plan(4, 2), 4, patience=1, resume=True)
    assert diary.steps == 0 and result.stopped_early and result.best_epoch == 1


def test_another_length_on_resume_is_remarked_and_ends_at_the_floor(tmp_path):
    fit(tmp_path, ALONE, Plan(4, 2), 2)
    _, diary, _ = fit(tmp_path, ALONE, Plan(4, 2), 5, resume=True)
    assert any("10 steps instead of 4" in text for text in diary.said)
    assert diary.records[-1]["lr"] == 0 and diary.records[0]["lr"] > 0


def test_resuming_as_it_was_is_silent(tmp_path):
    with pytest.raises(Interrupted):
        fit(tmp_path, ALONE, Plan(8, 2), 2, on_step=kill_at(2))
    assert fit(tmp_path, ALONE, Plan(8, 2), 2, resume=True)[1].said == []


@pytest.mark.parametrize(
    ("plan", "step", "words"),
    [
        (Plan(12, 1, 1), 4, "after 4 images"),
        (Plan(12, 4, 1), 1, "after 4 images"),
        (Plan(12, 3, 1), 1, "after 4 images"),
        (Plan(12, 6, 1), 0, "after 4 images"),
        (Plan(12, 5, 1), 1, "after 4 images"),
        (Plan(13, 2, 1), 0, "number of images or --seed is not the run's: epoch 1 starts anew"),
        (Plan(12, 2, 1, seed=4), 0, "epoch 1 starts anew"),
    ],
)
def test_another_step_size_goes_on_at_the_right_image_and_says_so(tmp_path, plan, step, words):
    """The number of processes may change between two parts of a run."""
    with pytest.raises(Interrupted):
        fit(tmp_path, ALONE, Plan(12, 2), 2, on_step=kill_at(2))
    trainer = new_trainer(new_model(), ALONE, plan, 2)
    remarks = trainer.restore(Checkpoints(RunFolder(tmp_path), METADATA).load_last(), plan, 2)
    assert trainer.progress.step == trainer.steps_done == step
    assert trainer.progress.seen == (0 if "anew" in words else 4)
    assert any(re.search(words, text) for text in remarks)


class Listening:
    """A plan that writes down which samples of which epoch its steps took."""

    def __init__(self, plan, taken):
        self.plan, self.taken = plan, taken

    def __getattr__(self, name):
        return getattr(self.plan, name)

    def take(self, epoch, seen):
        batches, count = self.plan.take(epoch, seen)
        self.taken += [(epoch, key.index) for batch in batches for key in batch]
        return batches, count


def test_whatever_the_sizes_of_steps_each_image_of_an_epoch_comes_once(tmp_path):
    """Interrupted twice in one epoch, each time with other steps: the order is that of one part,
    all steps are counted, and the learning rate ends at its floor."""
    taken, sizes = [], ((2, 3), (5, 1), (3, None))
    for size, steps in sizes:
        plan = Listening(Plan(17, size), taken)
        run = {"on_step": kill_at(steps) if steps else None, "resume": size != 2}
        if steps:
            with pytest.raises(Interrupted):
                fit(tmp_path, ALONE, plan, 2, **run)
        else:
            trainer, diary, _ = fit(tmp_path, ALONE, plan, 2, **run)
    whole = Plan(17, 17)
    assert taken == [(e, key.index) for e in (0, 1) for key in whole.take(e, 0)[0][0]]
    assert [record["step"] for record in diary.records] == [6, 12] and trainer.steps_done == 12
    assert diary.records[-1]["lr"] == 0 and diary.records[0]["lr"] > 0


def test_a_completed_but_not_validated_epoch_stays_complete_under_another_step_size():
    """As files from before `seen` was said have it."""
    saved = {"samples": 11, "samples_per_step": 4, "seed": 1, "total_steps": 6}
    progress = Progress.read({"epoch": 1, "step": 3}, saved)
    remarks = progress.relocate(saved, saved | {"samples_per_step": 2, "total_steps": 12})
    assert progress.step == 6 and "after 11 images" in remarks[0]


def test_a_run_of_two_processes_goes_on_as_one(tmp_path):
    """The sums of both are kept; it is said that rounding may differ."""
    with pytest.raises(Interrupted):
        fit(tmp_path, ALONE, Plan(8, 2), 1, on_step=kill_at(2))
    state = Checkpoints(RunFolder(tmp_path), METADATA).load_last()
    both = [state["ranks"][0], {**state["ranks"][0], "sums": {"weight": 4.0, "loss": 8.0,
            "bce": 1.0, "iou": 2.0}}]  # fmt: skip
    plan = Plan(8, 2)
    trainer = new_trainer(new_model(), ALONE, plan)
    remarks = trainer.restore(state | {"ranks": both}, plan, 1)
    assert "1 process(es) instead of 2" in remarks[0]
    alone = state["ranks"][0]["sums"]
    assert trainer.sums.state()["weight"] == 8
    assert trainer.sums.state()["loss"] == alone["loss"] + 8


def test_a_run_of_another_model_cannot_be_resumed(tmp_path):
    """Another adapter's run state is refused with the differing names, before anything changes."""
    fit(tmp_path, ALONE, Plan(4, 2), 1)
    with pytest.raises(UserError, match=r"'tiny' \(here 'other'\)"):
        Checkpoints(RunFolder(tmp_path), METADATA | {"adapter": "other"}).load_last()
    plan = Plan(4, 2)
    trainer = new_trainer(new_model(trainable_norm=True), ALONE, plan)
    with pytest.raises(UserError, match=r"unknown: adapter\.0\.bias"):
        trainer.restore(Checkpoints(RunFolder(tmp_path), METADATA).load_last(), plan, 1)


def test_options_of_now_win_over_those_in_the_file(tmp_path):
    fit(tmp_path, ALONE, Plan(4, 2), 1)
    plan = Plan(4, 2)
    optim = OptimOptions(lr=0.5, weight_decay=0.7)
    trainer = new_trainer(new_model(), ALONE, plan, 2, optim=optim)
    trainer.restore(Checkpoints(RunFolder(tmp_path), METADATA).load_last(), plan, 2)
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.7, 0.0]
    assert 0 < groups[0]["lr"] <= 0.5 and groups[0]["lr"] > 0.05
    assert all(trainer.optimizer.state[p]["step"] == 2 for p in trainer.parameters)


def test_sums_come_back_exactly():
    sums = Sums(CPU)
    sums.add({"a": torch.rand(5), "b": torch.rand(5)}, torch.tensor([1.0, 1, 0, 1, 1]))
    again = Sums(CPU)
    again.load(sums.state())
    assert torch.equal(sums.values, again.values) and sums.means() == again.means()
    again.load(Sums(CPU).state())
    assert again.values is None


def test_a_loader_that_ends_early_is_a_defect_and_said_so():
    trainer = new_trainer(new_model(), ALONE, plan := Plan(4, 2))
    assert plan.steps_per_epoch == 2
    with pytest.raises(RuntimeError, match="ended in the middle"):
        trainer.train_step([], 2)


def test_the_step_reads_as_a_step():
    """It fits one screen."""
    assert len(inspect.getsource(Trainer.train_step).splitlines()) <= 40


@pytest.mark.parametrize("told", [False, True])
def test_the_first_step_of_a_run_is_timed_where_it_compiles(tmp_path, told):
    model, plan, diary = new_model(), Plan(6, 2), Diary()
    trainer = new_trainer(model, ALONE, plan, epochs=2, tell_first_step=told)
    saved = Checkpoints(RunFolder(tmp_path), METADATA)
    trainer.fit(plan, make_batches(plan), scores_of(model), diary, saved, epochs=2, patience=0)
    assert len(diary.records) == 2
    lines = [line for line in diary.said if line.startswith("first step, with compiling: ")]
    assert len(lines) == told
