"""The verb `train`: compose model, data, loss and trainer, and let them run."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import yaml

from samtune import flags
from samtune.adapters import ADAPTERS, build_model
from samtune.config import TrainConfig
from samtune.data.datasets import SegmentationDataset
from samtune.data.files import Pair
from samtune.data.loading import make_loader
from samtune.data.objects import check_questions
from samtune.data.sample_data import SampleSet, make_sample_set
from samtune.data.sampler import TrainPlan
from samtune.engine import distributed
from samtune.engine.checkpoint import Checkpoints
from samtune.engine.compiling import check_compiler
from samtune.engine.distributed import Process
from samtune.engine.evaluator import Evaluator
from samtune.engine.logbook import Logbook, parameter_summary
from samtune.engine.optim import build_optimizer, build_schedule, use_tf32
from samtune.engine.trainer import Trainer
from samtune.errors import UserError
from samtune.losses import EveryAnswer, make_loss
from samtune.models.segmenter import PromptedSam
from samtune.models.weights import find_checkpoint
from samtune.pipeline import (
    check_pairs,
    evaluation_loader,
    made_ready,
    usable,
    validation_scores,
)
from samtune.run_folder import RunFolder, new_name
from samtune.sources import complete_named, said_of, scored_sets, training_pairs
from samtune.trained import describe

SAMPLE_SET = Path("dataset/sample")


def run(config: TrainConfig, resumed: RunFolder | None, process: Process) -> TrainConfig:
    """Train until the last epoch, early stopping or a signal. Returns the completed config.

    resumed: the run that goes on, None for a new one. Raises UserError for a mistake in the input,
    on all ranks alike and before the first step; Interrupted after a signal, once `last.pt` is
    written.
    """
    config = _complete(config, resumed, process)
    with distributed.together():
        if process.local_rank == 0:  # it may download; the others find the file
            find_checkpoint(config.model)
            ADAPTERS[config.model.adapter].settle(config.adapter, config.model.download)
    with distributed.together():
        if config.optim.compile:
            check_compiler(process.device)
        config, remark = _settle(config)
        model, metadata = _build(config, resumed is not None)
        train_pairs, val_pairs = training_pairs(config.data, config.read)
        if config.test.named:  # what cannot be scored is said now, not after hours of training
            scored_sets(config.test, config.read, config.data.dataset.split("+"))
    folder = RunFolder(config.run.output_dir)
    saved = Checkpoints(folder, metadata, config.run.save_pth)
    with distributed.together():
        if process.is_main and not resumed:
            folder.create()
        state = saved.load_last() if resumed else None
    train_pairs, val_pairs = (
        _check(name, pairs, config, model.image_size, process)
        for name, pairs in (("training", train_pairs), ("validation", val_pairs))
    )
    options = metadata["config"]
    if process.is_main:  # only now is it a run: a mistake above leaves nothing behind
        folder.config.write_text(yaml.safe_dump(options, sort_keys=False))
    first_epoch = state["progress"]["epoch"] + 1 if state else 1
    logbook = Logbook(folder.path, process, config.log, options, keep_before_epoch=first_epoch)
    try:
        if remark and not resumed:
            logbook.say(remark)
        if said := use_tf32(config.optim.tf32, process.device):
            logbook.say(said)
        _introduce(config, model, len(train_pairs), len(val_pairs), process, folder, logbook)
        result = _fit(config, model, train_pairs, val_pairs, process, logbook, saved, state)
        logbook.curves()
        early = " (stopped early: no better epoch since)" if result.stopped_early else ""
        logbook.say(
            f"best: epoch {result.best_epoch}, validation {config.run.best_by} "
            f"{result.best:.5f}{early}"
        )
        logbook.say(f"saved: {folder.best}   curves: {folder.curves}")
    finally:
        logbook.close()
    return config


def _groups(config: TrainConfig) -> list:
    """The option groups of a config, in the order of its fields."""
    return [getattr(config, f.name) for f in fields(config)]


def _complete(config: TrainConfig, resumed: RunFolder | None, process: Process) -> TrainConfig:
    """Collective. Fill in what was left open: the run's folder, the folders of the data."""
    output_dir = str(resumed.path) if resumed else config.run.output_dir
    output_dir = output_dir or str(new_name(config.model.adapter, config.model.model_type))
    run = replace(config.run, output_dir=distributed.broadcast_object(output_dir))
    with distributed.together():
        data, test, read = complete_named(config.data, config.test, config.read)
        if not data.named:
            if process.local_rank == 0:
                make_sample_set(SAMPLE_SET)
            data = replace(data, **_sample_folders("train"), **_sample_folders("val"))
            test = test if test.named else replace(test, **_sample_folders("test"))
        if not (data.val_image_dir or data.dataset):
            if not (data.val_slice or data.val_list):
                raise UserError(
                    "there is nothing to validate on: set --val_image_dir and --val_mask_dir, or "
                    "take a part of the training folders by --train_slice :80 --val_slice 80:"
                )
            data = replace(
                data, val_image_dir=data.train_image_dir, val_mask_dir=data.train_mask_dir,
                val_list=data.val_list or data.train_list,
            )  # fmt: skip
        if test.test_slice and not test.named:
            test = replace(
                test, test_image_dir=data.train_image_dir, test_mask_dir=data.train_mask_dir,
                test_list=data.train_list,
            )  # fmt: skip
    return replace(config, data=data, test=test, read=read, run=run)


