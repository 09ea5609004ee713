"""Answers handed to a protocol: batched, beside the model, and with nothing kept per pixel."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from samtune.answers import Collector
from samtune.data.files import Pair
from samtune.errors import UserError
from samtune.metrics.protocols import PROTOCOLS, SQUARE
from samtune.metrics.scoring import Scoring
from samtune.structures import IGNORE, Batch, Frame, Frames, Prediction, Prompts

CLASSES, FRAME = 3, 32
MODES = [(name, mode) for name, row in PROTOCOLS.items() for mode in row.modes]


def picture(index: int, form: str, side: int):
    """(R, H, W) truth and (R, C, 8, 8) logits that are right more often than not."""
    rng = np.random.default_rng(index)
    height, width = side + index % 5, side + 3 * (index % 3)
    rows = 3 if form == "instances" else 1
    channels = CLASSES if form in ("labels", "class_probability") else 1
    small = rng.integers(0, max(2, channels), (rows, 8, 8))
    lines, columns = (np.arange(n) * 8 // n for n in (height, width))
    truth = small[:, lines[:, None], columns].astype(np.uint8)
    truth[0, 0, : index % 4] = IGNORE
    wanted = small[:, None] == (np.arange(channels)[:, None, None] if channels > 1 else 1)
    logits = 4.0 * wanted - 2 + rng.standard_normal(wanted.shape)
    return truth, logits.astype(np.float32)


def make_batch(indices, form: str, in_frame: bool = False, side: int = 40):
    """A batch of pictures of different sizes, as a loader makes it, and a model's answer."""
    pictures = [picture(i, form, FRAME if in_frame else side) for i in indices]
    sizes = [truth.shape[-2:] for truth, _ in pictures]
    fitted = [(round(h * FRAME / max(h, w)), round(w * FRAME / max(h, w))) for h, w in sizes]
    frames = [Frame(size, valid) for size, valid in zip(sizes, fitted, strict=True)]
    frames = Frames.collate(frames, (FRAME, FRAME))
    canvas = (FRAME, FRAME) if in_frame else frames.canvas_size
    rows = [len(truth) for truth, _ in pictures]
    target = torch.full((sum(rows), *canvas), IGNORE, dtype=torch.uint8)
    for row, truth in enumerate(t[: canvas[0], : canvas[1]] for p, _ in pictures for t in p):
        target[row, : truth.shape[0], : truth.shape[1]] = torch.from_numpy(truth)
    index = torch.repeat_interleave(torch.arange(len(indices)), torch.tensor(rows))
    logits = torch.from_numpy(np.concatenate([logits for _, logits in pictures]))
    prediction = Prediction(logits, iou=logits.amax((2, 3))[:, :1].sigmoid())
    ids = [f"picture{i:03d}" for i in indices]
    batch = Batch(
        torch.zeros(len(ids), 3, FRAME, FRAME, dtype=torch.uint8), target,
        Prompts(image_index=index), frames, torch.ones(sum(rows)), ids, in_frame=in_frame,
        row_names=[f"{ids[i]}#{r}" if form == "instances" else ids[i] for r, i in enumerate(index)],
    )  # fmt: skip
    return prediction, batch


def score(protocol, mode, images, batch_size=1, threads=0, side=40) -> Scoring:
    scoring = Scoring(protocol, CLASSES if PROTOCOLS[protocol].classes > 1 else 1, mode=mode,
                      replicates=20)  # fmt: skip
    volumes = scoring.protocol.unit == "volume"
    pairs = [
        Pair(f"picture{i:03d}", Path("a"), Path("a"), f"case{i // 5}" if volumes else "")
        for i in range(images)
    ]
    collector = Collector(scoring, pairs, threads=threads)
    form, in_frame = scoring.protocol.answer, scoring.mode.resolution == SQUARE
    for start in range(0, images, batch_size):
        indices = range(start, min(images, start + batch_size))
        if volumes:  # slices of a volume are of one size
            parts = [make_batch([i], form, True) for i in indices]
        else:
            parts = [make_batch(indices, form, in_frame, side)]
        for part in parts:
            collector(*part)
    return collector.finish()


@pytest.mark.parametrize(("protocol", "mode"), MODES)
def test_threads_and_batches_of_different_sizes_change_no_score(protocol, mode):
    """Threads not by a bit; batches by rounding, for a matrix product of another size may differ in
    the last one.
    """
    alone = score(protocol, mode, 10)
    for batch_size, threads in ((1, 2), (4, 0), (10, 3)):
        other = score(protocol, mode, 10, batch_size, threads)
        assert list(other.rows) == list(alone.rows), "in the order of the pictures"
        if batch_size == 1:
            assert other.table() == alone.table() and other.result() == alone.result()
        for row, expected in zip(other.table(), alone.table(), strict=True):
            numbers = [
                [v for v in one.values() if not isinstance(v, str)] for one in (row, expected)
            ]
            np.testing.assert_allclose(*numbers, rtol=1e-6, atol=1e-7)


def test_what_measuring_refuses_is_raised_to_the_caller():
    collector = Collector(Scoring("binary", replicates=2), [Pair("picture000", Path(), Path())],
                          threads=2)  # fmt: skip
    collector.scoring.metrics = [Refusing()]
    with pytest.raises(UserError, match="no such border"):
        collector(*make_batch([0], "probability"))
        collector.finish()


class Refusing:
    def measure(self, truth, answer):
        raise UserError("no such border")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_per_pixel_is_kept(protocol):
    """What lives after ten times the pictures is more only by rows of a table."""
    side, threads, living, tensors = 160, 2, [], []
    score(protocol, "", 1, threads=threads, side=side)  # imports, caches
    for images in (3, 30):
        gc.collect()
        tracemalloc.start()
        kept = score(protocol, "", images, threads=threads, side=side)
        gc.collect()
        tensors.append(sum(type(o) is torch.Tensor for o in gc.get_objects()))
        living.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        del kept
    assert (living[1] - living[0]) / 27 < side * side / 4, "bytes: not even a fourth of a mask"
    assert tensors[1] <= tensors[0]
