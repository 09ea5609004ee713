"""Score models on a set of pictures under one prompt: a protocol's numbers, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from samtune.answers import Collector, Reading
from samtune.config import (
    LoaderOptions,
    LossOptions,
    PromptOptions,
    ReadOptions,
    answers_classes,
)
from samtune.data.class_shares import class_names
from samtune.data.files import Pair
from samtune.engine import distributed
from samtune.engine.distributed import Process
from samtune.engine.evaluator import Evaluator
from samtune.engine.logbook import Logbook
from samtune.losses import make_loss
from samtune.metrics.measure import BINARY, LABELS
from samtune.metrics.protocols import SQUARE, choose
from samtune.metrics.scoring import Scoring
from samtune.models.segmenter import PromptedSam
from samtune.pipeline import evaluation_loader, original_boxes
from samtune.structures import IGNORE, Batch, Prediction


class Judged(NamedTuple):
    """What one model scored. told: what it was told, as the batches show it.

    losses: means over rows. result: `Scoring.result()`, equal on all ranks. table: on rank 0 a row
    per picture, with losses where they were taken.
    """

    told: str
    losses: dict[str, float]
    result: dict
    table: list[dict]

    @property
    def scores(self) -> dict[str, float | None]:
        return self.losses | self.result["scores"]

    @property
    def headlines(self) -> dict[str, dict]:
        return self.result["headlines"]


@dataclass(frozen=True)
class Bench:
    """What stays the same whichever model and prompt is scored.

    protocol: (name, mode). majority: the class id that is most frequent in the set.
    """

    pairs: list[Pair]
    read: ReadOptions
    loader: LoaderOptions
    image_size: tuple[int, int]
    protocol: tuple[str, str]
    precision: str
    process: Process
    logbook: Logbook
    majority: int = 0

    def judge(
        self,
        models: dict[str, PromptedSam],
        prompts: PromptOptions,
        look: Callable[[str, Prediction, Batch], None] | None = None,
    ) -> dict[str, Judged]:
        """Collective. Score every model under a prompt, and what needs no model beside them.

        look: shown each model's predictions.
        """
        name, mode = self.protocol
        square = choose(name, mode, self._classes(prompts))[2].resolution == SQUARE
        loader = evaluation_loader(
            self.pairs, self.read, prompts, self.image_size, self.loader, self.process,
            "frame" if square else "original",
        )  # fmt: skip
        results = {}
        for label, model in models.items():
            shown = (lambda p, b, label=label: look(label, p, b)) if look else None
            results[label] = self._run(label, model.to(self.process.device), loader, prompts, shown)
        told = next(iter(results.values())).told if results else ""
        form = choose(name, mode, self._classes(prompts))[0].answer
        if form == BINARY and told.startswith(("box", "whole")):
            results["box_filled"] = self._run("", None, loader, prompts, reading=filled_box)
        if form == LABELS:
            results["majority"] = self._run("", None, loader, prompts, reading=self._most_frequent)
        return results

    def _run(self, label, model, loader, prompts, look=None, reading: Reading | None = None):
        classes = self._classes(prompts)
        names = class_names(self.read) if classes > 1 else ()
        scoring = Scoring(self.protocol[0], classes, names, self.protocol[1])
        collector = Collector(scoring, self.pairs, reading)
        loss = make_loss(LossOptions(), self.read.num_classes, prompts.prompt)
        evaluator = Evaluator(
            model, [loss.scores] if model else [], self.process, self.precision,
            decode_rows=self.loader.decode_rows,
        )  # fmt: skip

        def take(prediction: Prediction | None, batch: Batch) -> None:
            collector(prediction, batch)
            if look:
                look(prediction, batch)

        with self.logbook.progress(len(loader), f"scoring {label}") as bar:
            evaluation = evaluator.run(loader, bar.update if label else None, take)
        parts = distributed.gather_objects(collector.finish())
        whole, table = None, []
        if parts is not None:
            total = parts[0].merge(parts[1:])
            whole = total.result()
            own = {row["id"]: row for row in evaluation.rows}
            table = [own.get(row["id"], {}) | row for row in total.table()]
        result = distributed.broadcast_object(whole)
        return Judged(evaluation.prompt, evaluation.scores, result, table)

    def _classes(self, prompts: PromptOptions) -> int:
        """How many classes an answer tells apart."""
        several = answers_classes(self.read.num_classes, prompts.prompt)
        return self.read.num_classes if several else 1

    def _most_frequent(self, prediction: None, batch: Batch) -> Tensor:
        return torch.full_like(batch.target, self.majority)


def filled_box(prediction: Prediction | None, batch: Batch) -> Tensor:
    """The box itself taken as the mask, (R, T_h, T_w) 0 or 1: what a prompt gives away."""
    boxes = batch.prompts.boxes if batch.in_frame else original_boxes(batch)
    x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)  # each (R, 1, 1)
    height, width = batch.target.shape[-2:]
    y = torch.arange(height, device=batch.target.device)[None, :, None]
    x = torch.arange(width, device=batch.target.device)[None, None, :]
    inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1) & (batch.target != IGNORE)
    return inside.float()
