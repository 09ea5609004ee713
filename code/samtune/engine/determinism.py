"""What `--deterministic` promises, and what it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from samtune.engine.distributed import Process
from samtune.errors import UserError

_SIGN = " does not have a deterministic implementation"  # how torch says it


def promise(process: Process) -> str:
    """What a run under `--deterministic` may count on, for the log."""
    with_others = (
        "; sums over more than two processes may differ in their last bit"
        if process.world > 2
        else ""
    )
    if process.device.type == "cpu":
        return (
            "--deterministic: the same command gives the same numbers on this machine, bit for "
            f"bit, with any --workers{with_others}"
        )
    return (
        "--deterministic: only kernels of this GPU that repeat bit for bit; an operation that has "
        "none ends the run and is named. Not promised: the same bits on another kind of GPU, with "
        f"another torch or driver, or with another number of processes{with_others}"
    )


@contextmanager
def explain_indeterminism() -> Iterator[None]:
    """Turn torch's error about an operation that cannot repeat into one that says what to do."""
    try:
        yield
    except RuntimeError as error:
        operation, sign, _ = str(error).partition(_SIGN)
        if not sign:
            raise
        raise UserError(
            f"--deterministic: {operation.split()[-1]} has no form on this device that repeats bit "
            "for bit; leave --deterministic out, or try --loss_resolution original, another "
            "--adapter, or a CPU"
        ) from None
