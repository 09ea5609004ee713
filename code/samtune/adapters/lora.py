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

import copy

import torch
from torch import Tensor, nn

from samtune.adapters.layers import adapted_blocks, thaw_decoder
from samtune.adapters.options import LoraOptions
from samtune.adapters.projections import (
    PARTS,
    HeadwiseLowRank,
    HeadwiseQKV,
    HostedLinear,
)
from samtune.models.anatomy import QkvLayout, attention_blocks
from samtune.models.sam import Sam
from samtune.models.segmenter import PromptedSam


def build(sam: Sam, options: LoraOptions) -> PromptedSam:
    """Put low-rank terms into the chosen blocks of a frozen Sam and thaw its mask decoder."""
    thaw_decoder(sam)
    blocks = attention_blocks(sam.image_encoder)
    for block in (blocks[i] for i in adapted_blocks(sam.image_encoder, options.adapter_blocks)):
        block.attn.qkv = adapt_qkv(block.attn.qkv, QkvLayout.of(block.attn), options)
    if options.adapt_decoder:
        _adapt_transformer(sam.mask_decoder.transformer, options)
    return PromptedSam(sam)


def adapt_qkv(qkv: nn.Linear, layout: QkvLayout, options: LoraOptions) -> LoRAQKV | HeadwiseQKV:
    """A fused projection C -> 3 C with low-rank terms."""
    if options.form == "gsam":
        return HeadwiseQKV(qkv, layout, HeadwiseLowRank)
    return LoRAQKV(qkv, layout, options.rank, options.scale, options.targets.split(","))


def merge(model: PromptedSam) -> dict[str, Tensor]:
    """The state of a stock Sam whose output is the adapted model's; `model` stays as it is.

    Raises UserError if a stock Sam has no place for the mask decoder.
    """
    model.as_sam()
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, HostedLinear):
            state = {key: t for key, t in state.items() if not key.startswith(f"{name}.")}
            state[f"{name}.weight"], state[f"{name}.bias"] = _as_one_linear(module)
    return state


@torch.no_grad()
def _as_one_linear(module: HostedLinear) -> tuple[Tensor, Tensor]:
    """Weight and bias that do what the module does, rounded once.

    It is linear but for a constant, so its values at zero and at the unit vectors say all.
    """
    dtype = module.weight.dtype
    module = copy.deepcopy(module).double()
    unit = torch.eye(module.in_features, dtype=torch.float64, device=module.weight.device)
    bias = module(torch.zeros_like(unit[0]))
    weight = (module(unit) - bias).T.contiguous()
    return weight.to(dtype), bias.to(dtype)


class LoRAQKV(HostedLinear):
    """q + (x Aq) Bq alpha / rank, and likewise the other targets; B is zero at the start.

    targets: some of "q", "k", "v".
    """

    def __init__(
        self, stock: nn.Linear, layout: QkvLayout, rank: int, scale: float, targets: list[str]
    ):
        super().__init__(stock)
        self.layout, self.scale = layout, scale
        self.targets = [part for part in PARTS if part in targets]
        for part in self.targets:
            down, up = low_rank_pair(stock.in_features, rank, stock.out_features // 3)
            self.add_module(f"linear_a_{part}", down)
            self.add_module(f"linear_b_{part}", up)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3 C)."""
        terms = {part: self._term(part, x) for part in self.targets}
        nothing = torch.zeros_like(terms[self.targets[0]])
        terms = self.layout.join([terms.get(part, nothing) for part in PARTS])
        return super().forward(x) + self.scale * terms

    def _term(self, part: str, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        down, up = (self.get_submodule(f"linear_{factor}_{part}") for factor in "ab")
        return up(down(x))


class LoRALinear(HostedLinear):
    """x -> x W + b + (x A) B alpha / rank; B is zero at the start."""

    def __init__(self, stock: nn.Linear, rank: int, scale: float):
        super().__init__(stock)
        self.scale = scale
        self.linear_a, self.linear_b = low_rank_pair(stock.in_features, rank, stock.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        return super().forward(x) + self.scale * self.linear_b(self.linear_a(x))


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
