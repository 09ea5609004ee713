"""Under torchrun: a run that is long enough for torchrun to be sent SIGTERM in its middle."""

import sys
import time
from pathlib import Path

from engine_standins import Plan, fit

from samtune.engine import distributed
from samtune.engine.trainer import Interrupted
from samtune.errors import EXIT_INTERRUPTED

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    process = distributed.start(timeout_minutes=1)
    plan = Plan(400, 2, 1, process.rank, process.world)

    def on_step(step):
        if step == 5:
            (folder / f"running{process.rank}").touch()
        time.sleep(0.02)

    try:
        fit(folder, process, plan, 3, on_step=on_step)
    except Interrupted as error:
        print(f"rank {process.rank} stopped after {error.diary.steps} steps", flush=True)
        sys.exit(EXIT_INTERRUPTED)
    finally:
        distributed.shutdown()
