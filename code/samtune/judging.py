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
from samtune.data.loading import scoring_threads
from samtune.data.prompts import in_words
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
        beside = self._beside(prompts)
        results, of_batches = {}, {}
        with loader:
            for label, model in models.items():
                shown = (lambda p, b, label=label: look(label, p, b)) if look else None
                model = model.to(self.process.device)
                results[label], extra = self._run(label, model, loader, prompts, shown, beside)
                of_batches |= extra
                beside = {}  # once is enough: it is about the batches, whichever model answers
        return results | of_batches

    def _beside(self, prompts: PromptOptions) -> dict[str, Reading]:
        """What is scored without a model, by name."""
        form = choose(*self.protocol, self._classes(prompts))[0].answer
        if form == BINARY and in_words(prompts).startswith(("box", "whole")):
            return {"box_filled": filled_box}
        return {"majority": self._most_frequent} if form == LABELS else {}

    def _run(
        self, label, model, loader, prompts, look, beside: dict[str, Reading]
    ) -> tuple[Judged, dict[str, Judged]]:
        """One pass over the set: what the model scored, and what needs no model."""
        own, *others = (self._collector(prompts, one) for one in (None, *beside.values()))
        loss = make_loss(LossOptions(), self.read.num_classes, prompts.prompt)
        evaluator = Evaluator(
            model, [loss.scores], self.process, self.precision,
            decode_rows=self.loader.decode_rows,
        )  # fmt: skip

        def take(prediction: Prediction | None, batch: Batch) -> None:
            for collector in (own, *others):
                collector(prediction, batch)
            if look:
                look(prediction, batch)

        with self.logbook.progress(len(loader), f"scoring {label}") as bar:
            evaluation = evaluator.run(loader, bar.update, take)
        result, table = _joined(own)
        losses = {row["id"]: row for row in evaluation.rows}
        table = [losses.get(row["id"], {}) | row for row in table]
        judged = Judged(evaluation.prompt, evaluation.scores, result, table)
        joined = zip(beside, map(_joined, others), strict=True)
        return judged, {name: Judged(evaluation.prompt, {}, *parts) for name, parts in joined}

    def _collector(self, prompts: PromptOptions, reading: Reading | None) -> Collector:
        classes = self._classes(prompts)
        names = class_names(self.read) if classes > 1 else ()
        scoring = Scoring(self.protocol[0], classes, names, self.protocol[1])
        return Collector(scoring, self.pairs, reading, scoring_threads(self.loader.workers))

    def _classes(self, prompts: PromptOptions) -> int:
        """How many classes an answer tells apart."""
        several = answers_classes(self.read.num_classes, prompts.prompt)
        return self.read.num_classes if several else 1

    def _most_frequent(self, prediction: None, batch: Batch) -> Tensor:
        return torch.full_like(batch.target, self.majority)


def _joined(collector: Collector) -> tuple[dict, list[dict]]:
    """Collective. The result of all ranks on each of them; on rank 0 the table of pictures."""
    parts = distributed.gather_objects(collector.finish())
    whole, table = None, []
    if parts is not None:
        total = parts[0].merge(parts[1:])
        whole, table = total.result(), total.table()
    return distributed.broadcast_object(whole), table


def filled_box(prediction: Prediction | None, batch: Batch) -> Tensor:
    """The box itself taken as the mask, (R, T_h, T_w) 0 or 1: what a prompt gives away."""
    boxes = batch.prompts.boxes if batch.in_frame else original_boxes(batch)
    x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)  # each (R, 1, 1)
    height, width = batch.target.shape[-2:]
    y = torch.arange(height, device=batch.target.device)[None, :, None]
    x = torch.arange(width, device=batch.target.device)[None, None, :]
    inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1) & (batch.target != IGNORE)
    return inside.float()
