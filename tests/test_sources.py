"""From a data set's name to a trained and scored run: what is recorded, refused and said."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from samtune import config as c
from samtune.errors import UserError
from samtune.sources import complete_named, said_of, scored_set, training_pairs

sys.path.insert(0, str(Path(__file__).parent / "data"))
from miniatures import bundle_camo, camvid, istd

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [
    "train", "--model_type", "vit_mini", "--image_size", "64", "--epoch", "1", "--batch_size", "4",
    "--workers", "0", "--output_dir", "run", "--adapter", "decoder",
]  # fmt: skip


def complete(data: dict, test: dict | None = None, **read):
    return complete_named(
        c.TrainDataOptions(**data), c.TestDataOptions(**(test or {})), c.ReadOptions(**read)
    )


def main(*argv) -> subprocess.CompletedProcess:
    """The command line, as a process of its own."""
    command = [sys.executable, str(ROOT / "code" / "run_sa.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True)


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


def test_a_named_run_is_scored_without_a_flag(tmp_path, monkeypatch):
    """Shadows, named once in training: config.yaml records how they are read and what is scored."""
    monkeypatch.chdir(tmp_path)
    istd(tmp_path / "ISTD")
    bundle_camo(tmp_path)
    done = main(*TRAIN, "--dataset", "istd", "--data_root", ".", "--val_share", "0.3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ISTD, shadows: official (1330 / 540); val: scenes held out of train" in done.stdout
    recorded = yaml.safe_load(Path("run/config.yaml").read_text())
    assert recorded["mask_coding"] == "above128" and recorded["test_datasets"] == "istd"
    scores = json.loads(Path("run/scores.json").read_text())
    assert scores["images"] == 6 and scores["test_dataset"] == "istd"

    several = ["--test_datasets", "istd,camo", "--output_dir", "both", "--workers", "0"]
    done = main("evaluate", "--run_dir", "run", *several, "--save_predictions")
    assert done.returncode == 0, done.stdout + done.stderr
    both = json.loads(Path("both/scores.json").read_text())
    assert list(both) == ["istd", "camo"] and both["istd"]["images"] == 6
    assert both["istd"]["tuned"] == pytest.approx(scores["tuned"], rel=1e-5)
    assert both["camo"]["images"] == 3 == len(list(Path("both/camo/predictions/masks").iterdir()))
    done = main("evaluate", "--run_dir", "run", "--test_datasets", "duts")
    assert done.returncode == 2 and "does not hold DUTS" in done.stderr


def test_lists_train_and_score(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    istd(tmp_path)
    for split in ("train", "test"):
        names = sorted(path.stem for path in (tmp_path / f"{split}/{split}_B").iterdir())
        lines = [f"{split}_A/{name}.jpg,{split}_B/{name}.png\n" for name in names]
        Path(f"{split}/list.csv").write_text("".join(lines))
    lists = ["--train_list", "train/list.csv", "--test_list", "test/list.csv"]
    slices = ["--mask_coding", "above128", "--train_slice", ":8", "--val_slice", "8:"]
    done = main(*TRAIN, *lists, *slices)
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads(Path("run/scores.json").read_text())
    assert scores["images"] == 6 and scores["test_list"] == "test/list.csv"
