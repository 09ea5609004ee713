"""The verb `benchmark`: time the trainer's own `train_step`, or scoring, on random data without
files; or find the largest batch that fits into memory (`--probe`).
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from itertools import repeat
from typing import NamedTuple

import torch

from samtune import probe
from samtune.adapters import ADAPTERS, build_model
from samtune.config import BenchmarkConfig, Size
from samtune.engine import distributed
from samtune.engine.compiling import check_compiler
from samtune.engine.distributed import Process
from samtune.engine.evaluator import Evaluator
from samtune.engine.optim import build_optimizer, build_schedule, resolve_precision, use_tf32
from samtune.engine.throughput import peak_memory
from samtune.engine.trainer import Trainer, explain_out_of_memory
from samtune.errors import UserError
from samtune.losses import EveryAnswer, make_loss
from samtune.machine import Stopwatch, device_name, matmul_peak
from samtune.models.segmenter import PromptedSam
from samtune.models.weights import find_checkpoint
from samtune.pipeline import prepare, to_train, validation_scores
from samtune.random_data import random_batch
from samtune.structures import Batch


class Timed(NamedTuple):
    """seconds: of each timed step. first: of the very first one, which compiles, tunes, allocates.
    peak: bytes, see `peak_memory`.
    """

    first: float
    seconds: list[float]
    peak: int


def run(config: BenchmarkConfig, process: Process) -> dict:
    """Time `--steps` steps after `--warmup` untimed ones; print one JSON line.

    Weights are random unless --checkpoint names a file: speed does not depend on them. With --probe
    the line is what `probe.run` returns.
    """
    with distributed.together():
        config = _settled(config)
    if config.benchmark.probe:
        return _print(probe.run(config, process), process)
    with distributed.together():
        if config.optim.compile:
            check_compiler(process.device)
        model = _build(config)
        batch = _batch(config, model)
        if config.optim.accumulate < 1:
            raise UserError(f"--accumulate {config.optim.accumulate}: must be at least 1")
    distributed.seed_everything(config.run.seed, process.rank, config.run.deterministic)
    use_tf32(config.optim.tf32, process.device)
    facts = _facts(config, model, process)
    with explain_out_of_memory():
        time_steps = _time_scoring if config.benchmark.evaluate else _time_training
        timed = time_steps(config, model, batch, process)
    model = None  # what is measured now should not share the memory with it
    images = facts["accumulate"] * facts["batch_size"] * process.world
    seconds = statistics.mean(timed.seconds)
    result = {
        "images_per_second": round(images / seconds, 4),
        "seconds_per_step": round(seconds, 6),
        "median_seconds": round(statistics.median(timed.seconds), 6),
        "seconds_of_steps": [round(lap, 6) for lap in timed.seconds],
        "first_step_seconds": round(timed.first, 6),
        "peak_memory_bytes": timed.peak,
        **(_share_of_peak(config, batch, timed, process) if config.benchmark.peak else {}),
        **facts,
    }
    return _print(result, process)


def _print(result: dict, process: Process) -> dict:
    if process.is_main:
        print(json.dumps(result), flush=True)
    return result


def _settled(config: BenchmarkConfig) -> BenchmarkConfig:
    """With what is left open decided. Raises UserError for what cannot be timed."""
    options, timed = config.model, config.benchmark
    ADAPTERS[options.adapter].check(options, config.prompts.prompt, timed.num_classes)
    if timed.steps < 1 or timed.warmup < 0:
        raise UserError("--steps must be at least 1, and --warmup at least 0")
    if config.loader.batch_size == "auto":
        raise UserError("--batch_size auto is for training; `benchmark --probe` finds its number")
    if timed.probe and timed.evaluate:
        raise UserError("--probe is about training: leave out --evaluate")
    if options.train == "auto":
        options = replace(options, train="adapter")
    # A warm-up of the learning rate may be longer than what is timed, and costs nothing.
    return replace(config, model=options, optim=replace(config.optim, warmup_steps=0))


def _build(config: BenchmarkConfig) -> PromptedSam:
    """The model on the CPU."""
    options, prompt, classes = config.model, config.prompts.prompt, config.benchmark.num_classes
    checkpoint = None if options.checkpoint == "auto" else find_checkpoint(options)
    model = build_model(options, config.adapter, prompt, checkpoint, config.run.seed, classes)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.base_keys = frozenset(model.state_dict()) - trainable  # as if those came from a file
    return model


def _batch(config: BenchmarkConfig, model: PromptedSam) -> Batch:
    asked = config.benchmark
    at_original = config.loss.loss_resolution == "original"
    return random_batch(
        config.loader.batch_size, model.image_size, config.prompts, asked.rows,
        asked.picture_size if at_original else Size(0, 0),
    )  # fmt: skip


def _criterion(config: BenchmarkConfig) -> EveryAnswer:
    return EveryAnswer(make_loss(config.loss, config.benchmark.num_classes, config.prompts.prompt))


def _facts(config: BenchmarkConfig, model: PromptedSam, process: Process) -> dict:
    """What was timed, and on what."""
    return {
        "mode": "evaluate" if config.benchmark.evaluate else "train",
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "adapter": config.model.adapter,
        "model_type": config.model.model_type,
        "image_size": model.image_size.plain,
        "batch_size": config.loader.batch_size,
        "rows": config.benchmark.rows,
        "accumulate": 1 if config.benchmark.evaluate else config.optim.accumulate,
        "processes": process.world,
        "precision": resolve_precision(config.optim.precision, process.device),
        "tf32": config.optim.tf32 and process.device.type == "cuda",
        "compile": config.optim.compile,
        "activation_checkpointing": config.optim.activation_checkpointing,
        "shard": config.optim.shard,
        "train": config.model.train,
        "prompt": config.prompts.prompt,
        "num_classes": config.benchmark.num_classes,
        "refine_steps": config.prompts.refine_steps,
        "steps": config.benchmark.steps,
        "device": device_name(process),
        "torch": torch.__version__,
    }


def _time_training(config, model: PromptedSam, batch: Batch, process: Process) -> Timed:
    """Optimizer steps on the same micro-batch."""
    scorers, _ = validation_scores(config.benchmark.num_classes, config.prompts.prompt, "loss")
    wrapped = to_train(model, config.optim, process)
    optimizer = build_optimizer(wrapped, config.optim)
    timed = config.benchmark
    trainer = Trainer(
        wrapped,
        _criterion(config),
        scorers,
        optimizer,
        build_schedule(optimizer, config.optim, timed.warmup + timed.steps),
        process,
        clip_norm=config.optim.clip_norm,
        precision=config.optim.precision,
    )
    micro_batches = [batch] * config.optim.accumulate
    count = len(micro_batches) * config.loader.batch_size * process.world
    model.train()
    watch, first = Stopwatch(process.device), Stopwatch(process.device)
    first.mark()
    for step in range(timed.warmup + timed.steps):
        if step == timed.warmup:
            _begin(watch, process)
        trainer.train_step(micro_batches, count)
        if step == 0:
            first.mark()
        if step >= timed.warmup:
            watch.mark()
    trainer.check()
    return Timed(*first.laps(), watch.laps(), peak_memory(process))


def _time_scoring(config, model: PromptedSam, batch: Batch, process: Process) -> Timed:
    """Batches as validation takes them: encoded, decoded in parts, scored."""
    task = config.benchmark.num_classes, config.prompts.prompt
    scorers, counter = validation_scores(*task, "loss")
    prepare(model.requires_grad_(False), config.optim, process)
    evaluator = Evaluator(
        model.to(process.device),
        [make_loss(config.loss, *task).scores, *scorers],
        process,
        config.optim.precision,
        counter,
        config.loader.decode_rows,
    )
    timed, watch, first = config.benchmark, Stopwatch(process.device), Stopwatch(process.device)
    first.mark()
    evaluator.run(repeat(batch, max(timed.warmup, 1)), progress=lambda _: first.mark())
    _begin(watch, process)
    evaluator.run(repeat(batch, timed.steps), progress=lambda _: watch.mark())
    return Timed(first.laps()[0], watch.laps(), peak_memory(process))


def _begin(watch: Stopwatch, process: Process) -> None:
    """Once the device has done all that was queued, the first lap and its memory begin."""
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)
        torch.cuda.reset_peak_memory_stats(process.device)
    watch.mark()


def _share_of_peak(config, batch: Batch, timed: Timed, process: Process) -> dict:
    """What a step computes in one process, and how near that is to nothing but products.

    gmacs: 10^9 multiply-accumulates of one image's forward pass with its questions. flops_per_step:
    operations of the products that a step needs, forward and backward; what checkpointed blocks
    compute again, element-wise work and the optimizer are not among them (see `count_step`).
    share_of_peak: those over what `matmul_peak` would do in the median step.
    """
    # Imported here, as it would add 80 MiB to the peak of what was timed.
    from samtune.complexity import build_weightless, count_step

    training = not config.benchmark.evaluate
    classes, prompt = config.benchmark.num_classes, config.prompts.prompt
    model = build_weightless(config.model, config.adapter, classes, prompt)
    work = count_step(model.train(training), batch, _criterion(config) if training else None)
    flops = work.flops * (config.optim.accumulate if training else 1)
    if process.device.type == "cuda":
        torch.cuda.empty_cache()
    peak = matmul_peak(process.device, resolve_precision(config.optim.precision, process.device))
    return {
        "gmacs": round(work.macs / config.loader.batch_size / 1e9, 4),
        "flops_per_step": flops,
        "matmul_peak_flops": round(peak),
        "share_of_peak": round(flops / statistics.median(timed.seconds) / peak, 4),
    }
