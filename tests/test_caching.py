"""Runs that read features instead of computing them: the same losses, bit for bit."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from samtune import caching
from samtune.adapters import ADAPTERS, build_model
from samtune.adapters.options import LoraOptions, SamAdapterOptions
from samtune.config import LogOptions
from samtune.data.datasets import SegmentationDataset
from samtune.data.feature_cache import FeatureFiles
from samtune.data.sample_data import make_sample_set
from samtune.engine.distributed import Process, StopSignal
from samtune.engine.logbook import Logbook
from samtune.errors import Interrupted, UserError
from samtune.models import MODEL_TYPES
from samtune.models.segmenter import PromptedSam
from samtune.run_folder import RunFolder
from samtune.sources import training_pairs
from samtune.train import run as train
from tiny_models import TINY
from worker_caching import TRAINING, VALIDATION, config_of, with_features

ALONE = Process(0, 1, 0, torch.device("cpu"))
ROOT = Path(__file__).resolve().parents[1]


def named(config, folder, **run):
    return replace(config, run=replace(config.run, output_dir=str(folder), **run))


def records(folder):
    lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [{name: line[name] for name in ("epoch", "train", "validation")} for line in lines]


def kept_files():
    return sorted(Path("cache").glob("??/*.safetensors"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(sample set, folder of a run without kept features)."""
    folder = tmp_path_factory.mktemp("caching")
    sample = make_sample_set(folder / "sample")
    with pytest.MonkeyPatch.context() as patch:
        for name, row in TINY.items():
            patch.setitem(MODEL_TYPES, name, row)
        train(named(config_of(sample), folder / "plain"), None, ALONE)
    return sample, folder / "plain"


