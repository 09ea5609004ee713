"""The verb `train`: compose model, data, loss and trainer, and let them run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial

import yaml

from samtune import flags
from samtune.activity import now
from samtune.adapters import ADAPTERS, build_model
from samtune.caching import FeatureCaching, check_caching
from samtune.config import TrainConfig
from samtune.data.datasets import SegmentationDataset
from samtune.data.files import Pair
from samtune.data.loading import cores_per_process, make_loader
from samtune.data.objects import check_questions
from samtune.data.sampler import EpochBatches, TrainPlan
from samtune.data.scan import SeenPictures
from samtune.ddp_check import DdpCheck
from samtune.engine import distributed
from samtune.engine.checkpoint import Checkpoints
from samtune.engine.compiling import check_compiler
from samtune.engine.determinism import explain_indeterminism, promise
from samtune.engine.distributed import Process
from samtune.engine.durable import write_text
from samtune.engine.evaluator import Evaluator
from samtune.engine.logbook import Logbook, parameter_summary
from samtune.engine.optim import build_optimizer, build_schedule, use_tf32
from samtune.engine.throughput import Pace
from samtune.engine.trainer import Trainer
from samtune.errors import UserError
from samtune.losses import EveryAnswer, make_loss
from samtune.models.segmenter import PromptedSam
from samtune.models.weights import find_checkpoint
from samtune.pipeline import (
    check_pairs,
    evaluation_loader,
    to_train,
    usable,
    validation_scores,
)
from samtune.probe import settle_batch_size
from samtune.run_folder import RunFolder, new_name
from samtune.run_lock import launch_name
from samtune.slow_data import slow_data
from samtune.sources import (
    SAMPLE_SET,
    complete_data,
    look_into_shards,
    refuse_without_validation,
    said_of,
    scored_sets,
    training_pairs,
)
from samtune.trained import describe


def run(config: TrainConfig, resumed: RunFolder | None, process: Process) -> TrainConfig:
    """Train until the last epoch, early stopping or a signal. Returns the completed config.

    resumed: the run that goes on, None for a new one. Raises UserError for a mistake in the input,
    on all ranks alike and before the first step; Interrupted after a signal, once `last.pt` is
    written.
    """
    with ExitStack() as held:
        return _run(config, resumed, process, held)


def _run(
    config: TrainConfig, resumed: RunFolder | None, process: Process, held: ExitStack
) -> TrainConfig:
    """held: where the run's folder is kept from others, as long as this lasts."""
    _agree_on_run(resumed)
    config = _complete(config, resumed, process)

    def fetch() -> None:  # it may download; the others find the file
        find_checkpoint(config.model)
        ADAPTERS[config.model.adapter].settle(config.adapter, config.model.download)

    distributed.once_per_machine(process, fetch)
    indexes = look_into_shards(process, config.data, config.test)
    with distributed.together():
        if config.optim.compile:
            check_compiler(process.device)
        config, remark = _settle(config)
        model, metadata = _build(config, resumed is not None)
        train_pairs, val_pairs = training_pairs(config.data, config.read, indexes)
        if config.test.named:  # what cannot be scored is said now, not after hours of training
            own = config.data.dataset.split("+")
            scored_sets(config.test, config.read, own, indexes=indexes)
    folder = RunFolder(config.run.output_dir)
    warning = held.enter_context(_occupied(folder, resumed is None, process))
    now.run = str(folder.path)
    with distributed.together():
        if not config.run.save_every >= 0:
            raise UserError(f"--save_every {config.run.save_every}: must be 0 or more minutes")
        saved = Checkpoints(folder, metadata, config.run.save_pth, config.run.keep)
    state = saved.load_last() if resumed else None
    seen = SeenPictures()
    (train_pairs, picture_size), (val_pairs, _) = (
        _check(name, pairs, config, model.image_size, process, seen)
        for name, pairs in (("training", train_pairs), ("validation", val_pairs))
    )
    options = metadata["config"]
    if config.loader.batch_size == "auto":
        size = settle_batch_size(
            config, model.load_report is None, len(train_pairs), picture_size, process,
            Logbook.console(process).say,
        )  # fmt: skip
        config = replace(config, loader=replace(config.loader, batch_size=size))
        options["batch_size"] = size
        remark = "\n".join(filter(None, [remark, f"--batch_size auto: {size}"]))
    with distributed.together():  # only now is it a run: a mistake above leaves nothing behind
        if process.is_main:
            write_text(folder.config, yaml.safe_dump(options, sort_keys=False))
    first_epoch = state["progress"]["epoch"] + 1 if state else 1
    with distributed.together():
        logbook = Logbook(
            folder.path, process, config.log, options, keep_before_epoch=first_epoch,
            keep_steps=state["progress"]["step"] if state else 0,
        )  # fmt: skip
    try:
        for said in filter(None, (warning, saved.warning, "" if resumed else remark)):
            logbook.say(said)
        if said := use_tf32(config.optim.tf32, process.device):
            logbook.say(said)
        if config.run.deterministic:
            logbook.say(promise(process))
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


def _agree_on_run(resumed: RunFolder | None) -> None:
    """Collective. Raise UserError where machines do not see the same run to go on with."""
    seen = distributed.all_gather_objects(str(resumed.path) if resumed else "none")
    if len(set(seen)) > 1:
        raise UserError(
            f"--resume: the machines find different runs ({', '.join(sorted(set(seen)))}); "
            "--output_dir must be one folder, on a disk that all of them share"
        )