def _sample_folders(split: str) -> dict[str, str]:
    """The sample set's folders of one split, as options."""
    files = SampleSet(SAMPLE_SET)
    return {
        f"{split}_image_dir": str(files.image_dir(split)),
        f"{split}_mask_dir": str(files.mask_dir(split)),
    }


def _settle(config: TrainConfig) -> tuple[TrainConfig, str]:
    """The config with what the adapter's options leave open, and a line about it."""
    adapter = ADAPTERS[config.model.adapter]
    options, remark = adapter.settle(config.adapter, config.model.download)
    return replace(config, adapter=options), remark


def _build(config: TrainConfig, resumed: bool) -> tuple[PromptedSam, dict]:
    """The model with its base weights, and what its checkpoint files say about it.

    resumed: its other weights will be those of the run's state, whatever it started from.
    """
    adapter = ADAPTERS[config.model.adapter]
    classes = config.read.num_classes
    adapter.check(config.model, config.prompts.prompt, classes, config.data.crop)
    check_questions(config.read, config.prompts)
    if config.prompts.prompt == "none" and config.read.objects not in ("auto", "mask"):
        raise UserError(
            f"--objects {config.read.objects}: a question about one object needs a --prompt"
        )
    validation_scores(classes, config.prompts.prompt, config.run.best_by)
    base = find_checkpoint(config.model)
    seed, prompt = config.run.seed, config.prompts.prompt
    options = adapter.without_start(config.adapter) if resumed else config.adapter
    model = build_model(config.model, options, prompt, base, seed, classes)
    return model, describe(model, base, flags.dump(_groups(config)))


def _check(name, pairs, config, image_size, process) -> list[Pair]:
    """Read every file of a split once; drop what cannot be asked about."""
    logbook = Logbook.console(process)
    report = check_pairs(name, pairs, config.read, image_size, process, logbook)
    return usable(name, pairs, report, config.read, config.prompts, logbook)


def _introduce(config, model, training: int, validation: int, process, folder, logbook) -> None:
    """Say what is about to happen; the table of the model's parts goes into a file."""
    summary = parameter_summary(model)
    if process.is_main:
        folder.model.write_text(summary + "\n")
    weights = "random, so all of SAM that the prompt reads trains (--train auto)"
    if model.load_report:
        weights = model.load_report.summary()
    sample = " (the sample set)" if config.data.train_image_dir.startswith(str(SAMPLE_SET)) else ""
    logbook.say(
        f"model: {config.model.adapter} on {config.model.model_type} at {model.image_size} px, "
        f"prompt: {config.prompts.prompt}\n"
        f"weights: {weights}\n{summary.splitlines()[-1]}\n"
        f"data: {training} training images in {said_of(config.data)}{sample}\n"
        f"validation: {validation} images\n"
        f"run: {config.run.output_dir}, {process.world} process(es) on {process.device.type}"
    )


def _fit(config, model, train_pairs, val_pairs, process, logbook, saved, state):
    """The one legal order: seed -> device and DDP -> optimizer -> steps."""
    run, options, loader = config.run, config.optim, config.loader
    distributed.seed_everything(run.seed, process.rank, run.deterministic)
    image_size = model.image_size
    plan = TrainPlan(
        len(train_pairs), loader.batch_size, options.accumulate, process.rank, process.world,
        run.seed,
    )  # fmt: skip
    dataset = SegmentationDataset(
        train_pairs, config.read, image_size, config.prompts, config.loss.loss_resolution,
        augment=config.data.augment, seed=run.seed, train=True, crop=config.data.crop,
    )  # fmt: skip
    task = config.read.num_classes, config.prompts.prompt
    criterion = make_loss(config.loss, *task)
    scorers, counter = validation_scores(*task, run.best_by)
    wrapped = made_ready(model, options, process)
    optimizer = build_optimizer(wrapped, options)
    schedule = build_schedule(optimizer, options, run.epoch * plan.steps_per_epoch)
    trainer = Trainer(
        wrapped, EveryAnswer(criterion), scorers, optimizer, schedule, process,
        clip_norm=options.clip_norm, precision=options.precision, tell_first_step=options.compile,
    )  # fmt: skip

    on_gpu = process.device.type == "cuda"
    val_loader = evaluation_loader(
        val_pairs, config.read, config.prompts, image_size, loader, process
    )
    evaluator = Evaluator(
        model, [criterion.scores, *scorers], process, trainer.precision, counter,
        loader.decode_rows,
    )  # fmt: skip

    def make_batches(epoch: int, first_step: int):
        return make_loader(dataset, plan.batches(epoch, first_step), loader.workers, on_gpu)

    def validate() -> dict[str, float]:
        with logbook.progress(len(val_loader), "validation") as bar:
            return evaluator.run(val_loader, bar.update).scores

    return trainer.fit(
        plan, make_batches, validate, logbook, saved,
        epochs=run.epoch, best_by=run.best_by, patience=run.patience, resume=state,
    )  # fmt: skip
