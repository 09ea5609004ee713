"""The verb `evaluate`: score a trained run beside the untuned SAM and the filled box."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samtune.adapters import ADAPTERS
from samtune.config import (
    EvaluateConfig,
    LossOptions,
    ModelOptions,
    PromptOptions,
    ReadOptions,
    TestDataOptions,
    answers_classes,
)
from samtune.data.files import Pair
from samtune.data.images import read_image
from samtune.data.objects import EVERYTHING, target_of
from samtune.data.samples import read_sample
from samtune.engine import distributed
from samtune.engine.checkpoint import read_metadata
from samtune.engine.distributed import Process
from samtune.engine.evaluator import Evaluation, Evaluator
from samtune.engine.logbook import Logbook
from samtune.errors import UserError
from samtune.losses import make_loss
from samtune.metrics.classes import majority, per_class
from samtune.pictures import (
    class_colours,
    overlay,
    paint_classes,
    sheet,
    truth_picture,
    write_classes,
    write_png,
)
from samtune.pipeline import (
    check_pairs,
    evaluation_loader,
    filled_box,
    load_pairs,
    original_boxes,
    usable,
    validation_scores,
)
from samtune.run_folder import RunFolder, newest
from samtune.structures import Batch, Prediction, Sample
from samtune.trained import load_trained, load_untuned, options_of, trained_file

EXAMPLES = 6  # pictures on the sheet


def run(config: EvaluateConfig, process: Process) -> dict:
    """Score; write scores.json, scores.csv, examples.png. Returns the content of scores.json.

    Raises UserError on all ranks for a run, a checkpoint or test data that cannot be used.
    """
    wanted = config.evaluate
    with distributed.together():
        file = trained_file(wanted.run_dir or newest().path)
        metadata = read_metadata(file)
        test, read, prompts = _inherit(config, metadata)
        folder = RunFolder(wanted.output_dir or file.parent)
        pairs = load_pairs("test", test.test_image_dir, test.test_mask_dir, test.test_slice, read)
        models = {"tuned": load_trained(file, wanted.checkpoint)}
        if wanted.zero_shot and (untuned := load_untuned(file, wanted.checkpoint)):
            models["zero_shot"] = untuned
        if process.is_main:
            folder.path.mkdir(parents=True, exist_ok=True)
    logbook = Logbook.console(process)
    if wanted.zero_shot and "zero_shot" not in models:
        logbook.say("SAM itself cannot take frames of this size, so it is not scored beside")
    report = check_pairs("test", pairs, read, models["tuned"].image_size, process, logbook)
    with distributed.together():
        asked = usable("test", pairs, report, read, prompts, logbook)

    image_size = models["tuned"].image_size
    loader = evaluation_loader(asked, read, prompts, image_size, config.loader, process)
    task = read.num_classes, prompts.prompt
    loss = make_loss(LossOptions(), *task)
    scorers, counter = validation_scores(*task)
    results: dict[str, Evaluation] = {}
    shown = {pair.id for pair in asked[:: max(1, len(asked) // EXAMPLES)][:EXAMPLES]}
    by_id = {pair.id: pair for pair in asked}
    draw = draw_classes(read) if answers_classes(*task) else draw_object(read)
    pictures = Pictures(folder, by_id, shown, draw)
    for name, model in models.items():
        evaluator = Evaluator(
            model.to(process.device), [loss.scores, *scorers], process, wanted.precision, counter,
            config.loader.decode_rows,
        )  # fmt: skip
        keep_all = wanted.save_predictions and name == "tuned"
        with logbook.progress(len(loader), f"scoring {name}") as bar:
            results[name] = evaluator.run(
                loader, bar.update, lambda p, b, n=name, k=keep_all: pictures.take(n, p, b, k)
            )
    if results["tuned"].prompt.startswith(("box", "whole")):
        evaluator = Evaluator(None, [filled_box], process, "fp32")
        results["box_filled"] = evaluator.run(loader)
    if counter:
        guess = majority(results["tuned"].counts)
        results["majority"] = Evaluation(counter.scores(guess), [], "none")
    pictures.write_sheet(list(models))

    scores = {name: result.scores for name, result in results.items()} | {
        "images": len(asked),
        "skipped_empty": len(pairs) - len(asked),
        "prompt": prompts.prompt,
        "told": results["tuned"].prompt,
        "box_scale": prompts.box_scale,
        "run": str(file),
        **{k: metadata["config"][k] for k in ("adapter", "model_type", "train")},
        "image_size": image_size,
        "epoch": metadata["epoch"],
        "base_sha256": metadata["base_sha256"],
        "test_image_dir": test.test_image_dir,
        "test_slice": test.test_slice,
    }
    if counter:
        scores["num_classes"] = read.num_classes
        scores["iou_per_class"] = {
            name: _plain(per_class(result.counts)[0].tolist())
            for name, result in results.items()
            if result.counts is not None
        }
    if process.is_main:
        folder.scores.write_text(json.dumps(scores, indent=2) + "\n")
        _write_table(folder.table, results)
        logbook.say(_format(results, scores))
        logbook.say(f"written: {folder.scores}, {folder.table}, {folder.examples}")
    return scores


@dataclass(frozen=True)
class Drawing:
    """How answers become masks and pictures.

    masks: (R, C, h, w) logits with their batch -> (R, canvas) uint8. truth: (image, true mask) ->
    RGB. answer: (image, mask, true mask, box or None) -> RGB. write: a mask into a PNG. shown: what
    a sample's mask shows, as `masks` would. read: how files are read.
    """

    masks: Callable[[Prediction, Batch], Tensor]
    truth: Callable
    answer: Callable
    write: Callable[[Path, np.ndarray], None]
    shown: Callable[[Sample], np.ndarray]
    read: ReadOptions


def draw_object(read: ReadOptions) -> Drawing:
    """One kind of object: outlines over the image."""

    def masks(prediction: Prediction, batch: Batch) -> Tensor:
        logits = batch.frames.restore(prediction.logits, batch.prompts.image_index)
        return (logits[:, 0] > 0).to(torch.uint8)

    everything = replace(read, objects="mask")
    return Drawing(
        masks,
        truth_picture,
        overlay,
        lambda path, mask: write_png(path, mask * 255),
        lambda sample: target_of(sample, EVERYTHING, everything),
        read,
    )


def draw_classes(read: ReadOptions) -> Drawing:
    """Class maps: colours over the image."""
    colours = class_colours(read.num_classes)

    def masks(prediction: Prediction, batch: Batch) -> Tensor:
        bands = batch.bands(read.num_classes)
        answers = [batch.at_target(prediction.logits, band).argmax(1) for band in bands]
        return torch.cat(answers, 1).to(torch.uint8)

    return Drawing(
        masks,
        lambda image, truth: paint_classes(image, truth, colours),
        lambda image, mask, truth, box: paint_classes(image, mask, colours),
        lambda path, mask: write_classes(path, mask, colours),
        lambda sample: sample.mask,
        read,
    )


class Pictures:
    """Keeps the predicted masks that a picture needs, and draws them over their images."""

    def __init__(self, folder: RunFolder, pairs: dict[str, Pair], shown: set, draw: Drawing):
        self.folder, self.pairs, self.shown, self.draw = folder, pairs, shown, draw
        self.masks: dict[str, dict[str, np.ndarray]] = {}  # id -> name of the model -> mask
        self.boxes: dict[str, list[float]] = {}

    def take(self, name: str, prediction: Prediction, batch: Batch, keep_all: bool) -> None:
        """Look at one scored batch; with `keep_all` write every mask and overlay at once."""
        if not keep_all and not self.shown & set(batch.ids):
            return
        masks = self.draw.masks(prediction, batch).cpu().numpy()
        boxes = original_boxes(batch)
        sizes, images = batch.frames.original_size.tolist(), batch.image_of_row
        for row, image in enumerate(images):
            key, (height, width) = batch.ids[image], sizes[image]
            mask = masks[row, :height, :width]
            box = boxes[row].tolist() if boxes is not None else None
            if key in self.shown:
                self._keep(name, key, mask, box if images.count(image) == 1 else None)
            if keep_all:
                file = f"{batch.row_names[row]}.png"
                picture = self.draw.answer(self._image(key), mask, self._truth(key), box)
                self.draw.write(self.folder.predictions / "masks" / file, mask)
                write_png(self.folder.predictions / "overlays" / file, picture)

    def _keep(self, name: str, key: str, mask: np.ndarray, box: list[float] | None) -> None:
        """For the sheet: what the rows of an image show together."""
        seen = self.masks.setdefault(key, {})
        seen[name] = np.maximum(mask, seen.get(name, 0))
        self.boxes[key] = box

    def write_sheet(self, names: list[str]) -> None:
        """On rank 0, write examples.png: image with truth, then each model's answer, per image."""
        gathered = distributed.gather_objects((self.masks, self.boxes))
        if gathered is None:
            return
        rows = []
        for masks, boxes in gathered:
            for key, by_model in sorted(masks.items()):
                image, truth = self._image(key), self._truth(key)
                drawn = [self.draw.answer(image, by_model[n], truth, boxes[key]) for n in names]
                rows.append([self.draw.truth(image, truth), *drawn])
        titles = ["truth", *(name.replace("_", "-") for name in names)]
        if rows:
            write_png(self.folder.examples, sheet(rows, titles))

    def _image(self, key: str) -> np.ndarray:
        return read_image(self.pairs[key].image_path, self.draw.read)

    def _truth(self, key: str) -> np.ndarray:
        return self.draw.shown(read_sample(self.pairs[key], self.draw.read).sample)


