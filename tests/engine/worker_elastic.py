"""Under torchrun: a run that loses rank 1 by kill -9 in its second epoch, the first time.

Started without a word about where it lies or what to go on with. Writes `done<rank>`: where it
went on, and whether it ended as a run that nothing happened to.
"""

import json
import os
import signal
import sys
from pathlib import Path

from engine_standins import Plan, everything, fit, same

from samtune.engine import distributed
from samtune.run_folder import ROOT, RunFolder, begun_by_this_launch
from samtune.run_lock import launch_name

KILLED_AT = 5  # of the first start, counted over the epochs


def on_step(step: int) -> None:
    if os.environ["RANK"] == "1" and step == KILLED_AT and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    begun = begun_by_this_launch("")
    process = distributed.start(timeout_minutes=2)
    plan = Plan(7, 1, 1, process.rank, process.world)
    name = distributed.broadcast_object(f"run_{os.getpid()}")
    folder = begun or RunFolder(ROOT / name)
    launches = distributed.all_gather_objects(launch_name())
    goes_on = bool(folder.states())
    distributed.barrier()
    lock = folder.occupy(launches, new=not goes_on) if process.is_main else None
    distributed.barrier()
    distributed.seed_everything(1, process.rank, deterministic=True)
    trainer, diary, _ = fit(
        folder.path, process, plan, 3, on_step=on_step, resume=goes_on, save_every=1e-9
    )
    parts = everything(trainer, diary)
    steps = diary.steps
    if process.is_main:
        lock.release()
        Path("whole").mkdir()
    distributed.barrier()
    whole = everything(*fit("whole", process, plan, 3, on_step=lambda step: None)[:2])
    whole["records"] = whole["records"][-len(parts["records"]) :]
    told = {
        "folder": str(folder.path),
        "again": begun is not None,
        "steps": steps,
        "same": {name: same(whole[name], parts[name]) for name in whole},
    }
    Path(f"done{process.rank}").write_text(json.dumps(told))
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    sys.exit(main())
