"""The verb `merge`: fold what was trained into a stock SAM's weights, where that is possible."""

from __future__ import annotations

import torch

from samtune.adapters import ADAPTERS
from samtune.config import MergeOptions
from samtune.engine import distributed
from samtune.engine.checkpoint import read_metadata, write_atomically
from samtune.engine.distributed import Process
from samtune.run_folder import newest
from samtune.trained import load_trained, trained_file


def run(options: MergeOptions, process: Process) -> None:
    """Write a .pth that the unmodified `segment_anything` package loads, strictly.

    Raises UserError for an adapter that is not linear in SAM's own weights.
    """
    with distributed.together():
        file = trained_file(options.run_dir or newest().path)
        adapter = ADAPTERS[read_metadata(file)["adapter"]]
        state = adapter.merge(load_trained(file, options.checkpoint))
        path = options.output or str(file.with_name("merged.pth"))
        if process.is_main:
            write_atomically(path, lambda out: torch.save(state, out))
            print(f"written: {path}, {len(state)} tensors; sam_model_registry[...](checkpoint=...) "
                  "of segment_anything loads it")  # fmt: skip
