"""The verb `evaluate`: score a trained run beside the untuned SAM, under one prompt or several."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from samtune import __version__
from samtune.adapters import ADAPTERS
from samtune.config import (
    EvaluateConfig,
    EvaluateOptions,
    ModelOptions,
    PromptOptions,
    ReadOptions,
    TestDataOptions,
    answers_classes,
)
from samtune.data.catalog_rows import DATASETS
from samtune.data.loading import scoring_threads
from samtune.data.objects import check_questions, settle_objects
from samtune.data.prompts import prompts_to_score
from samtune.engine import distributed
from samtune.engine.distributed import Process
from samtune.engine.logbook import Logbook
from samtune.engine.optim import use_tf32
from samtune.errors import UserError
from samtune.gallery import Pictures, drawing_of
from samtune.judging import Bench, Judged
from samtune.metrics.protocols import PROTOCOLS, choose
from samtune.metrics.scoring import OWN_COLUMNS
from samtune.pipeline import check_pairs, usable
from samtune.run_folder import RunFolder, newest
from samtune.sources import look_into_shards, scored_sets
from samtune.tensor_files import file_sha256
from samtune.trained import (
    load_trained,
    load_untuned,
    options_of,
    read_description,
    trained_file,
)

EXAMPLES = 6  # pictures on the sheet
_SAID = {"box": "the box of the true mask", "none": "nothing"}


def run(config: EvaluateConfig, process: Process) -> dict:
    """Score; write scores.json, scores.csv, examples.png. Returns the content of scores.json.

    Raises UserError on all ranks for a run, a checkpoint, a prompt, a protocol or test data that
    cannot be used.
    """
    wanted = config.evaluate
    with distributed.together():
        file = trained_file(wanted.run_dir or newest().path)
        metadata = read_description(file)
        test, read, prompts = _inherit(config, metadata)
        folder = RunFolder(wanted.output_dir or file.parent)
    indexes = look_into_shards(process, test)
    with distributed.together():
        own = metadata["config"].get("dataset", "").split("+")
        sets = scored_sets(test, read, own, config.given, indexes)
        first = next(iter(prompts.values()))
        protocol, *_ = [_protocol(wanted, one.name, one.read, first) for one in sets]
    if len(sets) > 1:
        return _run_each(config, [one.name for one in sets], file, folder, process)
    dataset, pairs, read = sets[0]
    use_tf32(False, process.device)  # float32 scores are float32's
    with distributed.together():
        models = {"tuned": load_trained(file, wanted.checkpoint)}
        if wanted.zero_shot and (untuned := load_untuned(file, wanted.checkpoint)):
            models["zero_shot"] = untuned
        if process.is_main:
            folder.path.mkdir(parents=True, exist_ok=True)
    logbook = Logbook.console(process)
    if wanted.zero_shot and "zero_shot" not in models:
        logbook.say("SAM itself cannot take frames of this size, so it is not scored beside")
    image_size = models["tuned"].image_size
    report = check_pairs("test", pairs, read, image_size, process, logbook)
    with distributed.together():
        # All prompts are asked about the same images, so one that needs an object decides.
        strictest = next((o for o in prompts.values() if o.prompt != "none"), first)
        asked = usable("test", pairs, report, read, strictest, logbook)

    bench = Bench(
        asked, read, config.loader, image_size, protocol, wanted.precision, process, logbook,
        majority=max(range(read.num_classes), key=lambda c: report.classes.pixels[c]),
    )  # fmt: skip
    pictures = Pictures(
        folder,
        {pair.id: pair for pair in asked},
        shown={pair.id for pair in asked[:: max(1, len(asked) // EXAMPLES)][:EXAMPLES]},
        draw=drawing_of(read, first.prompt, DATASETS[dataset].colours if dataset else ()),
        keep_all="tuned" if wanted.save_predictions else "",
        threads=scoring_threads(config.loader.workers),
    )
    judged = {}  # by prompt, then by model
    for name, options in prompts.items():
        judged[name] = bench.judge(models, options, pictures.take if options is first else None)
    pictures.write_sheet(list(models))
    scores = _scores(judged) | {
        "images": len(asked),
        "skipped_empty": len(pairs) - len(asked),
        "prompt": first.prompt,
        "box_scale": first.box_scale,
        "num_classes": read.num_classes,
        "objects": settle_objects(read, first).objects,
        **_origin(file, metadata),
        "image_size": image_size.plain,
        "test_dataset": dataset,
        "test_image_dir": test.test_image_dir,
        "test_list": test.test_list,
        "test_shards": test.test_shards,
        "test_slice": test.test_slice,
    }
    text = json.dumps(scores, indent=2)
    scores = json.loads(text)  # what is returned is what the file says, lists for tuples
    if process.is_main:
        folder.scores.write_text(text + "\n")
        _write_table(folder.table, next(iter(judged.values())))
        logbook.say(_format(judged, scores))
        logbook.say(f"written: {folder.scores}, {folder.table}, {folder.examples}")
    return scores


def _run_each(config: EvaluateConfig, names: list[str], file: Path, folder, process) -> dict:
    """Score several test sets apart, each in a folder of its name; scores.json holds them all."""
    scores = {}
    for name in names:
        wanted = replace(config.evaluate, run_dir=str(file), output_dir=str(folder.path / name))
        given = config.given | {"test_datasets": name}
        scores[name] = run(replace(config, evaluate=wanted, given=given), process)
    if process.is_main:
        folder.scores.write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def _inherit(
    config: EvaluateConfig, metadata: dict
) -> tuple[TestDataOptions, ReadOptions, dict[str, PromptOptions]]:
    """Test data, reading rules and prompts as the run had them, except for what flags say."""

    def merge(group: type):
        names = group.__dataclass_fields__
        said = {k: v for k, v in config.given.items() if k in names and v != ""}
        return replace(options_of(metadata, group), **said)

    test = merge(TestDataOptions)
    sources = {"test_image_dir", "test_list", "test_shards", "test_datasets"}
    if said := {name for name in sources if config.given.get(name)}:  # instead of the run's own
        test = replace(test, **dict.fromkeys(sources - said, ""))
        if said & {"test_datasets", "test_shards"}:
            test = replace(test, test_mask_dir="")
    if not test.named:
        raise UserError("the run knows no test data: set --test_image_dir and --test_mask_dir "
                        "(TEST_IMAGE_DIR and TEST_MASK_DIR in eval.sh), --test_list, "
                        "--test_shards or --test_datasets")  # fmt: skip
    own = merge(PromptOptions)
    read = settle_objects(merge(ReadOptions), options_of(metadata, PromptOptions))
    prompts = prompts_to_score(config.evaluate.prompts, own) or {own.prompt: own}
    for options in prompts.values():
        _check_prompt(metadata, read, options)
    return test, read, prompts


def _check_prompt(metadata: dict, read: ReadOptions, options: PromptOptions) -> None:
    """Refuse a prompt that the run's model cannot be asked with."""
    ADAPTERS[metadata["adapter"]].check(
        options_of(metadata, ModelOptions), options.prompt, read.num_classes
    )
    trained, classes = metadata["config"]["prompt"], options_of(metadata, ReadOptions).num_classes
    if answers_classes(classes, trained) and read.num_classes != classes:
        raise UserError(f"--num_classes {read.num_classes}: the run answers with {classes} classes")
    if answers_classes(read.num_classes, options.prompt) != answers_classes(
        read.num_classes, trained
    ):
        raise UserError(
            f"--prompt {options.prompt}: with several classes, a model trained under --prompt "
            f"{trained} cannot be scored under it: one answers with a mask per class, the other "
            "with one mask per question"
        )
    check_questions(read, options)


