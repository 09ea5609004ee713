"""Scoring a set by shards gives what scoring it at once gives, on every rank."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from samtune.engine import evaluator as evaluator_module
from samtune.engine.distributed import Process
from samtune.engine.evaluator import Evaluator
from samtune.errors import Interrupted, UserError
from samtune.structures import Batch, Frame, Frames, Prediction, Prompts

SIDE = 8


class Model(nn.Module):
    """Answers each image by its mean; remembers in which mode and precision it was asked."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.BatchNorm2d(3).eval()
        self.scale = nn.Linear(1, 1)
        self.asked: list[tuple[bool, torch.dtype]] = []

    def forward(self, image, prompts, valid_size):
        logits = self.scale(image.float().mean((1, 2, 3), keepdim=False)[:, None])
        self.asked.append((self.training, logits.dtype))
        if prompts.image_index is not None:
            logits = logits[prompts.image_index]
        return Prediction(logits[:, :, None, None].expand(-1, 1, 2, 2))


def make_batch(indices, prompts=None, weight=None, ids=None):
    images = torch.stack(
        [torch.full((3, SIDE, SIDE), 7 * i + 1, dtype=torch.uint8) for i in indices]
    )
    frames = Frames.collate([Frame((SIDE, SIDE), (SIDE, SIDE))] * len(indices), (SIDE, SIDE))
    prompts = prompts or Prompts(boxes=torch.zeros(len(indices), 4))
    rows = len(indices) if prompts.image_index is None else len(prompts.image_index)
    return Batch(
        images, torch.zeros(rows, SIDE, SIDE, dtype=torch.uint8), prompts, frames,
        torch.ones(rows) if weight is None else weight,
        ids=ids or [f"{i:03d}" for i in indices],
    )  # fmt: skip


