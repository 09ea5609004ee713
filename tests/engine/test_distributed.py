"""Two real processes over gloo: what must be equal is equal, and nobody waits for ever."""

import re
import signal
import time
from pathlib import Path

import launch
import pytest
import torch
from engine_standins import Plan, TinySegmenter, new_model, new_trainer, run_steps, same
from torch import nn

from samtune.engine import distributed
from samtune.engine.distributed import Process
from samtune.engine.run_states import load_run_state
from samtune.errors import EXIT_INTERRUPTED, UserError

HERE = Path(__file__).parent
ALONE = Process(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes of worker_together.py wrote: one launch for all tests of this file."""
    folder = tmp_path_factory.mktemp("together")
    code, out, err = launch.torchrun(HERE / "worker_together.py", folder)
    assert code == 0, out + err
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", ["plain", "accumulated", "norm"])
def test_gradients_are_averaged_so_that_all_ranks_stay_bitwise_equal(ranks, case):
    """Training goes through DDP: no rank trains a model of its own (defect D1)."""
    assert same(ranks[0][case], ranks[1][case])


def test_ranks_would_drift_apart_if_the_module_inside_ddp_were_called(ranks):
    """The comparison above can fail: calling the inner module leaves the gradients apart."""
    assert not same(ranks[0]["bypassed"], ranks[1]["bypassed"])


@pytest.mark.parametrize(
    ("case", "samples", "accumulate", "options"),
    [
        ("plain", 7, 1, {}),
        ("accumulated", 7, 2, {}),
        ("norm", 8, 1, {"trainable_norm": True, "aux": True}),
    ],
)
def test_two_processes_equal_one_with_the_joined_batch(ranks, case, samples, accumulate, options):
    """Also with accumulation, and in an uneven last step, where one rank has a filler.

    Not where fillers meet a BatchNorm that trains: there they do join the statistics.
    """
    plan = Plan(samples, 4, accumulate)
    trainer = new_trainer(new_model(**options), ALONE, plan, 2, clip_norm=0.5)
    run_steps(trainer, plan)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(ranks[0][case]["state"][name], value, rtol=1e-6, atol=1e-6)
    assert ranks[0][case]["means"] == pytest.approx(trainer.sums.means(), abs=1e-6)


def test_training_moves_what_trains_and_nothing_else(ranks):
    """The frozen BatchNorm's statistics and the IoU head stay as they were."""
    before, after = new_model().state_dict(), ranks[0]["plain"]["state"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, p in new_model().named_parameters() if p.requires_grad}


def test_a_trained_head_that_no_loss_reads_breaks_ddp(ranks):
    """Why the IoU head stays frozen: DDP does not search for unused parameters (defect D23)."""
    assert "parameters that were not used" in ranks[0]["thawed"]
    assert ranks[0]["plain"]["means"]["loss"] > 0  # and frozen, many steps went through


def test_a_mistake_on_any_rank_is_raised_on_all(ranks):
    """`agree` and `together`: one rank's message, two messages, none."""
    for rank in ranks:
        assert rank["messages"] == ["mistake 1", "mistake 0", None]


def test_objects_and_sums_travel(ranks):
    assert ranks[0]["objects"] == {
        "sum": 3.0, "own": 1.0, "gathered": [0, 1], "all": [0, 1], "broadcast": "from 0"
    }  # fmt: skip
    assert ranks[1]["objects"] == {
        "sum": 3.0, "own": 2.0, "gathered": None, "all": [0, 1], "broadcast": "from 0"
    }  # fmt: skip


def test_ranks_draw_different_random_numbers(ranks):
    """Ranks do not share their noise (defect D17)."""
    assert not torch.equal(ranks[0]["noise"], ranks[1]["noise"])


def test_a_signal_on_one_rank_stops_all_after_the_same_step(ranks):
    """At step 3: known to all one step later. At the last step: `settle` tells. Nothing pending."""
    for rank in ranks:
        assert rank["stopped"] == [(4, True), (True, True), (False, True)]


def test_what_one_rank_finds_due_all_do_once_after_the_same_step(ranks):
    """One step later, as nobody waits for the answer; rank 1 has no clock of its own."""
    assert [rank["due"] for rank in ranks] == [([4], False)] * 2


def test_exactly_one_rank_is_the_first_to_fail(ranks):
    assert sorted(rank["first"] for rank in ranks) == [False, True]


def test_interrupted_on_two_ranks_and_resumed_equals_uninterrupted(ranks):
    """Bit for bit, from the middle of an epoch, with another number of loader workers (D22)."""
    for rank in ranks:
        result = rank["interrupted"]
        assert result["stop"][1] == 5  # steps begun: rank 1 was signalled in the fourth
        for part, value in result["whole"].items():
            assert same(value, result["parts"][part]), part


def test_a_nan_on_one_rank_is_told_by_all_with_its_file_and_saves_nothing(ranks):
    """One rank's image is at fault; the step, the loss and the file are named on every rank."""
    for rank in ranks:
        message, unchanged = rank["broken"]
        assert re.match(r"step \d+ \(epoch 3\): bce not finite for images/s3.png\.", message)
        assert unchanged


def test_a_failing_rank_does_not_hang_the_others():
    """Rank 1 fails alone, rank 0 waits in a collective: both end, and one message is printed."""
    code, out, err = launch.torchrun(HERE / "worker_failing.py", timeout=60)
    assert code != 0
    assert out.splitlines() == ["this image is broken"], err


@pytest.mark.parametrize(
    "by, number", [(launch.THEIRS, signal.SIGTERM), (launch.OURS, signal.SIGUSR1)]
)
def test_a_signal_to_torchrun_ends_in_one_save_at_one_step(tmp_path, by, number):
    """It passes the signal on; both ranks stop after the same step, and `last` is there.

    SIGUSR1 leaves torchrun itself running until the workers have saved, however long that takes.
    """
    launcher = launch.start(HERE / "worker_stopped.py", tmp_path, by=by)
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"running{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.05)
        launcher.send_signal(number)
        out, err = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    steps = dict(re.findall(r"rank (\d) stopped after (\d+) steps", out))
    assert set(steps) == {"0", "1"} and steps["0"] == steps["1"], out + err
    if by is launch.OURS:
        assert launcher.returncode == EXIT_INTERRUPTED, out + err
    assert load_run_state(tmp_path / "last.pt")["progress"]["step"] == int(steps["0"])


def test_without_torchrun_there_is_one_process_and_no_group(monkeypatch):
    """A CPU and a single process need neither NCCL nor a process group (defect D16)."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    process = distributed.start()
    assert (process.rank, process.world, process.is_main) == (0, 1, True)
    assert not torch.distributed.is_initialized()
    model = TinySegmenter()
    assert distributed.wrap(model, process) is model
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.all_reduce_sum(torch.ones(1)).item() == 1
    with pytest.raises(UserError, match="wrong"):
        distributed.agree(UserError("wrong"))
    distributed.barrier()
    distributed.shutdown()


def test_more_processes_than_gpus_is_a_users_mistake(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="4 processes were started for 2 GPU"):
        distributed.start()


def test_no_time_at_all_is_a_users_mistake():
    with pytest.raises(UserError, match="--timeout 0"):
        distributed.start(0)


@pytest.mark.parametrize("deterministic", [True, False])
def test_cudnn_is_deterministic_or_searches_for_speed_never_both(deterministic, monkeypatch):
    """The parent switched both on (defect D17)."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        distributed.seed_everything(3, 0, deterministic)
        assert cudnn.deterministic is deterministic
        assert cudnn.benchmark is not deterministic
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        first = torch.rand(3)
        distributed.seed_everything(3, 0, deterministic)
        assert torch.equal(first, torch.rand(3))
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.deterministic, cudnn.benchmark = before


def test_only_trainable_batch_norms_are_synchronised_and_keep_their_parameters():
    """A frozen one runs in eval mode and needs no company."""
    model = new_model(trainable_norm=True)
    weight, names = model.adapter[1].weight, list(model.state_dict())
    distributed.synchronise_batch_norm(model, torch.device("cpu"))
    assert isinstance(model.adapter[1], distributed.SyncedBatchNorm)
    assert type(model.image_encoder[1]) is nn.BatchNorm2d
    assert model.adapter[1].weight is weight
    assert list(model.state_dict()) == names
    distributed.synchronise_batch_norm(gpu := new_model(trainable_norm=True), torch.device("cuda"))
    assert type(gpu.adapter[1]) is nn.SyncBatchNorm


def test_a_second_interrupt_aborts_but_one_told_twice_does_not(monkeypatch):
    """torchrun repeats a terminal's Ctrl-C at once; a person's second one comes later."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGINT)
    with distributed.StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.1
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed() and stop.settle()
        now[0] += 3
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
