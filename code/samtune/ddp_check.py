"""`--check_ddp`: a run proves, on its own job, that its processes train one model.

Two things are shown, with the run's data, adapter, precision and wrapping, by the very function
that training calls:

* State: every parameter and buffer is the same on all ranks, bit for bit, before the first step,
  after the first epoch of the run, and at its end.
* Gradient: that of an epoch's first step, and of its last one where that has fewer images, is the
  same on all ranks bit for bit, and is that of one process: rank 0 computes the micro-batches of
  all ranks one after the other, without the others. Random numbers (dropout, noise of gates) are
  drawn alike both times, so that only the order of a sum differs. Where a BatchNorm trains, the
  ranks' micro-batches are one batch, which rank 0 then holds at once; kernels round a joined batch
  another way, and small batches blow that up.

Nothing of it stays: gradients are dropped, buffers and random numbers put back, so that what is
trained is what would have been.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from samtune.data.loading import make_loader
from samtune.data.sampler import MicroBatch, TrainPlan
from samtune.engine import distributed
from samtune.engine.distributed import Process
from samtune.engine.trainer import Trainer, explain_out_of_memory
from samtune.errors import UserError
from samtune.structures import Batch


class Rounding(NamedTuple):
    """allowed: how far a gradient may be off, as a part of the parameter's largest. floor: a
    parameter whose gradient is smaller than this part of the largest of all is judged by that.
    """

    allowed: float
    floor: float


# Where only the order of sums differs: some units of float32; on a GPU kernels that add up in any
# order, in bf16 too. A gradient with wrong weights is off by about an image's share of a step.
ROUNDING = {"fp32": Rounding(1e-4, 1e-3)} | dict.fromkeys(("bf16", "fp16"), Rounding(1e-2, 1e-3))
# Where batches are joined, a value beside 0 may fall on the other side of a ReLU, most likely in
# small batches (measured: 2e-2 at worst); and in half precision what cancels out before a BatchNorm
# (the gradient of a bias there is 0) leaves noise that is as large as small gradients are.
ROUNDING_JOINED = {"fp32": Rounding(5e-2, 1e-2)} | dict.fromkeys(
    ("bf16", "fp16"), Rounding(5e-2, 1.0)
)
_LOSS_SCALE = 256.0  # under fp16: the trainer's own starts so high that it overflows


class DdpCheck:
    """The proof for one run. Raises UserError, on all ranks, where it fails.

    trainer: the run's. plan, dataset: what it trains on. say: told what was found.
    """

    def __init__(
        self, trainer: Trainer, plan: TrainPlan, dataset: Dataset, say: Callable[[str], None]
    ):
        self.trainer, self.plan, self.dataset, self.say = trainer, plan, dataset, say
        self.process = trainer.process
        self._epochs = 0

    def after(self, prepare: Callable[[int], Iterable[None]]) -> Callable[[int], Iterator[None]]:
        """`prepare` of `Trainer.fit`, and the proof behind it."""

        def prepared(epoch: int) -> Iterator[None]:
            yield from prepare(epoch)
            self._epochs += 1
            if self._epochs == 1:
                self.same_everywhere("before the first step")
                self.same_as_alone(epoch)
            elif self._epochs == 2:
                self.same_everywhere(f"after epoch {epoch}")

        return prepared

    def same_everywhere(self, when: str) -> None:
        """Collective. Compare parameters and buffers over ranks; parts of a sharded model, which
        only one rank has, are left out.
        """
        if self.process.world == 1:
            return
        inner = distributed.unwrap(self.trainer.model)
        parameters, buffers = (
            {name: digest(t) for name, t in tensors if not hasattr(t, "full_tensor")}
            for tensors in (inner.named_parameters(), inner.named_buffers())
        )
        self._agree("", parameters | buffers, f"{when}: ")
        parts = "" if parameters else ", the parameters being in parts"
        self.say(
            f"--check_ddp, {when}: {len(parameters)} parameters and {len(buffers)} buffers are the "
            f"same on {self.process.world} processes, bit for bit{parts}"
        )

    def same_as_alone(self, epoch: int) -> None:
        """Collective. Compare the gradients of an epoch's first step, and of a smaller last one."""
        last = self.plan.steps_per_epoch - 1
        steps = [0]
        if self.plan.step(epoch, last)[1] < self.plan.step(epoch, 0)[1]:
            steps.append(last)
        for step in steps:
            with _no_trace(self.trainer.model, self.process.device):
                if self.process.world == 1:
                    self._repeat(epoch, step)
                else:
                    self._compare(epoch, step)

    def _repeat(self, epoch: int, step: int) -> None:
        """One process: the same step twice."""
        first, count = self._gradient_together(epoch, step)
        again, _ = self._gradient_together(epoch, step)
        off, name = largest_difference(again, first)
        found = "the same step twice gave the same gradient, bit for bit"
        if any(digest(first[n]) != digest(again[n]) for n in first):
            found = (
                f"the same step twice gave gradients that differ by {off:.1e} ({name}): kernels "
                "here add up in any order, see --deterministic"
            )
        self.say(f"--check_ddp: one process, so nothing to compare; {found} ({count} images)")

    def _compare(self, epoch: int, step: int) -> None:
        """Collective. One step on all ranks, and on rank 0 alone."""
        together, count = self._gradient_together(epoch, step)
        what = f"step {step + 1} of an epoch ({count} images)"
        self._agree("the gradient of ", {n: digest(g) for n, g in together.items()}, f"{what}: ")
        joined, found, precision = self._joins(), None, self.trainer.precision
        rounding = (ROUNDING_JOINED if joined else ROUNDING)[precision]
        with distributed.together(), distributed.alone(self.trainer.model) as inner:
            if self.process.is_main:
                reference = self._gradient_alone(inner, epoch, step, count, joined)
                found = largest_difference(together, reference, rounding.floor)
        off, name = distributed.broadcast_object(found)
        if not off <= rounding.allowed:
            raise UserError(
                f"--check_ddp, {what}: the gradient of {name} is not that of one process: it is "
                f"off by {off:.1e} of its largest value, where rounding in {precision} makes at "
                f"most {rounding.allowed:.0e}. {_ADVICE}"
            )
        self.say(
            f"--check_ddp, {what}: {len(together)} gradients are the same on {self.process.world} "
            f"processes, and those of one process: at most {off:.1e} off ({name}), rounding in "
            f"{precision}{' of joined batches' if joined else ''} may make "
            f"{rounding.allowed:.0e}"
        )

    def _agree(self, kind: str, digests: dict[str, bytes], when: str) -> None:
        """Collective. Raise UserError if a name's digest is not that of all ranks."""
        of_ranks = distributed.all_gather_objects(digests)
        if (odd := first_odd(of_ranks)) is None:
            return
        name, ranks = odd
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        raise UserError(
            f"--check_ddp, {when}{kind}{name} of {who} is not that of the other ranks. {_ADVICE}"
        )

    def _joins(self) -> bool:
        inner = distributed.unwrap(self.trainer.model)
        return any(
            layer.training and distributed.is_trainable_batch_norm(layer)
            for layer in inner.modules()
        )

    def _gradient_together(self, epoch: int, step: int) -> tuple[dict[str, Tensor], int]:
        """Collective. The gradient of a step as training computes it, and its images."""
        mine, count = self.plan.step(epoch, step)
        seeds = [_seed(self.process.rank, index) for index in range(len(mine))]
        with distributed.together():
            batches = list(self._load(mine))
        probe = self._probe(self.trainer.model, self.process, seeds)
        probe.backward(batches, count)
        return _take_gradients(self.trainer.model), count

    def _gradient_alone(
        self, inner: nn.Module, epoch: int, step: int, count: int, joined: bool
    ) -> dict[str, Tensor]:
        """The same step as one process takes it that has all micro-batches of all ranks."""
        plans = [replace(self.plan, rank=rank) for rank in range(self.process.world)]
        dealt = [plan.step(epoch, step)[0] for plan in plans]
        order = [(rank, index) for rank, mine in enumerate(dealt) for index in range(len(mine))]
        batches = [dealt[rank][index] for rank, index in order]
        if joined:
            batches = [list(chain(*together)) for together in zip(*dealt, strict=True)]
        lone = Process(0, 1, 0, self.process.device)
        probe = self._probe(inner, lone, [_seed(*place) for place in order])
        with explain_out_of_memory():
            inner.train()
            probe.backward(self._load(batches), count)
        return _take_gradients(inner)

    def _load(self, keys: list[MicroBatch]) -> Iterable[Batch]:
        """The batches that training gets for these keys, read by this process."""
        return make_loader(self.dataset, keys, workers=0)

    def _probe(self, model: nn.Module, process: Process, seeds: list[int]) -> Trainer:
        """A trainer like the run's, whose sums and loss scale nobody reads."""
        run = self.trainer
        probe = Trainer(
            model, run.criterion, [], run.optimizer, run.schedule, process, precision=run.precision
        )
        if probe.scaler.is_enabled():
            probe.scaler = torch.amp.GradScaler(process.device.type, init_scale=_LOSS_SCALE)
        probe.upload = _Seeded(probe.upload, seeds)
        return probe


