"""What a model answers about a set, handed picture by picture to a protocol's metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from samtune.data.files import Pair
from samtune.metrics.classes import class_map
from samtune.metrics.measure import BINARY, INSTANCES, LABELS, SOFT, Answer
from samtune.metrics.scoring import Scoring
from samtune.structures import Batch, Prediction
from samtune.threads import InOrder

# What was answered and the batch that asked -> (R, ...) of what a protocol reads, on the target.
Reading = Callable[[Prediction | None, Batch], Tensor]


class Place(NamedTuple):
    """A row's picture in the target: its id, its name for tables, its size, and whether it counts.

    `target` may be larger than the picture, and is read up to its size.
    """

    image_id: str
    name: str
    size: tuple[int, int]


class Collector:
    """Feeds a protocol from batches.

    scoring: of this process. pairs: of the whole set; their groups are volumes where the protocol
    scores volumes, and what is drawn as a whole by the bootstrap elsewhere. reading: what is
    scored instead of the model's answer, see `Reading`. threads: measure, while the caller goes on;
    0: the caller does.
    """

    def __init__(
        self,
        scoring: Scoring,
        pairs: Sequence[Pair],
        reading: Reading | None = None,
        threads: int = 0,
    ):
        self.scoring, self.form = scoring, scoring.protocol.answer
        self.measuring = InOrder(threads, scoring.enter)
        self.reading = reading or READINGS[self.form]
        self.group_of = {pair.id: pair.group for pair in pairs}
        self.left = Counter(pair.group or pair.id for pair in pairs)  # slices of volumes to come
        self.objects: dict[str, list[tuple[np.ndarray, np.ndarray, float]]] = {}

    def __call__(self, prediction: Prediction | None, batch: Batch) -> None:
        """Take in a batch's answers, on any device."""
        if self.form == INSTANCES:
            self._finish_objects(keep=batch.ids)
        answers = self.reading(prediction, batch).cpu().numpy()
        truths = batch.target.cpu().numpy()
        scores = None if prediction is None or prediction.iou is None else prediction.iou[:, 0]
        scores = None if scores is None else scores.float().cpu().numpy()
        for row, place in _places(batch):
            height, width = place.size
            truth, answer = truths[row, :height, :width], answers[row, ..., :height, :width]
            if self.form == INSTANCES:
                score = 1.0 if scores is None else float(scores[row])
                self.objects.setdefault(place.image_id, []).append((truth == 1, answer, score))
            else:
                self._add(place, truth, Answer(**{self.form: answer}))

    def finish(self) -> Scoring:
        """After the last batch. Raises what measuring raised."""
        self._finish_objects()
        self.measuring.finish()
        return self.scoring

    def _measure(self, name: str, truth: np.ndarray, answer: Answer, group: str) -> None:
        size = truth.nbytes + answer.array(self.form).nbytes
        self.measuring.put(self.scoring.measure, name, truth, answer, group, size=size)

    def _add(self, place: Place, truth: np.ndarray, answer: Answer) -> None:
        group = self.group_of[place.image_id]
        if self.scoring.protocol.unit != "volume":
            own = place.name == place.image_id
            self._measure(place.name, truth, answer, group or ("" if own else place.image_id))
            return
        volume = group or place.image_id
        self.scoring.add(place.image_id, truth, answer, volume)
        self.left[volume] -= 1
        if not self.left[volume]:  # all of it was on this process
            slices = self.scoring.open.pop(volume)
            size = 2 * sum(part.nbytes for pair in slices.values() for part in pair)  # stacked, too
            self.measuring.put(self.scoring.measure_volume, volume, slices, size=size)

    def _finish_objects(self, keep: Sequence[str] = ()) -> None:
        """Score the images whose objects have all been seen."""
        for image_id in [key for key in self.objects if key not in keep]:
            truths, masks, scores = zip(*self.objects.pop(image_id), strict=True)
            answer = Answer(masks=np.stack(masks), scores=np.array(scores))
            self._measure(image_id, np.stack(truths), answer, self.group_of[image_id])


def _places(batch: Batch) -> Iterator[tuple[int, Place]]:
    """Every row that counts."""
    sizes, names = batch.frames.original_size.tolist(), batch.row_names or batch.ids
    weights = batch.weight.tolist()
    for row, image in enumerate(batch.image_of_row):
        if weights[row]:
            size = batch.frames.frame_size if batch.in_frame else tuple(sizes[image])
            yield row, Place(batch.ids[image], names[row], size)


def _probability(prediction: Prediction, batch: Batch) -> Tensor:
    return batch.at_target(prediction.logits)[:, 0].sigmoid()


def _class_probability(prediction: Prediction, batch: Batch) -> Tensor:
    return batch.at_target(prediction.logits).softmax(1)


def _objects(prediction: Prediction, batch: Batch) -> Tensor:
    return batch.at_target(prediction.logits)[:, 0] > 0


READINGS: dict[str, Reading] = {
    BINARY: _probability,
    LABELS: class_map,
    SOFT: _class_probability,
    INSTANCES: _objects,
}
