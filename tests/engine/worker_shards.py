"""Train small SAMs in DDP and in shards, save and resume across, and save what came out.

Run by test_sharded.py under torchrun on two ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from engine_standins import METADATA, Diary
from worker_adapters import SMALL, TINY, make_pictures

from samtune.adapters import ADAPTERS, build_model
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
from samtune.engine.checkpoint import Checkpoints, adapted_state
from samtune.engine.evaluator import Evaluator
from samtune.engine.optim import build_optimizer, build_schedule
from samtune.engine.trainer import Trainer
from samtune.losses import EveryAnswer, MaskLoss
from samtune.metrics.region import region_scores
from samtune.models import MODEL_TYPES
from samtune.models.anatomy import attention_blocks, checkpoint_activations
from samtune.pipeline import evaluation_loader
from samtune.run_folder import RunFolder

EPOCHS, SAMPLES = 2, 5
PROMPT = PromptOptions(prompt="box")


def new_model(adapter="decoder", train="all"):
    options = SMALL.get(adapter, ADAPTERS[adapter].options())
    chosen = ModelOptions(model_type="tiny", adapter=adapter, train=train)
    return build_model(chosen, options, "box", None, seed=1)


def pairs_of(pictures: Path):
    return find_pairs(pictures / "image", pictures / "mask", ReadOptions(), ("a", "b"))[:SAMPLES]


def scores_of(model, pictures: Path, process) -> dict:
    """Rank 0 has a batch more than rank 1; images are encoded once, questions decoded in parts."""
    loader = evaluation_loader(
        pairs_of(pictures), ReadOptions(), PROMPT, 64, LoaderOptions(batch_size=2, workers=0),
        process,
    )  # fmt: skip
    scorers = [MaskLoss(LossOptions()).scores, region_scores]
    with distributed.gathered(model):
        whole = distributed.evaluated(model)
        return Evaluator(whole, scorers, process, decode_rows=1).run(loader).scores


def new_trainer(model, process, shard: bool, steps: int, precision: str) -> Trainer:
    wrapped = distributed.wrap(
        model, process, attention_blocks(model.image_encoder) if shard else ()
    )
    settings = OptimOptions(lr=1e-3)
    optimizer = build_optimizer(wrapped, settings)
    return Trainer(
        wrapped, EveryAnswer(MaskLoss(LossOptions())), [region_scores], optimizer,
        build_schedule(optimizer, settings, steps), process, clip_norm=0.5, precision=precision,
    )  # fmt: skip


def fit(
    process, pictures: Path, folder: Path, adapter="decoder", train="all", *, shard: bool,
    epochs=EPOCHS, resume=False, checkpointing=False, precision="fp32",
) -> dict:  # fmt: skip
    """A run of the real trainer: gradients accumulated and clipped, then validation."""
    model = new_model(adapter, train)
    dataset = SegmentationDataset(
        pairs_of(pictures), ReadOptions(), 64, PROMPT, "original", seed=4, train=True
    )
    accumulate = 4 // process.world
    plan = TrainPlan(SAMPLES, 1, accumulate, process.rank, process.world, seed=4)
    distributed.seed_everything(9, process.rank)
    if checkpointing:
        checkpoint_activations(model.image_encoder)
    trainer = new_trainer(model, process, shard, EPOCHS * plan.steps_per_epoch, precision)
    folder.mkdir(exist_ok=True)
    saved, diary = Checkpoints(RunFolder(folder), METADATA, save_pth=True), Diary()
    untrained = scores_of(trainer.model, pictures, process)
    trainer.fit(
        plan,
        lambda epoch, seen: make_loader(dataset, plan.batches(epoch, seen), workers=0),
        lambda: scores_of(trainer.model, pictures, process),
        diary, saved, epochs=epochs, patience=0, resume=saved.load_last() if resume else None,
    )  # fmt: skip
    moments = [of["exp_avg"] for of in trainer.optimizer.state.values()]
    return {
        "state": adapted_state(trainer.model),
        "untrained": untrained,
        "records": diary.records,
        "parameters held": sum(here(p).numel() for p in model.parameters()),
        "moments held": sum(here(moment).numel() for moment in moments),
    }


def here(tensor):
    """What this rank keeps of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def cases() -> dict[str, tuple[str, dict]]:
    """Name -> the folder of the run, its options. What is resumed was begun by the case before."""
    lora = {"adapter": "lora", "train": "adapter", "epochs": 1, "precision": "bf16"}
    return {
        "whole in ddp": ("a", {"shard": False}),
        "whole in shards": ("b", {"shard": True, "checkpointing": True}),
        "half in shards": ("c", {"shard": True, "epochs": 1}),
        "shards to ddp": ("c", {"shard": False, "resume": True}),
        "half in ddp": ("d", {"shard": False, "epochs": 1}),
        "ddp to shards": ("d", {"shard": True, "resume": True}),
        "lora, bf16 in ddp": ("e", {"shard": False, **lora}),
        "lora, bf16 in shards": ("f", {"shard": True, **lora}),
    }


def main(pictures: Path, folder: Path) -> None:
    process = distributed.start(5)
    MODEL_TYPES["tiny"] = TINY
    if process.is_main:
        make_pictures(pictures)
    distributed.barrier()
    result = {
        name: fit(process, pictures, folder / run, **options)
        for name, (run, options) in cases().items()
    }
    torch.save(result, folder / f"rank{process.rank}.pt")
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
