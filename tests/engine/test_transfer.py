"""Batches on their way to the device, and numbers on their way back."""

import pytest
import torch
from engine_standins import Plan, make_batches

from samtune.engine.transfer import Arrival, Upload
from samtune.structures import Batch, Corrections, Frame, Frames, Prompts

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def full_batch(value=7, side=64):
    """A batch with every tensor that there can be."""
    rows = torch.full((2, 1, 16, 16), float(value))
    return Batch(
        image=torch.full((2, 3, side, side), value, dtype=torch.uint8),
        target=torch.full((2, side, side), value, dtype=torch.uint8),
        prompts=Prompts(
            boxes=torch.ones(2, 4), points=torch.ones(2, 1, 2),
            point_labels=torch.ones(2, 1).long(), image_index=torch.arange(2), masks=rows,
            mask_given=torch.ones(2).bool(), lengths=(1, 1),
            corrections=Corrections(1, rows[:, 0].byte(), torch.arange(2)),
        ),
        frames=Frames.collate([Frame((side, side), (side, side))] * 2, (side, side)),
        weight=torch.ones(2),
    )  # fmt: skip


def tensors(value):
    """All in a batch, however deep."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (Batch, Frames)):
        value = tuple(vars(value).values())
    return [t for part in value for t in tensors(part)] if isinstance(value, tuple) else []


def test_on_a_cpu_a_batch_is_where_it_has_to_be():
    batch = next(iter(make_batches(Plan(2, 2))(0, 0)))
    assert Upload(CPU)(batch).image.data_ptr() == batch.image.data_ptr()


def test_every_tensor_of_a_batch_is_told_of_the_stream(monkeypatch):
    seen = []
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: seen.append((self.data_ptr(), stream))
    )
    batch = full_batch()
    batch.record_stream("steps")
    assert len(seen) == len(tensors(batch)) == 13
    assert {stream for _, stream in seen} == {"steps"}
    assert batch.image.sum() > 0


def test_numbers_arrive_on_a_cpu_at_once():
    assert Arrival(torch.tensor([1.0, 2.0])).wait().tolist() == [1.0, 2.0]


@needs_gpu
def test_batches_arrive_whole_while_the_device_is_busy():
    """Each is used and dropped while its successor is copied; a wrong order would mix them."""
    device = torch.device("cuda", 0)
    upload, sums, busy = Upload(device), [], torch.randn(4096, 4096, device=device)
    for value in range(40):
        batch = upload(full_batch(value, 512).pin_memory())
        assert all(t.is_cuda for t in tensors(batch))
        for _ in range(5):
            busy = (busy @ busy).tanh()
        sums.append(Arrival(batch.image.double().mean() + batch.prompts.masks.double().mean()))
        del batch
    assert [float(total.wait()) for total in sums] == [2.0 * value for value in range(40)]