def _protocol(
    wanted: EvaluateOptions, dataset: str, read: ReadOptions, prompts: PromptOptions
) -> tuple[str, str]:
    """The protocol and its mode: what flags say, else the data set's where it fits the answers."""
    classes = read.num_classes if answers_classes(read.num_classes, prompts.prompt) else 1
    objects = settle_objects(read, prompts).objects
    name = wanted.protocol
    if not name:
        usual = DATASETS[dataset].protocol if dataset else ""
        name = "semantic" if classes > 1 else "binary"
        if usual and objects == "mask" and (PROTOCOLS[usual].classes > 1) == (classes > 1):
            name = usual
    protocol, mode, _ = choose(name, wanted.protocol_mode, classes)
    if protocol.answer == "instances" and objects not in ("component", "instance"):
        raise UserError(
            f"--protocol {name} scores single objects: the run asks about --objects {objects}"
        )
    return name, mode


def _scores(judged: dict[str, dict[str, Judged]]) -> dict:
    """What scores.json says of models, prompts and conventions."""
    first = next(iter(judged.values()))
    tuned = first["tuned"]
    facts = {k: v for k, v in tuned.result.items() if k not in ("headlines", "scores", "counts")}
    facts["versions"] |= {"samtune": __version__, "torch": torch.__version__}
    several = {
        "prompts": {
            prompt: {"told": results["tuned"].told}
            | {model: result.scores for model, result in results.items()}
            for prompt, results in judged.items()
        }
    }
    return {
        **{model: result.scores for model, result in first.items()},
        **(several if len(judged) > 1 else {}),
        "told": tuned.told,
        "headlines": {model: result.headlines for model, result in first.items()},
        "counts": tuned.result["counts"],
        **facts,
    }


