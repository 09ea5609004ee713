"""The one entry: `run_sa.py [VERB] [flags]`, alone or under torchrun.

Reads the flags (without importing torch, so that `--help` and typos answer at once), imports the
verb and runs it. A user's mistake ends here as one line on rank 0, without a traceback.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import fields, replace

from samtune import config as c
from samtune import flags
from samtune.adapters import ADAPTERS
from samtune.errors import (
    EXIT_ABORTED,
    EXIT_CRASH,
    EXIT_INTERRUPTED,
    EXIT_LOST,
    EXIT_OUT_OF_MEMORY,
    EXIT_USER_ERROR,
    Interrupted,
    Lost,
    OutOfMemory,
    UserError,
)
from samtune.models import MODEL_TYPES
from samtune.run_folder import RunFolder, begun_by_this_launch, to_resume

VERBS = {
    "train": "train SAM with an adapter (the default); scores it if there are test images",
    "check": "look at all images and masks before training, with the flags of train, and report",
    "evaluate": "score a trained run, beside the untuned SAM",
    "import": "turn a published checkpoint, or the parent's, into a run",
    "merge": "fold a trained adapter into a stock SAM's weights, where that is possible",
    "compare": "train several adapters under one budget, with the flags of train",
    "shards": "pack folders of images and masks into tar files",
    "benchmark": "time training steps or scoring on random data, or find the largest batch that "
    "fits; the last line is JSON",
    "adapters": "print what each adapter does, takes, trains and costs, as Markdown",
}
NEXT_STEPS = """
That was the sample set. For your own images: edit the variables at the top of run.sh (MODEL_TYPE,
CHECKPOINT, TRAIN_IMAGE_DIR, TRAIN_MASK_DIR, ...) and launch it again; ./eval.sh scores the newest
run. README.md says more."""
PATIENCE = 30  # seconds
CHOICES = {"model_type": tuple(MODEL_TYPES), "adapter": tuple(ADAPTERS)}


def main(argv: list[str]) -> int:
    """Run the verb that `argv` names. Returns the exit code."""
    verb, argv = (argv[0], argv[1:]) if argv and argv[0] in VERBS else ("train", argv)
    try:
        if argv and not argv[0].startswith("-"):
            raise UserError(f"unknown verb {argv[0]!r}; there are {', '.join(VERBS)}")
        RUN[verb](argv)
    except (UserError, Interrupted, Lost) as error:
        said = str(error) if isinstance(error, Interrupted) else f"error: {error}"
        codes = {OutOfMemory: EXIT_OUT_OF_MEMORY, Interrupted: EXIT_INTERRUPTED, Lost: EXIT_LOST}
        code = codes.get(type(error), EXIT_USER_ERROR)
    except KeyboardInterrupt:
        said, code = "aborted", EXIT_ABORTED
    except Exception as error:
        said, code = "".join(traceback.format_exception(error)), EXIT_CRASH
    else:
        return 0
    # Ranks that had met agreed who speaks; before that all found the same, and rank 0 says it. It
    # must not be ended before: torchrun ends all others as soon as one has left. Its own end then
    # ends this wait; who waits in vain has met something that rank 0 has not.
    if not (processes.met or is_rank_0()):
        time.sleep(PATIENCE)
    if processes.speaks or not processes.met:
        print(said.rstrip(), file=sys.stderr, flush=True)
    if processes.met:
        # The other ranks are leaving as well. An orderly end would wait for their half-closed
        # connections, or be aborted by them.
        sys.stdout.flush()
        os._exit(code)
    return code


def train(argv: list[str]) -> None:
    """Train; then score the best state if test images are known."""
    folder, begun = _run_to_go_on_with(argv)
    config, _ = read(c.TrainConfig, "train", argv, str(folder.config) if folder else None)
    if begun:
        config = replace(config, run=replace(config.run, output_dir=str(begun.path)))
    with processes(config.run.timeout) as process:
        from samtune.train import run

        done = run(config, folder, process)
        if done.test.named:
            from samtune.evaluate import run as score

            scored = c.EvaluateOptions(run_dir=done.run.output_dir)
            # The run's file says all, but a run that went on may have been given other test data.
            given = vars(done.test)
            score(c.EvaluateConfig(scored, done.test, done.read, done.loader, given), process)
        if process.is_main and not config.data.named:
            print(NEXT_STEPS, flush=True)


def _run_to_go_on_with(argv: list[str]) -> tuple[RunFolder | None, RunFolder | None]:
    """The run that has a state to go on from, if any; else the folder of one that died before it
    had, where torchrun starts its processes again. One line says which."""
    resume, output_dir = flags.peek(argv, "resume", ""), flags.peek(argv, "output_dir", "")
    begun = begun_by_this_launch(output_dir)
    if begun and begun.states():
        said, found = f"started again: {begun.path} goes on from its last state", (begun, None)
    elif begun:
        said, found = f"started again: {begun.path} has no state yet and begins anew", (None, begun)
    else:
        found = to_resume(resume, output_dir), None
        said = "" if found[0] or not resume else "there is no run to go on with: a new one begins"
    if said and is_rank_0():
        print(said, file=sys.stderr, flush=True)
    return found


def check(argv: list[str]) -> None:
    """Look at the data that a training would read."""
    config, _ = read(c.CheckConfig, "check", argv)
    with processes(config.run.timeout) as process:
        from samtune.checking import run

        run(config, process)


def evaluate(argv: list[str]) -> None:
    """Score a run."""
    groups = [c.EvaluateOptions, c.TestDataOptions, c.ReadOptions, c.LoaderOptions]
    parsed = flags.parse(
        "run_sa.py evaluate", VERBS["evaluate"], groups, argv, retired=c.RETIRED, choices=CHOICES
    )
    remark(parsed)
    if parsed.given.get("batch_size") == "auto":
        raise UserError("--batch_size auto is for training; say how many images to score at once")
    with processes() as process:
        from samtune.evaluate import run

        run(c.EvaluateConfig(*parsed.instances, parsed.given), process)


def import_(argv: list[str]) -> None:
    """Turn somebody's weights into a run."""
    config, _ = read(c.ImportConfig, "import", argv)
    with processes() as process:
        from samtune.importing import run

        run(config, process)