def loader(count, rank=0, world=1, batch_size=2):
    mine = range(count)[rank::world]
    return [make_batch(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]


def score(prediction, batch):
    """An awkward number per row, so that the order of a sum would show in its last bits."""
    value = prediction.logits[:, 0, 0, 0].double()
    return {"score": (value * 1e3).sin(), "other": 1 / (1 + value.square())}


class Ranks:
    """Several ranks as threads of one process, with the collectives that the evaluator calls."""

    def __init__(self, world):
        self.world = world
        self.barrier = threading.Barrier(world, timeout=20)
        self.slots = [None] * world
        self.me = threading.local()

    def all(self, value):
        self.slots[self.me.rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values

    all_gather_objects = all

    def gather_objects(self, value):
        values = self.all(value)
        return values if self.me.rank == 0 else None

    def broadcast_object(self, value):
        return self.all(value)[0]

    def agree(self, error):
        if said := [str(e) for e in self.all(error) if e is not None]:
            raise UserError("\n".join(dict.fromkeys(said)))

    def run(self, function):
        def one(rank):
            self.me.rank = rank
            return function(Process(rank, self.world, rank, torch.device("cpu")))

        with ThreadPoolExecutor(self.world) as pool:
            futures = [pool.submit(one, rank) for rank in range(self.world)]
        return futures


SINGLE = Process(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.mark.parametrize("count", [1, 4, 7])
@pytest.mark.parametrize("world", [2, 3])
def test_sharded_validation_equals_single_process_validation_for_any_set_size(
    count, world, model, monkeypatch
):
    """The parent let rank 0 validate alone, others waiting. Here all do, no image twice or left."""
    single = Evaluator(model, [score], SINGLE).run(loader(count))
    ranks = Ranks(world)
    monkeypatch.setattr(evaluator_module, "distributed", ranks)
    results = [
        future.result()
        for future in ranks.run(
            lambda p: Evaluator(model, [score], p).run(loader(count, p.rank, p.world, 1))
        )
    ]
    for rank, result in enumerate(results):
        assert result.scores == single.scores, "equal to the last bit, on every rank"
        assert result.prompt == "box"
        assert result.rows == (single.rows if rank == 0 else [])
    assert [row["id"] for row in single.rows] == [f"{i:03d}" for i in range(count)]


def test_a_mistake_that_one_rank_meets_is_raised_on_all_and_none_hangs(model, monkeypatch):
    def broken(process):
        yield make_batch([process.rank])
        if process.rank == 1:
            raise UserError("b.png is truncated")

    ranks = Ranks(3)
    monkeypatch.setattr(evaluator_module, "distributed", ranks)
    for future in ranks.run(lambda p: Evaluator(model, [score], p).run(broken(p))):
        with pytest.raises(UserError, match=r"b\.png is truncated"):
            future.result()


def test_where_one_rank_is_told_to_stop_all_end_together_without_a_score(model, monkeypatch):
    """That one after its batch under way; also where a rank has no batch at all."""
    scored = {0: 0, 1: 0, 2: 0}

    def run(process):
        def count(batches):
            scored[process.rank] += batches

        batches = loader(8, process.rank, 2, 1) if process.rank < 2 else []
        stop = lambda: process.rank == 1 and scored[1] >= 2  # noqa: E731
        return Evaluator(model, [score], process).run(batches, count, stop=stop)

    ranks = Ranks(3)
    monkeypatch.setattr(evaluator_module, "distributed", ranks)
    for future in ranks.run(run):
        with pytest.raises(Interrupted):
            future.result()
    assert scored == {0: 4, 1: 2, 2: 0}


def test_running_out_of_gpu_memory_says_what_to_lower(model):
    def scorer(prediction, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="--batch_size"):
        Evaluator(model, [scorer], SINGLE).run(loader(2))


def test_scores_are_plain_numbers_and_no_graph_outlives_a_batch(model):
    """The parent's epoch averages held the autograd graph of every iteration."""
    seen = []

    def scorer(prediction, batch):
        seen.append(prediction.logits)
        return score(prediction, batch)

    result = Evaluator(model, [scorer], SINGLE).run(loader(5))
    assert not any(logits.requires_grad for logits in seen)
    assert all(type(value) is float for value in result.scores.values())
    assert all(type(row["score"]) is float for row in result.rows)
    # Not inference mode: what a module keeps from here must still serve training afterwards.
    assert not any(logits.is_inference() for logits in seen)


def test_the_model_is_scored_in_eval_mode_and_left_as_it_was(model):
    model.train()
    model.frozen.eval()
    Evaluator(model, [score], SINGLE, "bf16").run(loader(3))
    assert model.asked == [(False, torch.bfloat16)] * 2
    assert model.training and model.scale.training and not model.frozen.training


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (Prompts(), "none"),
        (Prompts(boxes=torch.zeros(2, 4)), "box"),
        (Prompts(points=torch.zeros(2, 1, 2), point_labels=torch.ones(2, 1)), "points"),
        (Prompts(boxes=torch.zeros(2, 4), points=torch.zeros(2, 1, 2)), "box+points"),
    ],
)
def test_a_result_states_the_prompt_that_the_model_was_given(model, prompts, told):
    """A score under the box of the true mask is an upper bound; nobody should have to guess."""
    result = Evaluator(model, [score], SINGLE).run([make_batch([0, 1], prompts)])
    assert result.prompt == told


def test_rows_that_only_keep_ranks_in_step_are_not_counted(model):
    batch = make_batch([3, 1, 3], weight=torch.tensor([1.0, 1.0, 0.0]))
    result = Evaluator(model, [score], SINGLE).run([batch])
    assert [row["id"] for row in result.rows] == ["001", "003"]
    assert result.scores == Evaluator(model, [score], SINGLE).run([make_batch([1, 3])]).scores


def test_each_row_bears_the_id_of_its_image(model):
    prompts = Prompts(boxes=torch.zeros(3, 4), image_index=torch.tensor([1, 0, 1]))
    result = Evaluator(model, [score], SINGLE).run([make_batch([0, 1], prompts, ids=["b", "a"])])
    assert [row["id"] for row in result.rows] == ["a", "a", "b"]
    assert result.rows[0]["score"] == result.rows[1]["score"] != result.rows[2]["score"]


def test_progress_and_on_batch_hear_of_every_batch(model):
    told, shown = [], []
    Evaluator(model, [score], SINGLE).run(
        loader(5), told.append, lambda prediction, batch: shown.append((prediction, batch.ids))
    )
    assert told == [1, 1, 1]
    assert [ids for _, ids in shown] == [["000", "001"], ["002", "003"], ["004"]]
    assert shown[0][0].logits.shape == (2, 1, 2, 2)


def test_scores_that_wait_on_the_device_are_moved_in_order(model, monkeypatch):
    whole = Evaluator(model, [score], SINGLE).run(loader(9))
    monkeypatch.setattr(evaluator_module, "_PARTS_AT_ONCE", 2)
    assert Evaluator(model, [score], SINGLE).run(loader(9)).rows == whole.rows


def test_scorers_that_need_no_model_get_none():
    scorer = lambda prediction, batch: {"blank": torch.tensor([float(prediction is None)] * 2)}  # noqa: E731
    assert Evaluator(None, [scorer], SINGLE).run(loader(2)).scores == {"blank": 1.0}


def test_two_scorers_may_not_claim_one_name(model):
    with pytest.raises(ValueError, match="score"):
        Evaluator(model, [score, score], SINGLE).run(loader(1))


WORKER = """
import json, sys
import torch
from samtune.engine import distributed
from samtune.engine.evaluator import Evaluator
from test_evaluator import Model, loader, score
process = distributed.start()
torch.manual_seed(0)
shard = loader(int(sys.argv[1]), process.rank, process.world)
result = Evaluator(Model(), [score], process).run(shard)
print(json.dumps([result.scores, result.prompt, result.rows]))
distributed.shutdown()
"""


@pytest.mark.parametrize("count", [1, 3])
def test_two_real_processes_agree_also_when_one_has_nothing_to_score(count, model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    paths = [str(Path(evaluator_module.__file__).parents[2]), str(Path(__file__).parent)]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(count)], stdout=subprocess.PIPE, text=True,
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank),
                                      "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        )
        for rank in range(2)
    ]  # fmt: skip
    answers = [json.loads(worker.communicate(timeout=120)[0]) for worker in workers]
    single = Evaluator(model, [score], SINGLE).run(loader(count))
    assert answers[0] == [single.scores, "box", single.rows]
    assert answers[1] == [single.scores, "box", []]


class Counting:
    """Counts that are no mean: the sum over rows of (a, b), scored a / b."""

    def __call__(self, prediction, batch):
        value = batch.image[:, 0, 0, 0].long()
        return torch.stack([value, value * value], dim=1)

    @staticmethod
    def scores(counts):
        a, b = counts.tolist()
        return {"ratio": a / b}


@pytest.mark.parametrize("world", [1, 3])
def test_counts_are_summed_over_the_set_without_fillers(world, model, monkeypatch):
    def run(process):
        shard = loader(7, process.rank, world)
        if process.rank == 0:
            shard.append(make_batch([3], weight=torch.zeros(1)))
        return Evaluator(model, [score], process, counter=Counting()).run(shard)

    ranks = Ranks(world)
    monkeypatch.setattr(evaluator_module, "distributed", ranks)
    values = [7 * i + 1 for i in range(7)]
    for future in ranks.run(run):
        result = future.result()
        assert result.counts.tolist() == [sum(values), sum(v * v for v in values)]
        assert result.scores["ratio"] == sum(values) / sum(v * v for v in values)
        assert {"score", "other"} < result.scores.keys()