def _origin(file: Path, metadata: dict) -> dict:
    """Which run was scored."""
    return {
        "run": str(file),
        "run_sha256": file_sha256(file),
        **{name: metadata["config"][name] for name in ("adapter", "model_type", "train")},
        "epoch": metadata["epoch"],
        "base_sha256": metadata["base_sha256"],
    }


def _write_table(path: Path, results: dict[str, Judged]) -> None:
    """One line per picture (volume, object), a column per model and score."""
    rows = {name: {row["id"]: row for row in result.table} for name, result in results.items()}
    # names come from annotations and file names: they are data, whatever they hold
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        columns = [
            (name, score)
            for name, result in results.items()
            for score in (result.table[0] if result.table else ())
            if score not in OWN_COLUMNS
        ]
        writer.writerow([*OWN_COLUMNS, *(f"{name}_{score}" for name, score in columns)])
        for key, row in rows["tuned"].items():
            facts = [key, row["group"], int(row["empty_truth"]), row["ignored_pixels"]]
            cells = (rows[name][key][score] for name, score in columns)
            writer.writerow([*facts, *("" if math.isnan(c) else f"{c:.6f}" for c in cells)])


def _format(judged: dict[str, dict[str, Judged]], scores: dict) -> str:
    """The table that people read: a line per model, under several prompts per prompt and model."""
    first = next(iter(judged.values()))
    tuned = first["tuned"]
    names = [*tuned.losses, *tuned.headlines]
    width = max(len(label) for label in (*first, *(judged if len(judged) > 1 else ()))) + 2
    told = f"prompt: {_SAID.get(tuned.told, tuned.told)}" if len(judged) == 1 else "by prompt"
    protocol = scores["protocol"]
    lines = [f"{scores['images']} test images, {told} ({protocol['name']}, {protocol['mode']})"]
    lines.append(" " * width + "".join(f"{name:>{_column(name)}}" for name in names))
    for prompt, results in judged.items():
        if len(judged) > 1:
            lines.append(f"{prompt}: {_SAID.get(results['tuned'].told, results['tuned'].told)}")
        for label, result in results.items():
            cells = ((result.scores.get(name), _column(name)) for name in names)
            lines.append(f"{label.replace('_', '-'):{width}}" + "".join(
                f"{'-':>{w}}" if value is None else f"{value:{w}.5f}" for value, w in cells
            ))  # fmt: skip
    return "\n".join(lines + _remarks(first, scores))


def _column(name: str) -> int:
    """How wide a score's column is."""
    return max(10, len(name) + 2)


def _remarks(results: dict[str, Judged], scores: dict) -> list[str]:
    """What stands under the table."""
    lines, tuned = [], results["tuned"]
    spans = [
        f"{name} {span[0]:.4f}..{span[1]:.4f}"
        for name, headline in tuned.headlines.items()
        if (span := headline["interval"])
    ]
    if spans:
        lines.append(f"95 % intervals of tuned: {', '.join(spans)}")
    classes = {n.removeprefix("iou/"): v for n, v in tuned.scores.items() if n.startswith("iou/")}
    if classes:
        told = (f"{name} {'-' if v is None else f'{v:.3f}'}" for name, v in classes.items())
        lines.append(f"IoU of tuned per class: {', '.join(told)}")
    if not scores["base_sha256"] and "zero_shot" in results:
        lines.append("zero-shot: the same SAM before training, from random weights")
    if "majority" in results:
        lines.append("majority: the test set's most frequent class, everywhere")
    return lines
