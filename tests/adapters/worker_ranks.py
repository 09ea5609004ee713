"""One step of every adapter on this rank's share of two images. Writes OUT/rank<r>.pt."""

import sys
from pathlib import Path

import torch
from test_contract import MODELS, ask
from tiny_models import TINY

from samtune.adapters import ADAPTERS, build_model
from samtune.config import ModelOptions
from samtune.engine import distributed
from samtune.models import MODEL_TYPES
from samtune.structures import Prompts


def step(process, model_type, name, options) -> dict[str, torch.Tensor]:
    """Gradients and buffers after a forward and a backward pass in training mode."""
    prompt = ADAPTERS[name].prompts[0]
    model_options = ModelOptions(model_type=model_type, adapter=name, train="adapter")
    model = build_model(model_options, options, prompt, None, seed=1)
    wrapped = distributed.wrap(model, process).train()
    image, prompts = ask(prompt)
    mine = slice(process.rank, None, process.world)
    boxes = None if prompts.boxes is None else prompts.boxes[mine]
    prediction = wrapped(image[mine], Prompts(boxes=boxes))
    # Not the mean square: it would hide a BatchNorm that sees its own rank's images alone.
    target = torch.linspace(-1, 1, 2 * 256).reshape(2, 1, 16, 16)[mine]
    (prediction.logits - target).square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return gradients | dict(model.named_buffers())


def run(process) -> dict[str, dict]:
    MODEL_TYPES.update(TINY)
    return {model.id: step(process, *model.values) for model in MODELS}


def main():
    process = distributed.start(timeout_minutes=1)
    torch.save(run(process), Path(sys.argv[1]) / f"rank{process.rank}.pt")
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main()
