"""`--check_ddp` passes where processes train one model, finds where they do not, and leaves no
trace."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from worker_adapters import SMALL, make_pictures

from forked_ranks import on_ranks
from samtune import config as c
from samtune.adapters import ADAPTERS, build_model
from samtune.data.datasets import SegmentationDataset
from samtune.data.files import find_pairs
from samtune.data.sampler import TrainPlan
from samtune.ddp_check import DdpCheck, digest, first_odd, largest_difference
from samtune.engine import distributed
from samtune.engine.distributed import Process
from samtune.engine.optim import build_optimizer, build_schedule
from samtune.engine.trainer import Trainer
from samtune.errors import UserError
from samtune.losses import MaskLoss
from samtune.models import MODEL_TYPES
from samtune.models.anatomy import attention_blocks
from samtune.train import run as train
from tiny_models import TINY

CAN_SHARD = hasattr(torch.cpu.Stream, "record_event")  # from torch 2.7 on
ALONE = Process(0, 1, 0, torch.device("cpu"))
GSAM = {"gsam": SMALL["gsam"]}  # the others with what they draw at random


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder)
    return folder


def job(process, pictures, adapter, accumulate=2, shard=False, **options) -> DdpCheck:
    """The check of a run on seven pictures, so that an epoch ends with a smaller step; what it says
    is in `said`."""
    MODEL_TYPES["tiny"] = TINY["tiny"]
    chosen = c.ModelOptions(model_type="tiny", adapter=adapter, train="adapter")
    row, prompt = GSAM.get(adapter, ADAPTERS[adapter].options()), ADAPTERS[adapter].prompts[0]
    model = build_model(chosen, row, prompt, None, seed=1)
    read = c.ReadOptions()
    pairs = find_pairs(pictures / "image", pictures / "mask", read, ("a", "b"))
    dataset = SegmentationDataset(
        pairs, read, 64, c.PromptOptions(prompt=prompt), "original", augment="standard", seed=4,
        train=True,
    )  # fmt: skip
    size = 2 // process.world
    plan = TrainPlan(len(pairs), size, accumulate, process.rank, process.world, seed=4)
    distributed.seed_everything(9, process.rank)
    wrapped = distributed.wrap(
        model, process, attention_blocks(model.image_encoder) if shard else ()
    )
    settings = c.OptimOptions()
    optimizer = build_optimizer(wrapped, settings)
    schedule = build_schedule(optimizer, settings, 9)
    trainer = Trainer(
        wrapped, MaskLoss(c.LossOptions()), [], optimizer, schedule, process, **options
    )
    said = []
    check = DdpCheck(trainer, plan, dataset, said.append)
    check.said = said
    return check


def whole_check(check: DdpCheck) -> list[str]:
    """As before a run's first step."""
    for _ in check.after(lambda epoch: ())(0):
        pass
    return check.said


# --- it passes -----------------------------------------------------------------------------------


def checked(process, pictures) -> dict[str, list[str]]:
    cases = {name: (name, {}) for name in ADAPTERS}
    cases["bf16"] = ("lora", {"precision": "bf16"})
    cases["bf16 joined"] = ("ts_sam", {"precision": "bf16"})
    if CAN_SHARD:
        cases["sharded"] = ("lora", {"shard": True})
    return {key: whole_check(job(process, pictures, n, **how)) for key, (n, how) in cases.items()}


@pytest.fixture(scope="module")
def passed(pictures):
    return on_ranks(checked, pictures)[0]


@pytest.mark.parametrize("case", [*ADAPTERS, "bf16", "bf16 joined", "sharded"])
def test_every_adapter_passes_with_accumulation_and_an_uneven_last_step(passed, case):
    if case == "sharded" and not CAN_SHARD:
        pytest.skip("this torch does not shard on a CPU")
    state, first, last = passed[case]
    assert "before the first step" in state and "the same on 2 processes, bit for bit" in state
    assert "step 1 of an epoch (4 images)" in first and "those of one process" in first
    assert "step 2 of an epoch (3 images)" in last
    assert ("joined" in first) == (case in ("gsam", "ts_sam", "bf16 joined"))


def test_one_process_repeats_a_step(pictures, tiny):
    said = whole_check(job(ALONE, pictures, "conv_lora"))
    assert len(said) == 2 and all("bit for bit" in line for line in said)


# --- it finds what is wrong ----------------------------------------------------------------------


def bypassed(check, rank):
    """The parent's defect: training calls the module inside DDP."""
    check.trainer.model = distributed.unwrap(check.trainer.model)


def perturbed(check, rank):
    if rank == 1:
        with torch.no_grad():
            _first_trainable(check)[1].view(-1)[0] += 1e-7


def perturbed_buffer(check, rank):
    if rank == 0:
        next(distributed.unwrap(check.trainer.model).buffers()).view(-1)[0] += 1


def weighted(check, rank):
    """One rank's images count more than another's."""
    criterion = check.trainer.criterion

    def more(prediction, batch):
        total, terms = criterion(prediction, batch)
        return total * (1 + 0.01 * rank), terms

    check.trainer.criterion = more


def _first_trainable(check):
    model = distributed.unwrap(check.trainer.model)
    return next((name, p) for name, p in model.named_parameters() if p.requires_grad)


