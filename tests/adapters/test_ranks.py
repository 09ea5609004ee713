"""Two processes train every adapter as one does, BatchNorm included."""

import importlib.util
from pathlib import Path

import pytest
import torch
import worker_ranks
from test_contract import MODELS

from samtune.engine import distributed
from samtune.models import MODEL_TYPES

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What one process found, and what each of two did."""
    spec = importlib.util.spec_from_file_location("launch", HERE.parent / "engine" / "launch.py")
    launch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launch)
    folder, table = tmp_path_factory.mktemp("ranks"), dict(MODEL_TYPES)
    code, _, errors = launch.torchrun(HERE / "worker_ranks.py", folder, timeout=300)
    assert code == 0, errors
    process = distributed.Process(0, 1, 0, torch.device("cpu"))
    alone = worker_ranks.run(process)
    MODEL_TYPES.clear(), MODEL_TYPES.update(table)
    return alone, *(torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))


@pytest.mark.parametrize("model", [model.id for model in MODELS])
def test_two_processes_step_as_one(steps, model):
    alone, first, second = (found[model] for found in steps)
    assert alone.keys() == first.keys() == second.keys()
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name].double(), tensor.double(), atol=1e-4, rtol=1e-3), name
