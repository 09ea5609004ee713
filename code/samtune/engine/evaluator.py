"""Model + loader + scorers -> scores: the same numbers on one process and on many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from samtune.activity import now
from samtune.engine import distributed
from samtune.engine.distributed import Process
from samtune.engine.optim import autocast, resolve_precision
from samtune.errors import Interrupted, UserError
from samtune.structures import Batch, Prediction, Prompts

# What a model answered and the batch that asked -> named scores, each (R,).
Scorer = Callable[[Prediction | None, Batch], dict[str, Tensor]]

_PARTS_AT_ONCE = 64  # whose scores wait on the device: seldom a copy, and never many of them


class Counter(Protocol):
    """Scores that are no mean over rows: what each row adds to integer counts of the whole set."""

    def __call__(self, prediction: Prediction, batch: Batch) -> Tensor:
        """(R, ...) int64."""

    def scores(self, counts: Tensor) -> dict[str, float]:
        """Scores by name from the sum over all rows."""


@dataclass(frozen=True)
class Evaluation:
    """What a set of images scored.

    scores: mean over rows by name, equal on all ranks. rows: on rank 0 one dict per row, "id" (the
    row's name) and each score, sorted by id; empty elsewhere. prompt: what the model was told, read
    off the batches themselves ("box", "2 points", "none", ...): a score without it says little,
    since the box of the true mask gives much away. counts: the counter's sum over rows, None
    without one.
    """

    scores: dict[str, float]
    rows: list[dict]
    prompt: str
    counts: Tensor | None = None


class Evaluator:
    """Scores a model on this rank's share of a set; the shares of all ranks make the whole.

    model: the unwrapped model, or None for scorers that look at the batch alone. scorers: their
    names must differ. counter: further scores, from sums over the whole set. precision: 'auto',
    'fp32', 'bf16' or 'fp16', of the forward pass only. decode_rows: rows that are decoded and
    scored at once, the images being encoded once for all; 0: all of a batch.
    """

    def __init__(
        self,
        model: nn.Module | None,
        scorers: Sequence[Scorer],
        process: Process,
        precision: str = "fp32",
        counter: Counter | None = None,
        decode_rows: int = 0,
    ):
        self.model, self.scorers, self.counter = model, scorers, counter
        self.decode_rows = decode_rows
        self.process, self.precision = process, resolve_precision(precision, process.device)

    def run(
        self,
        loader: Iterable[Batch],
        progress: Callable[[int], None] | None = None,
        on_batch: Callable[[Prediction | None, Batch], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Evaluation:
        """Collective. Score every row of every rank's loader once; some loaders may be empty.

        progress: told 1 after each batch. on_batch: shown each prediction with its batch, on the
        device, in parts of `decode_rows` rows. The mean is the exactly rounded one of all rows, so
        it does not depend on how they were dealt. stop: asked after each batch; where it says yes
        on one rank, that one ends at once, and all raise Interrupted when each has ended. Raises
        UserError on all ranks if one meets it.
        """
        rows, prompt, counts, error = [], None, None, None
        try:
            rows, prompt, counts = self._score(loader, progress, on_batch, stop)
        except UserError as raised:
            error = raised
        except torch.OutOfMemoryError:
            error = UserError(
                "the GPU ran out of memory while scoring; lower --batch_size or --image_size, or "
                "set --precision bf16"
            )
        distributed.agree(error)
        if any(distributed.all_gather_objects(stop())):
            raise Interrupted("scoring was interrupted")
        return self._join(rows, prompt, counts)

    @torch.no_grad()
    def _score(
        self, loader, progress, on_batch, stop
    ) -> tuple[list[dict], str | None, Tensor | None]:
        """This rank's rows, the prompt and the counts; the latter None where there is no batch."""
        names, ids, table, waiting, prompt, counts = [], [], [], [], None, None
        with _eval_mode(self.model):
            for batch in loader:
                now.moves += 1  # also where no bar tells how far it is
                prompt = batch.told or _prompt_of(batch.prompts)
                ids += _row_ids(batch)  # before the copy: reading a GPU tensor would wait for it
                for prediction, part, real in self._predict(batch):
                    scores = self._row_scores(prediction, part)
                    names = list(scores)
                    rows = torch.zeros(len(part.weight), 0, dtype=torch.float64)
                    if scores:
                        rows = torch.stack([s.double() for s in scores.values()], dim=1)
                    waiting.append((rows, real))
                    if self.counter:
                        more = self.counter(prediction, part)
                        more = (more * _beside(part.weight > 0, more)).sum(0)
                        counts = more if counts is None else counts + more
                    if on_batch:
                        on_batch(prediction, part)
                if len(waiting) >= _PARTS_AT_ONCE:
                    table += _moved(waiting)
                if progress:
                    progress(1)
                if stop():
                    break
        table += _moved(waiting)
        return (
            [
                {"id": key, **dict(zip(names, row, strict=True))}
                for key, row in zip(ids, table, strict=True)
            ],
            prompt,
            None if counts is None else counts.cpu(),
        )

    def _predict(self, batch: Batch) -> Iterator[tuple[Prediction | None, Batch, Tensor]]:
        """Answers with the rows that they are about, on the device; and which count, on the CPU."""
        real = (batch.weight > 0).split(self.decode_rows or len(batch.weight))
        batch = batch.to(self.process.device)
        parts = batch.in_parts(self.decode_rows)
        features = self._encode(batch) if self.model and len(parts) > 1 else None
        for part, counts in zip(parts, real, strict=True):
            yield self._answer(part, features), part, counts

    def _encode(self, batch: Batch) -> Tensor:
        with autocast(self.precision, self.process.device):
            image, _, *others = batch.inputs
            return self.model.encode(image, *others)

    def _answer(self, batch: Batch, features: Tensor | None) -> Prediction | None:
        """What the model says; features: of the batch's images, where they are known already."""
        if self.model is None:
            return None
        with autocast(self.precision, self.process.device):
            if features is None:
                return self.model(*batch.inputs)
            return self.model.answer(features, batch.prompts, tuple(batch.image.shape[-2:]))

    def _row_scores(self, prediction: Prediction | None, batch: Batch) -> dict[str, Tensor]:
        scores: dict[str, Tensor] = {}
        for scorer in self.scorers:
            more = scorer(prediction, batch)
            if twice := scores.keys() & more.keys():
                raise ValueError(f"two scorers give the same score: {sorted(twice)}")
            scores |= more
        return scores

    def _join(self, rows: list[dict], prompt: str | None, counts: Tensor | None) -> Evaluation:
        """Collective. Every rank's rows on rank 0; their means, and all counts, on every rank."""
        gathered = distributed.gather_objects((rows, prompt, counts))
        scores, rows = {}, []
        if gathered is not None:
            rows = sorted((row for part, *_ in gathered for row in part), key=lambda r: r["id"])
            prompt = next((told for _, told, _ in gathered if told is not None), "none")
            names = [name for name in rows[0] if name != "id"] if rows else []
            scores = {name: math.fsum(row[name] for row in rows) / len(rows) for name in names}
            parts = [part for *_, part in gathered if part is not None]
            counts = sum(parts) if parts else None
            scores |= self.counter.scores(counts) if parts else {}
        scores, prompt, counts = distributed.broadcast_object((scores, prompt, counts))
        return Evaluation(scores, rows, prompt, counts)


class _eval_mode:
    """Inside, the model is in eval mode; after it, each part is in the mode it was in."""

    def __init__(self, model: nn.Module | None):
        self.modes = [] if model is None else [(part, part.training) for part in model.modules()]
        self.model = model

    def __enter__(self) -> None:
        if self.model is not None:
            self.model.eval()

    def __exit__(self, *_) -> None:
        for part, training in self.modes:
            part.training = training


def _moved(waiting: list[tuple[Tensor, Tensor]]) -> list[list[float]]:
    """The rows that count of all that wait, which wait no more: one copy from the device."""
    if not waiting:
        return []
    rows, real = (torch.cat(parts) for parts in zip(*waiting, strict=True))
    waiting.clear()
    return rows.cpu()[real].tolist()


def _beside(values: Tensor, other: Tensor) -> Tensor:
    """(R,) -> (R, 1, ...), with as many dimensions as `other`."""
    return values.reshape(-1, *[1] * (other.dim() - 1))


def _row_ids(batch: Batch) -> list[str]:
    """The name of each row of real weight: its own, else the id of its image."""
    names = batch.row_names or [batch.ids[i] for i in batch.image_of_row]
    return [name for name, weight in zip(names, batch.weight.tolist(), strict=True) if weight]


def _prompt_of(prompts: Prompts) -> str:
    parts = {"box": prompts.boxes, "points": prompts.points, "mask": prompts.masks}
    return "+".join(name for name, part in parts.items() if part is not None) or "none"
