"""How large an adapted model is and what a forward pass costs, without weights or arithmetic."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from samtune.adapters import ADAPTERS, build_model
from samtune.config import ModelOptions
from samtune.engine.trainer import Criterion
from samtune.models import MODEL_TYPES
from samtune.models.segmenter import PromptedSam
from samtune.structures import Batch, Prompts


class Work(NamedTuple):
    """Products of a batch. macs: multiply-accumulates of its forward pass. flops: operations (two
    per multiply-accumulate) of forward and backward pass together.
    """

    macs: int
    flops: int


def build_weightless(
    options: ModelOptions, adapter_options, num_classes: int = 1, prompt: str = "none"
) -> PromptedSam:
    """The model that `build_model` makes without base weights, holding no numbers.

    `options.train` says what trains; 'auto' means 'all' here, as there are no base weights.
    Raises UserError for a combination that the adapter refuses.
    """
    row = ADAPTERS[options.adapter]
    row.check(options, prompt, num_classes)
    importlib.import_module(row.module)  # torchvision computes while it is imported
    # timm reads numbers off tensors while it builds a TinyViT, which is small.
    vit = MODEL_TYPES[options.model_type].backbone == "vit"
    with torch.device("meta") if vit else nullcontext():
        return build_model(options, adapter_options, prompt, None, 0, num_classes)


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
    with FakeTensorMode(), torch.no_grad(), _counting() as counter:
        image = torch.empty(1, 3, *frame, dtype=torch.uint8)
        prompts = Prompts(boxes=None if boxes is None else torch.empty(boxes))
        functional_call(model, _state_without_numbers(model), (image, prompts))
    return counter.get_total_flops() // 2


def count_step(model: PromptedSam, batch: Batch, criterion: Criterion | None) -> Work:
    """What one micro-batch costs, counted as `count_macs` counts: no batch is ever computed.

    model: in the mode in which it will run, without checkpointed blocks: what they compute twice is
    no work that the step asks for. criterion: as `Trainer` takes it; None: there is no backward
    pass. That one costs what reaching the trainable tensors takes, so less with a frozen start.
    """
    with (
        torch.set_grad_enabled(criterion is not None),
        FakeTensorMode(allow_non_fake_inputs=True),  # a loss may hold weights of classes
        _counting() as counter,
    ):
        batch = batch.map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        inputs = batch.image, batch.prompts, batch.frames.valid_size
        prediction = functional_call(model, _state_without_numbers(model), inputs)
        forward = counter.get_total_flops()
        if criterion:
            total, _ = criterion(prediction, batch)
            sum((prediction.aux or {}).values(), total.sum()).backward()
    return Work(forward // 2, counter.get_total_flops())


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    # A fused attention is one kernel, for which torch has no formula on every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        yield counter


def _state_without_numbers(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as the modes around make them; what trains may have a gradient."""
    grad = torch.is_grad_enabled()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: torch.empty(t.shape, dtype=t.dtype, requires_grad=grad and t.requires_grad)
        for name, t in tensors
    }