def _plain(values: list[float]) -> list[float | None]:
    """NaN as null, for JSON."""
    return [None if math.isnan(value) else round(value, 6) for value in values]


def _inherit(
    config: EvaluateConfig, metadata: dict
) -> tuple[TestDataOptions, ReadOptions, PromptOptions]:
    """Test data, reading rules and prompts as the run had them, except for what flags say."""

    def merge(group: type):
        names = group.__dataclass_fields__
        said = {k: v for k, v in config.given.items() if k in names and v != ""}
        return replace(options_of(metadata, group), **said)

    test = merge(TestDataOptions)
    if not test.test_image_dir:
        raise UserError("the run knows no test data: set --test_image_dir and --test_mask_dir "
                        "(TEST_IMAGE_DIR and TEST_MASK_DIR in eval.sh)")  # fmt: skip
    prompts = merge(PromptOptions)
    read = merge(ReadOptions)
    ADAPTERS[metadata["adapter"]].check(
        options_of(metadata, ModelOptions), prompts.prompt, read.num_classes
    )
    return test, read, prompts


def _write_table(path: Path, results: dict[str, Evaluation]) -> None:
    """One line per image, a column per model and score."""
    columns = {
        (name, score): {row["id"]: row[score] for row in result.rows}
        for name, result in results.items()
        if result.rows
        for score in result.rows[0]
        if score != "id"
    }
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *(f"{name}_{score}" for name, score in columns)])
        for row in next(iter(results.values())).rows:
            writer.writerow([row["id"], *(f"{c[row['id']]:.6f}" for c in columns.values())])


def _format(results: dict[str, Evaluation], scores: dict) -> str:
    """The table that people read."""
    names = list(next(iter(results.values())).scores)
    told = {"box": "the box of the true mask", "none": "nothing"}.get(
        scores["told"], scores["told"]
    )
    lines = [f"{scores['images']} test images, prompt: {told}"]
    lines.append(f"{'':12}" + "".join(f"{name:>10}" for name in names))
    for label, result in results.items():
        cells = (result.scores.get(name) for name in names)
        lines.append(f"{label.replace('_', '-'):12}" + "".join(
            f"{'-':>10}" if value is None else f"{value:10.5f}" for value in cells
        ))  # fmt: skip
    if not scores["base_sha256"] and "zero_shot" in results:
        lines.append("zero-shot: the same SAM before training, from random weights")
    if "majority" in results:
        lines.append("majority: the test set's most frequent class, everywhere")
    return "\n".join(lines)
