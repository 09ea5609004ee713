"""Conv-LoRA: low-rank terms with convolutions at several scales inside the bottleneck.

Paper: "Convolution Meets LoRA: Parameter Efficient Finetuning for Segment Anything Model",
arXiv 2401.17868.
original: autogluon/autogluon f34ebb4f6. Each window (each image, where attention is global) goes
through the one convolution that a noisy gate chooses for it; a loss keeps their use balanced.
gsam: usagisukisuki/G-SAM 31dfd1c, arXiv 2408.12406. Per head, all convolutions, mixed per pixel.

Deviations: the published code passes the chosen convolution's output through exp and log, which is
the identity for one choice but may overflow; decoder heads that no loss reads stay frozen; only the
best expert is chosen (the published setting). Both forms compute what the published code computes
without making the maps that it resizes: see `scaled_convolution` and `_fold`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samtune.adapters.layers import adapted_blocks, thaw_decoder
from samtune.adapters.options import ConvLoraOptions
from samtune.adapters.projections import HeadwiseLowRank, HeadwiseQKV, HostedLinear
from samtune.models.anatomy import QkvLayout, attention_blocks
from samtune.models.sam import Sam
from samtune.models.segmenter import NO_PROMPT, PromptedSam
from samtune.structures import Prediction, Prompts

_LEAST_NOISE = 0.01  # standard deviation of the gate's noise, beside the learned part
_BALANCE_WEIGHT = 0.01
_CUBIC = -0.75  # the free parameter of bicubic interpolation, as in torch


def build(sam: Sam, options: ConvLoraOptions) -> PromptedSam:
    """Put terms into the chosen blocks of a frozen Sam and thaw its mask decoder."""
    thaw_decoder(sam)
    blocks = attention_blocks(sam.image_encoder)
    for block in (blocks[i] for i in adapted_blocks(sam.image_encoder, options.adapter_blocks)):
        block.attn.qkv = adapt_qkv(block.attn.qkv, QkvLayout.of(block.attn), options)
    return ConvLoRASam(sam) if options.form == "original" else PromptedSam(sam)


def adapt_qkv(
    qkv: nn.Linear, layout: QkvLayout, options: ConvLoraOptions
) -> ConvLoRAQKV | HeadwiseQKV:
    """A fused projection C -> 3 C with convolutional low-rank terms.

    The original form has one term for all 3 C channels, whose order means nothing to it.
    """
    if options.form == "gsam":
        return HeadwiseQKV(qkv, layout, HeadwiseConvLoRA)
    return ConvLoRAQKV(qkv, options.rank, options.alpha / options.rank, options.experts)


class ConvLoRASam(PromptedSam):
    """Reports in training how unevenly the convolutions are used, as the loss term `balance`."""

    def forward(
        self, image: Tensor, prompts: Prompts = NO_PROMPT, valid_size: Tensor | None = None
    ) -> Prediction:
        prediction = super().forward(image, prompts, valid_size)
        layers = [m for m in self.modules() if isinstance(m, ConvLoRAQKV) and m.training]
        if not layers:
            return prediction
        return prediction._replace(aux={"balance": sum(layer.take_balance() for layer in layers)})


class ConvLoRAQKV(HostedLinear):
    """x W + b + scale (z + expert(z)) B with z = x A: the original form, zero at the start."""

    def __init__(self, stock: nn.Linear, rank: int, scale: float, experts: int):
        super().__init__(stock)
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(rank, stock.in_features))
        self.lora_B = nn.Parameter(torch.zeros(stock.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self.lora_moe_gating = NoisyGate(rank, experts)
        self.lora_moe_experts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(rank, rank, 3, padding=1), nn.GELU()) for _ in range(experts)
        )
        for expert in self.lora_moe_experts:
            nn.init.zeros_(expert[0].bias)
        self._balance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B', h, w, C) -> the same with 3 C."""
        z = F.linear(x, self.lora_A)
        # Its few channels cost nothing in full precision; half would blur the interpolation.
        with torch.autocast(x.device.type, enabled=False):
            mixed = self._mix(z.float() if z.dtype.itemsize < 4 else z)
        term = F.linear(mixed.to(z.dtype), self.lora_B)
        return super().forward(x) + self.scale * term

    def take_balance(self) -> Tensor:
        """The balancing loss of the latest forward in training; forgotten here, with its graph."""
        balance, self._balance = self._balance, None
        return balance

    def _mix(self, z: Tensor) -> Tensor:
        """(B', h, w, r) -> z + expert(z), likewise."""
        gate = self.lora_moe_gating
        noise = z.new_empty(len(z), gate.experts).normal_() if self.training else None
        chosen, balance = gate(z.mean((1, 2)), noise)
        if self.training:
            self._balance = balance
        convolutions = [expert[0] for expert in self.lora_moe_experts]
        # An expert that nobody chose gets a zero gradient this way, not none.
        weight = torch.stack([c.weight for c in convolutions])[chosen]  # (B', r, r, 3, 3)
        bias = torch.stack([c.bias for c in convolutions])[chosen]  # (B', r)
        return z + scaled_convolution(z, weight, bias, chosen + 1)


