"""SAM's weights: where the file lies, what is in it, and that every tensor finds its place."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import tempfile
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from segment_anything.modeling import Sam
from tqdm import tqdm

from samtune.config import ModelOptions
from samtune.errors import UserError
from samtune.models import MODEL_TYPES, ModelType
from samtune.models.mask_decoder import ClassDecoder
from samtune.models.positions import resize_pos_embed, resize_rel_pos
from samtune.models.sam import resolve_model_type
from samtune.tensor_files import CHUNK, read_state_dict

_MOST_BYTES = 2**34  # of a download; the largest SAM has 2.4 GB


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor, by name.

    loaded: taken as it is. resized: position tables brought to this image size. new: of the model
    alone (an adapter's). unused: of the file alone. reset: of both, but started anew, as the file's
    answers another question (the tokens of a decoder for K classes).
    """

    loaded: tuple[str, ...]
    resized: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    reset: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for the log."""
        text = (
            f"{len(self.loaded)} tensors loaded, {len(self.resized)} resized, "
            f"{len(self.new)} new, {len(self.unused)} unused"
        )
        if self.reset:
            text = f"{len(self.reset)} started anew for the classes, {text}"
        more = " ..." if len(self.unused) > 3 else ""
        return text + (f" ({', '.join(self.unused[:3])}{more})" if self.unused else "")


def find_checkpoint(options: ModelOptions, folder: Path = Path("checkpoints")) -> Path | None:
    """The file with the base weights; None when the model starts from random ones.

    A missing official file is fetched with `options.download`; let one process do that before the
    others look. Raises UserError when the file is missing or cannot be fetched whole.
    """
    model_type = resolve_model_type(options.model_type)
    if options.checkpoint == "none":
        return None
    if options.checkpoint == "auto":
        if not model_type.file:
            return None
        path = folder / model_type.file
    else:
        path = Path(options.checkpoint)
    if path.is_file():
        return path
    if not model_type.file or path.name != model_type.file:
        raise UserError(f"--checkpoint {path}: there is no such file")
    if not (options.download and model_type.sha256):
        raise UserError(_missing(options.model_type, model_type, path))
    try:
        fetch(model_type.url, path, model_type.sha256)
    except OSError as error:
        reason = f" and could not be fetched ({error})"
        raise UserError(_missing(options.model_type, model_type, path, reason)) from None
    return path


def load_base(sam: Sam, path: str | Path) -> LoadReport:
    """Load a SAM checkpoint into a stock Sam of any image size, accounting for every tensor.

    Position tables are resized to the model's grid: the absolute one bilinearly, the relative ones
    linearly and only in blocks of global attention. Any other difference of shape and any missing
    tensor raises UserError, with the model type that the file looks like.
    """
    given = read_state_dict(path)
    wanted = sam.state_dict()
    resized = _resize_positions(sam, given, wanted)
    unused = tuple(name for name in given if name not in wanted)
    other_size = _anatomy(given) not in (None, _anatomy(wanted))
    if other_size or any(_shape(given, name) != t.shape for name, t in wanted.items()):
        raise UserError(_explain_misfit(path, given, wanted))
    sam.load_state_dict({name: given[name] for name in wanted})
    loaded = tuple(name for name in wanted if name not in resized)
    return LoadReport(loaded, tuple(resized), unused=unused)


def give_classes(
    sam: Sam, num_classes: int, layout: str, report: LoadReport | None
) -> LoadReport | None:
    """Let a Sam answer with one mask per class, keeping what its decoder has in common with that.

    num_classes, layout: see `ClassDecoder`. report: of `load_base`, None for random weights.
    Returns it with the tensors that were left out as unused and those that started anew as reset.
    The caller seeds torch. What is new trains; the caller freezes it if it should not.
    """
    before = sam.state_dict(keep_vars=True)
    sam.mask_decoder = ClassDecoder(sam.mask_decoder, num_classes, layout)
    after = sam.state_dict(keep_vars=True)
    if report is None:
        return None
    gone = tuple(name for name in report.loaded if name not in after)
    reset = tuple(n for n in report.loaded if n in after and after[n] is not before[n])
    loaded = tuple(name for name in report.loaded if name not in {*gone, *reset})
    return replace(report, loaded=loaded, unused=report.unused + gone, reset=reset)


def _resize_positions(sam: Sam, given: dict, wanted: dict) -> list[str]:
    """Resize position tables in `given` to the shapes in `wanted`; the names that were resized.

    A TinyViT has none: its biases are those of windows.
    """
    name = "image_encoder.pos_embed"
    resizers = {name: lambda table, shape: resize_pos_embed(table, tuple(shape[1:3]))}
    for index, block in enumerate(sam.image_encoder.blocks):
        if block.window_size == 0:  # global attention: the table's length is the grid's
            for axis in "hw":
                name = f"image_encoder.blocks.{index}.attn.rel_pos_{axis}"
                resizers[name] = lambda table, shape: resize_rel_pos(table, shape[0])
    resized = []
    for name, resize in resizers.items():
        table, target = given.get(name), wanted.get(name)
        if table is None or target is None or table.shape == target.shape:
            continue
        if table.ndim == target.ndim and table.shape[-1] == target.shape[-1]:
            given[name] = resize(table.float(), target.shape)
            resized.append(name)
    return resized


def _explain_misfit(path, given: dict, wanted: dict) -> str:
    """Why the tensors in the file are not those of the model, and what to do."""
    anatomy = _anatomy(given)
    if anatomy is None:
        return f"{path} is no SAM checkpoint: it has no image encoder under SAM's names"
    if anatomy != _anatomy(wanted):
        names = model_types_like(given)
        hint = f": add --model_type {names[0]}" if names else ""
        return (
            f"{path} holds a SAM of another size (width {anatomy[0]}, {anatomy[1]} blocks){hint}, "
            "or choose another --checkpoint"
        )
    missing = [name for name in wanted if name not in given]
    if missing:
        return f"{path} is incomplete: {len(missing)} tensors are missing, first {missing[0]}"
    name = next(name for name in wanted if given[name].shape != wanted[name].shape)
    return (
        f"{path} does not fit --model_type: {name} has shape {tuple(given[name].shape)} "
        f"instead of {tuple(wanted[name].shape)}"
    )


def _shape(state: dict, name: str) -> torch.Size | None:
    return state[name].shape if name in state else None


def _anatomy(state: dict) -> tuple[int, int, int] | None:
    """Width before the neck, blocks and feature channels of the image encoder in a state dict."""
    neck = state.get("image_encoder.neck.0.weight")
    block = re.compile(r"image_encoder\.(layers\.\d+\.)?blocks\.\d+\.")
    blocks = {match[0] for name in state if (match := block.match(name))}
    if neck is None or neck.ndim != 4 or not blocks:
        return None
    return neck.shape[1], len(blocks), neck.shape[0]


def _type_anatomy(model_type: ModelType) -> tuple[int, int, int]:
    return model_type.embed_dim, model_type.depth, model_type.prompt_embed_dim


def model_types_like(state: dict) -> list[str]:
    """The model types whose image encoder has the size of the one in a state dict."""
    anatomy = _anatomy(state)
    return [name for name, row in MODEL_TYPES.items() if _type_anatomy(row) == anatomy]


def _missing(name: str, model_type: ModelType, path: Path, reason: str = "") -> str:
    fetch = "or add --download, " if model_type.sha256 else ""
    return (
        f"the weights of {name} are missing{reason}: put {model_type.file} (from {model_type.url}) "
        f"at {path}, {fetch}or start from random weights with --checkpoint none"
    )


def fetch(url: str, path: Path, sha256: str) -> None:
    """Fetch a file of weights; nothing is left at `path` unless it has this digest.

    Raises OSError where there is no way to the file, UserError if it did not arrive whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            digest = _copy(url, file)
        if digest != sha256:
            raise UserError(
                f"{url} did not arrive whole (its SHA-256 is {digest}, not {sha256}): try again, "
                f"or put the file at {path} yourself"
            )
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except http.client.HTTPException as error:
        raise OSError(str(error)) from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def _copy(url: str, file) -> str:
    """Copy a URL into an open file, with a progress bar; the SHA-256 of what was written."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=30) as response:
        length = response.headers.get("Content-Length", "")
        size = int(length) if length.isdecimal() else None
        with tqdm(desc=url.rpartition("/")[2], total=size, unit="B", unit_scale=True) as bar:
            while chunk := response.read(CHUNK):
                if file.write(chunk) and file.tell() > _MOST_BYTES:
                    raise OSError(f"more than {_MOST_BYTES:,} bytes came")
                digest.update(chunk)
                bar.update(len(chunk))
    return digest.hexdigest()