@pytest.fixture
def config(plain, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return config_of(plain[0])


@pytest.fixture
def encoded(monkeypatch):
    """How many pictures went through the frozen part, and how many through the whole encoder."""
    counts, frozen, encode = {"frozen": 0, "whole": 0}, PromptedSam.frozen, PromptedSam.encode

    def counting_frozen(model, image, valid_size=None):
        counts["frozen"] += len(image)
        return frozen(model, image, valid_size)

    def counting_encode(model, image, valid_size=None, known=None):
        counts["whole"] += len(image) if known is None else 0
        return encode(model, image, valid_size, known)

    monkeypatch.setattr(PromptedSam, "frozen", counting_frozen)
    monkeypatch.setattr(PromptedSam, "encode", counting_encode)
    return counts


def test_losses_are_those_without_kept_features_bit_for_bit(config, plain, encoded):
    """In the run that computes them, and in the next one, which finds all but two."""
    train(with_features(named(config, "first"), "fp32"), None, ALONE)
    assert encoded == {"frozen": 1 + 2 * TRAINING + VALIDATION, "whole": 0}  # 1 tells their shape
    files = kept_files()
    assert len(files) == 2 * TRAINING + VALIDATION
    files[3].write_bytes(files[3].read_bytes()[:-4])
    files[9].write_bytes(files[10].read_bytes())
    encoded |= {"frozen": 0, "whole": 0}
    train(with_features(named(config, "second"), "fp32"), None, ALONE)
    assert encoded["whole"] == 0 and encoded["frozen"] in (1 + 3, 1 + 3 + 3)
    for folder in ("first", "second"):
        assert records(folder) == records(plain[1])
        before, after = (load_file(path / "best.safetensors") for path in (plain[1], Path(folder)))
        assert all(torch.equal(before[name], after[name]) for name in before)
    times = [json.loads(line) for line in Path("second/metrics.jsonl").read_text().splitlines()]
    assert all(t["prepare_seconds"] + t["train_seconds"] <= t["seconds"] for t in times)


def test_rounded_features_change_losses_by_their_rounding(config, plain):
    train(with_features(named(config, "rounded"), "bf16"), None, ALONE)
    for exact, rounded in zip(records(plain[1]), records("rounded"), strict=True):
        assert rounded["validation"]["loss"] != exact["validation"]["loss"]
        for split in ("train", "validation"):
            assert rounded[split]["loss"] == pytest.approx(exact[split]["loss"], rel=1e-3)


def test_autocast_keeps_what_the_encoder_returned(config):
    """'fp32' rounds nothing, whichever number format the run computes in."""
    config = replace(config, optim=replace(config.optim, precision="bf16"))
    train(named(config, "plain", epoch=1), None, ALONE)
    train(with_features(named(config, "kept", epoch=1), "fp32"), None, ALONE)
    assert records("kept") == records("plain")


@pytest.mark.parametrize(
    ("model_type", "adapter", "options"),
    [
        ("tiny_t", "lora", LoraOptions()),
        ("tiny", "sam_adapter", SamAdapterOptions(adapter_blocks="1", tune_out=12, hidden_dim=6)),
    ],
)
def test_a_frozen_beginning_is_kept_where_later_blocks_train(
    config, encoded, model_type, adapter, options
):
    """LoRA leaves TinyViT's convolutions alone; SAM-Adapter reads the image once more. Without
    augmentation there is one view."""
    model = replace(config.model, model_type=model_type, adapter=adapter)
    data = replace(config.data, augment="none", augment_views=0)
    config = replace(config, model=model, data=data, adapter=options)
    train(named(config, "plain", epoch=2), None, ALONE)
    encoded |= {"frozen": 0, "whole": 0}
    train(with_features(named(config, "kept", epoch=2), "fp32"), None, ALONE)
    assert encoded == {"frozen": 1 + TRAINING + VALIDATION, "whole": 0}
    assert records("kept") == records("plain")


def test_features_that_another_run_removes_are_missed_by_nobody(
    config, plain, encoded, monkeypatch
):
    fill = caching.FeatureCaching.fill

    def robbed(self, epoch):
        yield from fill(self, epoch)
        for path in kept_files()[:5]:
            path.unlink()

    monkeypatch.setattr(caching.FeatureCaching, "fill", robbed)
    train(with_features(named(config, "robbed"), "fp32"), None, ALONE)
    assert encoded["whole"] > 0 and records("robbed") == records(plain[1])


def test_an_interrupted_run_goes_on_exactly_while_it_fills_too(config, plain, monkeypatch):
    config = with_features(config, "fp32")
    agreed = StopSignal.agreed
    for stop_at in (1, 5):  # batches of features or steps, from the launch on
        calls = iter(range(100))
        monkeypatch.setattr(
            StopSignal, "agreed", lambda _, due=False, c=calls, n=stop_at: next(c) == n
        )
        with pytest.raises(Interrupted):
            train(named(config, "cut"), RunFolder("cut") if stop_at > 1 else None, ALONE)
    monkeypatch.setattr(StopSignal, "agreed", agreed)
    train(named(config, "cut"), RunFolder("cut"), ALONE)
    assert records("cut") == records(plain[1])


def names(config) -> set[str]:
    """Of the files that a run would read of its training images."""
    model = build_model(config.model, config.adapter, "box", None, config.run.seed).train()
    pairs, _ = training_pairs(config.data, config.read)
    dataset = SegmentationDataset(
        pairs, config.read, model.image_size, config.prompts, "original", config.data.augment,
        config.run.seed, train=True, views=config.data.augment_views,
    )  # fmt: skip
    logbook = Logbook(None, ALONE, LogOptions(), {})
    keeper = caching.FeatureCaching(
        config.data, model, config.optim.precision, config.loader, 3, ALONE, logbook
    ).keep("training", dataset)
    return {keeper.kept.name(view, index) for view in (0, 1) for index in range(TRAINING)}


def test_other_weights_sizes_and_formats_have_other_features(config):
    """A wrong hit would train on the features of something else."""
    config = with_features(replace(config, optim=replace(config.optim, precision="fp32")), "fp32")
    unchanged = names(config)
    assert len(unchanged) == 2 * TRAINING and names(replace(config, test=None)) == unchanged
    for group, changes in (
        ("model", {"image_size": "48x64"}),
        ("model", {"normalisation": "unit"}),
        ("run", {"seed": 22}),  # random weights, other draws
        ("read", {"resize": "squash"}),
        ("read", {"intensity_range": "0,9"}),
        ("optim", {"precision": "bf16"}),
        ("data", {"cache_features": "bf16"}),
        ("data", {"augment": "flip"}),
    ):
        other = replace(config, **{group: replace(getattr(config, group), **changes)})
        assert not names(other) & unchanged, changes


@pytest.mark.parametrize(
    ("group", "changes", "said"),
    [
        ("data", {"augment_views": 0}, r"--cache_features fp32: .*--augment_views 4"),
        ("data", {"augment_views": -1}, "--augment_views -1"),
        ("data", {"cache_limit": 1e-5}, r"keeps 0\.00 GB .*raise --cache_limit"),
        ("model", {"train": "all"}, r"--adapter decoder and --train all .*nothing stays"),
        ("model", {"train": "auto"}, "--train auto"),
    ],
)
def test_what_cannot_be_kept_is_said_before_training(config, group, changes, said):
    config = with_features(config, "fp32")
    wrong = replace(config, **{group: replace(getattr(config, group), **changes)})
    with pytest.raises(UserError, match=said):
        train(wrong, None, ALONE)
    assert not Path("run/last.pt").exists() and not Path("cache").exists()


@pytest.mark.parametrize("adapter", ["ts_sam", "samus", "gsam", "lora", "sam_adapter"])
def test_adapters_that_change_the_encoder_from_its_start_say_so(config, adapter):
    model = replace(config.model, adapter=adapter)
    prompts = replace(config.prompts, prompt="none")
    config = replace(config, model=model, adapter=ADAPTERS[adapter].options(), prompts=prompts)
    with pytest.raises(UserError, match=f"--adapter {adapter} .*drop"):
        train(with_features(config, "bf16"), None, ALONE)


def test_a_file_that_cannot_be_written_ends_the_run_in_words(config, monkeypatch):
    def full(self, name, features, picture_size):
        raise UserError("--cache_dir cache: No space left on device")

    monkeypatch.setattr(FeatureFiles, "write", full)
    with pytest.raises(UserError, match="No space left"):
        train(with_features(config, "fp32"), None, ALONE)


def test_two_processes_share_the_work_and_train_what_one_would(config, plain):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "code"), str(ROOT / "tests")]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(ROOT / "tests" / "worker_caching.py"), str(plain[0].root), "both"],
        env=environment, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    written = [Path(f"written{rank}.txt").read_text().split() for rank in (0, 1)]
    assert not set(written[0]) & set(written[1]), "each file is computed once"
    assert sum(map(len, written)) == len(kept_files()) == 2 * TRAINING + VALIDATION
    assert abs(len(written[0]) - len(written[1])) <= 3  # one of each view and set at most
    together = config_of(plain[0], batch_size=4)
    train(named(together, "alone", epoch=2), None, ALONE)
    for one, two in zip(records("alone"), records("both"), strict=True):
        for split in ("train", "validation"):
            assert two[split]["loss"] == pytest.approx(one[split]["loss"], rel=1e-4)