class NoisyGate(nn.Module):
    """Chooses one expert per window by the mean of its features, and says how fair that was."""

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.experts = experts
        self.w_gate = nn.Parameter(torch.zeros(width, experts))
        self.w_noise = nn.Parameter(torch.zeros(width, experts))

    def forward(self, features: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B', r) -> the chosen expert (B',) int64 and the balancing loss, a scalar.

        noise: (B', experts) standard normal in training, None in evaluation.
        """
        clean = features @ self.w_gate  # (B', experts)
        if noise is None:
            chosen = clean.argmax(1)
            importance = load = self._counts(chosen)
        else:
            spread = F.softplus(features @ self.w_noise) + _LEAST_NOISE
            noisy = clean + noise * spread
            best, second = noisy.topk(2).values.split(1, dim=1)  # (B', 1) each
            chosen = noisy.argmax(1)
            importance = self._counts(chosen)
            # How probable it was, before the noise of this expert was drawn, to be the best one.
            rival = torch.where(noisy > second, second, best)
            load = torch.special.ndtr((clean - rival) / spread).sum(0)
        return chosen, _BALANCE_WEIGHT * (_unevenness(importance) + _unevenness(load))

    def _counts(self, chosen: Tensor) -> Tensor:
        """(experts,) how many windows go to each."""
        experts = torch.arange(self.experts, device=chosen.device)
        return (chosen[:, None] == experts).to(self.w_gate.dtype).sum(0)


def _unevenness(v: Tensor) -> Tensor:
    """The squared coefficient of variation."""
    return v.var() / (v.mean().square() + 1e-10)


def scaled_convolution(z: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """Enlarge each map by its own scale, convolve, GELU, and bring it back: (B', h, w, r).

    weight: (B', r, r, 3, 3), bias: (B', r), scale: (B',) whole numbers >= 1. Both resizings are
    bicubic without aligned corners.

    Bringing back by s reads only the 4 x 4 enlarged pixels around each cell, of s x s. These alone
    are made, for every scale in the same shapes: so no window has to be sorted by its expert, the
    host waits for nothing, and scale 8 costs what scale 2 does. Enlarging is linear and separable,
    a small matrix per axis and neighbour, hence deterministic too; torch's is not on a GPU.
    Measured on two CPU cores with r = 3, forward and backward, against a pass per expert over its
    own windows (for which the host must wait): 25 windows of 14 x 14 spread over 8 experts take
    15 ms instead of 50, one map of 64 x 64 at scale 8 takes 20 ms instead of 100; the other way is
    faster only where nearly all choose scale 1. Every expert on every window takes far longer.
    """
    batch, height, width, channels = z.shape
    down, across = (enlargement(scale, n, z.dtype) for n in (height, width))  # (B', 3, 4 n, n)
    x = down.flatten(1, 2) @ z.flatten(2)  # rows: (B', 3 4h, w r)
    x = x.reshape(batch, 3, 4 * height, width, channels)
    # One product per neighbouring column j: o[j] = sum over row neighbours i and channels c.
    x = torch.einsum("bocij,biywc->bjyow", weight, x)
    x = torch.einsum("bjyow,bjxw->byxo", x, across) + bias[:, None, None]  # (B', 4h, 4w, r)
    x = F.gelu(x).unflatten(2, (width, 4)).unflatten(1, (height, 4))  # (B', h, 4, w, 4, r)
    taps = _cubic_taps(scale, z.dtype)  # (B', 4)
    return torch.einsum("byixjo,bi,bj->byxo", x, taps, taps)


def enlargement(scale: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(B', 3, 4 length, length): bicubic enlarging along one axis, where it is needed.

    Entry [b, i, 4 y + k]: the weights with which cells make the i-th neighbour (before, itself,
    after) of the k-th enlarged pixel around cell y; zero for a neighbour outside, as the padding.
    """
    scale = scale[:, None, None, None]
    neighbour = torch.arange(-1, 2, device=scale.device)[:, None, None]
    offset = torch.arange(4 * length, device=scale.device)[:, None]
    pixel = scale * (offset // 4) + (scale - 1) // 2 - 1 + offset % 4
    pixel = pixel.clamp(min=0).minimum(scale * length - 1) + neighbour  # (B', 3, 4 length, 1)
    inside = (pixel >= 0) & (pixel < scale * length)
    centre = (pixel.to(dtype) + 0.5) / scale - 0.5  # in cells
    cell = torch.arange(-2, length + 2, device=scale.device)
    weight = _cubic((centre - cell).abs()) * inside  # (B', 3, 4 length, 2 + length + 2)
    before, within, after = weight.split([2, length, 2], dim=-1)
    within[..., 0] += before.sum(-1)  # what lies beyond the border is read at the border
    within[..., -1] += after.sum(-1)
    return within


def _cubic_taps(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(B', 4): the weights of the four enlarged pixels around a cell in bringing it back."""
    fraction = 0.5 * (scale % 2 == 0).to(dtype)[:, None]  # its centre lies on one or between two
    return _cubic((torch.arange(-1, 3, device=scale.device) - fraction).abs())


def _cubic(d: Tensor) -> Tensor:
    """The weight of a pixel at distance d >= 0 in cubic convolution."""
    near = ((_CUBIC + 2) * d - (_CUBIC + 3)) * d * d + 1
    far = ((_CUBIC * d - 5 * _CUBIC) * d + 8 * _CUBIC) * d - 4 * _CUBIC
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


class HeadwiseConvLoRA(HeadwiseLowRank):
    """G-SAM's term: four convolutions between A and B, mixed per pixel by a fifth one.

    They enlarge to 1, 2, 3 and 4 times the size, nearest, convolve and bring back, nearest.
    """

    def __init__(self, head_dim: int):
        super().__init__(head_dim)
        convolution = partial(nn.Conv2d, self.width, kernel_size=3, padding=1)
        for name in ("expert1", "expert2", "expert3", "expert4"):
            self.add_module(name, nn.ModuleDict({"conv": convolution(self.width)}))
        self.gate = nn.ModuleDict({"conv": convolution(4)})

    def bottleneck(self, x: Tensor) -> Tensor:
        """(B', h, w, heads, m) -> the same shape."""
        z = x.permute(0, 3, 4, 1, 2).flatten(0, 1)  # (B' heads, m, h, w)
        y = self._mix(z).unflatten(0, (len(x), -1))
        return y.permute(0, 3, 4, 1, 2)

    def _mix(self, z: Tensor) -> Tensor:
        """(N, m, h, w) -> the experts' outputs, mixed."""
        first, *others = (getattr(self, f"expert{i}")["conv"] for i in range(1, 5))
        gate = self.gate["conv"]
        weight, bias = torch.cat([first.weight, gate.weight]), torch.cat([first.bias, gate.bias])
        first_output, gates = F.conv2d(z, weight, bias, padding=1).split([self.width, 4], dim=1)
        weight = _fold(torch.cat([expert.weight for expert in others]))
        bias = torch.cat([expert.bias for expert in others])
        rest = F.conv2d(F.pad(z, (1, 0, 1, 0)), weight, bias)  # (N, 3 m, h, w)
        outputs = torch.cat([first_output, rest], dim=1).unflatten(1, (4, -1))  # (N, 4, m, h, w)
        return (gates.relu().softmax(1)[:, :, None] * outputs).sum(1)


def _fold(weight: Tensor) -> Tensor:
    """(O, I, 3, 3) -> (O, I, 2, 2): the same convolution, its enlarged map never made.

    After enlarging by s >= 2 the pixel that is read back, the first of its cell, has its own cell
    after it and another one before it, along each axis. So the last two columns (rows) of the
    kernel read the same cell, whatever s is: G-SAM's scales 2, 3 and 4 are one kind of function.
    """
    weight = torch.stack([weight[..., 0], weight[..., 1] + weight[..., 2]], dim=-1)
    return torch.stack([weight[..., 0, :], weight[..., 1, :] + weight[..., 2, :]], dim=-2)
