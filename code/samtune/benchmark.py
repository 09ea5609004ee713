"""The verb `benchmark`: time the trainer's own `train_step` on random data, without files."""

from __future__ import annotations

import json
import resource
import time

import torch

from samtune.adapters import build_model
from samtune.config import BenchmarkConfig
from samtune.engine import distributed
from samtune.engine.distributed import Process
from samtune.engine.optim import build_optimizer, build_schedule
from samtune.engine.trainer import Trainer
from samtune.losses import MaskLoss
from samtune.metrics.region import region_scores
from samtune.models.weights import find_checkpoint
from samtune.structures import Batch, Frame, Frames, Prompts


def run(config: BenchmarkConfig, process: Process) -> dict:
    """Time `--steps` optimizer steps after `--warmup` untimed ones; print one JSON line as the last.

    Weights are random unless --checkpoint names a file: speed does not depend on them.
    """
    options = config.model
    checkpoint = None if options.checkpoint in ("auto", "none") else find_checkpoint(options)
    trained = "adapter" if options.train == "auto" else options.train
