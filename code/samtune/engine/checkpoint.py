"""What a run leaves on disk: what was tuned (best), and everything needed to go on (last).

The *adapted state* is a complement: whatever the model needs that the base checkpoint does not
hold. It lies in safetensors with a JSON description beside the tensors, so that the file alone says
which model it belongs to. The *run state* is the adapted state plus optimizer, position and random
number generators; it is read with `weights_only=True`, so it holds tensors and plain values only.

A file is written under another name, flushed to the disk and only then given its own name: a crash
in between leaves the old file whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from samtune.engine.distributed import gather_tensors, shard_like, unwrap
from samtune.errors import UserError
from samtune.run_folder import RunFolder
from samtune.tensor_files import existing_file, read_state_dict, read_tensors

IDENTITY = ("adapter", "model_type", "image_size", "base_sha256")  # what a file cannot change
_METADATA_KEY = "samtune"
_SHOWN_NAMES = 6

Renames = Sequence[tuple[str, str | None]]


class Checkpoints:
    """The two checkpoints of one run. `metadata` describes the model and goes into each of them.

    What is written does not depend on how the model lies on the ranks: a sharded run's files serve
    any other.
    """

    def __init__(self, folder: RunFolder, metadata: Mapping[str, Any], save_pth: bool = False):
        self.folder, self.metadata, self.save_pth = folder, dict(metadata), save_pth

    def save_best(self, model: nn.Module, **facts) -> None:
        """Collective. Rank 0 writes the adapted state, `facts` (epoch, scores) in its metadata."""
        save_adapted(self.folder.best, model, self.metadata | facts)
        if self.save_pth:
            save_parent(self.folder.best_pth, model)

    def save_last(self, state: Mapping[str, Any]) -> None:
        save_run_state(self.folder.last, {**state, "metadata": self.metadata})

    def load_last(self) -> dict[str, Any]:
        """The run state. Raises UserError if it belongs to another model than this run's."""
        state = load_run_state(self.folder.last)
        require_same(self.folder.last, state.get("metadata", {}), self.metadata)
        return state


def adapted_state(model: nn.Module) -> dict[str, Tensor] | None:
    """Copies, on the CPU, of all persistent state that the model's base checkpoint does not hold.

    On rank 0; None on the others. Collective if the model is sharded.

    A key is part of it if it is not in `model.base_keys`, or trains, or is a buffer of a module
    with trainable parameters (BatchNorm statistics go with the layer that moved them). A tensor
    that appears under several names is held once, under the first.
    """
    model = unwrap(model)
    keys = set(_adapted_keys(model))
    return _gathered(model, lambda key: key in keys)


def _gathered(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, Tensor] | None:
    return gather_tensors({key: t for key, t in model.state_dict().items() if wanted(key)})


def _adapted_keys(model: nn.Module) -> list[str]:
    state = model.state_dict(keep_vars=True)  # first, as it lets a sharded model's parts be parts
    moving = set()  # ids of tensors that training changes
    for module in model.modules():
        parameters = [p for p in module.parameters(recurse=False) if p.requires_grad]
        moving.update(map(id, parameters))
        if parameters:
            moving.update(map(id, module.buffers(recurse=False)))
    first_name = {}
    for key, tensor in state.items():
        first_name.setdefault(id(tensor), key)
    return [key for i, key in first_name.items() if i in moving or key not in model.base_keys]


