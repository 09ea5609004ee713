"""How numbers move: AdamW with decay where it belongs, a cosine that ends, and number formats."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from samtune.config import OptimOptions
from samtune.errors import UserError

NUMBERS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_optimizer(model: nn.Module, options: OptimOptions) -> AdamW:
    """AdamW over what trains; decay on the `weight` of linear and convolution layers only.

    Biases, norms, tokens and position tables do not decay: zero is no natural value for them.
    Build it last, when the parameters are on their device. Fused: one kernel for all of them.
    """
    if not options.lr > 0:
        raise UserError(f"--lr {options.lr}: the learning rate must be positive")
    decaying = {
        id(layer.weight) for layer in model.modules() if isinstance(layer, (nn.Linear, _ConvNd))
    }
    trainable = [p for p in model.parameters() if p.requires_grad]  # shared ones appear once
    if not trainable:
        raise ValueError("no parameter of the model trains")
    groups = [
        {
            "params": [p for p in trainable if id(p) in decaying],
            "weight_decay": options.weight_decay,
        },
        {"params": [p for p in trainable if id(p) not in decaying], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=options.lr, fused=True)


def build_schedule(optimizer: Optimizer, options: OptimOptions, total_steps: int) -> LambdaLR:
    """Learning rate per optimizer step: linear warm-up, then a cosine down to `--min_lr`.

    The first step after the warm-up has the full rate, the last of `total_steps` exactly the
    smallest one, whatever the size of the data. A run of one step takes it at the full rate.
    """
    warmup, floor = options.warmup_steps, options.min_lr / options.lr
    if not 0 <= floor <= 1:
        raise UserError(f"--min_lr {options.min_lr} must lie between 0 and --lr {options.lr}")
    if not 0 <= warmup < total_steps:
        raise UserError(
            f"--warmup_steps {warmup} must be less than the {total_steps} steps of the whole run"
        )

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)


def resolve_precision(precision: str, device: torch.device) -> str:
    """'fp32', 'bf16' or 'fp16'; 'auto' is bf16 where the GPU has it, else fp16, fp32 on a CPU."""
    if precision == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    return precision


def use_tf32(wanted: bool, device: torch.device) -> str:
    """Choose how a GPU multiplies float32: in TF32 (10 bits of mantissa) if wanted, else in full.

    Returns a line for the log, "" without the wish. Said in both directions, as torch by itself
    takes TF32 for convolutions. These two switches are the ones that all its versions understand
    together; a CPU's float32 stays what it is.
    """
    if device.type != "cuda":
        return "--tf32 has no effect on a CPU: float32 stays float32" if wanted else ""
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    torch.backends.cudnn.allow_tf32 = wanted
    return "float32 products and convolutions in TF32 (--tf32): 10 bits of mantissa" * wanted


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which the forward pass runs in this (resolved) precision."""
    return torch.autocast(device.type, NUMBERS[precision], enabled=precision != "fp32")
