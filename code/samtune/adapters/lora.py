"""LoRA: low-rank terms beside the frozen projections of the image encoder's attention.

Paper: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
samed: "Customized Segment Anything Model for Medical Image Segmentation", arXiv 2304.13785;
hitachinsk/SAMed e351840. Terms of the block's input on q and v; optionally likewise in the mask
decoder's transformer, which is then frozen otherwise.
gsam: usagisukisuki/G-SAM 31dfd1c, arXiv 2408.12406. One map per block and part, shared by all
heads, of q, k and v as projected.

Deviations: the no-mask vector stays frozen (SAMed forgets to freeze it); decoder heads that no loss
reads stay frozen; SAMed's terms take a scale alpha / rank and any of q, k, v, with its own choice
as the default.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samtune.adapters.layers import thaw_decoder
from samtune.adapters.options import LoraOptions
from samtune.adapters.projections import (
    OUTER_SCALE,
    PARTS,
    HeadwiseLowRank,
    HeadwiseQKV,
    HostedLinear,
    join_parts,
    split_parts,
)
from samtune.models.sam import Sam
from samtune.models.segmenter import PromptedSam


def build(sam: Sam, options: LoraOptions) -> PromptedSam:
    """Put low-rank terms into every block of a frozen Sam and thaw its mask decoder."""
    thaw_decoder(sam)
    for block in sam.image_encoder.blocks:
        block.attn.qkv = adapt_qkv(block.attn.qkv, block.attn.num_heads, options)
    if options.adapt_decoder:
        _adapt_transformer(sam.mask_decoder.transformer, options)
    return PromptedSam(sam)


def adapt_qkv(
    qkv: nn.Linear, num_heads: int, options: LoraOptions, head_major: bool = False
) -> LoRAQKV | HeadwiseLoRAQKV:
    """A fused projection C -> 3 C with low-rank terms.

    head_major: its channels are each head's q, k, v, as TinyViT's, instead of SAM's all of q, then
    k, then v.
    """
    if options.form == "gsam":
        return HeadwiseLoRAQKV(qkv, num_heads, head_major)
    targets = options.targets.split(",")
    return LoRAQKV(qkv, num_heads, options.rank, options.scale, targets, head_major)


def merge(model: PromptedSam) -> dict[str, Tensor]:
    """The state of a stock Sam whose output is the adapted model's; `model` stays as it is."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, (LoRAQKV, LoRALinear, HeadwiseLoRAQKV)):
            state = {key: t for key, t in state.items() if not key.startswith(f"{name}.")}
            state[f"{name}.weight"], state[f"{name}.bias"] = _in_float64(module)
    return state


@torch.no_grad()
def _in_float64(module: LoRAQKV | LoRALinear | HeadwiseLoRAQKV) -> tuple[Tensor, Tensor]:
    """Merged weight and bias, rounded once."""
    weight, bias = module.merged(module.weight.double(), module.bias.double())
    return weight.to(module.weight.dtype), bias.to(module.bias.dtype)


class LoRAQKV(HostedLinear):
    """q + (x Aq) Bq alpha / rank, and likewise the other targets; B is zero at the start.

    targets: some of "q", "k", "v". head_major: see `adapt_qkv`.
    """

    def __init__(
        self,
        stock: nn.Linear,
        num_heads: int,
        rank: int,
        scale: float,
        targets: list[str],
        head_major: bool,
    ):
        super().__init__(stock)
        self.num_heads, self.scale, self.head_major = num_heads, scale, head_major
        self.targets = [part for part in PARTS if part in targets]
        for part in self.targets:
            down, up = low_rank_pair(stock.in_features, rank, stock.out_features // 3)
            self.add_module(f"linear_a_{part}", down)
            self.add_module(f"linear_b_{part}", up)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3 C)."""
        down, up = self.low_rank()
        return super().forward(x) + F.linear(F.linear(x, down), up)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """The pairs of all n targets as one: (n rank, C) and (3 C, n rank), zero elsewhere.

        So the channels' order is dealt with in the small matrices, not in the tokens.
        """
        down = torch.cat([self.get_submodule(f"linear_a_{p}").weight for p in self.targets])
        ups = [self.get_submodule(f"linear_b_{p}").weight for p in self.targets]
        used = dict(zip(self.targets, torch.block_diag(*ups).chunk(len(ups)), strict=True))
        rows = [used.get(part, torch.zeros_like(used[self.targets[0]])) for part in PARTS]
        heads = [r.T.unflatten(-1, (self.num_heads, -1)) for r in rows]  # (n rank, heads, d) each
        return down, self.scale * join_parts(heads, self.head_major).T

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        down, up = self.low_rank()
        return weight + up.to(weight) @ down.to(weight), bias


class LoRALinear(HostedLinear):
    """x -> x W + b + (x A) B alpha / rank; B is zero at the start."""

    def __init__(self, stock: nn.Linear, rank: int, scale: float):
        super().__init__(stock)
        self.scale = scale
        self.linear_a, self.linear_b = low_rank_pair(stock.in_features, rank, stock.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        return super().forward(x) + self.scale * self.linear_b(self.linear_a(x))

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        product = self.linear_b.weight.to(weight) @ self.linear_a.weight.to(weight)
        return weight + self.scale * product, bias


class HeadwiseLoRAQKV(HeadwiseQKV):
    """G-SAM's LoRA: q' = q + q A B / (2 m), likewise k and v."""

    def __init__(self, stock: nn.Linear, num_heads: int, head_major: bool):
        super().__init__(stock, num_heads, head_major, HeadwiseLowRank)

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.cat([weight.T, bias[None]])  # (C + 1, 3 C): the map of inputs, then the bias
        parts = [
            part + OUTER_SCALE / term.width * part @ term.lora_A.to(part) @ term.lora_B.to(part)
            for part, term in zip(
                split_parts(rows, self.num_heads, self.head_major), self.terms, strict=True
            )
        ]
        rows = join_parts(parts, self.head_major)
        return rows[:-1].T.contiguous(), rows[-1]


def low_rank_pair(width: int, rank: int, out_width: int) -> tuple[nn.Linear, nn.Linear]:
    """A: width -> rank, uniform within 1 / sqrt(width); B: rank -> out_width, zero. No bias."""
    down, up = nn.Linear(width, rank, bias=False), nn.Linear(rank, out_width, bias=False)
    nn.init.zeros_(up.weight)
    return down, up


def _adapt_transformer(transformer: nn.Module, options: LoraOptions) -> None:
    """Freeze the decoder's transformer and give each of its attentions low-rank terms."""
    transformer.requires_grad_(False)
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        attentions += [
            layer.self_attn, layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        ]  # fmt: skip
    for attention in attentions:
        for part in options.targets.split(","):
            stock = attention.get_submodule(f"{part}_proj")
            adapted = LoRALinear(stock, options.rank, options.scale)
            attention.register_module(f"{part}_proj", adapted)