@contextmanager
def _occupied(folder: RunFolder, new: bool, process: Process) -> Iterator[str]:
    """Collective. Inside, rank 0 keeps other runs out of the folder; gives a warning, "" if it can.

    Raises UserError on all ranks as `RunFolder.occupy` does. After a mistake that lets no run begin
    nothing is left in the folder.
    """
    launches, lock = distributed.all_gather_objects(launch_name()), None
    try:
        with distributed.together():
            if process.is_main:
                lock = folder.occupy(launches, new)
        yield lock.warning if lock else ""
    except UserError:
        if lock and not folder.config.exists():
            lock.withdraw()
        raise
    finally:
        if lock:
            lock.release()


def _complete(config: TrainConfig, resumed: RunFolder | None, process: Process) -> TrainConfig:
    """Collective. Fill in what was left open: the run's folder, the folders of the data."""
    output_dir = str(resumed.path) if resumed else config.run.output_dir
    output_dir = output_dir or str(new_name(config.model.adapter, config.model.model_type))
    run = replace(config.run, output_dir=distributed.broadcast_object(output_dir))
    data, test, read = complete_data(config.data, config.test, config.read, process)
    with distributed.together():
        refuse_without_validation(data)
    return replace(config, data=data, test=test, read=read, run=run)


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
    check_caching(config.data, config.model, model)
    return model, describe(model, base, flags.dump(_groups(config)))


def _check(name, pairs, config, image_size, process, seen) -> tuple[list[Pair], tuple[int, int]]:
    """Read every file of a split once; drop what cannot be asked about. Also returns (H, W) of the
    smallest canvas that holds every picture.
    """
    logbook = Logbook.console(process)
    report = check_pairs(name, pairs, config.read, image_size, process, logbook, seen)
    height, width = (max(sides) for sides in zip(*report.sizes, strict=True))
    return usable(name, pairs, report, config.read, config.prompts, logbook), (height, width)


def _introduce(config, model, training: int, validation: int, process, folder, logbook) -> None:
    """Say what is about to happen; the table of the model's parts goes into a file."""
    summary = parameter_summary(model)
    with distributed.together():
        if process.is_main:
            write_text(folder.model, summary + "\n")
    weights = "random, so all of SAM that the prompt reads trains (--train auto)"
    if model.load_report:
        weights = model.load_report.summary()
    spread = ""
    if config.optim.shard:
        spread = (
            ", sharded" if process.world > 1 else "; --shard has nothing to share out among one"
        )
    sample = " (the sample set)" if config.data.train_image_dir.startswith(str(SAMPLE_SET)) else ""
    logbook.say(
        f"model: {config.model.adapter} on {config.model.model_type} at {model.image_size} px, "
        f"prompt: {config.prompts.prompt}\n"
        f"weights: {weights}\n{summary.splitlines()[-1]}\n"
        f"data: {training} training images in {said_of(config.data)}{sample}\n"
        f"validation: {validation} images\n"
        f"run: {config.run.output_dir}, {process.world} process(es) on {process.device.type}"
        + spread
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
        views=config.data.augment_views,
    )  # fmt: skip
    task = config.read.num_classes, config.prompts.prompt
    criterion = make_loss(config.loss, *task)
    scorers, counter = validation_scores(*task, run.best_by)
    wrapped = to_train(model, options, process)
    optimizer = build_optimizer(wrapped, options)
    schedule = build_schedule(optimizer, options, run.epoch * plan.steps_per_epoch)
    trainer = Trainer(
        wrapped, EveryAnswer(criterion), scorers, optimizer, schedule, process,
        clip_norm=options.clip_norm, precision=options.precision, tell_first_step=options.compile,
    )  # fmt: skip

    caching = keep = None
    if config.data.cache_features != "none":
        caching = FeatureCaching(
            config.data, model, trainer.precision, loader, run.epoch, process, logbook
        )
        dataset, keep = caching.keep("training", dataset), partial(caching.keep, "validation")
    on_gpu = process.device.type == "cuda"
    val_loader = evaluation_loader(
        val_pairs, config.read, config.prompts, image_size, loader, process, keep=keep
    )
    if caching:
        caching.make_room()
    evaluator = Evaluator(
        distributed.evaluated(wrapped), [criterion.scores, *scorers], process, trainer.precision,
        counter, loader.decode_rows,
    )  # fmt: skip

    keys = EpochBatches(plan)
    train_loader = make_loader(dataset, keys, loader.workers, on_gpu)

    def make_batches(epoch: int, seen: int):
        keys.begin(epoch, seen)
        return train_loader

    def validate() -> dict[str, float]:
        progress = logbook.progress(len(val_loader), "validation")
        with progress as bar, distributed.gathered(wrapped):
            return evaluator.run(val_loader, bar.update, stop=trainer.is_asked_to_stop).scores

    def explain_slow_data(pace: Pace) -> str:
        return slow_data(pace, train_loader.num_workers, cores_per_process(), image_size, config)

    prepare = caching.fill if caching else lambda epoch: ()
    check = DdpCheck(trainer, plan, dataset, logbook.say) if run.check_ddp else None
    with train_loader, val_loader, explain_indeterminism():
        result = trainer.fit(
            plan, make_batches, validate, logbook, saved,
            epochs=run.epoch, best_by=run.best_by, patience=run.patience, resume=state,
            prepare=check.after(prepare) if check else prepare,
            log_every=config.log.log_every, explain_slow_data=explain_slow_data,
            save_every=60 * run.save_every,
        )  # fmt: skip
    if check:
        check.same_everywhere("at the end")
    return result