def merge(argv: list[str]) -> None:
    """A run as a stock SAM's checkpoint."""
    parsed = flags.parse("run_sa.py merge", VERBS["merge"], [c.MergeOptions], argv)
    with processes() as process:
        from samtune.merging import run

        run(parsed.instances[0], process)


def compare(argv: list[str]) -> None:
    """Several adapters side by side."""
    from samtune.compare import run

    parser = flags.Parser(prog="run_sa.py compare", description=VERBS["compare"])
    parser.add_argument(
        "--adapters", default=",".join(ADAPTERS), help="with commas between (default: all)"
    )
    parser.add_argument("--output_dir", required=True, help="a folder for all their runs")
    given, rest = parser.parse_known_args(argv)
    if unknown := set(given.adapters.split(",")) - set(ADAPTERS):
        raise UserError(f"--adapters {min(unknown)}: there are {', '.join(ADAPTERS)}")
    for name in given.adapters.split(","):  # what one of them refuses is said before training
        config, _ = read(c.TrainConfig, "train", ["--adapter", name, *rest])
        data, test = config.data, config.test
        if data.named and not (data.dataset or test.named or test.test_slice):
            raise UserError(
                "there is nothing to compare scores on: set --test_image_dir and --test_mask_dir, "
                "--test_list, --test_shards, --test_slice or --test_datasets"
            )
    print(run(given.adapters.split(","), given.output_dir, rest))


def shards(argv: list[str]) -> None:
    """Folders into tar files."""
    groups = [c.ShardsOptions, c.NameOptions]
    parsed = flags.parse("run_sa.py shards", VERBS["shards"], groups, argv)
    from samtune.sharding import run

    run(*parsed.instances)


