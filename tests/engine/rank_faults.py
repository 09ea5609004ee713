"""A small training on ranks that are forked from the test's process, for faults to happen to.

All is imported there already (`import_all`), so a launch takes no time. A launcher, forked too,
holds the store as torchrun's does, but ends nobody: who hangs gets no help. Ranks fail as under
run_sa.py, whose code decides what is said and with which exit code they leave. Every process holds
the writing end of a pipe, which reads as ended when all are gone, loader processes too.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from engine_standins import (
    METADATA,
    Diary,
    Plan,
    collate,
    everything,
    new_model,
    new_trainer,
    run_steps,
    scores_of,
)
from PIL import Image
from torch.utils.data import Dataset

import run_sa
from samtune.activity import now
from samtune.data.decoding import decode
from samtune.data.loading import make_loader
from samtune.engine import watchdog
from samtune.engine.checkpoint import Checkpoints
from samtune.engine.distributed import Process
from samtune.engine.trainer import Trainer
from samtune.run_folder import RunFolder

SAMPLES, EPOCHS, STEPS = 24, 3, 6  # steps of an epoch, on two ranks
QUICK = {"BEAT": 0.1, "SILENCE": 60.0, "FAREWELL": 1.0, "ROLL_CALL": 1.0}
_os_exit = os._exit


class Ranks:
    """`world` ranks that run `work`, one start after another over one store.

    timeout: minutes, as of --timeout. starts: how many there are; `work` of all but the last must
    end. settings: of `watchdog`.
    """

    def __init__(
        self,
        folder: Path,
        work: Callable[[Process], None],
        world=2,
        timeout=5.0,
        starts=1,
        **settings,
    ):
        folder.mkdir(exist_ok=True)
        self.settings = QUICK | settings
        self.folder, self.world, self.starts = folder, world, starts
        self.gone, held = os.pipe()
        self.launcher = _fork(lambda: self._launch(work, timeout))
        os.close(held)

    def _launch(self, work, timeout: float) -> None:
        os.close(self.gone)
        store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        for start in range(self.starts):
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(start)
            ranks = [
                _fork(lambda rank=rank: self._be(rank, store.port, work, timeout))
                for rank in range(self.world)
            ]
            (self.folder / "pids.part").write_text(" ".join(map(str, ranks)))
            (self.folder / "pids.part").rename(self.folder / "pids")
            for rank in ranks:
                os.waitpid(rank, 0)

    def _be(self, rank: int, port: int, work, timeout: float) -> None:
        """A rank, from its start to its exit."""
        said = os.open(self.folder / f"said{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world),
            "LOCAL_WORLD_SIZE": str(self.world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        torch.cuda.is_available = lambda: False
        vars(watchdog).update(self.settings)
        me = os.getpid()

        def leave(code: int) -> None:
            if os.getpid() == me:  # not a loader process
                (self.folder / f"code{rank}").write_text(str(code))
            _os_exit(code)

        def verb(argv: list[str]) -> None:
            with run_sa.processes(timeout) as process:
                work(process)

        os._exit, run_sa.RUN["train"] = leave, verb
        os._exit(run_sa.main(["train"]))

    def pid(self, rank: int) -> int:
        deadline = time.monotonic() + 60
        while not (self.folder / "pids").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return int((self.folder / "pids").read_text().split()[rank])

    def wait(self, seconds: float = 300) -> None:
        """Until every process is gone. Fails after `seconds`: that is a hang."""
        ended, _, _ = select.select([self.gone], [], [], seconds)
        if not ended:
            for pid in [*map(self.pid, range(self.world)), self.launcher]:
                _kill(pid)
        os.close(self.gone)
        os.waitpid(self.launcher, 0)
        assert ended, f"processes are left after {seconds} s: {self.said}"

    @property
    def codes(self) -> list[int | None]:
        """Exit codes of the ranks; None where one was killed."""
        files = [self.folder / f"code{rank}" for rank in range(self.world)]
        return [int(file.read_text()) if file.exists() else None for file in files]

    @property
    def said(self) -> str:
        files = [self.folder / f"said{rank}" for rank in range(self.world)]
        return "".join(file.read_text() for file in files if file.exists())

    @property
    def error(self) -> str:
        """The one message; fails if there are several, or a traceback."""
        assert "Traceback" not in self.said, self.said
        errors = [line for line in self.said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.said
        return errors[0]


def _fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:
        traceback.print_exc()
        _os_exit(99)
    _os_exit(0)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    while True:
        time.sleep(100)


# --- the training --------------------------------------------------------------------------------


def import_all() -> None:
    """Also what torch imports when it first makes an optimizer and wraps a model: seconds of it."""
    import torch._dynamo

    plan = Plan(1, 1)
    trainer = new_trainer(new_model(), Process(0, 1, 0, torch.device("cpu")), plan)
    run_steps(trainer, plan, 1)


def draw_pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(SAMPLES):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"s{index}.png")


class Pictures(Dataset):
    """Files; `fault(key)` is called before one is read, and may return what to multiply it by."""

    def __init__(self, folder: Path, fault: Callable = lambda key: None):
        self.folder, self.fault = folder, fault

    def __len__(self):
        return SAMPLES

    def files_of(self, keys):
        return [str(self.folder / f"s{key.index}.png") for key in keys]

    def __getitem__(self, key):
        factor = self.fault(key) or 1.0
        image = torch.from_numpy(decode(self.files_of([key])[0]).array).permute(2, 0, 1)
        return image, (image.float().mean(0) > 127).float() * factor, key


class Keys:
    """The batches of an epoch that `begin` names, for one loader."""

    def __init__(self, plan: Plan):
        self.plan, self.place = plan, (0, 0)

    def begin(self, *place: int) -> None:
        self.place = place

    def __len__(self):
        return self.plan.steps_per_epoch

    def __iter__(self):
        return iter(self.plan.batches(*self.place))


def training(
    run: Path,
    pictures: Path,
    *,
    workers: int = 0,
    before_step: Callable[[int, int], None] = lambda rank, step: None,
    fault: Callable = lambda key: None,
    validate: Callable[[int], None] = lambda rank: None,
) -> Callable[[Process], None]:
    """Work for `Ranks`: train to the end, from the last saved state of `run` if there is one.

    before_step: called with (rank, step from 1) when that step is under way but has no batch yet.
    validate: called with the rank at each epoch's end. What came out is written to
    run/done<rank>.pt.
    """

    def work(process: Process) -> None:
        take_step = Trainer.train_step

        def step(self, micro_batches, global_count):
            def beginning():  # the step is under way when its batches are asked for
                before_step(process.rank, self.steps_done + 1)
                yield from micro_batches

            take_step(self, beginning(), global_count)

        Trainer.train_step = step
        _train(process)

    def _train(process: Process) -> None:
        now.run = str(run)
        run.mkdir(exist_ok=True)
        plan = Plan(SAMPLES, 2, 1, process.rank, process.world)
        keys, model, diary = Keys(plan), new_model(dropout=0.2), Diary()
        trainer = new_trainer(model, process, plan, EPOCHS)
        torch.manual_seed(1 + process.rank)
        saved, scores = Checkpoints(RunFolder(run), METADATA), scores_of(model)
        state = saved.load_last() if RunFolder(run).last.exists() else None

        def batches(epoch: int, first_step: int):
            keys.begin(epoch, first_step)
            return loader

        def validation() -> dict[str, float]:
            validate(process.rank)
            return scores()

        with make_loader(Pictures(pictures, fault), keys, workers, collate=collate) as loader:
            trainer.fit(
                plan, batches, validation, diary, saved, epochs=EPOCHS, patience=0, resume=state
            )
        result = everything(trainer, diary)
        del result["records"]  # a killed run has lost those that it had told
        torch.save(result, run / f"done{process.rank}.pt")

    return work
