"""What `--deterministic` cannot is said: at the start, and where an operation cannot repeat."""

import pytest
import torch
from engine_standins import Plan, fit

from samtune.engine.determinism import explain_indeterminism, promise
from samtune.engine.distributed import Process
from samtune.errors import UserError


def test_the_promise_follows_device_and_processes():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert "bit for bit, with any --workers" in promise(Process(0, 2, 0, cpu))
    assert "more than two processes" in promise(Process(0, 4, 0, cpu))
    assert "more than two processes" not in promise(Process(0, 2, 0, cpu))
    assert "Not promised: the same bits on another kind of GPU" in promise(Process(0, 1, 0, gpu))


def test_an_operation_that_cannot_repeat_is_a_users_choice_and_named(tmp_path):
    """As torch says it, where there is no GPU to say it of."""
    said = (
        "upsample_linear1d_backward_out_cuda does not have a deterministic implementation, but you "
        "set 'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for ..."
    )

    def stumble(step):
        raise RuntimeError(said)

    with (
        pytest.raises(UserError, match="--deterministic: upsample_linear1d_backward_out_cuda has"),
        explain_indeterminism(),
    ):
        fit(tmp_path, Process(0, 1, 0, torch.device("cpu")), Plan(4, 2), 1, on_step=stumble)
    with pytest.raises(RuntimeError, match="another"), explain_indeterminism():
        raise RuntimeError("another")
