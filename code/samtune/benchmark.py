"""The verb `benchmark`: time the trainer's own `train_step` on random data, without files."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import replace

import torch

from samtune.adapters import ADAPTERS, build_model
from samtune.config import BenchmarkConfig, PromptOptions, Size
from samtune.data.prompts import collate_prompts, make_prompt
from samtune.engine import distributed
from samtune.engine.compiling import check_compiler
from samtune.engine.distributed import Process
from samtune.engine.optim import build_optimizer, build_schedule, use_tf32
from samtune.engine.trainer import Trainer, explain_out_of_memory
from samtune.losses import EveryAnswer, make_loss
from samtune.models.weights import find_checkpoint
from samtune.pipeline import made_ready, validation_scores
from samtune.structures import Batch, Frame, Frames, Prompts


def run(config: BenchmarkConfig, process: Process) -> dict:
    """Time `--steps` optimizer steps after `--warmup` untimed ones; print one JSON line.

    Weights are random unless --checkpoint names a file: speed does not depend on them. Images
    fill the frame; the loss is taken there.
    """
    with distributed.together():
        options = config.model
        task = classes, prompt = config.benchmark.num_classes, config.prompts.prompt
        ADAPTERS[options.adapter].check(options, prompt, classes)
        if config.optim.compile:
            check_compiler(process.device)
        checkpoint = None if options.checkpoint == "auto" else find_checkpoint(options)
        if options.train == "auto":
            options = replace(options, train="adapter")
        model = build_model(options, config.adapter, prompt, checkpoint, config.run.seed, classes)
        scorers, _ = validation_scores(*task, "loss")
    distributed.seed_everything(config.run.seed, process.rank, config.run.deterministic)
    use_tf32(config.optim.tf32, process.device)
    counts = {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in model.parameters()),
    }
    image_size = model.image_size
    wrapped = made_ready(model, config.optim, process)
    optimizer = build_optimizer(wrapped, config.optim)
    steps = config.benchmark.warmup + config.benchmark.steps
    trainer = Trainer(
        wrapped,
        EveryAnswer(make_loss(config.loss, *task)),
        scorers,
        optimizer,
        build_schedule(optimizer, config.optim, steps),
        process,
        clip_norm=config.optim.clip_norm,
        precision=config.optim.precision,
    )
    batch = random_batch(config.loader.batch_size, image_size, config.prompts)
    micro_batches = [batch] * config.optim.accumulate
    count = len(micro_batches) * config.loader.batch_size * process.world
    model.train()
    with explain_out_of_memory():
        seconds, first = _time(trainer, micro_batches, count, config, process)
    result = {
        "images_per_second": round(count / seconds, 4),
        "seconds_per_step": round(seconds, 6),
        "first_step_seconds": round(first, 6),
        "peak_memory_bytes": peak_memory(process),
        **counts,
        "adapter": options.adapter,
        "model_type": options.model_type,
        "image_size": image_size.plain,
        "batch_size": config.loader.batch_size,
        "accumulate": config.optim.accumulate,
        "processes": process.world,
        "precision": trainer.precision,
        "tf32": config.optim.tf32 and process.device.type == "cuda",
        "compile": config.optim.compile,
        "activation_checkpointing": config.optim.activation_checkpointing,
        "train": options.train,
        "prompt": prompt,
        "num_classes": classes,
        "refine_steps": config.prompts.refine_steps,
        "steps": config.benchmark.steps,
        "device": device_name(process),
        "torch": torch.__version__,
    }
    if process.is_main:
        print(json.dumps(result), flush=True)
    return result


def random_batch(
    batch_size: int, image_size: int | tuple[int, int], prompt: PromptOptions
) -> Batch:
    """Images of noise with a box-shaped object each, in frames without padding.

    image_size: (S_h, S_w), or the side of a square.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = size = Size.read(image_size)
    shape = (batch_size, 3, height, width)
    image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    target = torch.zeros(batch_size, height, width, dtype=torch.uint8)
    target[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1
    prompts = Prompts()
    if prompt.prompt != "none":
        told = (
            make_prompt(mask, Frame(size, size), size, prompt, train=True, words=(0, i))
            for i, mask in enumerate(target.numpy())
        )
        prompts = collate_prompts(list(told))
    return Batch(
        image,
        target,
        prompts,
        Frames.collate([Frame(size, size)] * batch_size, size),
        torch.ones(batch_size),
        in_frame=True,
        ids=["random"] * batch_size,
        paths=["random"] * batch_size,
    )


def _time(
    trainer, micro_batches, count: int, config: BenchmarkConfig, process: Process
) -> tuple[float, float]:
    """Seconds per step, mean over the timed ones; and those of the very first step.

    The first one compiles, tunes and allocates: with --warmup 0 it is among the timed ones, too.
    """
    began = time.perf_counter()
    for step in range(config.benchmark.warmup + config.benchmark.steps):
        if step == config.benchmark.warmup:
            _wait(process)
            if process.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(process.device)
            start = time.perf_counter()
        trainer.train_step(micro_batches, count)
        if step == 0:
            _wait(process)
            first = time.perf_counter() - began
    trainer.check()
    _wait(process)
    return (time.perf_counter() - start) / config.benchmark.steps, first


def _wait(process: Process) -> None:
    """Until the device has done all that was queued."""
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)


def peak_memory(process: Process) -> int:
    """Bytes: allocated on the GPU during the timed steps, or resident in RAM over the whole run."""
    if process.device.type == "cuda":
        return torch.cuda.max_memory_allocated(process.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def device_name(process: Process) -> str:
    """What the steps ran on."""
    if process.device.type == "cuda":
        return torch.cuda.get_device_name(process.device)
    return f"CPU, {torch.get_num_threads()} threads"
