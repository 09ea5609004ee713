"""Train every adapter for some steps on this rank, and save what came out.

Run by test_ddp.py under torchrun, and by the same test in its own process for comparison.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch

from samtune.adapters import ADAPTERS, build_model
from samtune.adapters.options import (
    AdaptFormerOptions,
    ConvLoraOptions,
    GsamOptions,
    LoraOptions,
    SamAdapterOptions,
)
from samtune.config import (
    LoaderOptions,
    LossOptions,
    ModelOptions,
    OptimOptions,
    PromptOptions,
    ReadOptions,
)
from samtune.data.datasets import SegmentationDataset
from samtune.data.files import find_pairs
from samtune.data.loading import make_loader
from samtune.data.sampler import TrainPlan
from samtune.engine import distributed
from samtune.engine.compiling import compile_blocks
from samtune.engine.evaluator import Evaluator
from samtune.engine.optim import build_optimizer, build_schedule
from samtune.engine.trainer import Trainer
from samtune.losses import EveryAnswer, MaskLoss
from samtune.metrics.region import region_scores
from samtune.models import MODEL_TYPES
from samtune.models.anatomy import attention_blocks
from samtune.pipeline import evaluation_loader

TINY = replace(
    MODEL_TYPES["vit_mini"], embed_dim=32, depth=2, num_heads=2, global_blocks=(1,), image_size=64,
    window_size=3, prompt_embed_dim=32, decoder_heads=4, decoder_mlp_dim=32, iou_head_hidden_dim=16,
)  # fmt: skip
# Smaller where the default is large; and no dropout, which is each rank's own.
SMALL = {"gsam": GsamOptions(resnet_depth=18), "adaptformer": AdaptFormerOptions(dropout=0.0)}
OPTIONS = [(name, SMALL.get(name, adapter.options())) for name, adapter in ADAPTERS.items()]
OPTIONS += [("sam_adapter", SamAdapterOptions(variant="official"))]
OPTIONS += [("lora", LoraOptions(adapt_decoder=True)), ("lora", LoraOptions(form="gsam"))]
OPTIONS += [("conv_lora", ConvLoraOptions(form="gsam"))]
OPTIONS += [("sam_adapter", SamAdapterOptions(adapter_blocks="1"))]
COMPILED = LoraOptions(adapter_blocks="1")  # and its blocks compiled
OPTIONS += [("lora", COMPILED)]
SAMPLES = 7  # no multiple of any global batch here: the last step of an epoch is uneven
# A filler enters the statistics of a BatchNorm that trains: these get even steps, and few, as their
# small batches blow rounding up from step to step.
WITH_BATCH_NORM = ("gsam", "ts_sam")
EVEN_SAMPLES = 4
WITH_MIXED = ("decoder", "samus")  # what a prompt is does not depend on the adapter


def samples_of(name: str) -> int:
    return EVEN_SAMPLES if name in WITH_BATCH_NORM else SAMPLES


def epochs_of(name: str) -> int:
    return 1 if name in WITH_BATCH_NORM else 2


def make_pictures(folder: Path) -> None:
    """Noise with a brighter rectangle, of several sizes."""
    rng = np.random.default_rng(0)
    for kind in ("image", "mask"):
        (folder / kind).mkdir(parents=True)
    for index in range(SAMPLES):
        height, width = 40 + 7 * index, 90 - 5 * index
        image = rng.integers(0, 120, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), np.uint8)
        mask[5 : 20 + index, 8 + index : 40] = 255
        for part in range(index % 3):
            mask[30 : 34 + index, 5 + 14 * part : 15 + 14 * part] = 255
        image[mask > 0] += 100
        cv2.imwrite(str(folder / "image" / f"{index}.png"), image)
        cv2.imwrite(str(folder / "mask" / f"{index}.png"), mask)


def train(name: str, options, prompt: str, accumulate: int, process, pictures: Path) -> dict:
    """Parameters, statistics and validation scores; one global batch on any world."""
    model_options = ModelOptions(model_type="tiny", adapter=name, train="adapter")
    model = build_model(model_options, options, prompt, None, seed=1)
    read, asked = ReadOptions(), PromptOptions(prompt=prompt)
    if prompt == "mixed":  # and ragged: one to three rows per image, each corrected twice
        read = ReadOptions(objects="component")
        asked = PromptOptions(prompt, refine_steps=2, max_objects=2)
    pairs = find_pairs(pictures / "image", pictures / "mask", read, ("a", "b"))[: samples_of(name)]
    dataset = SegmentationDataset(
        pairs, read, 64, asked, "original", augment="standard", seed=4, train=True
    )
    per_process = 2 // process.world  # four with accumulation
    plan = TrainPlan(len(pairs), per_process, accumulate, process.rank, process.world, seed=4)
    distributed.seed_everything(9, process.rank)
    if options == COMPILED:
        compile_blocks(attention_blocks(model.image_encoder), "aot_eager")
    wrapped = distributed.wrap(model, process)
    settings = OptimOptions(lr=1e-3)
    optimizer = build_optimizer(wrapped, settings)
    for group in optimizer.param_groups:
        # Adam divides by the gradient's size: where that is rounding noise (the bias of a key, for
        # one) its steps would be noise of full size. This keeps them as small as the gradient.
        group["eps"] = 1e-2
    schedule = build_schedule(optimizer, settings, epochs_of(name) * plan.steps_per_epoch)
    loss = MaskLoss(LossOptions())
    trainer = Trainer(wrapped, EveryAnswer(loss), [region_scores], optimizer, schedule, process)
    wrapped.train()
    for epoch in range(epochs_of(name)):
        batches = iter(make_loader(dataset, plan.batches(epoch), workers=0))
        for step in range(plan.steps_per_epoch):
            micro_batches, count = plan.step(epoch, step)
            trainer.train_step([next(batches) for _ in micro_batches], count)
    trainer.check()

    loader = evaluation_loader(pairs, read, asked, 64, LoaderOptions(batch_size=2, workers=0),
                               process)  # fmt: skip
    scores = Evaluator(model, [loss.scores, region_scores], process).run(loader).scores
    return {"state": model.state_dict(), "train": trainer.sums.means(), "validation": scores}


def cases():
    return [
        (f"{index}-{name}-{prompt}-{accumulate}", name, options, prompt, accumulate)
        for index, (name, options) in enumerate(OPTIONS)
        for prompt in ("box", "none", "mixed")
        if prompt in ADAPTERS[name].prompts and (prompt != "mixed" or name in WITH_MIXED)
        for accumulate in (1, 2)
    ]


def train_all(process, pictures: Path) -> dict[str, dict]:
    MODEL_TYPES["tiny"] = TINY
    return {key: train(*case, process, pictures) for key, *case in cases()}


if __name__ == "__main__":
    process = distributed.start(5)
    results = train_all(process, Path(sys.argv[1]))
    torch.save(results, Path(sys.argv[2]) / f"rank{process.rank}.pt")
    distributed.shutdown()