def save_adapted(path: str | Path, model: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Write the adapted state as safetensors, `metadata` (JSON-able) with it, atomically.

    Rank 0 writes. Collective if the model is sharded.
    """
    state = adapted_state(model)
    if state is None:
        return
    content = save(state, {_METADATA_KEY: json.dumps(dict(metadata))})
    write_atomically(path, lambda file: file.write(content))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `save_adapted` was told about the model in this file.

    Raises UserError if the file is missing, damaged, or was not written by samtune.
    """
    try:
        with safe_open(existing_file(path), "pt") as file:
            metadata = json.loads(file.metadata()[_METADATA_KEY])
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    except (KeyError, TypeError, ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise UserError(f"{path} does not say what model it belongs to: not samtune's")
    return metadata


def require_same(path: str | Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise UserError if the file's model and ours differ in what makes files exchangeable."""
    differing = [
        f"{name} {saved[name]!r} (here {ours[name]!r})"
        for name in IDENTITY
        if name in saved and name in ours and saved[name] != ours[name]
    ]
    if differing:
        raise UserError(f"{path} belongs to another model: {', '.join(differing)}")


def load_adapted(model: nn.Module, path: str | Path, renames: Renames = ()) -> list[str]:
    """Load tuned weights into a model of the same build; return the names loaded.

    path: samtune's safetensors, whose keys must be exactly the model's adapted state; or a .pth/.pt
    dict of tensors, with or without a leading `module.`, that must cover the adapted parameters and
    may hold other state of the model too. renames: (pattern, replacement) applied to the start of
    each key of a .pth, first match only; None drops the key.
    Raises UserError with the names that are missing, unknown or of another shape.
    """
    if Path(path).suffix == ".safetensors":
        return _load(model, path, read_state_dict(path), exact=True)
    state = {renamed(key, renames): tensor for key, tensor in read_state_dict(path).items()}
    state.pop(None, None)
    return load_published(model, path, state)


def load_published(model: nn.Module, path: str | Path, state: Mapping[str, Tensor]) -> list[str]:
    """Load what others tuned, under our names; return the names loaded.

    It must cover the adapted parameters and may hold other state of the model too. path: where it
    lay, for the error's words. Raises UserError as `load_adapted` does.
    """
    return _load(model, path, state, exact=False)


def load_adapted_state(model: nn.Module, path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Load what `adapted_state` returned; `path` is where it lay, for the error's words."""
    _load(model, path, state, exact=True)


def _load(model: nn.Module, path, state: Mapping[str, Tensor], exact: bool) -> list[str]:
    model = unwrap(model)
    ours, expected = model.state_dict(), set(_adapted_keys(model))
    if not exact:  # the parent's files hold parameters only
        expected &= {name for name, _ in model.named_parameters()} | (ours.keys() - model.base_keys)
    known = expected if exact else ours.keys()
    complaints = {
        "missing": [key for key in ours if key in expected and key not in state],
        "unknown": [key for key in state if key not in known],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(ours[key].shape)}"
            for key in state
            if key in known and state[key].shape != ours[key].shape
        ],
    }
    if said := [f"{what}: {_shorten(names)}" for what, names in complaints.items() if names]:
        raise UserError(
            f"{path} does not fit this model (another adapter, base or --train?); "
            + "; ".join(said)
        )
    state = {key: shard_like(tensor, ours[key]) for key, tensor in state.items()}
    model.load_state_dict(state, strict=False)  # every key was accounted for above
    return [key for key in ours if key in state]


def _shorten(names: list[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    return ", ".join(sorted(names)[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def renamed(key: str, renames: Renames) -> str | None:
    """Our name for a published one; None where nothing here reads the tensor.

    renames: (pattern, replacement) applied to the start of the key, first match only.
    """
    for pattern, replacement in renames:
        if match := re.match(pattern, key):
            return replacement and match.expand(replacement) + key[match.end() :]
    return key


def save_parent(path: str | Path, model: nn.Module) -> None:
    """Write the parent repository's format: a flat dict of tensors by name, without a prefix.

    The adapted state and all of the mask decoder, also the heads that stayed frozen. Rank 0 writes.
    Collective if the model is sharded.
    """
    model = unwrap(model)
    adapted = set(_adapted_keys(model))
    state = _gathered(model, lambda key: key in adapted or key.startswith("mask_decoder."))
    if state is not None:
        write_atomically(path, lambda file: torch.save(state, file))


def optimizer_state(optimizer: Optimizer) -> dict[str, Any] | None:
    """The optimizer's state dict with whole tensors on the CPU, on rank 0; None on the others.

    Collective if the model is sharded.
    """
    state = optimizer.state_dict()
    moments = state["state"]
    flat = {(index, name): t for index, of in moments.items() for name, t in of.items()}
    flat = gather_tensors(flat)
    if flat is None:
        return None
    whole = {index: {name: flat[index, name] for name in of} for index, of in moments.items()}
    return {**state, "state": whole}


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Take up the moments that `optimizer_state` returned, but not the options of the groups."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups = zip(optimizer.param_groups, state["param_groups"], strict=True)
    moments = {
        index: {name: shard_like(tensor, parameters[index]) for name, tensor in of.items()}
        for index, of in state["state"].items()
    }
    groups = [{**now, "params": saved["params"]} for now, saved in groups]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def save_run_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a dict of tensors and plain values, atomically."""
    write_atomically(path, lambda file: torch.save(dict(state), file))


def load_run_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_run_state` wrote, on the CPU. Raises UserError if missing or damaged."""
    state = read_tensors(path)
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{path} is not the state of a run")
    return state


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill the file; it appears under `path` whole or not at all.

    Raises UserError if the system refuses (a full disk, a folder without permission).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path} could not be written: {reason}; the previous file is unchanged"
        ) from error
