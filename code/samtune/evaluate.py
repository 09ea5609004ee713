"""The verb `evaluate`: score a trained run beside the untuned SAM and the filled box."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

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
from samtune.engine import distributed
from samtune.engine.checkpoint import read_metadata
from samtune.engine.distributed import Process
from samtune.engine.evaluator import Evaluation, Evaluator
from samtune.engine.logbook import Logbook
from samtune.errors import UserError
from samtune.gallery import Pictures, draw_classes, draw_object
from samtune.losses import make_loss
from samtune.metrics.classes import majority, per_class
from samtune.pipeline import (
    check_pairs,
    evaluation_loader,
    filled_box,
    usable,
    validation_scores,
)
from samtune.run_folder import RunFolder, newest
from samtune.sources import scored_set
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
    if len(names := test.test_datasets.split(",")) > 1:
        return _run_each(config, names, file, folder, process)
    with distributed.together():
        own = metadata["config"].get("dataset", "").split("+")
        dataset, pairs, read = scored_set(test, read, own, config.given)
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
            model.to(process.device), [loss.scores, *scorers], process, wanted.precision, counter
        )  # fmt: skip
        keep_all = wanted.save_predictions and name == "tuned"
        with logbook.progress(len(loader), f"scoring {name}") as bar:
            results[name] = evaluator.run(
                loader, bar.update, lambda p, b, n=name, k=keep_all: pictures.take(n, p, b, k)
            )
    if prompts.prompt == "box":
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
        "box_scale": prompts.box_scale,
        "run": str(file),
        **{k: metadata["config"][k] for k in ("adapter", "model_type", "train")},
        "image_size": image_size.plain,
        "epoch": metadata["epoch"],
        "base_sha256": metadata["base_sha256"],
        "test_dataset": dataset,
        "test_image_dir": test.test_image_dir,
        "test_list": test.test_list,
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


def _plain(values: list[float]) -> list[float | None]:
    """NaN as null, for JSON."""
    return [None if math.isnan(value) else round(value, 6) for value in values]


def _run_each(config: EvaluateConfig, names: list[str], file: Path, folder, process) -> dict:
    """Score several test sets apart, each in a folder of its name; scores.json holds them all."""
    scores = {}
    for name in map(str.strip, names):
        wanted = replace(
            config.evaluate, run_dir=str(file), output_dir=str(folder.path / name)
        )  # fmt: skip
        given = config.given | {"test_datasets": name}
        scores[name] = run(replace(config, evaluate=wanted, given=given), process)
    if process.is_main:
        folder.scores.write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def _inherit(
    config: EvaluateConfig, metadata: dict
) -> tuple[TestDataOptions, ReadOptions, PromptOptions]:
    """Test data, reading rules and prompts as the run had them, except for what flags say."""

    def merge(group: type):
        names = group.__dataclass_fields__
        said = {k: v for k, v in config.given.items() if k in names and v != ""}
        return replace(options_of(metadata, group), **said)

    test = merge(TestDataOptions)
    sources = {"test_image_dir", "test_list", "test_datasets"}
    if said := {name for name in sources if config.given.get(name)}:  # instead of the run's own
        test = replace(test, **dict.fromkeys(sources - said, ""))
        if "test_datasets" in said:
            test = replace(test, test_mask_dir="")
    if not test.named:
        raise UserError("the run knows no test data: set --test_image_dir and --test_mask_dir "
                        "(TEST_IMAGE_DIR and TEST_MASK_DIR in eval.sh), --test_list or "
                        "--test_datasets")  # fmt: skip
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
    if "majority" in results:
        lines.append("majority: the test set's most frequent class, everywhere")
    return "\n".join(lines)