def broken(process, pictures, adapter, spoil) -> str:
    check = job(process, pictures, adapter)
    spoil(check, process.rank)
    with pytest.raises(UserError) as caught:
        whole_check(check)
    return str(caught.value)


def unsynchronised(process, pictures) -> str:
    """A BatchNorm that sees the images of its own rank only."""
    distributed.synchronise_batch_norm = lambda model, device: None
    return broken(process, pictures, "ts_sam", lambda check, rank: None)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (bypassed, "the gradient of .* of rank 1 is not that of the other ranks"),
        (perturbed, "before the first step: .* of rank 1 is not that of the other ranks"),
        (perturbed_buffer, "before the first step: .* of rank 1 is not that"),
        (weighted, "the gradient of .* is not that of one process: it is off by"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_broken_is_found_and_all_ranks_say_the_same(pictures, spoil, said):
    first, second = on_ranks(broken, pictures, "lora", spoil)
    assert first == second
    assert re.search(said, first), first


def test_batch_norms_that_are_not_synchronised_are_found(pictures):
    first, second = on_ranks(unsynchronised, pictures)
    assert first == second and "is not that of one process" in first


def test_which_rank_is_the_odd_one():
    a, b = b"a", b"b"
    assert first_odd([{"x": a, "y": a}, {"x": a, "y": a}]) is None
    assert first_odd([{"x": a, "y": b}, {"x": a, "y": a}, {"x": a, "y": a}]) == ("y", [0])
    assert first_odd([{"x": a}, {"x": b}]) == ("x", [1])
    assert first_odd([{"x": a}, {"x": a, "y": a}]) == ("y", [1])


def test_a_hash_tells_single_bits_and_reads_every_number_format():
    plain = torch.tensor([0.0, 1.0])
    assert digest(plain) != digest(torch.tensor([-0.0, 1.0])), "a sign of zero is a bit"
    for tensor in (torch.tensor(3), plain.bfloat16(), torch.zeros(0), torch.ones(2, 3).t()):
        assert digest(tensor) == digest(tensor.clone())


def test_a_difference_is_judged_by_the_size_of_its_gradient():
    reference = {"large": torch.tensor([100.0, 0.0]), "small": torch.tensor([1e-9])}
    off, name = largest_difference(
        {"large": torch.tensor([101.0, 0]), "small": -reference["small"]}, reference
    )
    assert (off, name) == (pytest.approx(0.01), "large"), "next to nothing is no difference"
    assert largest_difference(reference, reference)[0] == 0
    for wrong in (torch.tensor([float("nan"), 0]), torch.tensor([float("inf"), 0])):
        assert largest_difference(reference | {"large": wrong}, reference)[0] == float("inf")
    assert largest_difference({"large": reference["large"]}, reference) == (float("inf"), "small")


# --- it leaves no trace, and --deterministic repeats ---------------------------------------------


def trained(process, pictures, folder, check_ddp):
    """A run on two processes with loader processes, from which everything random is drawn."""
    MODEL_TYPES["tiny"] = TINY["tiny"]
    images, masks = str(pictures / "image"), str(pictures / "mask")
    config = c.TrainConfig(
        c.ModelOptions(model_type="tiny", adapter="adaptformer", train="adapter"),
        c.ReadOptions(),
        c.TrainDataOptions(images, masks, images, masks, train_slice=":5", val_slice="5:"),
        c.TestDataOptions(),
        c.LoaderOptions(batch_size=1, workers=1),
        c.PromptOptions(box_jitter=0.1),
        c.LossOptions(),
        c.OptimOptions(lr=1e-2),
        c.RunOptions(epoch=2, output_dir=str(folder), deterministic=True, check_ddp=check_ddp),
        c.LogOptions(log_every=1),
        ADAPTERS["adaptformer"].options(),
    )
    train(config, None, process)


def left_by(folder: Path) -> tuple[list[dict], dict]:
    """Records without what time decides, and the trained tensors."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for name in [n for n in record if n == "speed" or n.endswith("seconds")]:
            del record[name]
    return records, load_file(folder / "best.safetensors")


def test_two_deterministic_runs_are_equal_bit_for_bit_and_the_check_leaves_no_trace(
    pictures, tmp_path, capfd
):
    """Two processes, loader processes, dropout, jitter; the second run checks itself."""
    on_ranks(trained, pictures, tmp_path / "plain", False)
    assert "--check_ddp" not in capfd.readouterr().out
    on_ranks(trained, pictures, tmp_path / "checked", True)
    said = capfd.readouterr().out
    for when in ("before the first step", "after epoch 1", "at the end"):
        assert f"--check_ddp, {when}: " in said
    (records, tensors), (again, others) = map(left_by, (tmp_path / "plain", tmp_path / "checked"))
    assert records == again and len(records) == 8
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    last, other = (
        torch.load(tmp_path / name / "last.pt", weights_only=True)["ranks"]
        for name in ("plain", "checked")
    )
    for mine, theirs in zip(last, other, strict=True):
        assert torch.equal(mine["rng"]["cpu"], theirs["rng"]["cpu"])
        assert mine["sums"] == theirs["sums"]


def test_a_check_leaves_neither_statistics_nor_gradients_nor_random_numbers(pictures, tiny):
    """With a BatchNorm that trains."""
    check = job(ALONE, pictures, "ts_sam")
    model = check.trainer.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    whole_check(check)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert check.trainer.sums.values is None and check.trainer.steps_done == 0
