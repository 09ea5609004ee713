"""The adapters' own flags. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from samtune.config import option
from samtune.errors import UserError


@dataclass(frozen=True)
class DecoderOptions:
    """Adapter decoder (it has no options)"""


@dataclass(frozen=True)
class SamAdapterOptions:
    """Adapter sam_adapter"""

    variant: str = option(
        "parent",
        "'parent': before and after every block, as Kyyle2114's; 'official': before every block, "
        "as the paper's authors'",
        ("parent", "official"),
    )
    tune_out: int = option(192, "parent: channels of the features that all blocks share")
    hidden_dim: int = option(32, "parent: channels inside each block's adapter")
    embedding: str = option(
        "published",
        "official: how patches become features: 'published' mixes places as the published weights "
        "need it, 'straight' does not",
        ("published", "straight"),
    )

    def __post_init__(self):
        foreign = {"parent": ("embedding",), "official": ("tune_out", "hidden_dim")}[self.variant]
        for f in fields(self):
            if f.name in foreign and getattr(self, f.name) != f.default:
                raise UserError(f"--{f.name} means nothing with --variant {self.variant}")
        if min(self.tune_out, self.hidden_dim) < 1:
            raise UserError("--tune_out and --hidden_dim must be at least 1")


@dataclass(frozen=True)
class GsamOptions:
    """Adapter gsam"""

    resnet_depth: int = option(101, "depth of the CNN, a ResNet; published: 101", (18, 50, 101))
    cnn_weights: str = option(
        "none",
        "file with torchvision's ImageNet weights (IMAGENET1K_V1) of that ResNet, as published; "
        "'none': start it from random weights. Nothing is fetched",
    )
    freeze_peg: bool = option(
        False,
        "leave the encoder's position convolution at its random start, as published; also for "
        "published checkpoints",
    )
