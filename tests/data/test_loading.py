"""Loader processes."""

import gc
import itertools
import multiprocessing.forkserver
import os
import random
import signal
import subprocess
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from samtune.activity import now
from samtune.config import PromptOptions, ReadOptions
from samtune.data.datasets import SegmentationDataset
from samtune.data.files import Pair
from samtune.data.loading import cores_per_process, make_loader
from samtune.data.sampler import EpochBatches, TrainPlan
from samtune.errors import UserError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for i in range(12):
        mask = np.zeros((40 + i, 60), np.uint8)
        mask[10:20, 15:40] = 255
        image = rng.integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{i}.bmp")
        Image.fromarray(mask).save(folder / f"{i}.png")
    return [Pair(str(i), folder / f"{i}.bmp", folder / f"{i}.png") for i in range(12)]


def dataset_of(pairs):
    prompt = PromptOptions(box_jitter=0.1)
    return SegmentationDataset(
        pairs, ReadOptions(), 64, prompt, "original", augment="standard", seed=3, train=True
    )


def load(pairs, workers, epoch=0, **options):
    plan = TrainPlan(len(pairs), 2, 2, rank=0, world=1, seed=3)
    return list(make_loader(dataset_of(pairs), plan.batches(epoch), workers, **options))


def same(one, other):
    return one.ids == other.ids and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("image", "target")
    ) and torch.equal(one.prompts.boxes, other.prompts.boxes)  # fmt: skip


def test_the_number_of_loader_processes_changes_nothing(pairs):
    alone = load(pairs, 0)
    for workers in (1, 2):
        batches = load(pairs, workers)
        assert len(batches) == len(alone) == 6 and all(map(same, alone, batches))


def test_loader_processes_do_not_repeat_each_other(pairs):
    """Processes that share a random stream would augment all their pictures alike."""
    same_picture_twelve_times = [pairs[0]] * 12
    batches = [b for epoch in (0, 1) for b in load(same_picture_twelve_times, 2, epoch)]
    assert len({tuple(box.tolist()) for batch in batches for box in batch.prompts.boxes}) == 24
    images = {image.numpy().tobytes() for batch in batches for image in batch.image}
    assert len(images) > 6  # half of them stay as they are, and a flip is a flip


