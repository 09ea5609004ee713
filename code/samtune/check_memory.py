"""What can be said of a training's memory without a trial: all but the activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from samtune.adapters import ADAPTERS
from samtune.complexity import build_weightless, count_trainable
from samtune.config import CheckConfig, Size
from samtune.data.loading import worker_count
from samtune.models import MODEL_TYPES

_FLOAT, _AHEAD = 4, 2  # bytes; batches that a loader process prepares
_GRADIENT_AND_ADAMW = 3 * _FLOAT  # for each number that trains


def memory_guess(config: CheckConfig, frame: Size, sizes: Sequence[tuple[int, int]]) -> dict:
    """Bytes, by what takes them. sizes: (H, W) of the pictures. Raises UserError for a model that
    training would refuse.

    batch and loaders are missing where `--batch_size auto` leaves them open.
    """
    model = build_weightless(
        _as_trained(config), ADAPTERS[config.model.adapter].without_start(config.adapter),
        config.read.num_classes, config.prompts.prompt,
    )  # fmt: skip
    largest = max((height * width for height, width in sizes), default=0)
    guessed = {
        "weights": sum(p.numel() for p in model.parameters()) * _FLOAT,
        "gradients_and_optimizer": count_trainable(model) * _GRADIENT_AND_ADAMW,
        "largest_picture": 4 * largest,  # RGB and its mask, as a loader process holds them
    }
    size = config.loader.batch_size
    if size != "auto":
        target = largest if config.loss.loss_resolution == "original" else frame[0] * frame[1]
        guessed["batch"] = size * (3 * frame[0] * frame[1] + target)
        guessed["loaders"] = worker_count(config.loader.workers) * _AHEAD * guessed["batch"]
    return guessed


def in_words(guessed: dict) -> str:
    """The estimate as a sentence."""
    names = {
        "weights": "weights", "gradients_and_optimizer": "gradients and AdamW's state",
        "batch": "a batch", "loaders": "batches held ready",
        "largest_picture": "the largest picture",
    }  # fmt: skip
    parts = [
        f"{name} {guessed[key] / 2**20:,.1f} MiB" for key, name in names.items() if key in guessed
    ]
    return (
        f"memory per process, an estimate without activations: {', '.join(parts)}; `benchmark "
        "--probe` with these flags finds by trials what fits"
    )


def _as_trained(config: CheckConfig):
    """The model's options with what `--train auto` will mean, whether weights are there or not."""
    model = config.model
    pretrained = MODEL_TYPES[model.model_type].file if model.checkpoint == "auto" else True
    if model.train == "auto" and pretrained and model.checkpoint != "none":
        return replace(model, train="adapter")
    return model