_ADVICE = (
    "So the processes would train different models; nothing in the data makes that: look for a "
    "process with other code, libraries or hardware, or report it"
)


class _Seeded:
    """An upload that begins a random stream of its own for each batch."""

    def __init__(self, upload: Callable[[Batch], Batch], seeds: list[int]):
        self.upload, self.seeds = upload, iter(seeds)

    def __call__(self, batch: Batch) -> Batch:
        torch.manual_seed(next(self.seeds))
        return self.upload(batch)


def _seed(rank: int, index: int) -> int:
    return 2**20 * rank + index


@contextmanager
def _no_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """In training mode inside; afterwards random numbers, buffers and mode are as before."""
    before, mode = [(buffer, buffer.clone()) for buffer in model.buffers()], model.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.train()
        try:
            yield
        finally:
            for buffer, value in before:
                buffer.copy_(value)
            model.train(mode)


def _take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Collective for a sharded model. Copies on the CPU by name; the model has none any more."""
    taken = {}
    for name, parameter in distributed.unwrap(model).named_parameters():
        if parameter.grad is not None:
            taken[name] = distributed.whole(parameter.grad).to("cpu", copy=True)
            parameter.grad = None
    return taken


def largest_difference(
    ours: dict[str, Tensor], reference: dict[str, Tensor], floor: float = 1e-3
) -> tuple[float, str]:
    """How far a gradient is off, as a part of the parameter's largest, and of which parameter.

    floor: see `Rounding`. Infinite where one is not finite or the names differ.
    """
    if names := ours.keys() ^ reference.keys():
        return math.inf, min(names)
    largest = {name: _size(gradient) for name, gradient in reference.items()}
    floor *= max(largest.values(), default=0)
    worst = 0.0, next(iter(ours), "nothing")
    for name, gradient in ours.items():
        off = _size(gradient - reference[name])
        if off:  # else equal, perhaps both 0; NaN is true
            off /= max(largest[name], floor)
        worst = max(worst, (off if math.isfinite(off) else math.inf, name))
    return worst


def _size(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def first_odd(of_ranks: list[dict[str, bytes]]) -> tuple[str, list[int]] | None:
    """The first name whose digests differ, and the ranks that are not as most ranks are, or where
    that decides nothing as rank 0 is; None where all agree.
    """
    for name in dict.fromkeys(name for digests in of_ranks for name in digests):
        values = [digests.get(name) for digests in of_ranks]
        usual = max(values, key=values.count)
        if odd := [rank for rank, value in enumerate(values) if value != usual]:
            return name, odd
    return None


def digest(tensor: Tensor) -> bytes:
    """A hash of the tensor's bits."""
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(plain.numpy(), digest_size=16).digest()
