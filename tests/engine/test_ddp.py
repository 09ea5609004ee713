"""Two processes train the very model that one process trains, for every adapter.

With and without accumulation, with an uneven last step in every epoch, with pictures of mixed size,
augmentation and validation; the real plan, loader, loss, optimizer and evaluator.
"""

import pytest
import torch
from launch import torchrun
from worker_adapters import BATCH_NORM, cases, make_pictures, train_all

from samtune.adapters.options import ConvLoraOptions
from samtune.engine.distributed import Process
from samtune.models import MODEL_TYPES

KEYS = [key for key, *_ in cases()]
# Each rank draws its own noise for the gates, and balances its own images: another model by design.
DRAWING = {key for key, _, options, *_ in cases() if options == ConvLoraOptions()}
REPEATABLE = [key for key in KEYS if key not in DRAWING]
NORMALISED = {key for key, name, *_ in cases() if name in BATCH_NORM}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(alone, rank 0, rank 1): what came out of one process, and of two."""
    folder = tmp_path_factory.mktemp("ddp")
    make_pictures(folder / "pictures")
    script = __file__.replace("test_ddp", "worker_adapters")
    code, out, err = torchrun(script, folder / "pictures", folder, timeout=600)
    assert code == 0, out + err
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = train_all(Process(0, 1, 0, torch.device("cpu")), folder / "pictures")
    finally:
        torch.set_num_threads(threads)
        MODEL_TYPES.pop("tiny")
    return [alone] + [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in (0, 1)]


@pytest.mark.parametrize("key", KEYS)
def test_ranks_hold_the_same_model(results, key):
    """Gradients are averaged: the parent trained a model of its own on each GPU."""
    _, first, second = (result[key]["state"] for result in results)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("key", REPEATABLE)
def test_two_processes_train_what_one_would(results, key):
    alone, first, _ = (result[key]["state"] for result in results)
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_scores_are_those_of_one_process(results, key, split):
    """Seven pictures on two ranks: none counts twice, fillers count nothing."""
    alone, first, second = (result[key][split] for result in results)
    assert first == second
    if key in DRAWING:
        return
    for name, value in alone.items():
        assert first[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("key", KEYS)
def test_training_moved_the_model(results, key):
    """Else the comparisons above would say nothing."""
    alone = results[0][key]["state"]
    moved = [n for n, t in alone.items() if n.startswith("mask_decoder") and t.is_floating_point()]
    assert any(not torch.equal(alone[n], initial(key)[n]) for n in moved)


def initial(key):
    from worker_adapters import TINY

    from samtune.adapters import build_model
    from samtune.config import ModelOptions

    MODEL_TYPES["tiny"] = TINY
    try:
        _, name, options, prompt, _ = next(case for case in cases() if case[0] == key)
        chosen = ModelOptions(model_type="tiny", adapter=name, train="adapter", image_size=64)
        return build_model(chosen, options, prompt, None, seed=1).state_dict()
    finally:
        MODEL_TYPES.pop("tiny")
