"""The one entry: `run_sa.py [train|evaluate|benchmark] [flags]`, alone or under torchrun.

Reads the flags (without importing torch, so that `--help` and typos answer at once), imports the
verb and runs it. A user's mistake ends here as one line on rank 0, without a traceback.
"""

from __future__ import annotations

import os
import sys
from dataclasses import fields

from samtune import config as c
from samtune import flags
from samtune.adapters import ADAPTERS
from samtune.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from samtune.models import MODEL_TYPES
from samtune.run_folder import to_resume

VERBS = {
    "train": "train SAM with an adapter (the default); scores it if there are test images",
    "evaluate": "score a trained run, beside the untuned SAM",
    "benchmark": "time training steps on random data; the last line is JSON",
}
CHOICES = {"model_type": tuple(MODEL_TYPES), "adapter": tuple(ADAPTERS)}


def main(argv: list[str]) -> int:
    """Run the verb that `argv` names. Returns the exit code."""
    verb, argv = (argv[0], argv[1:]) if argv and argv[0] in VERBS else ("train", argv)
    try:
        if argv and not argv[0].startswith("-"):
            raise UserError(f"unknown verb {argv[0]!r}; there are {', '.join(VERBS)}")
        return {"train": train, "evaluate": evaluate, "benchmark": benchmark}[verb](argv)
    except UserError as error:
        # An error that all ranks agreed upon, or met before they knew each other, is said once.
        if os.environ.get("RANK", "0") == "0" or getattr(error, "only_here", False):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR


def train(argv: list[str]) -> int:
    """Train; then score the best state if test images are known."""
    folder = to_resume(flags.peek(argv, "resume", ""), flags.peek(argv, "output_dir", ""))
    base = str(folder.config) if folder else None
    config, parsed = read(c.TrainConfig, "train", argv, base)
    from samtune.train import Interrupted, run  # torch is imported here, not for --help

    try:
        done = run(config, folder, parsed)
    except Interrupted as interrupted:
        if os.environ.get("RANK", "0") == "0":
            print(interrupted, file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    if done.test.test_image_dir:
        from samtune.evaluate import run as score

        score(c.EvaluateConfig(
            c.EvaluateOptions(run=done.run.output_dir), done.test, done.read, done.loader, {}
        ))  # fmt: skip
    return 0


def evaluate(argv: list[str]) -> int:
    """Score a run."""
    groups = [c.EvaluateOptions, c.TestDataOptions, c.ReadOptions, c.LoaderOptions]
    parsed = flags.parse(
        "run_sa.py evaluate", VERBS["evaluate"], groups, argv, retired=c.RETIRED, choices=CHOICES
    )
    remark(parsed)
    from samtune.evaluate import run

    run(c.EvaluateConfig(*parsed.instances, parsed.given))
    return 0


def benchmark(argv: list[str]) -> int:
    """Time training steps."""
    config, _ = read(c.BenchmarkConfig, "benchmark", argv)
    from samtune.benchmark import run

    run(config)
    return 0


def read(kind: type, verb: str, argv: list[str], base: str | None = None):
    """Flags into `kind`, with the flags of the adapter that `--adapter` chooses."""
    default = next(f.default for f in fields(c.ModelOptions) if f.name == "adapter")
    chosen = flags.peek(argv, "adapter", flags.peek(["--config", base], "adapter", default)
                        if base else default)  # fmt: skip
    if chosen not in ADAPTERS:
        raise UserError(f"--adapter {chosen}: there are {', '.join(ADAPTERS)}")
    groups = [GROUPS.get(f.name) or ADAPTERS[chosen].options for f in fields(kind)]
    own = {f.name for f in fields(ADAPTERS[chosen].options)}
    foreign = {
        f.name: f"belongs to --adapter {name}; --adapter {chosen} takes "
        + (", ".join(f"--{flag}" for flag in sorted(own)) or "no flags of its own")
        for name, adapter in ADAPTERS.items()
        for f in fields(adapter.options)
        if f.name not in own
    }
    parsed = flags.parse(
        f"run_sa.py {verb}", VERBS[verb], groups, argv,
        retired=c.RETIRED, foreign=foreign, choices=CHOICES, base=base, free=c.FREE_ON_RESUME,
    )  # fmt: skip
    remark(parsed)
    return kind(*parsed.instances), parsed


def remark(parsed: flags.Parsed) -> None:
    """Say what was accepted but ignored."""
    if os.environ.get("RANK", "0") == "0":
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
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
