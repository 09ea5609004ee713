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
class LoraOptions:
    """Adapter lora"""

    form: str = option(
        "samed",
        "'samed': low-rank terms of a block's input on its q and v, as SAMed's; 'gsam': one map, "
        "the same for all heads, of each head's projected q, k and v, as G-SAM's",
        ("samed", "gsam"),
    )
    rank: int = option(4, "samed: channels between the two factors of a term")
    alpha: float = option(0.0, "samed: terms are scaled by alpha / rank; 0: by 1")
    targets: str = option("q,v", "samed: which of q,k,v have a term, with commas between")
    adapt_decoder: bool = option(
        False, "samed: the mask decoder's transformer stays frozen and has such terms too"
    )

    def __post_init__(self):
        if self.form == "gsam":
            _refuse(self, ("rank", "alpha", "targets", "adapt_decoder"), "--form gsam")
        if self.rank < 1 or self.alpha < 0:
            raise UserError("--rank must be at least 1 and --alpha at least 0")
        targets = self.targets.split(",")
        if not set(targets) <= {"q", "k", "v"} or len(set(targets)) < len(targets):
            raise UserError(f"--targets {self.targets}: expected some of q,k,v, each once")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.alpha else 1.0


@dataclass(frozen=True)
class ConvLoraOptions:
    """Adapter conv_lora"""

    form: str = option(
        "original",
        "'original': a low-rank term of a block's input with one of several convolutions inside, "
        "as the paper's authors'; 'gsam': on each head's projected q, k and v, as G-SAM's",
        ("original", "gsam"),
    )
    rank: int = option(3, "original: channels between the two factors of a term")
    alpha: float = option(32.0, "original: terms are scaled by alpha / rank")
    experts: int = option(8, "original: convolutions to choose from, at scales 1, 2, 3, ...")

    def __post_init__(self):
        if self.form == "gsam":
            _refuse(self, ("rank", "alpha", "experts"), "--form gsam")
        if self.rank < 1 or self.alpha <= 0:
            raise UserError("--rank must be at least 1 and --alpha above 0")
        if self.experts < 2:
            raise UserError("--experts must be at least 2: with one there is nothing to choose")


def _refuse(options, names: tuple[str, ...], reason: str) -> None:
    """Raise UserError if any of the named options was given."""
    for f in fields(options):
        if f.name in names and getattr(options, f.name) != f.default:
            raise UserError(f"--{f.name} means nothing with {reason}")
