"""From a data set's name to a trained and scored run: what is recorded, refused and said."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from samtune import config as c
from samtune.adapters import ADAPTERS
from samtune.engine.distributed import Process
from samtune.errors import UserError
from samtune.evaluate import run as evaluate
from samtune.models import MODEL_TYPES
from samtune.sources import complete_named, said_of, scored_set, training_pairs
from samtune.train import run as train

sys.path.insert(0, str(Path(__file__).parent / "data"))
from miniatures import bundle_camo, camvid, istd

ALONE = Process(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def run_named(tmp_path, monkeypatch):
    """Train one epoch of a tiny SAM in an empty folder, with these options of the data."""
    monkeypatch.chdir(tmp_path)
    tiny = replace(
        MODEL_TYPES["vit_mini"], embed_dim=32, depth=2, num_heads=2, global_blocks=(1,),
        image_size=64, window_size=3, prompt_embed_dim=32, decoder_heads=4, decoder_mlp_dim=32,
        iou_head_hidden_dim=16,
    )  # fmt: skip
    monkeypatch.setitem(MODEL_TYPES, "tiny", tiny)

    def run(data: dict, test: dict | None = None, **read) -> c.TrainConfig:
        return train(
            c.TrainConfig(
                c.ModelOptions(model_type="tiny", adapter="decoder"),
                c.ReadOptions(**read),
                c.TrainDataOptions(**data),
                c.TestDataOptions(**(test or {})),
                c.LoaderOptions(batch_size=4, workers=0),
                c.PromptOptions(),
                c.LossOptions(),
                c.OptimOptions(),
                c.RunOptions(epoch=1, output_dir="run"),
                c.LogOptions(),
                ADAPTERS["decoder"].options(),
            ),
            None,
            ALONE,
        )

    return run


def score(output_dir: str, **given) -> dict:
    wanted = c.EvaluateOptions(run_dir="run", output_dir=output_dir, save_predictions=True)
    groups = c.TestDataOptions(), c.ReadOptions(), c.LoaderOptions(4, 0)
    return evaluate(c.EvaluateConfig(wanted, *groups, given), ALONE)


def complete(data: dict, test: dict | None = None, **read):
    return complete_named(
        c.TrainDataOptions(**data), c.TestDataOptions(**(test or {})), c.ReadOptions(**read)
    )


def test_a_data_set_decides_reading_and_test(tmp_path):
    camvid(tmp_path)
    data, test, read = complete({"dataset": "camvid", "data_root": str(tmp_path)})
    assert (read.num_classes, read.ignore_index, read.mask_coding) == (11, 11, "auto")
    assert (test.test_datasets, test.test_data_root) == ("camvid", str(tmp_path))
    assert complete_named(data, test, read) == (data, test, read), "as a resumed run asks again"
    train, val = training_pairs(replace(data, train_slice=":2"), read)
    assert [len(train), len(val)] == [2, 1]
    assert "sequences of val" in said_of(data)
    assert len(scored_set(test, read, ["camvid"]).pairs) == 2


def test_test_sets_are_read_each_as_its_row_says(tmp_path):
    bundle_camo(tmp_path)
    istd(tmp_path)
    camvid(tmp_path / "CamVid")
    data = {"dataset": "cod10k+camo", "data_root": str(tmp_path)}
    data, test, read = complete(data, {"test_datasets": "camo, istd"}, mask_threshold=1)
    assert test.test_data_root == str(tmp_path) and read.mask_threshold == 1
    own, other = (
        scored_set(replace(test, test_datasets=name), read, ["cod10k", "camo"])
        for name in ("camo", "istd")
    )
    assert own.read.mask_threshold == 1 and other.read.mask_coding == "above128"
    said = scored_set(replace(test, test_datasets="istd"), read, [], {"mask_threshold": 200})
    assert said.read.mask_threshold == 200
    with pytest.raises(UserError, match="--test_datasets camvid: it has 11 class"):
        scored_set(replace(test, test_datasets="camvid"), read)


@pytest.mark.parametrize(
    ("data", "test", "said"),
    [
        ({"dataset": "camvid", "train_image_dir": "x"}, {}, "--train_image_dir both say"),
        ({"dataset": "camvid", "val_list": "x"}, {}, "--dataset and --val_list both say"),
        ({"dataset": "camvid+istd"}, {}, "ISTD, shadows; looked there"),
        ({"dataset": "kamvid"}, {}, "did you mean camvid"),
        ({}, {}, "say with --dataset what it holds"),
        ({"dataset": "camvid"}, {"test_datasets": "nc4k"}, "does not hold NC4K"),
        ({"dataset": "camvid"}, {"test_datasets": "camvid", "test_list": "x"}, "--test_list both"),
    ],
)
def test_contradictions_are_refused_before_anything_is_built(tmp_path, data, test, said):
    camvid(tmp_path)
    with pytest.raises(UserError, match=said):
        complete({"data_root": str(tmp_path), **data}, test)


def test_a_named_run_is_scored_without_a_flag(run_named, tmp_path, capsys):
    """Shadows, named once in training: config.yaml records how they are read and what is scored."""
    istd(tmp_path / "ISTD")
    bundle_camo(tmp_path)
    done = run_named({"dataset": "istd", "data_root": ".", "val_share": 0.3})
    assert done.test.named
    said = capsys.readouterr().out
    assert "ISTD, shadows: official (1330 / 540); val: scenes held out of train" in said
    recorded = yaml.safe_load(Path("run/config.yaml").read_text())
    assert recorded["mask_coding"] == "above128" and recorded["test_datasets"] == "istd"
    scores = score("alone")
    assert scores["images"] == 6 and scores["test_dataset"] == "istd"
    both = score("both", test_datasets="istd,camo")
    assert both == json.loads(Path("both/scores.json").read_text())
    assert list(both) == ["istd", "camo"] and both["istd"] == scores
    assert both["camo"]["images"] == 3 == len(list(Path("both/camo/predictions/masks").iterdir()))
    for sets, message in {
        "duts": "does not hold DUTS", "istd,duts": "does not hold DUTS",
        "istd,istd": "stands there twice", "istd,": "no such data set",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            score("none", test_datasets=sets)
    assert not Path("none").exists(), "nothing is scored before all of it can be"
    folders = {"test_image_dir": "ISTD/test/test_A", "test_mask_dir": "ISTD/test/test_B"}
    alike = score("folders", **folders)  # instead of the run's own
    assert alike["tuned"]["loss"] == scores["tuned"]["loss"]
    assert alike["protocol"]["name"] == "binary" and scores["protocol"]["name"] == "shadow"


def test_a_named_set_is_asked_what_the_run_was_asked(tmp_path):
    """Which classes questions are about is no matter of how files are read: it is kept."""
    camvid(tmp_path)
    asked = {"objects": "class", "background": -1, "ask_classes": "car,tree", "min_area": 5}
    data = {"dataset": "camvid", "data_root": str(tmp_path)}
    _, test, read = complete(data, **asked)
    for own in (["camvid"], []):
        scored = scored_set(test, read, own).read
        assert {name: getattr(scored, name) for name in asked} == asked


def test_lists_train_and_score(run_named, tmp_path):
    istd(tmp_path)
    for split in ("train", "test"):
        names = sorted(path.stem for path in (tmp_path / f"{split}/{split}_B").iterdir())
        lines = [f"{split}_A/{name}.jpg,{split}_B/{name}.png\n" for name in names]
        Path(f"{split}/list.csv").write_text("".join(lines))
    lists = {"train_list": "train/list.csv"}, {"test_list": "test/list.csv"}
    with pytest.raises(UserError, match="nothing to validate on"):
        run_named(*lists, mask_coding="above128")
    lists[0].update(train_slice=":8", val_slice="8:")
    run_named(*lists, mask_coding="above128")
    scores = score("alone")
    assert scores["images"] == 6 and scores["test_list"] == "test/list.csv"
