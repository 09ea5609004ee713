"""The verb `train`: compose model, data, loss and trainer, and let them run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from samtune import __version__, flags
from samtune.adapters import ADAPTERS, build_model
from samtune.config import TrainConfig
from samtune.data.datasets import SegmentationDataset
from samtune.data.loading import make_loader
from samtune.data.sample_data import make_sample_set
from samtune.data.sampler import TrainPlan
from samtune.engine import distributed
from samtune.engine.checkpoint import save_adapted, save_parent
from samtune.engine.distributed import Process
from samtune.engine.evaluator import Evaluator
from samtune.engine.logbook import Logbook, parameter_summary
from samtune.engine.optim import build_optimizer, build_schedule
from samtune.engine.trainer import Interrupted, Trainer
from samtune.losses import MaskLoss
from samtune.metrics.region import region_scores
from samtune.models.weights import file_sha256, find_checkpoint
from samtune.pipeline import agreed, check_pairs, evaluation_loader, load_pairs, usable
from samtune.run_folder import RunFolder, new_name

__all__ = ["Interrupted", "run"]

SAMPLE_SET = Path("dataset/sample")


def run(config: TrainConfig, resumed: RunFolder | None, process: Process) -> TrainConfig:
    """Train until the last epoch, early stopping or a signal. Returns the completed config.

    Raises UserError for a mistake in the input, on all ranks alike, before the first step; and
    Interrupted after a signal, once `last.pt` is written.
    """
    with agreed():
        config = _complete(config, resumed, process)
        folder = RunFolder(config.run.output_dir)
        if process.is_main and resumed is None:
            folder.create()
            folder.config.write_text(yaml.safe_dump(flags.dump(_groups(config)), sort_keys=False))
