"""Training: `train_step` is a step, `fit` repeats it, watches over it and can be interrupted.

Everything comes from outside (model, loss, scores, plan of the samples, loader, validation), so
this file knows no adapter, no data set and no file format; the run's folder does the writing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from samtune.activity import now
from samtune.engine import distributed
from samtune.engine.checkpoint import (
    Checkpoints,
    adapted_state,
    load_adapted_state,
    load_optimizer_state,
    optimizer_state,
)
from samtune.engine.distributed import Process, StopSignal
from samtune.engine.optim import autocast, resolve_precision
from samtune.engine.progress import Progress, Sums, describe_plan
from samtune.engine.steplog import StepLog
from samtune.engine.throughput import SLOW_DATA, Pace, StepMeter, speed_of_epoch
from samtune.engine.transfer import Arrival, Upload
from samtune.errors import Interrupted, OutOfMemory, UserError
from samtune.structures import Batch, Prediction

Criterion = Callable[[Prediction, Batch], tuple[Tensor, dict[str, Tensor]]]
Scorer = Callable[[Prediction, Batch], dict[str, Tensor]]
# What is kept of a micro-batch: its files, the file of each row (None: in order), its losses (R,).
_Seen = tuple[list[str], Tensor | None, dict[str, Tensor]]

# fp16's loss scale halves at each overflow: from 2^16, this many in a row leave nothing to halve.
_OVERFLOWS_IN_A_ROW = 30
# How torch's out-of-memory error, the CPU's allocator and CUDA's libraries say it.
_NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class FitResult:
    """best: the watched score of `best_epoch` (from 1); epochs: how many are complete."""

    best: float
    best_epoch: int
    epochs: int
    stopped_early: bool


@dataclass(frozen=True)
class _Watched:
    """What must be known of a step to say what went wrong in it."""

    name: str
    norm: Arrival  # of the gradient
    seen: list[_Seen]


class Trainer:
    """Trains `model` (as `distributed.wrap` returned it) on batches.

    criterion: (prediction, batch) -> total (R,) and its terms by name, each (R,). scorers: the same
    call -> scores by name, each (R,), for the log only. schedule steps once per optimizer step.
    clip_norm: 0 means no clipping. precision: 'auto', 'fp32', 'bf16' or 'fp16'.
    tell_first_step: `fit` says how long the first step took, in which a model is compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        scorers: Sequence[Scorer],
        optimizer: Optimizer,
        schedule: LambdaLR,
        process: Process,
        *,
        clip_norm: float = 0.0,
        precision: str = "auto",
        tell_first_step: bool = False,
    ):
        self.model, self.criterion, self.scorers = model, criterion, scorers
        self.optimizer, self.schedule, self.process = optimizer, schedule, process
        self.clip_norm = clip_norm
        self.precision = resolve_precision(precision, process.device)
        if self.precision == "fp16" and distributed.is_sharded(model):
            # The scale's check for overflow would have to agree over ranks; nobody has tried it.
            raise UserError("--shard does not go with --precision fp16: use bf16 or fp32")
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=self.precision == "fp16")
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.upload = Upload(process.device)
        self.progress = Progress()
        self.sums = Sums(process.device)
        self.meter = StepMeter()
        self.steps_done = 0
        self._stop: StopSignal | None = None  # while `fit` is at work
        self._watched: _Watched | None = None
        self._overflows = 0
        self._tell_first_step = tell_first_step

    def train_step(self, micro_batches: Iterable[Batch], global_count: int) -> None:
        """One optimizer step over this rank's micro-batches; the host never waits for the device.

        global_count: real samples (weight 1) of the step over all ranks.
        """
        seen = self.backward(micro_batches, global_count)
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.lr = self.optimizer.param_groups[0]["lr"]
        self.schedule.step()
        self.steps_done += 1
        self._watch(norm, seen)

    def backward(self, micro_batches: Iterable[Batch], global_count: int) -> list[_Seen]:
        """Forward and backward passes of a step: the gradient, averaged over ranks, in `.grad`.

        DDP averages gradients over ranks, hence the factor `world`: the gradient equals that of one
        process with the joined batch, however unevenly the samples are dealt.
        """
        now.reaches(
            self.progress.step, f"step {self.steps_done + 1} (epoch {self.progress.epoch + 1})"
        )
        scale = self.process.world / global_count
        seen = []
        for batch, is_last in _mark_last(micro_batches):
            batch = self.upload(batch)
            with distributed.no_sync(self.model, active=not is_last):
                with autocast(self.precision, self.process.device):
                    prediction = self.model(*batch.inputs)
                total, terms = self.criterion(prediction, batch)
                loss = (batch.weight * total).sum()
                for term in (prediction.aux or {}).values():  # a mean over the micro-batch
                    loss = loss + term * batch.weight.sum()
                self.scaler.scale(loss * scale).backward()
            losses = self._score(prediction, batch, total, terms)
            seen.append((batch.paths or batch.ids, batch.prompts.image_index, losses))
        return seen

    @torch.no_grad()
    def _score(self, prediction, batch, total, terms) -> dict[str, Tensor]:
        """Add this micro-batch to the epoch's sums; return its losses by name, each (R,)."""
        aux = {name: t.detach().expand_as(total) for name, t in (prediction.aux or {}).items()}
        losses = {"loss": sum(aux.values(), total), **terms, **aux}
        losses = {name: values.detach() for name, values in losses.items()}
        scores = {}
        for scorer in self.scorers:
            scores |= scorer(prediction, batch)
        self.sums.add(losses | scores, batch.weight)
        return losses

    def _clip(self) -> Tensor:
        """The norm of the whole gradient, equal on all ranks, before it is clipped."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = distributed.whole(nn.utils.get_total_norm(gradients))
        if self.clip_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        return norm

    def _watch(self, norm: Tensor, seen: list[_Seen]) -> None:
        """Send this step's gradient norm to the host, and look at the one before, now arrived."""
        name = f"step {self.steps_done} (epoch {self.progress.epoch + 1})"
        previous, self._watched = self._watched, _Watched(name, Arrival(norm), seen)
        self._examine(previous)

    def check(self) -> None:
        """Collective. Raise UserError if the latest step was not finite; waits for the device."""
        previous, self._watched = self._watched, None
        self._examine(previous)

    def _examine(self, watched: _Watched | None) -> None:
        if watched is None:
            return
        self._overflows = 0 if math.isfinite(watched.norm.wait().item()) else self._overflows + 1
        # All ranks come to the same conclusion: after DDP, their gradients have the same norm.
        if self._overflows > (_OVERFLOWS_IN_A_ROW if self.scaler.is_enabled() else 0):
            raise UserError(_diagnose(watched))

    def fit(
        self,
        plan,
        make_batches: Callable[[int, int], Iterable[Batch]],
        validate: Callable[[], dict[str, float]],
        logbook,
        saved: Checkpoints,
        *,
        epochs: int,
        best_by: str = "loss",
        patience: int = -1,
        resume: dict[str, Any] | None = None,
        prepare: Callable[[int], Iterable[None]] = lambda epoch: (),
        log_every: int = 0,
        explain_slow_data: Callable[[Pace], str] | None = None,
        save_every: float = 0.0,
    ) -> FitResult:
        """Collective. Train until `epochs` are complete or `patience` of them brought nothing.

        plan: `steps_per_epoch`, `take(epoch, seen)` -> (this rank's micro-batches of the step after
        that epoch's first `seen` samples, how many samples all ranks have in it), `samples`,
        `samples_per_step` (over all ranks) and `seed`.
        make_batches(epoch, seen): the rest of that epoch's micro-batches, in that order.
        validate: scores by name, or Interrupted raised on all ranks where `is_asked_to_stop` made
        it end early; one of the scores is `best_by` ('loss' is better when lower, 'iou' and
        'dice' when higher). patience: -1 means half of the epochs, 0 never stops. resume: what
        `saved.load_last()` returned. prepare(epoch): collective work before that epoch's first
        step, which gives way now and then, on all ranks equally often. log_every: steps between two
        lines about them, see StepLog. explain_slow_data: what to say, once, when an epoch has
        waited long for its batches. save_every: seconds of an epoch after which the state is saved
        within it too; 0: never. Epochs count from 0 in plan and loader, from 1 in records.

        Raises Interrupted when a signal came and the state was saved; UserError when the loss is
        not finite, the GPU's memory is too small or the folder cannot be written.
        """
        limit = max(1, epochs // 2) if patience < 0 else patience or math.inf
        if resume is not None:
            for remark in self.restore(resume, plan, epochs):
                logbook.say(remark)

        def goes_on() -> bool:
            return self.progress.epoch < epochs and self.progress.stale < limit

        self._lines = StepLog(log_every, logbook, self.meter, self.process)
        self._explain_slow_data = explain_slow_data
        self._saved_at = time.monotonic()
        with StopSignal() as stop, explain_out_of_memory():
            self._stop = stop
            while goes_on():
                watch = [time.monotonic()]
                for _ in prepare(self.progress.epoch):
                    if stop.agreed():
                        self._interrupt(saved, plan, epochs)
                watch.append(time.monotonic())
                for _ in self._epoch(plan, make_batches, logbook, epochs):
                    if stop.agreed(self._is_save_due(save_every)):
                        self._interrupt(saved, plan, epochs)
                    if stop.due:
                        self._save_between_steps(saved, plan, epochs)
                if stop.settle():
                    self._interrupt(saved, plan, epochs)
                try:
                    self._finish_epoch(validate, best_by, logbook, saved, watch)
                except Interrupted:  # in validation, which the next launch begins again
                    self._interrupt(saved, plan, epochs)
                self._save_last(saved, plan, epochs)
                if stop.settle():
                    raise Interrupted(self._farewell(saved, complete=not goes_on()))
        done = self.progress
        return FitResult(done.best, done.best_epoch, done.epoch, stopped_early=done.epoch < epochs)

    def _epoch(self, plan, make_batches, logbook, epochs: int) -> Iterator[None]:
        """Take the steps that are left of this epoch; give way between any two of them."""
        self.model.train()
        self.meter.start()
        self._lines.start_epoch(self.sums)
        progress, last = self.progress, plan.steps_per_epoch
        epoch, first = progress.epoch, progress.step
        batches: Iterator[Batch] = iter(())
        if first < last:
            # A loader draws a seed when it starts; a resumed epoch starts it once more, and must
            # not move the random numbers of the model.
            with torch.random.fork_rng(devices=[]):
                batches = self.meter.watch(make_batches(epoch, progress.seen))
                batches = chain([*islice(batches, 1)], batches)
        bar = logbook.progress(range(first, last), f"epoch {epoch + 1}/{epochs}", unit="step")
        for step in bar:
            micro_batches, global_count = plan.take(epoch, progress.seen)
            began = time.monotonic()
            self.train_step(islice(batches, len(micro_batches)), global_count)
            progress.step, progress.seen = step + 1, progress.seen + global_count
            self.meter.step(global_count)
            self._lines.step(progress, self.steps_done, self.sums, self._watched.norm)
            if self._tell_first_step:
                self._tell_first_step = False
                self.check()  # which waits for the device
                logbook.say(f"first step, with compiling: {time.monotonic() - began:.1f} s")
            if step + 1 < last:
                yield

    def _finish_epoch(
        self, validate, best_by, logbook, saved: Checkpoints, watch: list[float]
    ) -> None:
        """Validate, tell, and keep what improved: before anything decides to stop.

        watch: when the epoch began, and when its first step did.
        """
        self.check()
        train = self.sums.means()  # waits for the device
        trained = time.monotonic()
        speed = self._speed(logbook)
        with torch.random.fork_rng(devices=[]):  # loaders again
            scores = distributed.broadcast_object(validate())
        improved = self.progress.judge(scores[best_by], best_by)
        record = {
            "epoch": self.progress.epoch + 1,
            "step": self.steps_done,
            "lr": self.progress.lr,
            "train": train,
            "validation": scores,
            "best": improved,
            "seconds": time.monotonic() - watch[0],
            "prepare_seconds": watch[1] - watch[0],
            "train_seconds": trained - watch[1],
            "speed": speed,
        }
        with distributed.together():
            logbook.epoch(record)
        if improved:
            facts = {name: record[name] for name in ("epoch", "step", "validation")}
            with distributed.together():
                saved.save_best(self.model, best_by=best_by, **facts)
        self.progress.epoch += 1
        self.progress.step = self.progress.seen = 0
        self.sums = Sums(self.process.device)

    def _speed(self, logbook) -> dict[str, float]:
        """Collective. How fast the epoch's steps were; the first time that they waited too long for
        data, that is said as well."""
        self._lines.flush()
        speed, settled = speed_of_epoch(self.meter, self.process)
        if self._explain_slow_data and settled and settled.data_wait > SLOW_DATA:
            logbook.say(self._explain_slow_data(settled))
            self._explain_slow_data = None
        return speed

    def is_asked_to_stop(self) -> bool:
        """Whether this process was signalled while `fit` was at work. Not collective."""
        return self._stop is not None and self._stop.requested

    def _is_save_due(self, every: float) -> bool:
        """By rank 0's clock, which nobody sets; the others learn it with the next step."""
        return self.process.is_main and 0 < every <= time.monotonic() - self._saved_at

    def _save_between_steps(self, saved: Checkpoints, plan, epochs: int) -> None:
        began = time.monotonic()
        self._save_last(saved, plan, epochs)
        self.meter.leave_out(time.monotonic() - began)

    def _interrupt(self, saved: Checkpoints, plan, epochs: int) -> None:
        self._save_last(saved, plan, epochs)
        raise Interrupted(self._farewell(saved)) from None

    def _farewell(self, saved: Checkpoints, complete: bool = False) -> str:
        place = f"in epoch {self.progress.epoch + 1} after {self.progress.step} of its steps"
        return (
            f"interrupted {'after the last epoch' if complete else place}; everything is saved: "
            f"--resume {saved.folder.path} goes on from there"
        )

    def _save_last(self, saved: Checkpoints, plan, epochs: int) -> None:
        """Collective. Write everything needed to go on, unless the latest step went wrong."""
        self.check()
        self._lines.flush()
        mine = {"sums": self.sums.state(), "rng": _random_state(self.process.device)}
        of_ranks = distributed.gather_objects(mine)
        model, optimizer = adapted_state(self.model), optimizer_state(self.optimizer)
        with distributed.together():
            if self.process.is_main:
                saved.save_last(
                    {
                        "model": model,
                        "optimizer": optimizer,
                        "scaler": self.scaler.state_dict(),
                        "progress": asdict(self.progress),
                        "plan": describe_plan(plan, epochs),
                        "ranks": of_ranks,
                    }
                )
        self._saved_at = time.monotonic()

    def restore(self, state: dict[str, Any], plan, epochs: int) -> list[str]:
        """Take up a run where `state` left it; return what is not as it was, in words.

        On as many ranks with the same data and options, what follows is bit for bit what would
        have followed. The optimizer's options (--lr and others) are those of now, not the file's.
        """
        load_adapted_state(self.model, "the run's state", state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress.read(state["progress"], state["plan"])
        remarks = self._restore_ranks(state["ranks"])
        remarks += self.progress.relocate(state["plan"], describe_plan(plan, epochs))
        if self.progress.seen == 0:
            self.sums = Sums(self.process.device)
        self.steps_done = self.progress.epoch * plan.steps_per_epoch + self.progress.step
        _move_schedule(self.schedule, self.steps_done)
        return remarks

    def _restore_ranks(self, ranks: list[dict]) -> list[str]:
        """Sums and random numbers of each rank."""
        rank, world = self.process.rank, self.process.world
        self.sums = Sums(self.process.device)
        if rank < len(ranks):
            _set_random_state(ranks[rank]["rng"], self.process.device)
        if world == len(ranks):
            self.sums.load(ranks[rank]["sums"])
            return []
        total = {name: sum(r["sums"][name] for r in ranks) for name in ranks[0]["sums"]}
        self.sums.load(total if rank == 0 else dict.fromkeys(total, 0.0))
        return [f"resumed on {world} process(es) instead of {len(ranks)}: results may differ a bit"]


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn the out-of-memory errors of a GPU and of a CPU into one that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY)):
            raise
        raise OutOfMemory(
            "the memory is too small for this: lower --batch_size (and raise --accumulate to keep "
            "the step's size) or --image_size, or use --activation_checkpointing yes or "
            "--precision bf16; `run_sa.py benchmark --probe` with the same flags finds the largest "
            "batch that fits; " + str(error).split(". ")[0]
        ) from None


