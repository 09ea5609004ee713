"""Nothing grows with the steps: the watcher of long runs, and a short one in this process."""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

import soak
from forked_ranks import on_ranks
from samtune import config as c
from samtune.adapters.options import DecoderOptions
from samtune.data.sample_data import make_sample_set
from samtune.engine.logbook import Logbook
from samtune.models import MODEL_TYPES
from samtune.train import run as train
from soak import Life, Look, faults, lives, look
from tiny_models import TINY

MIB = 2**20


def seen(memory=lambda t: 300 * MIB, files=lambda t: 30, role="rank 0", pid=1, zombie=False):
    """A process over 100 looks."""
    return [Look(t, pid, role, memory(t), files(t), 9, zombie) for t in range(100)]


def test_a_flat_process_is_flat_and_start_up_is_not_growth():
    looks = seen(memory=lambda t: (300 if t > 20 else 10 * t) * MIB + t % 7)
    assert faults(looks) == []
    assert lives(looks)[0].looks == 100


@pytest.mark.parametrize(
    ("leak", "said"),
    [
        (seen(memory=lambda t: (300 + t) * MIB), "rank 0: memory grew"),
        (seen(files=lambda t: 30 + t // 10), "rank 0: files grew from 33 to 38"),
        ([*seen(), *seen(role="rank 0, loader 0", pid=2, zombie=True)], "not buried for 99 s"),
        (seen(role="launcher"), "no rank"),
    ],
)
def test_a_leak_is_found(leak, said):
    (fault,) = faults(leak)
    assert said in fault


def test_who_outlives_the_launch_is_counted_and_one_look_at_the_dead_is_none():
    dead = Look(3, 2, "rank 0, loader 0", 0, 0, 0, True)
    assert faults([*seen(), dead]) == []
    assert faults(seen(), left=[7]) == ["1 processes outlived the launch"]


def test_a_process_is_looked_at_as_it_is():
    before = look(os.getpid(), "me", 0.0)
    kept = [open(os.devnull) for _ in range(3)]  # noqa: SIM115
    ballast = mmap.mmap(-1, 32 * MIB)  # new pages, whatever else this process has freed
    ballast.write(os.urandom(MIB) * 32)
    after = look(os.getpid(), "me", 1.0)
    assert after.files == before.files + 3 and not after.zombie
    assert len(ballast) * 0.9 < after.memory - before.memory < 2 * len(ballast)
    for file in kept:
        file.close()
    child = os.fork()
    if not child:
        os._exit(0)
    while not look(child, "child", 0.0).zombie:
        time.sleep(0.01)
    assert child in soak.children_of(os.getpid())
    os.waitpid(child, 0)
    assert look(child, "child", 0.0) is None


def test_the_table_says_what_was_found():
    life = Life("rank 0", 99.0, 100, (300 * MIB, 301 * MIB), (30, 30), (9, 9))
    result = {
        "steps": 2004, "image_size": 64, "workers": 1, "epochs": 167, "seconds": 300.0,
        "versions": {"torch": "2.6.0"}, "date": "2026-01-01", "faults": life.faults,
        "processes": [vars(life)],
    }  # fmt: skip
    text = soak.table(result)
    assert "| rank 0 | 300.0 -> 301.0 | 30 -> 30 | 9 -> 9 |" in text and "flat." in text
    leaking = replace(life, files=(30, 36))
    assert leaking.faults == ["rank 0: files grew from 30 to 36"]


def watched(process, folder: Path) -> list[Look]:
    """40 steps on a rank, looked at after each epoch; the last look is after the run."""
    os.chdir(folder)
    MODEL_TYPES["tiny"] = TINY["tiny"]
    looks, epoch = [], Logbook.epoch

    def and_look(self, record):
        epoch(self, record)
        looks.append(look(os.getpid(), f"rank {process.rank}", time.monotonic()))

    Logbook.epoch = and_look
    names = ("train_image_dir", "train_mask_dir", "val_image_dir", "val_mask_dir")
    files = {name: f"sample/{name.split('_')[0]}/{name.split('_')[1]}" for name in names}
    config = c.TrainConfig(
        c.ModelOptions(model_type="tiny", adapter="decoder"),
        c.ReadOptions(),
        c.TrainDataOptions(**files, train_slice=":8", val_slice=":2"),
        c.TestDataOptions(),
        c.LoaderOptions(batch_size=1, workers=1),
        c.PromptOptions(),
        c.LossOptions(),
        c.OptimOptions(),
        c.RunOptions(epoch=10, patience=0, output_dir="run"),
        c.LogOptions(log_every=1),
        DecoderOptions(),
    )
    before = len(soak.children_of(os.getpid()))
    train(config, None, process)
    assert len(soak.children_of(os.getpid())) == before, "a loader process was left, or a zombie"
    return looks


def test_forty_steps_on_two_processes_open_no_file_and_keep_no_memory(tmp_path):
    files = make_sample_set(tmp_path / "sample")
    assert files.image_dir("train") == tmp_path / "sample/train/image"
    for looks in on_ranks(watched, tmp_path):
        assert len(looks) == 10
        settled, last = looks[3], looks[-1]
        assert last.files <= settled.files + soak.GROWTH_FILES
        assert last.threads == settled.threads
        assert last.memory - settled.memory < 16 * MIB


@pytest.mark.slow
def test_a_run_under_torchrun_stays_flat(tmp_path):
    assert soak.main(["--steps", "240", "--output", str(tmp_path / "soak.json")]) == 0
