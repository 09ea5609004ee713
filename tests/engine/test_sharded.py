"""`--shard`: each of two processes holds a part, and the numbers are those of DDP."""

from pathlib import Path

import launch
import pytest
import torch
from worker_shards import fit, new_model, scores_of

from samtune.engine import distributed
from samtune.engine.checkpoint import load_adapted
from samtune.engine.distributed import Process
from samtune.engine.trainer import Trainer
from samtune.errors import UserError

ALONE = Process(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, rank 0's results, rank 1's): one launch for all tests of this file."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch cannot shard on a CPU")
    folder = tmp_path_factory.mktemp("shards")
    script = Path(__file__).with_name("worker_shards.py")
    code, out, err = launch.torchrun(script, folder / "pictures", folder, timeout=300)
    assert code == 0, out + err
    return [folder, *(torch.load(folder / f"rank{rank}.pt") for rank in (0, 1))]


# With two ranks a sum of two gradients has one order only, so that nothing is left to rounding.
@pytest.mark.parametrize(
    "sharded, expected",
    [
        ("whole in shards", "whole in ddp"),  # with activations computed twice, at that
        ("half in shards", "half in ddp"),
        ("shards to ddp", "whole in ddp"),
        ("ddp to shards", "whole in ddp"),
        ("lora, bf16 in shards", "lora, bf16 in ddp"),
    ],
)
def test_shards_train_what_ddp_trains(runs, sharded, expected):
    """Parameters, losses and scores, through accumulation, clipping, validation and resuming."""
    _, rank_0, rank_1 = runs
    ours, theirs = rank_0[sharded], rank_0[expected]
    assert ours["state"].keys() == theirs["state"].keys() and rank_1[sharded]["state"] is None
    for name, tensor in theirs["state"].items():
        torch.testing.assert_close(ours["state"][name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    last = [records[-1] for records in (ours["records"], theirs["records"])]
    for part in ("train", "validation"):
        assert last[0][part] == pytest.approx(last[1][part], rel=1e-6)
    assert ours["records"] == rank_1[sharded]["records"]
    assert ours["untrained"] == pytest.approx(theirs["untrained"], rel=1e-6)
    assert ours["untrained"]["loss"] != pytest.approx(last[0]["validation"]["loss"], rel=1e-3)


@pytest.mark.parametrize("kind", ["parameters held", "moments held"])
def test_each_rank_keeps_its_part_only(runs, kind):
    """The ranks' parts make the whole; a row that cannot be halved makes one a little larger."""
    parts = [rank["whole in shards"][kind] for rank in runs[1:]]
    whole = runs[1]["whole in ddp"][kind]
    assert sum(parts) == whole
    assert max(parts) < 0.51 * whole


def test_the_files_of_shards_are_those_of_ddp(runs):
    """best.safetensors, best.pth and last.pt: the same names, shapes and plain tensors."""
    for name in ("last.pt", "best.pth"):
        ours, theirs = (torch.load(runs[0] / run / name, weights_only=True) for run in "ba")
        assert _shape_of(ours) == _shape_of(theirs)


def _shape_of(value):
    if isinstance(value, torch.Tensor):
        return type(value), value.shape, value.dtype
    if isinstance(value, dict):
        return {key: _shape_of(item) for key, item in value.items() if key != "rng"}
    return [_shape_of(item) for item in value] if isinstance(value, list) else type(value)


def test_the_best_state_of_shards_scores_the_same_in_one_process(runs, tiny_from_worker):
    folder, rank_0, _ = runs
    records = rank_0["whole in shards"]["records"]
    best = [record for record in records if record["best"]][-1]["validation"]
    for file in ("best.safetensors", "best.pth"):
        load_adapted(model := new_model(), folder / "b" / file)
        assert scores_of(model, folder / "pictures", ALONE) == pytest.approx(best, rel=1e-5)


def test_one_process_goes_on_with_a_run_of_shards(runs, tiny_from_worker, tmp_path):
    folder, rank_0, _ = runs
    (tmp_path / "last.pt").write_bytes((folder / "b" / "last.pt").read_bytes())
    alone = fit(ALONE, folder / "pictures", tmp_path, shard=True, epochs=3, resume=True)
    assert [record["epoch"] for record in alone["records"]] == [3]
    assert (
        alone["records"][0]["train"]["loss"]
        < rank_0["whole in shards"]["records"][0]["train"]["loss"]
    )


@pytest.fixture
def tiny_from_worker(monkeypatch):
    from worker_adapters import TINY

    from samtune.models import MODEL_TYPES

    monkeypatch.setitem(MODEL_TYPES, "tiny", TINY)


def test_a_torch_that_cannot_shard_is_said(monkeypatch):
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="--shard without a GPU"):
        distributed.wrap(model, Process(0, 2, 0, torch.device("cpu")), [model])


def test_fp16_is_refused():
    """Its loss scale would have to see the overflow of every rank's part."""
    model = torch.nn.Linear(2, 2)
    model.set_requires_gradient_sync = None
    optimizer = torch.optim.AdamW(model.parameters())
    gpu = Process(0, 2, 0, torch.device("cuda"))
    with pytest.raises(UserError, match="--shard does not go with --precision fp16"):
        Trainer(model, None, [], optimizer, None, gpu, precision="fp16")


def test_without_shards_everything_is_a_plain_tensor():
    """The same code on plain tensors: nothing is gathered, nothing is dealt."""
    model = torch.nn.Linear(2, 2)
    with distributed.gathered(model):
        assert not distributed.is_sharded(model)
    assert distributed.whole(model.weight) is model.weight
    assert distributed.shard_like(model.bias, model.bias) is model.bias