def benchmark(argv: list[str]) -> None:
    """Time training steps."""
    config, _ = read(c.BenchmarkConfig, "benchmark", argv)
    with processes(config.run.timeout) as process:
        from samtune.benchmark import run

        run(config, process)


def adapters(argv: list[str]) -> None:
    """What there is to choose from."""
    flags.Parser(prog="run_sa.py adapters", description=VERBS["adapters"]).parse_args(argv)
    from samtune.adapter_table import run

    print(run(), end="")


class Processes:
    """This process among those that torchrun started. torch is imported here, not for --help."""

    met = False  # have the ranks met, and not parted yet?
    speaks = True  # is this the rank that tells of the failure?

    @contextmanager
    def __call__(self, timeout: int = 60):
        from samtune.engine import distributed
        from samtune.engine.watchdog import Watchdog

        process = distributed.start(timeout)
        self.met = True
        watchdog = Watchdog(process, timeout)
        if process.is_main:
            logging.basicConfig(stream=sys.stdout, format="%(message)s")
            logging.getLogger("samtune").setLevel(logging.INFO)
        try:
            with watchdog:
                yield process
        except Exception as error:
            # torchrun ends all ranks as soon as one has left, also the one that is to speak.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.speaks = distributed.first_to_fail()
            if distributed.is_broken(error):
                raise Lost(watchdog.account(error) if self.speaks else "") from None
            raise
        distributed.shutdown()
        self.met = False


processes = Processes()


def read(kind: type, verb: str, argv: list[str], base: str | None = None):
    """Flags into `kind`, with the flags of the adapter that `--adapter` chooses."""
    default = next(f.default for f in fields(c.ModelOptions) if f.name == "adapter")
    # A run that goes on keeps its adapter, whatever run.sh says by default.
    chosen = flags.peek(["--config", base] if base else argv, "adapter", default)
    if chosen not in ADAPTERS:
        raise UserError(f"--adapter {chosen}: there are {', '.join(ADAPTERS)}")
    groups = [GROUPS.get(f.name) or ADAPTERS[chosen].options for f in fields(kind)]
    own = sorted(f.name for f in fields(ADAPTERS[chosen].options))
    takes = ", ".join(f"--{name}" for name in own) or "no flags of its own"
    owners = {}  # flag -> the other adapters that have it
    for name, adapter in ADAPTERS.items():
        for f in fields(adapter.options):
            if f.name not in own:
                owners.setdefault(f.name, []).append(name)
    foreign = {
        flag: f"belongs to --adapter {' and '.join(names)}; --adapter {chosen} takes {takes}"
        for flag, names in owners.items()
    }
    parsed = flags.parse(
        f"run_sa.py {verb}", VERBS[verb], groups, argv,
        retired=c.RETIRED, foreign=foreign, choices=CHOICES, base=base, free=c.FREE_ON_RESUME,
    )  # fmt: skip
    remark(parsed)
    return kind(*parsed.instances), parsed


def is_rank_0() -> bool:
    """Whether this process speaks, as torchrun's environment says before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def remark(parsed: flags.Parsed) -> None:
    """Say what was accepted but ignored."""
    if is_rank_0():
        for text in parsed.remarks:
            print(text, file=sys.stderr, flush=True)


GROUPS = {
    "model": c.ModelOptions,
    "read": c.ReadOptions,
    "data": c.TrainDataOptions,
    "test": c.TestDataOptions,
    "loader": c.LoaderOptions,
    "prompts": c.PromptOptions,
    "loss": c.LossOptions,
    "optim": c.OptimOptions,
    "run": c.RunOptions,
    "log": c.LogOptions,
    "benchmark": c.BenchmarkOptions,
    "check": c.CheckOptions,
    "source": c.ImportOptions,
}
RUN = {
    "train": train,
    "check": check,
    "evaluate": evaluate,
    "import": import_,
    "merge": merge,
    "compare": compare,
    "shards": shards,
    "benchmark": benchmark,
    "adapters": adapters,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
