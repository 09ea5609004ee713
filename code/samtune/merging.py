"""The verb `merge`: fold what was trained into a stock SAM's weights, where that is possible."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from samtune.adapters import ADAPTERS
from samtune.config import MergeOptions
from samtune.engine import distributed
from samtune.engine.checkpoint import write_atomically
from samtune.engine.distributed import Process
from samtune.models import MODEL_TYPES
from samtune.run_folder import newest
from samtune.tensor_files import read_state_dict
from samtune.trained import base_file, load_trained, read_description, trained_file


def run(options: MergeOptions, process: Process) -> None:
    """Write a .pth that the package of the model's weights loads, strictly and unmodified.

    Raises UserError for an adapter that is not linear in SAM's own weights.
    """
    with distributed.together():
        file = trained_file(options.run_dir or newest().path)
        metadata = read_description(file)
        model = load_trained(file, options.checkpoint)
        state = ADAPTERS[metadata["adapter"]].merge(model)
        package = "segment_anything"
        if MODEL_TYPES[metadata["model_type"]].backbone == "tiny_vit":
            package = "MobileSAM"
            state |= classifier(base_file(metadata, options.checkpoint))
        path = options.output or str(file.with_name("merged.pth"))
        if process.is_main:
            write_atomically(path, lambda out: torch.save(state, out))
            print(f"written: {path}, {len(state)} tensors; sam_model_registry[...](checkpoint=...) "
                  f"of {package} loads it, and so does --checkpoint here")  # fmt: skip


def classifier(base: Path | None) -> dict[str, Tensor]:
    """What a MobileSAM file holds and nothing reads, but its package asks for."""
    given = read_state_dict(base) if base else {}
    ends = ("image_encoder.norm_head.", "image_encoder.head.")
    return {name: tensor for name, tensor in given.items() if name.startswith(ends)}