def _mark_last(items: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    waiting = None
    for item in items:
        if waiting is not None:
            yield waiting, False
        waiting = item
    if waiting is None:
        raise RuntimeError("the loader ended in the middle of an epoch")
    yield waiting, True


def _diagnose(watched: _Watched) -> str:
    """Collective. Which loss of which images was not finite, over all ranks."""
    mine, images = [], []
    for files, index, losses in watched.seen:
        rows = files if index is None else [files[i] for i in index.tolist()]
        images += rows
        mine += [
            (name, file)
            for name, values in losses.items()
            for file, value in zip(rows, values.tolist(), strict=True)
            if not math.isfinite(value)
        ]
    everywhere = distributed.all_gather_objects((mine, images))
    bad = [pair for pairs, _ in everywhere for pair in pairs]
    if bad:
        names = dict.fromkeys(name for name, _ in bad if name != "loss") or ["loss"]
        what, files = f"{' and '.join(names)} not finite", [file for _, file in bad]
    else:
        what = "the gradient is not finite, though every loss is"
        files = [file for _, images in everywhere for file in images]
    return (
        f"{watched.name}: {what} for {', '.join(dict.fromkeys(files))}. The run's files are from "
        "before this step. Look at these images and masks, or lower --lr, set --clip_norm 1, or "
        "use --precision fp32"
    )


def _move_schedule(schedule: LambdaLR, step: int) -> None:
    """Set the learning rates of optimizer step `step`, as if all before it had been taken."""
    schedule.last_epoch = step
    groups, factors = schedule.optimizer.param_groups, schedule.lr_lambdas
    for group, base_lr, factor in zip(groups, schedule.base_lrs, factors, strict=True):
        group["lr"] = base_lr * factor(step)


def _random_state(device: torch.device) -> dict[str, Tensor | None]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
