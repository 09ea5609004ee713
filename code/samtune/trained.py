"""A trained run as a model again: what `best.safetensors` says, built and loaded."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from samtune import __version__, flags
from samtune.adapters import ADAPTERS, build_model, build_untuned
from samtune.config import (
    ModelOptions,
    PromptOptions,
    ReadOptions,
    Size,
    TestDataOptions,
    TrainDataOptions,
)
from samtune.data.codings import coding_of
from samtune.engine.checkpoint import load_adapted, read_metadata
from samtune.errors import UserError
from samtune.models import MODEL_TYPES
from samtune.models.segmenter import PromptedSam
from samtune.models.weights import find_checkpoint
from samtune.tensor_files import file_sha256


def load_trained(path: str | Path, checkpoint: str = "") -> PromptedSam:
    """Build the model of a run and load what was trained, on the CPU, in eval mode.

    path: `best.safetensors` or its folder. checkpoint: SAM's own weights, if they are not where
    they were in training. `as_sam()` of the result is a stock SAM for `SamPredictor`.
    Raises UserError if a file is missing, or was made for other base weights.
    """
    path = trained_file(path)
    metadata = read_description(path)
    options = options_of(metadata, ModelOptions)
    adapter = ADAPTERS[options.adapter]
    base = base_file(metadata, checkpoint)
    model = build_model(
        options,
        adapter.without_start(options_of(metadata, adapter.options)),
        metadata["config"]["prompt"],
        base,
        metadata["config"]["seed"],
        options_of(metadata, ReadOptions).num_classes,
    )
    model.base_keys = model.base_keys - set(metadata.get("more_keys", ()))
    load_adapted(model, path, adapter.renames)
    return model.eval()


def load_untuned(path: str | Path, checkpoint: str = "") -> PromptedSam | None:
    """The same SAM as `load_trained`, before any training.

    None where the run's frame is none for SAM itself, whose patches must fill it.
    """
    metadata = read_description(trained_file(path))
    patch = MODEL_TYPES[metadata["model_type"]].patch_size
    if any(side % patch for side in Size.read(metadata["image_size"])):
        return None
    config = metadata["config"]
    return build_untuned(
        options_of(metadata, ModelOptions),
        base_file(metadata, checkpoint),
        config["seed"],
        options_of(metadata, ReadOptions).num_classes,
        config["prompt"],
    )


def describe(model: PromptedSam, base: Path | None, config: dict) -> dict:
    """What a file of trained weights says about its model; `config` is every option by name."""
    return {
        "samtune": __version__,
        "adapter": config["adapter"],
        "model_type": config["model_type"],
        "image_size": model.image_size.plain,
        "base_file": base.name if base else "",
        "base_sha256": file_sha256(base) if base else "",
        "pixel_mean": model.pixel_mean.flatten().tolist(),
        "pixel_std": model.pixel_std.flatten().tolist(),
        "config": config,
    }


def trained_file(path: str | Path) -> Path:
    """`best.safetensors` for a run's folder; the file itself otherwise."""
    path = Path(path)
    path = path / "best.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"--run_dir {path}: no such file")
    return path


def read_description(path: str | Path) -> dict:
    """What `describe` said in this file, its options checked as flags are.

    Raises UserError where the file says something else.
    """
    metadata = read_metadata(path)
    config, words = metadata.get("config"), ("adapter", "model_type", "base_file", "base_sha256")
    if (
        not isinstance(config, dict)
        or not {"prompt", "seed", "adapter", "model_type", "train"} <= config.keys()
        or not {"image_size", "epoch"} <= metadata.keys()
        or not all(isinstance(metadata.get(word), str) for word in words)
        or type(config["seed"]) is not int
    ):
        raise UserError(f"{path} does not say which model it belongs to: not samtune's")
    choices = {"model_type": tuple(MODEL_TYPES), "adapter": tuple(ADAPTERS)}
    groups = (ModelOptions, ReadOptions, PromptOptions, TestDataOptions, TrainDataOptions)
    config |= flags.checked(config, groups, path, choices)
    config |= flags.checked(config, [ADAPTERS[config["adapter"]].options], path, choices)
    metadata["image_size"] = flags.checked(
        {"image_size": metadata["image_size"]}, [ModelOptions], path, choices
    )["image_size"].plain
    if any(metadata[name] != config[name] for name in ("adapter", "model_type")):
        raise UserError(f"{path} names two adapters or model types: it is damaged; fetch it again")
    coding_of(options_of(metadata, ReadOptions))
    return metadata


def options_of(metadata: dict, group: type):
    """The options of one group, as the run had them."""
    known = metadata["config"]
    return group(**{f.name: known[f.name] for f in fields(group) if f.name in known})


def base_file(metadata: dict, checkpoint: str = "") -> Path | None:
    """SAM's weights that the run was trained on; None if it began from random weights.

    Raises UserError if they are missing or are other weights than in training.
    """
    if not metadata["base_sha256"]:
        return None
    options = replace(options_of(metadata, ModelOptions), download=False)
    if checkpoint:
        options = replace(options, checkpoint=checkpoint)
    path = find_checkpoint(options)
    if path is None or file_sha256(path) != metadata["base_sha256"]:
        raise UserError(
            f"--checkpoint {path}: these are not the weights that the run was trained on "
            f"({metadata['base_file']}, sha256 {metadata['base_sha256'][:12]}...)"
        )
    return path
