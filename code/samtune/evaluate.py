"""The verb `evaluate`: score a trained run beside the untuned SAM and the filled box."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from samtune.adapters import ADAPTERS
from samtune.config import (
    EvaluateConfig,
    LossOptions,
    ModelOptions,
    PromptOptions,
    ReadOptions,
    TestDataOptions,
)
from samtune.data.files import Pair
from samtune.data.images import read_image
from samtune.data.masks import read_mask
from samtune.engine import distributed
from samtune.engine.checkpoint import read_metadata
from samtune.engine.distributed import Process
from samtune.engine.evaluator import Evaluation, Evaluator
from samtune.engine.logbook import Logbook
from samtune.errors import UserError
from samtune.losses import MaskLoss
from samtune.metrics.region import region_scores
from samtune.pictures import overlay, sheet, truth_picture, write_png
from samtune.pipeline import (
    check_pairs,
    evaluation_loader,
    filled_box,
    load_pairs,
    original_boxes,
    usable,
)
from samtune.run_folder import RunFolder, newest
from samtune.structures import Batch, Prediction
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
        asked = usable("test", pairs, report, prompts, logbook)

    image_size = models["tuned"].image_size
    loader = evaluation_loader(asked, read, prompts, image_size, config.loader, process)
    loss = MaskLoss(LossOptions())
    results: dict[str, Evaluation] = {}
    shown = {pair.id for pair in asked[:: max(1, len(asked) // EXAMPLES)][:EXAMPLES]}
    pictures = Pictures(folder, {pair.id: pair for pair in asked}, read, shown)
    for name, model in models.items():
        evaluator = Evaluator(
            model.to(process.device), [loss.scores, region_scores], process,
            wanted.precision,
        )  # fmt: skip
        keep_all = wanted.save_predictions and name == "tuned"
        with logbook.progress(len(loader), f"scoring {name}") as bar:
            results[name] = evaluator.run(
                loader, bar.update, lambda p, b, n=name, k=keep_all: pictures.take(n, p, b, k)
            )
    if prompts.prompt == "box":
        evaluator = Evaluator(None, [filled_box], process, "fp32")
        results["box_filled"] = evaluator.run(loader)
    pictures.write_sheet(list(models))

    scores = {name: result.scores for name, result in results.items()} | {
        "images": len(asked),
        "skipped_empty": len(pairs) - len(asked),
        "prompt": prompts.prompt,
        "box_scale": prompts.box_scale,
        "run": str(file),
        **{k: metadata["config"][k] for k in ("adapter", "model_type", "train")},
        "image_size": image_size.plain,
        "epoch": metadata["epoch"],
        "base_sha256": metadata["base_sha256"],
        "test_image_dir": test.test_image_dir,
        "test_slice": test.test_slice,
    }
    if process.is_main:
        folder.scores.write_text(json.dumps(scores, indent=2) + "\n")
        _write_table(folder.table, results)
        logbook.say(_format(results, scores))
        logbook.say(f"written: {folder.scores}, {folder.table}, {folder.examples}")
    return scores


class Pictures:
    """Keeps the predicted masks that a picture needs, and draws them over their images."""

    def __init__(self, folder: RunFolder, pairs: dict[str, Pair], read: ReadOptions, shown: set):
        self.folder, self.pairs, self.read, self.shown = folder, pairs, read, shown
        self.masks: dict[str, dict[str, np.ndarray]] = {}  # id -> name of the model -> mask
        self.boxes: dict[str, list[float]] = {}

    def take(self, name: str, prediction: Prediction, batch: Batch, keep_all: bool) -> None:
        """Look at one scored batch; with `keep_all` write every mask and overlay at once."""
        if not keep_all and not self.shown & set(batch.ids):
            return
        logits = batch.frames.restore(prediction.logits, batch.prompts.image_index)
        masks = (logits[:, 0] > 0).cpu().numpy().astype(np.uint8)
        boxes = original_boxes(batch)
        for row, (key, (height, width)) in enumerate(
            zip(batch.ids, batch.frames.original_size.tolist(), strict=True)
        ):
            mask = masks[row, :height, :width]
            box = boxes[row].tolist() if boxes is not None else None
            if key in self.shown:
                self.masks.setdefault(key, {})[name] = mask
                self.boxes[key] = box
            if keep_all:
                pair = self.pairs[key]
                picture = overlay(
                    read_image(pair.image_path, self.read), mask,
                    read_mask(pair.mask_path, self.read), box,
                )  # fmt: skip
                write_png(self.folder.predictions / "masks" / f"{key}.png", mask * 255)
                write_png(self.folder.predictions / "overlays" / f"{key}.png", picture)

    def write_sheet(self, names: list[str]) -> None:
        """On rank 0, write examples.png: image with truth, then each model's answer, per image."""
        gathered = distributed.gather_objects((self.masks, self.boxes))
        if gathered is None:
            return
        rows = []
        for masks, boxes in gathered:
            for key, by_model in sorted(masks.items()):
                image = read_image(self.pairs[key].image_path, self.read)
                truth = read_mask(self.pairs[key].mask_path, self.read)
                drawn = [overlay(image, by_model[name], truth, boxes[key]) for name in names]
                rows.append([truth_picture(image, truth), *drawn])
        titles = ["truth", *(name.replace("_", "-") for name in names)]
        if rows:
            write_png(self.folder.examples, sheet(rows, titles))


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
    ADAPTERS[metadata["adapter"]].check(options_of(metadata, ModelOptions), prompts.prompt)
    return test, merge(ReadOptions), prompts


def _write_table(path: Path, results: dict[str, Evaluation]) -> None:
    """One line per image, a column per model and score."""
    columns = {
        (name, score): {row["id"]: row[score] for row in result.rows}
        for name, result in results.items()
        for score in result.scores
    }
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *(f"{name}_{score}" for name, score in columns)])
        for row in next(iter(results.values())).rows:
            writer.writerow([row["id"], *(f"{c[row['id']]:.6f}" for c in columns.values())])


def _format(results: dict[str, Evaluation], scores: dict) -> str:
    """The table that people read."""
    names = list(next(iter(results.values())).scores)
    told = "the box of the true mask" if scores["prompt"] == "box" else "nothing"
    lines = [f"{scores['images']} test images, prompt: {told}"]
    lines.append(f"{'':12}" + "".join(f"{name:>10}" for name in names))
    for label, result in results.items():
        cells = (result.scores.get(name) for name in names)
        lines.append(f"{label.replace('_', '-'):12}" + "".join(
            f"{'-':>10}" if value is None else f"{value:10.5f}" for value in cells
        ))  # fmt: skip
    if not scores["base_sha256"] and "zero_shot" in results:
        lines.append("zero-shot: the same SAM before training, from random weights")
    return "\n".join(lines)
