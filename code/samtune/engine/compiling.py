"""`torch.compile` for the parts of a model that are the same many times over.

Each block is compiled by itself: short to compile, as blocks of one shape share what was made, and
DDP's buckets go out between two blocks as they do without.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from samtune.errors import UserError

# Versions of one function that torch keeps; what would need one more runs uncompiled. A TinyViT's
# blocks have several widths; each comes in training and in evaluation, with and without a gradient
# of its input, and for the last batch, which is smaller.
_MOST_VERSIONS = 64


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile each block's forward in place, when it is first called; names stay as they are.

    Before activation checkpointing, which then runs what was compiled a second time: the other way
    round torch leaves such blocks uncompiled without a word. Random numbers are drawn as without,
    so results differ by rounding only.

    Each size has a version of its own: a run has few (its frame, its crop, a last batch). One
    version for all of them takes minutes per block in torch 2.15, which reasons about windows of
    unknown grids, and makes slower kernels.
    """
    torch._dynamo.config.cache_size_limit = _MOST_VERSIONS
    # DDP's own way with compiled models cuts them where its buckets end; blocks are cuts enough.
    torch._dynamo.config.optimize_ddp = False
    options = {"fallback_random": True} if backend == "inductor" else None
    for block in blocks:
        block.forward = torch.compile(
            block.forward, dynamic=False, backend=backend, options=options
        )


def check_compiler(device: torch.device) -> None:
    """Raise UserError if nothing can be compiled for this device here.

    A CPU needs a C++ compiler, a GPU triton: a small function, forward and backward, finds out, so
    that no run fails at its first step for the want of one.
    """
    x = torch.ones(4, 4, device=device, requires_grad=True)
    try:
        torch.compile(_small, dynamic=False)(x).backward()
    except Exception as error:  # torch, triton and the compiler's driver have classes of their own
        needs = "triton" if device.type == "cuda" else "a C++ compiler (g++)"
        raise UserError(
            f"--compile: torch.compile does not work here ({_cause(error)}); on this device it "
            f"needs {needs}: install it, or leave --compile out"
        ) from None


def _small(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * 2).sum()


def _cause(error: Exception) -> str:
    """The first line that says more than which backend it was."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith("backend=")]
    return said[0] if said else type(error).__name__