def test_ranks_do_not_share_their_augmentation(pairs):
    """Every process draws for its own samples; equal streams would show as equal boxes."""
    same_picture = [pairs[0]] * 12
    boxes = []
    for rank in range(2):
        plan = TrainPlan(12, 2, 1, rank, world=2, seed=3)
        loader = make_loader(dataset_of(same_picture), plan.batches(0), 0)
        boxes += [tuple(box.tolist()) for batch in loader for box in batch.prompts.boxes]
    assert len(set(boxes)) == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_left_alone(pairs, workers):
    """What the loader draws must not shift the dropout of a resumed run, nor depend on it."""
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = load(pairs, workers)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    assert all(map(same, first, load(pairs, workers)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_mistake_arrives_without_the_loaders_traceback(pairs, tmp_path, workers):
    broken = tmp_path / "broken.bmp"
    broken.write_bytes(pairs[0].image_path.read_bytes()[:999])
    with pytest.raises(UserError) as error:
        load([*pairs[:11], pairs[11]._replace(image_path=broken)], workers)
    message = str(error.value)
    assert message.startswith(f"{broken}: truncated") and "\n" not in message
    assert "Traceback" not in message and "DataLoader" not in message


class Defective(torch.utils.data.Dataset):
    """A defect of the program, not of the input."""

    def __getitem__(self, key):
        raise ZeroDivisionError("a defect")


class Deadly(torch.utils.data.Dataset):
    """Its process is killed, as by a lack of memory."""

    def __getitem__(self, key):
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def test_a_defect_keeps_its_traceback():
    loader = make_loader(Defective(), [[0]], 1)
    with pytest.raises(ZeroDivisionError, match="in __getitem__"):
        list(loader)
    loader._iterator._workers[0].terminate()  # torch alone takes five seconds over it


def test_a_killed_loader_process_is_explained():
    with pytest.raises(UserError, match=r"a loader process died .*--workers"):
        list(make_loader(Deadly(), [[0], [1]], 1))


def test_a_killed_loader_process_is_told_with_the_files_it_had_to_read(pairs):
    """Wherever that is noticed: torch raises it in the midst of what the main thread does.

    Two processes take batches in turn, and each is two ahead.
    """
    plan = TrainPlan(len(pairs), 1, 1, rank=0, world=1, seed=3)
    order = [str(pairs[i].image_path) for i in plan.order(0)]
    with (
        pytest.raises(UserError, match=r"a loader process died .*--workers") as caught,
        make_loader(dataset_of(pairs), plan.batches(0), 2) as loader,
    ):
        batches = iter(loader)
        next(batches)  # the first process has had batch 0; the second one has 1 and 3
        os.kill(loader._iterator._workers[1].pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            time.sleep(0.01)
    assert f"which had {order[1]}, {order[3]} to read" in str(caught.value), order
    assert loader._iterator is None, "it was closed"


def test_what_is_read_is_noted(pairs):
    """By this process, or by one that reads for it."""
    plan = TrainPlan(len(pairs), 2, 1, rank=0, world=1, seed=3)
    for workers in (0, 1):
        with make_loader(dataset_of(pairs), plan.batches(0), workers) as loader:
            for keys, _ in zip(plan.batches(0), loader, strict=True):
                assert list(now.files) == [str(pairs[key.index].image_path) for key in keys]
                assert not now.reads


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_loader_processes_outlive_the_signals_that_stop_training(pairs, start_method):
    """Ctrl-C and torchrun's SIGTERM reach the whole process group; the training process decides."""
    plan = TrainPlan(len(pairs), 1, 1, rank=0, world=1, seed=3)
    loader = make_loader(dataset_of(pairs), plan.batches(0), 2, start_method=start_method)
    batches = iter(loader)
    got = [next(batches)]
    processes = [worker.pid for worker in loader._iterator._workers]
    if start_method == "forkserver":
        processes.append(multiprocessing.forkserver._forkserver._forkserver_pid)
    for process in processes:  # from another process: of this one they take a SIGTERM
        subprocess.run(["sh", "-c", "kill -INT $0; kill -TERM $0; kill -USR1 $0", str(process)])
    time.sleep(0.2)
    got += list(batches)
    assert [batch.ids[0] for batch in got] == [pairs[i].id for i in plan.order(0)]
    assert all(worker.is_alive() for worker in loader._iterator._workers)
    assert all(map(same, got, make_loader(dataset_of(pairs), plan.batches(0), 0)))


def test_a_signal_while_loader_processes_start_reaches_this_process(pairs, monkeypatch):
    """Blocked for the children, it must not be lost for the parent."""
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        fork = os.fork

        def fork_under_fire():
            os.kill(os.getpid(), signal.SIGTERM)
            return fork()

        monkeypatch.setattr(os, "fork", fork_under_fire)
        assert len(load(pairs, 2)) == 6
        assert seen
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_loader_processes_are_kept_and_end_with_the_loader(pairs):
    plan = TrainPlan(len(pairs), 2, 1, rank=0, world=1, seed=3)
    loader = make_loader(dataset_of(pairs), plan.batches(0), 2)
    first = list(loader)
    workers = loader._iterator._workers
    pids = [worker.pid for worker in workers]
    assert all(map(same, first, loader)) and [w.pid for w in loader._iterator._workers] == pids
    assert len(loader) == 6
    del loader
    gc.collect()
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_one_loader_serves_all_epochs_by_the_same_processes(pairs, start_method):
    """As a new one per epoch would; also from the middle, and after an epoch that was abandoned."""
    plan = TrainPlan(len(pairs), 2, 2, rank=0, world=1, seed=3)
    keys, processes = EpochBatches(plan), set()
    with closing(make_loader(dataset_of(pairs), keys, 2, start_method=start_method)) as loader:
        for epoch, seen, taken in ((0, 0, 6), (1, 0, 1), (1, 4, 4), (2, 8, 2)):
            keys.begin(epoch, seen)
            batches = list(itertools.islice(loader, taken))
            fresh = make_loader(dataset_of(pairs), plan.batches(epoch, seen), 0)
            assert len(batches) == taken and all(map(same, batches, fresh))
            processes |= {worker.pid for worker in loader._iterator._workers}
    assert len(processes) == 2


@pytest.mark.parametrize("taken", [0, 1, 12])
def test_closing_ends_the_processes_whatever_they_are_at(pairs, taken):
    """Also while a batch is asked for no more and others lie prepared; nobody is left to reap."""
    plan = TrainPlan(len(pairs), 1, 1, rank=0, world=1, seed=3)
    loader = make_loader(dataset_of(pairs), plan.batches(0), 2)
    batches = iter(loader)  # it stays alive, as it does in an error's traceback
    assert len([next(batches) for _ in range(taken)]) == taken
    workers = loader._iterator._workers
    loader.close()
    assert [worker.exitcode for worker in workers] == [0, 0]
    loader.close()
    assert len(list(loader)) == 12, "and it starts anew"
    loader.close()
    make_loader(dataset_of(pairs), plan.batches(0), 0).close()


def test_processes_that_died_between_two_epochs_are_explained(pairs):
    plan = TrainPlan(len(pairs), 1, 1, rank=0, world=1, seed=3)
    with closing(make_loader(dataset_of(pairs), plan.batches(0), 1)) as loader:
        list(loader)
        os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"a loader process died .*--workers"):
            list(loader)


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_a_program_that_ends_early_does_not_wait_for_its_loader(pairs, start_method):
    """Left over by an error, say: the interpreter ends the processes, and waits until they have."""
    plan = TrainPlan(len(pairs), 1, 1, rank=0, world=1, seed=3)
    loader = make_loader(dataset_of(pairs), plan.batches(0), 2, start_method=start_method)
    next(iter(loader))
    for worker in loader._iterator._workers:
        worker.terminate()
        worker.join(timeout=20)
        assert worker.exitcode == 0


def test_workers_follow_cores_and_batches(pairs, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert make_loader(dataset_of(pairs), [[]] * 9, -1).num_workers == 4
    assert make_loader(dataset_of(pairs), [[]] * 3, -1).num_workers == 3
    assert make_loader(dataset_of(pairs), [], -1).num_workers == 0
    assert list(make_loader(dataset_of(pairs), [], 2)) == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert cores_per_process() == 2
    assert make_loader(dataset_of(pairs), [[]] * 9, -1).num_workers == 2
    with pytest.raises(UserError, match="--workers -2"):
        make_loader(dataset_of(pairs), [[]], -2)
