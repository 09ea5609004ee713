"""A run from shards is the run from the folders they were packed from, number by number."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from samtune import config as c
from samtune.adapters import ADAPTERS
from samtune.data.sample_data import make_sample_set
from samtune.engine.distributed import Process
from samtune.engine.trainer import Trainer
from samtune.errors import Interrupted, UserError
from samtune.evaluate import run as evaluate
from samtune.run_folder import RunFolder
from samtune.sharding import run as pack
from samtune.sources import look_into_shards
from samtune.train import run as train

sys.path.insert(0, str(Path(__file__).parent / "engine"))
from launch import torchrun

ALONE = Process(0, 1, 0, torch.device("cpu"))
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """The sample set as folders, sample/..., and as shards, SPLIT-00000N.tar."""
    root = tmp_path_factory.mktemp("house")
    files = make_sample_set(root / "sample")
    for split in SPLITS:
        folders = str(files.image_dir(split)), str(files.mask_dir(split))
        options = c.ShardsOptions(*folders, output_dir=str(root), name=split, pairs_per_shard=4)
        pack(options, c.NameOptions())
    return root


@pytest.fixture
def config_of(house, tmp_path, monkeypatch, tiny):
    """The options of a short run from "folders" or from "shards", in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def config(source: str, **run) -> c.TrainConfig:
        said = {}
        for split in SPLITS:
            if source == "shards":
                said[f"{split}_shards"] = f"{house}/{split}-*.tar"
            else:
                said |= {f"{split}_{kind}_dir": f"{house}/sample/{split}/{kind}"
                         for kind in ("image", "mask")}  # fmt: skip
        test = {name: said.pop(name) for name in list(said) if name.startswith("test_")}
        return c.TrainConfig(
            c.ModelOptions(model_type="tiny", adapter="decoder", train="adapter"),
            c.ReadOptions(),
            c.TrainDataOptions(**said),
            c.TestDataOptions(**test),
            c.LoaderOptions(batch_size=8, workers=1),
            c.PromptOptions(),
            c.LossOptions(loss_resolution="frame"),
            c.OptimOptions(lr=1e-3),
            c.RunOptions(**({"epoch": 2, "output_dir": source} | run)),
            c.LogOptions(),
            ADAPTERS["decoder"].options(),
        )

    return config


def records(folder: str) -> list[dict]:
    """What metrics.jsonl says of each epoch, but for what a clock or a machine says."""
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [{name: line[name] for name in ("epoch", "step", "train", "validation")}
            for line in lines]  # fmt: skip


def score(run: str, **given) -> dict:
    wanted = c.EvaluateOptions(run_dir=run, output_dir=f"{run}/scores", zero_shot=False)
    groups = c.TestDataOptions(), c.ReadOptions(), c.LoaderOptions(4, 0)
    return evaluate(c.EvaluateConfig(wanted, *groups, given), ALONE)


def test_the_numbers_are_those_of_the_folders(config_of, house, capsys):
    for source in ("folders", "shards"):
        train(config_of(source), None, ALONE)
    assert f"training images in {house}/train-*.tar" in capsys.readouterr().out
    assert records("shards") == records("folders")
    assert [record["train"]["loss"] > 0 for record in records("shards")] == [True, True]
    one, other = (torch.load(f"{s}/last.pt", weights_only=True) for s in ("folders", "shards"))
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    plain, sharded = score("folders"), score("shards")
    assert sharded["tuned"] == plain["tuned"] and sharded["images"] == 6
    assert sharded["test_shards"] == f"{house}/test-*.tar" and not plain["test_shards"]
    swapped = score("folders", test_shards=f"{house}/test-{{000000..000001}}.tar")
    assert swapped["tuned"] == plain["tuned"] and not swapped["test_image_dir"]


def test_a_run_stopped_within_an_epoch_goes_on_exactly(config_of, monkeypatch):
    config = config_of("shards")
    train(config, None, ALONE)
    step, taken = Trainer.train_step, []

    def stopping(self, *arguments, **options):
        taken.append(None)
        if len(taken) == 5:  # the sample set gives 3 steps an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **options)

    parts = replace(config, run=replace(config.run, output_dir="parts"))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopping)
        with pytest.raises(Interrupted):
            train(parts, None, ALONE)
    train(replace(parts, run=replace(parts.run, resume="parts")), RunFolder("parts"), ALONE)
    assert records("parts") == records("shards")
    whole, both = (torch.load(f"{s}/last.pt", weights_only=True) for s in ("shards", "parts"))
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, both["model"][name]), name


def test_slices_are_those_of_folders(config_of, house):
    config = config_of("shards")
    data = c.TrainDataOptions(train_shards=f"{house}/train-*.tar", train_slice=":16",
                              val_slice="16:")  # fmt: skip
    done = train(
        replace(config, data=data, test=c.TestDataOptions(test_slice=":3"),
                run=replace(config.run, epoch=1)), None, ALONE,
    )  # fmt: skip
    assert done.data.val_shards == done.test.test_shards == data.train_shards
    assert score("shards")["images"] == 3


@pytest.mark.parametrize(
    ("data", "test", "said"),
    [
        ({"train_image_dir": "x"}, {}, "--train_shards and --train_image_dir both say"),
        ({"val_list": "x"}, {}, "--val_shards and --val_list both say"),
        ({"dataset": "camvid", "data_root": "."}, {}, "--dataset and --train_shards both say"),
        ({"val_shards": ""}, {}, "nothing to validate on"),
        ({"val_shards": "", "val_slice": ":"}, {}, "24 images are in training and in validation"),
        ({}, {"test_datasets": "camvid"}, "--test_datasets and --test_shards both say"),
        ({"train_shards": "none-{0..1}.tar"}, {}, "none-0.tar: there is no such file\nnone-1.tar"),
    ],
)
def test_contradictions_are_refused(config_of, data, test, said):
    config = config_of("shards")
    config = replace(config, data=replace(config.data, **data), test=replace(config.test, **test))
    with pytest.raises(UserError, match=said):
        train(config, None, ALONE)
    assert not Path("shards").exists()


def test_two_processes_look_into_shards_together(house, tmp_path):
    """Each into its share; both then know all, or raise the same."""
    code, out, err = torchrun(Path(__file__).with_name("worker_tars.py"), house, tmp_path)
    assert code == 0, out + err
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    options = c.TrainDataOptions(
        train_shards=f"{house}/train-*.tar", val_shards=f"{house}/val-*.tar"
    )
    alone = look_into_shards(ALONE, options)
    expected = {
        flag: [(str(m), m.offset, m.size) for index in indexes for m in index.members]
        for flag, indexes in alone.items()
    }
    assert expected.keys() == {"--train_shards", "--val_shards"}
    for rank, found in enumerate(ranks):
        assert found["members"] == expected
        assert found["looked_into"] == rank_share(house, rank)
        assert found["said"] == f"{house}/missing.tar: there is no such file"


def rank_share(house: Path, rank: int) -> list[str]:
    named = [*sorted(house.glob("train-*.tar")), *sorted(house.glob("val-*.tar"))]
    return [str(path) for path in named[rank::2]]
