"""What training cannot change of an image encoder: its stages before the first one that trains.

Found by construction: an encoder is a chain of stages, and the chain is frozen up to the first
stage that holds a parameter that trains. `PromptedSam.train` keeps what holds none in eval mode, so
that such a stage draws no random number and moves no statistics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from samtune.errors import UserError


class Stage(NamedTuple):
    """A link of the chain. parts: every module and parameter that `run` reads."""

    parts: tuple[nn.Module | nn.Parameter, ...]
    run: Callable[[Tensor], Tensor]

    @property
    def rests(self) -> bool:
        """Whether training cannot change what it computes. What holds no parameter may be in
        training mode (a dropout), so it does not count as frozen."""
        parameters = list(self.parameters())
        return bool(parameters) and not any(p.requires_grad for p in parameters)

    def parameters(self) -> Iterator[nn.Parameter]:
        for part in self.parts:
            yield from part.parameters() if isinstance(part, nn.Module) else (part,)


def stages_of(encoder: nn.Module, beside: Any = None) -> list[Stage]:
    """The chain whose first stage reads the normalised image and whose last gives the features.

    An encoder of our own says it by a method `stages`; one without it, whose parts are no chain,
    has none. One whose later stages read the image themselves has a method `beside(image)`, too;
    what that returned goes to `stages`. Without it those stages can be looked at, not run.
    """
    if type(encoder) is ImageEncoderViT:
        return _stages_of_vit(encoder)
    if reads_image(encoder):
        return encoder.stages(beside)
    return encoder.stages() if hasattr(encoder, "stages") else []


def reads_image(encoder: nn.Module) -> bool:
    """Whether stages after the first one read the image, too."""
    return hasattr(encoder, "beside")


def _stages_of_vit(encoder: ImageEncoderViT) -> list[Stage]:
    patches, positions, neck = encoder.patch_embed, encoder.pos_embed, encoder.neck
    return [
        Stage((patches, positions), lambda image: patches(image) + positions),  # (B, h, w, C)
        *(Stage((block,), block) for block in encoder.blocks),
        Stage((neck,), lambda x: neck(x.permute(0, 3, 1, 2))),  # (B, C', h, w)
    ]


def frozen_stages(encoder: nn.Module) -> int:
    """How many stages at the beginning of the chain are frozen."""
    return sum(1 for _ in takewhile(lambda stage: stage.rests, stages_of(encoder)))


def run_frozen(encoder: nn.Module, image: Tensor) -> Tensor:
    """(B, 3, H, W) normalised -> what the first stage that trains reads, or the features where none
    does. Raises UserError where the first stage trains already.
    """
    depth = frozen_stages(encoder)
    if not depth:
        raise UserError("nothing at the beginning of this image encoder is frozen")
    return _chain(stages_of(encoder)[:depth], image)


def run_rest(encoder: nn.Module, frozen: Tensor, image: Callable[[], Tensor]) -> Tensor:
    """What `run_frozen` returned -> (B, C', h, w) features. image: makes the normalised image,
    where that is read once more.
    """
    depth = frozen_stages(encoder)
    beside = encoder.beside(image()) if reads_image(encoder) else None
    return _chain(stages_of(encoder, beside)[depth:], frozen)


def _chain(stages: list[Stage], x: Tensor) -> Tensor:
    for stage in stages:
        x = stage.run(x)
    return x


def fingerprint(encoder: nn.Module) -> str:
    """The SHA-256 of the frozen stages: numbers, modules and their plain attributes (a window's
    size, a count of heads). Equal for equal stages, whatever comes after them.
    """
    digest = hashlib.sha256()
    for number, stage in enumerate(stages_of(encoder)[: frozen_stages(encoder)]):
        for part in stage.parts:
            digest.update(f"stage {number}: {type(part).__qualname__}".encode())
            if isinstance(part, nn.Module):
                digest.update("".join(_structure(part)).encode())
            tensors = part.state_dict() if isinstance(part, nn.Module) else {"": part.data}
            for name, tensor in tensors.items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(_bytes(tensor))
    return digest.hexdigest()


def _structure(module: nn.Module) -> Iterator[str]:
    for name, part in module.named_modules():
        plain = {
            key: value
            for key, value in vars(part).items()
            if isinstance(value, (bool, int, float, str, tuple))
            and not key.startswith("_")
            and key != "training"
        }
        yield f"{name} {type(part).__qualname__} {sorted(plain.items())};"


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())
