"""The recipes in configs/: each parses, fits its model, and trains on its data set's miniature."""

import json
import math
import re
import sys
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

import run_sa
from samtune import config as c
from samtune.adapters import ADAPTERS
from samtune.complexity import build_weightless, count_trainable
from samtune.data.catalog_rows import DATASETS
from samtune.engine.distributed import Process
from samtune.engine.logbook import Logbook
from samtune.models.sam import build_sam
from samtune.sources import scored_set
from samtune.train import run as train

sys.path.insert(0, str(Path(__file__).parent / "data"))
from miniatures import MINIATURES, bundle_cod10k

ALONE = Process(0, 1, 0, torch.device("cpu"))
RECIPES = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
BUNDLE = {"cod10k", "camo", "chameleon", "nc4k"}  # data sets that come in one folder
SHRINK = 8  # a miniature's frame, of those that a recipe chooses


@cache
def parse(recipe: Path) -> c.TrainConfig:
    """Through the very flags of `train`."""
    return run_sa.read(c.TrainConfig, "train", ["--config", str(recipe)])[0]


def num_classes(config: c.TrainConfig) -> int:
    (number,) = {DATASETS[name].num_classes for name in config.data.dataset.split("+")}
    return number


def test_there_are_recipes_for_every_published_table():
    names = {recipe.stem for recipe in RECIPES}
    methods = ("decoder", "lora", "conv_lora", "adaptformer", "samus", "gsam")
    gsam = ("camvid", "massachusetts", "isbi2012", "kvasir", "synapse", "cityscapes", "trans10k")
    assert names == {
        *(f"gsam-{dataset}-{method}" for dataset in gsam for method in methods),
        *(f"sam_adapter-cod-{size}" for size in ("vit_b", "vit_l", "vit_h")),
        "sam_adapter-istd-vit_h",
        *(f"ts_sam-{task}-{s}" for task in ("cod", "sod", "shadow") for s in ("vit_b", "vit_h")),
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_says_where_it_is_from_and_only_what_is_no_default(recipe):
    lines = recipe.read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert lines[0].startswith("# ") and "\n# Published" in header
    assert re.search(r"\w+/[\w-]+ @ [0-9a-f]{7}\b", header), "the source, and its commit"
    assert "\n# Different here, on purpose:\n# - " in header
    groups = [getattr(parse(recipe), f.name) for f in fields(c.TrainConfig)]
    known = {f.name: f.default for group in groups for f in fields(group)}
    known_to_eval = {f.name for f in fields(c.EvaluateOptions)}
    assert set(re.findall(r"--([a-z]\w+)", header)) <= known.keys() | known_to_eval
    said = yaml.safe_load("\n".join(lines))
    values = {f.name: getattr(group, f.name) for group in groups for f in fields(group)}
    assert {name for name in known if values[name] != known[name]} | {"adapter"} == said.keys()
    assert parse(recipe).data.data_root == "", "where data lies is the user's to say"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipes_model_is_built_at_its_full_size(recipe):
    config = parse(recipe)
    row, classes = ADAPTERS[config.model.adapter], num_classes(config)
    row.check(config.model, config.prompts.prompt, classes, config.data.crop)
    assert config.prompts.prompt == "none"
    options = replace(config.model, train=config.model.train.replace("auto", "adapter"))
    trainable, size = of_full_size(options, row.without_start(config.adapter), classes)
    assert trainable > 0 and size == row.frame_size(config.model)


@cache
def of_full_size(options: c.ModelOptions, adapter, classes: int) -> tuple[int, c.Size]:
    model = build_weightless(options, adapter, classes)
    return count_trainable(model), model.image_size


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """A folder with miniatures of all data sets that a config names, made once."""

    @cache
    def make(names: frozenset[str]) -> Path:
        root = tmp_path_factory.mktemp("data")
        if names & BUNDLE:
            bundle_cod10k(root)
        for name in names - BUNDLE:
            own = len(names) > 1
            MINIATURES[name][0](root / DATASETS[name].folders[0] if own else root)
        return root

    def of(config: c.TrainConfig) -> Path:
        tested = config.test.test_datasets.split(",") if config.test.test_datasets else []
        return make(frozenset({*config.data.dataset.split("+"), *tested}))

    return of


def shrink(size: c.Size) -> c.Size:
    return c.Size(size.height // SHRINK, size.width // SHRINK)


def miniature(config: c.TrainConfig, root: Path) -> c.TrainConfig:
    """The same on a tiny SAM, in a small frame, for two epochs of two images each."""
    frame = shrink(config.model.image_size) if config.model.image_size else c.Size(64, 64)
    adapter = ADAPTERS[config.model.adapter].without_start(config.adapter)
    if config.model.adapter == "gsam":
        adapter = replace(adapter, resnet_depth=18)
    return replace(
        config,
        model=replace(config.model, model_type="tiny", checkpoint="base.pth", image_size=frame),
        data=replace(
            config.data, data_root=str(root), crop=shrink(config.data.crop), train_slice=":2",
            val_slice=":2",
        ),
        loader=replace(config.loader, workers=0),
        run=replace(config.run, epoch=2, output_dir="run"),
        adapter=adapter,
    )  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_takes_two_steps_on_a_miniature(recipe, data_root, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Logbook, "curves", lambda self: None)  # two thirds of the time
    torch.save(build_sam("tiny").state_dict(), "base.pth")
    config = parse(recipe)
    done = train(miniature(config, data_root(config)), None, ALONE)
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 2
    terms = {"ce"} if num_classes(config) > 1 else {"bce", "iou_loss"}
    if config.loss.bce == "balanced":
        terms = {"balanced_bce", "iou_loss"}
    for name in terms | {"loss"}:
        assert math.isfinite(records[-1]["train"][name]) and records[-1]["validation"][name] >= 0
    assert done.read.num_classes == num_classes(config)
    for name in done.test.test_datasets.split(","):
        assert scored_set(replace(done.test, test_datasets=name), done.read).pairs
