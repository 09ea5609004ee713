"""The adapters' own flags. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from samtune.adapters.block_lists import check_blocks
from samtune.config import option
from samtune.errors import UserError


def _which_blocks():
    """The field of the adapters that can leave blocks of the image encoder as they are."""
    return option(
        "all",
        "blocks of the image encoder that get the adapter: '8-11', '0,2,5-7', counted from 0 among "
        "those that attend; what comes before the first of them needs no backward pass: less time "
        "and memory",
    )


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
    adapter_blocks: str = _which_blocks()

    def __post_init__(self):
        check_blocks("adapter_blocks", self.adapter_blocks, ("all",))
        foreign = {"parent": ("embedding",), "official": ("tune_out", "hidden_dim")}[self.variant]
        for f in fields(self):
            if f.name in foreign and getattr(self, f.name) != f.default:
                raise UserError(f"--{f.name} means nothing with --variant {self.variant}")
        if min(self.tune_out, self.hidden_dim) < 1:
            raise UserError("--tune_out and --hidden_dim must be at least 1")


@dataclass(frozen=True)
class AdaptFormerOptions:
    """Adapter adaptformer"""

    form: str = option(
        "original",
        "'original': reads what enters the MLP's norm, and changes nothing at first; 'gsam': reads "
        "what the norm returns; 'spatial': as gsam, and looks around each token (SM-AdaptFormer)",
        ("original", "gsam", "spatial"),
    )
    bottleneck: int = option(
        0, "channels inside each adapter; 0: 64 (original) or a quarter of the encoder's"
    )
    scale: float = option(
        0.0, "weight of the adapter beside the MLP; 0: 0.1 (original) or 0.5, as published"
    )
    learn_scale: bool = option(False, "original: let each block's weight train, from --scale")
    dropout: float = option(0.1, "original: share of its channels that training drops")
    dilations: str = option(
        "12,24,36", "spatial: distances, in tokens, at which it looks around beside the next token"
    )
    adapter_blocks: str = _which_blocks()

    def __post_init__(self):
        check_blocks("adapter_blocks", self.adapter_blocks, ("all",))
        only = {"learn_scale": "original", "dropout": "original", "dilations": "spatial"}
        for f in fields(self):
            if only.get(f.name, self.form) != self.form and getattr(self, f.name) != f.default:
                raise UserError(f"--{f.name} means nothing with --form {self.form}")
        if self.bottleneck < 0:
            raise UserError(f"--bottleneck {self.bottleneck}: it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout {self.dropout}: it must be at least 0 and below 1")
        if not all(d.strip().isdigit() and int(d) for d in self.dilations.split(",")):
            raise UserError(
                f"--dilations {self.dilations}: write whole numbers above 0, like 12,24,36"
            )


@dataclass(frozen=True)
class SamusOptions:
    """Adapter samus"""

    cnn_width: int = option(
        64, "channels of the convolution branch at full size; each halving of the size doubles them"
    )
    freeze_decoder: bool = option(
        False, "leave the mask decoder as it is, as published (with --train adapter)"
    )

    def __post_init__(self):
        if self.cnn_width < 1:
            raise UserError(f"--cnn_width {self.cnn_width}: it must be at least 1")


@dataclass(frozen=True)
class TsSamOptions:
    """Adapter ts_sam"""

    use_fft: bool = option(
        False, "feed the image's high frequencies to the side stream, as published for shadows"
    )
    csa_blocks: str = option(
        "auto",
        "blocks whose output the side stream reads and changes: '0,2,5-7' or 'none'; 'auto': all, "
        "as published",
    )
    mrm_blocks: str = option(
        "auto",
        "blocks whose output is refined at finer scales, likewise; 'auto': the last 12, as "
        "published for vit_b and vit_h",
    )
    scale_factor: int = option(
        0,
        "the encoder's width over the side stream's; 0: such that the side stream has the width of "
        "SAM's features (3, 4, 5 for vit_b, vit_l, vit_h)",
    )
    embedding: str = option(
        "published",
        "how patches enter the side stream: 'published' mixes places as the published weights need "
        "it, 'straight' does not",
        ("published", "straight"),
    )

    def __post_init__(self):
        for name in ("csa_blocks", "mrm_blocks"):
            check_blocks(name, getattr(self, name), ("auto", "none"))
        if self.scale_factor < 0:
            raise UserError("--scale_factor must be at least 1, or 0")


@dataclass(frozen=True)
class GsamOptions:
    """Adapter gsam"""

    resnet_depth: int = option(101, "depth of the CNN, a ResNet; published: 101", (18, 50, 101))
    cnn_weights: str = option(
        "auto",
        "file with torchvision's ImageNet weights (IMAGENET1K_V1) of that ResNet, as published; "
        "'auto': the one in checkpoints/, which --download fetches, or random weights where it is "
        "not there (the log says which); 'none': random weights",
    )
    freeze_peg: bool = option(
        False,
        "leave the encoder's position convolution at its random start, as published; also for "
        "published checkpoints",
    )


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
    adapter_blocks: str = _which_blocks()

    def __post_init__(self):
        check_blocks("adapter_blocks", self.adapter_blocks, ("all",))
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
    adapter_blocks: str = _which_blocks()

    def __post_init__(self):
        check_blocks("adapter_blocks", self.adapter_blocks, ("all",))
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
