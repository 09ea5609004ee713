"""How large an adapted model is and what a forward pass costs, without weights or arithmetic."""

from __future__ import annotations

import importlib
from contextlib import nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from samtune.adapters import ADAPTERS, build_model
from samtune.config import ModelOptions
from samtune.models import MODEL_TYPES
from samtune.models.segmenter import PromptedSam
from samtune.structures import Prompts


def build_weightless(options: ModelOptions, adapter_options, num_classes: int = 1) -> PromptedSam:
    """The model that `build_model` makes without prompt and base weights, holding no numbers.

    `options.train` says what trains; 'auto' means 'all' here, as there are no base weights.
    Raises UserError for a combination that the adapter refuses.
    """
    row = ADAPTERS[options.adapter]
    row.check(options, "none", num_classes)
    importlib.import_module(row.module)  # torchvision computes while it is imported
    # timm reads numbers off tensors while it builds a TinyViT, which is small.
    vit = MODEL_TYPES[options.model_type].backbone == "vit"
    with torch.device("meta") if vit else nullcontext():
        return build_model(options, adapter_options, "none", None, 0, num_classes)


def count_trainable(model: nn.Module) -> int:
    """Numbers that training may change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_macs(model: PromptedSam, frame: tuple[int, int], prompt: str = "none") -> int:
    """Multiply-accumulates of one forward pass of one image: half of torch's count of operations.

    model: on any device, also "meta"; it is left as it is. frame: height and width of the image,
    pixels. prompt: 'none' or 'box' (one box).

    Counted where they reach a kernel, whichever module or plain function they come from: all matrix
    products, convolutions (transposed ones by their input) and both products of every attention,
    among them those of relative positions, of padding tokens and of low-rank terms. Not counted:
    what is done element by element (norms, activations, softmax, sums, positions of prompts),
    resizing by torch, Fourier transforms, averages. What the code here writes as a product counts
    as one: GSAM's pooling, Conv-LoRA's resizing. What it leaves out does not: hyper-networks of
    masks that nobody reads, G-SAM's enlarged maps (see `conv_lora`).
    """
    boxes = {"none": None, "box": (1, 4)}[prompt]
    with FakeTensorMode(), torch.no_grad():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        state = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors}
        image = torch.empty(1, 3, *frame, dtype=torch.uint8)
        prompts = Prompts(boxes=None if boxes is None else torch.empty(boxes))
        # A fused attention is one kernel, for which torch has no formula on every device.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            functional_call(model, state, (image, prompts))
    return counter.get_total_flops() // 2
