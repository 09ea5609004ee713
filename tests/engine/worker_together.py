"""Under torchrun: everything that two processes must agree on. Writes OUT/rank<r>.pt."""

import os
import signal
import sys
from pathlib import Path

import torch
from engine_standins import Plan, everything, fit, new_model, new_trainer, run_steps

from samtune.engine import distributed
from samtune.engine.trainer import Interrupted
from samtune.errors import UserError


def trained(process, samples=7, accumulate=1, **options):
    """Parameters and buffers after two epochs; with 7 samples one rank gets a filler."""
    plan = Plan(samples, 2, accumulate, process.rank, process.world)
    trainer = new_trainer(new_model(**options), process, plan, 2, clip_norm=0.5)
    run_steps(trainer, plan)
    state = distributed.unwrap(trainer.model).state_dict()
    return {"state": state, "means": trainer.sums.means()}


def bypassed(process):
    """What goes wrong when training calls the module inside DDP."""
    plan = Plan(8, 2, 1, process.rank, process.world)
    trainer = new_trainer(new_model(), process, plan)
    trainer.model = distributed.unwrap(trainer.model)
    run_steps(trainer, plan, 1)
    return trainer.model.state_dict()


def thawed_head(process):
    """What DDP says when a parameter trains that no loss reads."""
    plan = Plan(8, 2, 1, process.rank, process.world)
    model = new_model()
    model.mask_decoder.iou_prediction_head.requires_grad_(True)
    try:
        run_steps(new_trainer(model, process, plan), plan, 1)
    except RuntimeError as error:
        return str(error)


def messages(process):
    """What `agree` and `together` raise when one rank, both, or none of them fails."""
    said = []
    for failing in ({1}, {0, 1}, set()):
        try:
            with distributed.together():
                if process.rank in failing:
                    raise UserError(f"mistake {min(failing)}")
            said.append(None)
        except UserError as error:
            said.append(str(error))
    return said


def objects(process):
    tensor = torch.tensor([1.0 + process.rank], dtype=torch.float64)
    total = distributed.all_reduce_sum(tensor)
    distributed.barrier()
    return {
        "sum": total.item(),
        "own": tensor.item(),
        "gathered": distributed.gather_objects(process.rank),
        "all": distributed.all_gather_objects(process.rank),
        "broadcast": distributed.broadcast_object(f"from {process.rank}"),
    }


def noise(process):
    distributed.seed_everything(21, process.rank)
    return torch.rand(4)


def stopped_at(process, signalled_step):
    """The step after which this rank stops when rank 1 alone is signalled."""
    with distributed.StopSignal() as stop:
        for step in range(20):
            if process.rank == 1 and step == signalled_step:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.agreed():
                return step, stop._pending is None
        return stop.settle(), stop._pending is None


def due_at(process):
    """The steps after which this rank saves when rank 0 finds at step 3 that it is time."""
    saves = []
    with distributed.StopSignal() as stop:
        for step in range(10):
            assert not stop.agreed(process.is_main and step >= 3 and not saves)
            if stop.due:
                saves.append(step)
        return saves, stop.settle()


def interrupted_run(process, folder):
    """An uninterrupted run, and one that rank 1 stops in the middle of its second epoch."""
    plan = Plan(11, 2, 1, process.rank, process.world)
    whole = everything(*fit(folder / "whole", process, plan, 3)[:2])
    stops = []

    def on_step(step):
        if process.rank == 1 and step == plan.steps_per_epoch + 1:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        fit(folder / "parts", process, plan, 3, on_step=on_step)
    except Interrupted as error:
        stops.append((str(error), error.diary.steps, error.diary.records))
    trainer, diary, _ = fit(folder / "parts", process, plan, 3, resume=True, workers=1, seed=99)
    diary.records[:0] = stops[0][2]
    return {"whole": whole, "parts": everything(trainer, diary), "stop": stops[0][:2]}


def broken_run(process, folder):
    """A run in which one image of rank 1's second epoch gives a NaN."""
    plan = Plan(8, 2, 1, process.rank, process.world)
    fit(folder, process, plan, 2, scores=[1.0, 0.5])
    before = (folder / "last.pt").read_bytes()
    try:
        fit(folder, process, plan, 4, resume=True, broken=(3,))
    except UserError as error:
        return str(error), before == (folder / "last.pt").read_bytes()


def main():
    folder = Path(sys.argv[1])
    process = distributed.start(timeout_minutes=1)
    for name in ("whole", "parts", "broken"):
        (folder / name).mkdir(exist_ok=True)
    distributed.seed_everything(1, process.rank, deterministic=True)
    result = {
        "plain": trained(process),
        "accumulated": trained(process, accumulate=2),
        "norm": trained(process, samples=8, trainable_norm=True, aux=True),
        "bypassed": bypassed(process),
        "messages": messages(process),
        "objects": objects(process),
        "noise": noise(process),
        "stopped": [stopped_at(process, 3), stopped_at(process, 19), stopped_at(process, 99)],
        "due": due_at(process),
        "interrupted": interrupted_run(process, folder),
        "broken": broken_run(process, folder / "broken"),
        "thawed": thawed_head(process),
        "first": distributed.first_to_fail(),
    }
    torch.save(result, folder / f"rank{process.rank}.pt")
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main()
