"""A run of a tiny SAM with kept features, on as many ranks as there are.

Run by test_caching.py under torchrun. Arguments: the sample set, the folder of the run.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from samtune import config as c
from samtune.adapters.options import DecoderOptions
from samtune.data.feature_cache import FeatureFiles
from samtune.data.sample_data import SampleSet
from samtune.engine import distributed
from samtune.models import MODEL_TYPES
from samtune.train import run as train
from tiny_models import TINY

TRAINING, VALIDATION = 6, 3  # images, in full batches of 3


def config_of(files: SampleSet, output_dir: str = "run", batch_size: int = 3) -> c.TrainConfig:
    """Three epochs of two views of each image; the image encoder is frozen."""
    return c.TrainConfig(
        c.ModelOptions(model_type="tiny", adapter="decoder", train="adapter"),
        c.ReadOptions(),
        c.TrainDataOptions(
            train_image_dir=str(files.image_dir("train")),
            train_mask_dir=str(files.mask_dir("train")),
            train_slice=f":{TRAINING}",
            val_image_dir=str(files.image_dir("val")),
            val_mask_dir=str(files.mask_dir("val")),
            val_slice=f":{VALIDATION}",
            augment_views=2,
        ),
        c.TestDataOptions(),
        c.LoaderOptions(batch_size=batch_size, workers=0),
        c.PromptOptions(box_jitter=0.1),
        c.LossOptions(),
        c.OptimOptions(lr=1e-3),
        c.RunOptions(epoch=3, output_dir=output_dir),
        c.LogOptions(),
        DecoderOptions(),
    )


def with_features(config: c.TrainConfig, kind: str, **options) -> c.TrainConfig:
    return replace(config, data=replace(config.data, cache_features=kind, **options))


def main() -> None:
    torch.set_num_threads(1)
    MODEL_TYPES.update(TINY)
    written: list[str] = []
    write = FeatureFiles.write

    def counting(files, name, features, picture_size):
        written.append(name)
        write(files, name, features, picture_size)

    FeatureFiles.write = counting
    process = distributed.start()
    config = config_of(SampleSet(Path(sys.argv[1])), sys.argv[2], batch_size=2)
    config = replace(config, run=replace(config.run, epoch=2))
    train(with_features(config, "fp32"), None, process)
    Path(f"written{process.rank}.txt").write_text("\n".join(written))
    distributed.shutdown()


if __name__ == "__main__":
    main()
