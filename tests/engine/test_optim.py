"""AdamW decays what it should; the learning rate ends where it should."""

import copy
from itertools import pairwise

import pytest
import torch
from engine_standins import new_model
from torch import nn

from samtune.config import OptimOptions
from samtune.engine.optim import (
    autocast,
    build_optimizer,
    build_schedule,
    resolve_precision,
    use_tf32,
)
from samtune.errors import UserError

CPU = torch.device("cpu")


def rates(total_steps, **options):
    """The learning rate of each step of a run."""
    options = OptimOptions(lr=0.1, **options)
    optimizer = build_optimizer(nn.Linear(2, 2), options)
    schedule = build_schedule(optimizer, options, total_steps)
    result = []
    for _ in range(total_steps):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return result


@pytest.mark.parametrize("total_steps", [2, 3, 5, 20, 1000])
@pytest.mark.parametrize("min_lr", [0.0, 0.003])
def test_the_cosine_falls_and_ends_at_its_floor_for_any_data_size(total_steps, min_lr):
    """Neither constant for large data nor rising again for small data (defect D4)."""
    lrs = rates(total_steps, min_lr=min_lr)
    assert lrs[0] == pytest.approx(0.1)
    assert lrs[-1] == pytest.approx(min_lr, abs=1e-15)
    assert all(a > b for a, b in pairwise(lrs))


def test_warm_up_is_linear_and_reaches_the_peak():
    assert rates(8, warmup_steps=3)[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates(8, warmup_steps=3)[-1] == 0


def test_a_run_of_one_step_takes_it_at_the_full_rate():
    assert rates(1) == [0.1]


def test_weights_of_layers_decay_and_nothing_else():
    model = new_model(trainable_norm=True)
    model.token = nn.Parameter(torch.ones(3))
    model.table = nn.Embedding(2, 2)
    optimizer = build_optimizer(model, OptimOptions(weight_decay=0.3))
    decay = {
        name: group["weight_decay"]
        for group in optimizer.param_groups
        for name, p in model.named_parameters()
        if any(p is member for member in group["params"])
    }
    assert decay == {
        "adapter.0.weight": 0.3,
        "adapter.1.weight": 0.0,
        "adapter.1.bias": 0.0,
        "mask_decoder.mask.weight": 0.3,
        "mask_decoder.mask.bias": 0.0,
        "table.weight": 0.0,
        "token": 0.0,
    }


def test_frozen_parameters_are_unknown_to_the_optimizer():
    """A head that no loss reads would otherwise decay (the parent's IoU head and spare masks)."""
    model = new_model()
    known = {id(p) for group in build_optimizer(model, OptimOptions()).param_groups
             for p in group["params"]}  # fmt: skip
    assert known == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"lr": 0.0}, "--lr"),
        ({"lr": 1e-3, "min_lr": 1e-2}, "--min_lr"),
        ({"lr": 1e-3, "warmup_steps": 10}, "--warmup_steps"),
    ],
)
def test_impossible_options_name_their_flag(options, flag):
    options = OptimOptions(**options)
    with pytest.raises(UserError, match=flag):
        build_schedule(build_optimizer(nn.Linear(2, 2), options), options, 10)


def test_a_model_that_is_frozen_throughout_is_refused():
    with pytest.raises(ValueError, match="trains"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimOptions())


def test_what_adamw_kept_in_plain_steps_goes_on_in_fused_ones():
    """A run from before goes on: the same path up to rounding, from the state in its file."""

    def steps(model, optimizer, numbers):
        for number in numbers:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    plain = nn.Linear(3, 3)
    before = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0, fused=False)
    steps(plain, before, range(5))
    fused = copy.deepcopy(plain)
    after = build_optimizer(fused, OptimOptions(lr=0.01, weight_decay=0))
    state = copy.deepcopy(before.state_dict())["state"]
    groups = after.state_dict()["param_groups"]  # weight and bias apart, in that order
    after.load_state_dict({"state": state, "param_groups": groups})
    assert [group["fused"] for group in after.param_groups] == [True, True]
    steps(plain, before, range(5, 10))
    steps(fused, after, range(5, 10))
    for ours, expected in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4 * 0.01)


@pytest.mark.parametrize("wanted", [False, True])
def test_tf32_is_said_and_set_on_a_gpu_only(monkeypatch, wanted):
    """Off, convolutions are exact, too: torch by itself takes TF32 for them."""
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not wanted)
    line = use_tf32(wanted, CPU)
    assert chosen == [] and ("no effect" in line) is wanted
    line = use_tf32(wanted, torch.device("cuda"))
    assert chosen == ["high" if wanted else "highest"]
    assert torch.backends.cudnn.allow_tf32 is wanted and ("TF32" in line) is wanted


def test_precision_auto_is_fp32_on_a_cpu_and_fp16_is_refused_there():
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"
    with pytest.raises(UserError, match="fp32 or bf16"):
        resolve_precision("fp16", CPU)


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp16")])
def test_precision_auto_on_a_gpu_depends_on_the_gpu(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert resolve_precision("auto", torch.device("cuda")) == expected


def test_autocast_gives_the_asked_format():
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(precision, CPU):
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype is kind
