"""The way from files to a model's input and to steps, composed: what several verbs share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from samtune.config import (
    LoaderOptions,
    OptimOptions,
    PromptOptions,
    ReadOptions,
    Size,
    answers_classes,
)
from samtune.data.datasets import SegmentationDataset
from samtune.data.files import Pair
from samtune.data.loading import make_loader
from samtune.data.objects import settle_objects
from samtune.data.sampler import eval_batches
from samtune.data.scan import ScanReport, SeenPictures, scan_pairs
from samtune.engine import distributed
from samtune.engine.compiling import compile_blocks
from samtune.engine.distributed import Process
from samtune.engine.evaluator import Scorer
from samtune.engine.logbook import Logbook
from samtune.engine.optim import NUMBERS, resolve_precision
from samtune.errors import UserError
from samtune.metrics.classes import ClassCounts
from samtune.metrics.region import region_scores
from samtune.models.anatomy import attention_blocks, checkpoint_activations, hold_frozen
from samtune.models.segmenter import PromptedSam
from samtune.structures import Batch


def check_pairs(
    name: str,
    pairs: list[Pair],
    read: ReadOptions,
    image_size: Size,
    process: Process,
    logbook: Logbook,
    seen: SeenPictures | None = None,
) -> ScanReport:
    """Read every file once, each rank its share, before anything is trained on them.

    seen: the pictures of other splits, by content; rank 0 says which of these are among them.
    Raises UserError on every rank, with all problems listed, if a file cannot be used.
    """
    mine = pairs[process.rank :: process.world]
    with logbook.progress(len(mine), f"checking {name} files") as bar:
        report = scan_pairs(mine, read, bar.update, image_size)
    reports = distributed.gather_objects(report)
    whole = ScanReport.merge(reports) if reports else None
    report = distributed.broadcast_object(whole and whole.without_pictures())
    report.raise_problems()
    if whole:
        for remark in whole.remarks + (seen.add(name, whole) if seen else []):
            logbook.say(f"{name}: {remark}")
    return report


def usable(
    name: str,
    pairs: list[Pair],
    report: ScanReport,
    read: ReadOptions,
    prompts: PromptOptions,
    logbook: Logbook,
) -> list[Pair]:
    """The pairs that can be asked about: without object there is no box (`--empty_masks`)."""
    objects = settle_objects(read, prompts).objects
    needed = objects != "mask" or (prompts.prompt != "none" and prompts.empty_masks == "skip")
    if not needed or not report.empty:
        return pairs
    kept = report.without_empty(pairs)
    logbook.say(f"{name}: the {len(pairs) - len(kept)} images without object are skipped")
    if not kept:
        raise UserError(
            f"no {name} image holds an object, so --prompt {prompts.prompt} has nothing to ask"
        )
    return kept


def evaluation_loader(
    pairs: list[Pair],
    read: ReadOptions,
    prompts: PromptOptions,
    image_size: Size,
    loader: LoaderOptions,
    process: Process,
    resolution: str = "original",
    keep: Callable[[SegmentationDataset], SegmentationDataset] | None = None,
):
    """Batches of this rank's share of `pairs`, each image once.

    resolution: of the targets, at each picture's "original" size or in the model's "frame". keep:
    makes a dataset read features that were kept.
    """
    dataset = SegmentationDataset(pairs, read, image_size, prompts, resolution)
    dataset = keep(dataset) if keep else dataset
    batches = eval_batches(len(pairs), loader.batch_size, process.rank, process.world)
    return make_loader(dataset, batches, loader.workers, process.device.type == "cuda")


def to_train(model: PromptedSam, options: OptimOptions, process: Process) -> nn.Module:
    """Collective. The model as training calls it, made ready in the one legal order.

    Nothing but an optimizer may follow; evaluation goes on with the model itself.
    """
    prepare(model, options, process)
    shard_by = attention_blocks(model.image_encoder) if options.shard else ()
    return distributed.wrap(model, process, shard_by)


def prepare(model: PromptedSam, options: OptimOptions, process: Process) -> None:
    """How the image encoder's blocks compute, in place; names and results stay as they are.

    Frozen weights that the base checkpoint brings are held in half precision where it computes so.
    Raises UserError for what does not go together.
    """
    if options.compile and options.shard:  # validation's copy of the model would call the shards
        raise UserError("--shard does not go with --compile: leave one of them out")
    precision = resolve_precision(options.precision, process.device)
    if precision != "fp32" and not options.shard:  # FSDP wants one number format for all
        hold_frozen(model, NUMBERS[precision])
    if options.compile:
        compile_blocks(attention_blocks(model.image_encoder))
    # After compiling: what is computed again is what was compiled.
    checkpoint_activations(model.image_encoder, options.activation_checkpointing)


def validation_scores(
    num_classes: int, prompt: str, best_by: str
) -> tuple[list[Scorer], ClassCounts | None]:
    """What is measured while training: scores of rows, or counts of classes over the set.

    Raises UserError if the score that chooses the best epoch is not among them.
    """
    classes = answers_classes(num_classes, prompt)
    if best_by not in (known := ("loss", "mIoU") if classes else ("loss", "iou", "dice")):
        raise UserError(f"--best_by {best_by}: this run measures {', '.join(known)}")
    return ([], ClassCounts(num_classes)) if classes else ([region_scores], None)


def original_boxes(batch: Batch) -> Tensor | None:
    """(R, 4) float64: the box prompts in pixels of the original pictures; None without boxes."""
    if batch.prompts.boxes is None:
        return None
    scale = batch.frames.original_size.double() / batch.frames.valid_size.double()
    if batch.prompts.image_index is not None:
        scale = scale[batch.prompts.image_index]
    return (batch.prompts.boxes.double() * scale.flip(1).repeat(1, 2)).round()  # x, y, x, y
