"""Where an image encoder keeps what adapters take hold of: SAM's ViT and TinyViT read the same.

In both, a block has `attn` and `mlp`, and `attn` has the linear layers `qkv` and `proj`; any of
them can be replaced in place. What differs is said here.

|  | SAM's ViT | TinyViT |
|---|---|---|
| `attn.qkv` reads | (B, h, w, C) | (B', window, window, C) |
| its 3C outputs | q, k, v, each of all heads | all heads, each q, k, v |
| `mlp` reads | (B, h, w, C), normalised | (B, h w, C), normalises by itself |
| the width C | one for all blocks | grows from layer to layer |

B' counts windows. A `qkv` of SAM's ViT that looks around a token (`looks_around`) reads windows
too; any other reads a single zero, (1, 1, 1, C), beside the grid where windows reach over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samtune.errors import UserError
from samtune.models.block_lists import choose_blocks

if TYPE_CHECKING:
    from samtune.models.segmenter import PromptedSam


def attention_blocks(encoder: nn.Module) -> list[nn.Module]:
    """The blocks that attend, in order: all of a ViT's, all but the first layer's of a TinyViT."""
    return list(encoder.blocks)


def checkpoint_activations(encoder: nn.Module, which: str = "yes") -> None:
    """Let blocks that attend forget their activations and compute them again when needed.

    which: 'no', 'yes' (all), 'global' (those that attend to the whole grid) or a list as
    `choose_blocks` reads it. In place; names in the state dict do not change. Random numbers are
    drawn alike both times. Raises UserError for blocks that are not there.
    """
    blocks = attention_blocks(encoder)
    if which == "no":
        return
    if which == "global":
        chosen = [block for block in blocks if block.window_size == 0]
        if not chosen:
            raise UserError(
                "--activation_checkpointing global: no block of this --model_type attends to the "
                "whole grid; say yes, or which blocks"
            )
    elif which == "yes":
        chosen = blocks
    else:
        chosen = [blocks[i] for i in choose_blocks("activation_checkpointing", which, len(blocks))]
    for block in chosen:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def hold_frozen(model: PromptedSam, dtype: torch.dtype) -> None:
    """Keep the image encoder's frozen linear and convolution weights in autocast's number format.

    In place. No result changes: autocast would convert them before each use, and keep the copy for
    the backward pass. Only what the base checkpoint brings, for what is saved from here must not
    lose digits.
    """
    for prefix, layer in model.image_encoder.named_modules(prefix="image_encoder"):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            for name, parameter in layer.named_parameters(recurse=False):
                if not parameter.requires_grad and f"{prefix}.{name}" in model.base_keys:
                    parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True)
class QkvLayout:
    """How the 3C outputs of a fused `qkv` are ordered.

    head_major: by head, [q | k | v] within each; else q, k, v, each by head.
    """

    num_heads: int
    head_major: bool

    @classmethod
    def of(cls, attention: nn.Module) -> QkvLayout:
        """The layout of a block's `attn`."""
        return cls(attention.num_heads, attention.head_major)

    def join(self, parts: Sequence[Tensor], dim: int = -1) -> Tensor:
        """q, k and v, each C long along `dim` and ordered by head -> 3C long, as `qkv` puts out.

        With dim 0 it joins weights: three (C, C_in) -> (3C, C_in).
        """
        dim %= parts[0].ndim
        by_head = [part.unflatten(dim, (self.num_heads, -1)) for part in parts]
        return torch.stack(by_head, dim + self.head_major).flatten(dim, dim + 2)

    def split(self, qkv: Tensor, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
        """3C outputs along `dim` -> q, k and v of C each, ordered by head; undoes `join`."""
        dim %= qkv.ndim
        sizes = (self.num_heads, 3, -1) if self.head_major else (3, self.num_heads, -1)
        parts = qkv.unflatten(dim, sizes).unbind(dim + self.head_major)
        q, k, v = (part.flatten(dim, dim + 1) for part in parts)
        return q, k, v
