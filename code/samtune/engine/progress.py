"""How far a run is: position, best score so far, and the running sums of the epoch under way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from samtune.engine import distributed


@dataclass
class Progress:
    """How far a run is: `epoch` epochs are complete, and `step` steps of the one after them.

    seen: samples that those steps took of the epoch's order, over all ranks. That is the position;
    how many steps lead there depends on their size, which another part of the run may change.
    """

    epoch: int = 0
    step: int = 0
    seen: int = 0
    lr: float = 0.0  # of the latest step
    best: float = math.nan  # the watched score of the best epoch; NaN before the first real one
    best_epoch: int = 0  # counted from 1, as in the records; 0: none yet
    stale: int = 0  # epochs since the best one

    def judge(self, score: float, best_by: str) -> bool:
        """Count a validated epoch; True if it is the best so far. NaN never is an improvement."""
        sign = -1 if best_by == "loss" else 1
        better = not math.isnan(score) and not sign * score <= sign * self.best
        self.stale = 0 if better else self.stale + 1
        if better or self.best_epoch == 0:  # the first epoch is kept whatever it scored
            self.best, self.best_epoch = score, self.epoch + 1
            return True
        return False

    @classmethod
    def read(cls, saved: dict[str, Any], plan: dict[str, int]) -> Progress:
        """From a file. plan: `describe_plan` of the run that wrote it. Before files said how many
        samples were seen, all steps of an epoch had one size."""
        seen = min(saved["step"] * plan["samples_per_step"], plan["samples"])
        return cls(**{"seen": seen, **saved})

    def relocate(self, saved: dict[str, int], now: dict[str, int]) -> list[str]:
        """Find the step from which another plan goes on; return remarks if anything differs.

        saved, now: `describe_plan` of the run's plan and of the one that takes over. With another
        number of images per step each image of the epoch still comes once: the epoch goes on after
        those that were seen, and its last step has the number that it always has.
        """
        remarks, epoch = [], self.epoch + 1
        if any(now[name] != saved[name] for name in ("samples", "seed")):
            again = f": epoch {epoch} starts anew" if self.seen else ""
            remarks.append(f"the number of images or --seed is not the run's{again}")
            self.seen = 0
        elif now["samples_per_step"] != saved["samples_per_step"]:
            remarks.append(
                f"a step has {now['samples_per_step']} images instead of "
                f"{saved['samples_per_step']}: epoch {epoch} goes on after {self.seen} images, in "
                "the same order, each image once"
            )
        size, samples = now["samples_per_step"], now["samples"]
        self.step = -(-samples // size) - -(-(samples - self.seen) // size)
        if now["total_steps"] != saved["total_steps"]:
            remarks.append(
                f"the run has {now['total_steps']} steps instead of {saved['total_steps']}: from "
                "here on the learning rate follows the new length"
            )
        return remarks


def describe_plan(plan, epochs: int) -> dict[str, int]:
    """What decides which sample is seen when."""
    return {
        "samples": plan.samples,
        "samples_per_step": plan.samples_per_step,
        "seed": plan.seed,
        "total_steps": epochs * plan.steps_per_epoch,
    }


@dataclass
class Sums:
    """Weighted sums of per-row values by name, in float64 on the device, without waiting for it."""

    device: torch.device
    names: list[str] = field(default_factory=list)
    values: Tensor | None = None  # (1 + names,), the first one sums the weights

    @torch.no_grad()
    def add(self, rows: dict[str, Tensor], weight: Tensor) -> None:
        """rows: name -> (R,) values; weight: (R,)."""
        if self.values is None:
            self.load(dict.fromkeys(["weight", *rows], 0.0))
        weight = weight.double()
        columns = [torch.ones_like(weight), *(rows[name].double() for name in self.names)]
        self.values += torch.stack(columns) @ weight

    def means(self) -> dict[str, float]:
        """Collective. The weighted mean of each name over all ranks."""
        total = distributed.all_reduce_sum(self.values).cpu()
        return dict(zip(self.names, (total[1:] / total[0]).tolist(), strict=True))

    def state(self) -> dict[str, float]:
        if self.values is None:
            return {}
        return dict(zip(["weight", *self.names], self.values.tolist(), strict=True))

    def load(self, state: dict[str, float]) -> None:
        self.names = [name for name in state if name != "weight"]
        self.values = None
        if state:
            self.values = torch.tensor(
                [state["weight"], *(state[name] for name in self.names)],
                dtype=torch.float64,
                device=self.device,
            )
