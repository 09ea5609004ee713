"""The verb `check`: look at every image and mask before training, and say what is there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from samtune import __version__
from samtune.adapters import ADAPTERS
from samtune.check_memory import in_words, memory_guess
from samtune.check_page import page
from samtune.check_sheet import Tile, draw_tiles, sheet_of
from samtune.check_sources import Source, find_sources
from samtune.config import CheckConfig, Size
from samtune.data.catalog_rows import DATASETS
from samtune.data.codings import coding_of
from samtune.data.findings import (
    ERROR,
    FACT,
    LEVELS,
    WARNING,
    Finding,
    Split,
    covers,
    findings_of,
    printable,
)
from samtune.data.guesses import guess
from samtune.data.images import parse_range
from samtune.data.inspection import Facts, Inspected
from samtune.data.leaks import leaks_between
from samtune.data.loading import cores_per_process, make_loader
from samtune.data.objects import check_questions
from samtune.engine import distributed
from samtune.engine.distributed import Process
from samtune.engine.logbook import Logbook
from samtune.errors import UserError
from samtune.pictures import write_png
from samtune.run_folder import ROOT
from samtune.sources import complete_data, look_into_shards, said_of

FOLDER = ROOT / "check"  # where --output_dir says nothing; a later check overwrites it
_AT_ONCE = 16  # pairs that a loader process reads before it hands over what it found
_SPOKEN = {ERROR: 10, WARNING: 3, FACT: 0}  # examples on the console
_QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


def run(config: CheckConfig, process: Process) -> dict:
    """Read all files, each rank its share; write check.json, check.html and check.png on rank 0.

    Returns what check.json says (on rank 0, else nothing of it). Raises UserError on all ranks
    where there are errors in the data (with `--strict` also for warnings), after all is written;
    and before anything is read for flags that no data could be read by.
    """
    logbook = Logbook.console(process)
    data, test, read = complete_data(config.data, config.test, config.read, process)
    config = replace(config, data=data, test=test, read=read)
    with distributed.together():
        _check_flags(config)
    indexes = look_into_shards(process, data, test)
    frame = ADAPTERS[config.model.adapter].frame_size(config.model)
    sources, findings = find_sources(config, indexes)
    splits = []
    for source in sources:
        facts = _inspect(source, config.loader.workers, process, logbook)
        splits.append(Split(source.name, source.pairs, facts, source.read, frame))
    report = {}
    with distributed.together():
        if process.is_main:
            report = _report(config, sources, splits, findings, logbook)
    verdict = distributed.broadcast_object(report.get("failed", ""))
    if verdict:
        raise UserError(verdict)
    return report


def _check_flags(config: CheckConfig) -> None:
    """Refuse flags that contradict each other, as training does."""
    read, row = config.read, ADAPTERS[config.model.adapter]
    row.check(config.model, config.prompts.prompt, read.num_classes, config.data.crop)
    check_questions(read, config.prompts)
    coding_of(read)
    if read.intensity_range != "auto":
        parse_range(read.intensity_range)
    if config.check.pictures < 0:
        raise UserError(f"--pictures {config.check.pictures}: must be at least 0")


def _inspect(source: Source, workers: int, process: Process, logbook: Logbook) -> list[Facts]:
    """Collective. The facts about every pair on rank 0; elsewhere those of this rank's share."""
    mine = source.pairs[process.rank :: process.world]
    keys = [range(len(mine))[i : i + _AT_ONCE] for i in range(0, len(mine), _AT_ONCE)]
    workers = cores_per_process() if workers == -1 else workers
    facts: list[Facts] = []
    with distributed.together():
        loader = make_loader(Inspected(mine, source.read), keys, workers, collate=list)
        bar = logbook.progress(len(mine), f"checking {source.name} files", "pair")
        with closing(loader), bar:
            for part in loader:
                facts += part
                bar.update(len(part))
    parts = distributed.gather_objects(facts)
    if parts is None:
        return facts
    whole = [None] * len(source.pairs)
    for rank, part in enumerate(parts):
        whole[rank :: process.world] = part
    return whole


def _report(
    config: CheckConfig,
    sources: Sequence[Source],
    splits: Sequence[Split],
    findings: list[Finding],
    logbook: Logbook,
) -> dict:
    """Judge, write and say. Returns the content of check.json, and "failed": why to end badly."""
    findings = findings + [finding for split in splits for finding in findings_of(split)]
    findings += leaks_between(splits)
    sizes = [one.size for one in splits[0].facts]
    memory = _memory(config, splits[0].frame, sizes, findings)
    findings = sorted(map(_cleaned, findings), key=lambda found: LEVELS.index(found.level))
    counts = Counter(found.level for found in findings)
    tiles = draw_tiles(
        splits, config.check.pictures, config.run.seed, config.prompts.prompt,
        {source.name: DATASETS[source.dataset].colours for source in sources if source.dataset},
    )  # fmt: skip
    verdict = f"{counts[ERROR]} error(s) and {counts[WARNING]} warning(s)"
    about = _about(config, splits)
    report = {
        "version": __version__,
        "verdict": verdict,
        "errors": counts[ERROR],
        "warnings": counts[WARNING],
        "about": dict(about),
        "splits": {split.name: summary(split) for split in splits},
        "findings": [finding._asdict() for finding in findings],
        "memory_bytes": memory,
    }
    folder = Path(config.run.output_dir or FOLDER)
    _write(folder, report, page(verdict, splits, findings, about, tiles), tiles)
    for line in _in_words(splits, findings):
        logbook.say(line)
    logbook.say(
        f"written: {', '.join(str(folder / f'check.{e}') for e in ('html', 'png', 'json'))}"
    )
    failed = counts[ERROR] or (config.check.strict and counts[WARNING])
    return report | {"failed": f"{verdict} in the data: {folder / 'check.html'}" if failed else ""}


def _memory(config, frame: Size, sizes: Sequence[tuple[int, int]], findings: list[Finding]) -> dict:
    """The estimate, which becomes a finding, too."""
    try:
        guessed = memory_guess(config, frame, sizes)
    except UserError as error:
        findings.append(Finding(ERROR, "model", "", str(error)))
        return {}
    findings.append(Finding(FACT, "memory", "", in_words(guessed)))
    return guessed


def _about(config: CheckConfig, splits: Sequence[Split]) -> list[tuple[str, str]]:
    """What was looked at, name and value."""
    counts = ", ".join(f"{len(split.facts)} {split.name}" for split in splits)
    return [
        ("pairs", printable(counts)),
        ("training data", printable(" ".join(said_of(config.data).split()))),
        ("model", f"{config.model.adapter} on {config.model.model_type}"),
        ("frame", f"{splits[0].frame} px, --resize {config.read.resize}"),
        ("prompt", config.prompts.prompt),
        ("samtune", __version__),
    ]


def summary(split: Split) -> dict:
    """The numbers of a split, for check.json."""
    boxes = np.concatenate([one.boxes for one in split.usable] or [np.zeros((0, 5))])
    shares = np.concatenate([covers(one) for one in split.usable] or [np.zeros(0)])
    found, classes = guess(split.facts), split.classes
    sizes = Counter(f"{w}x{h}" for h, w in (one.size for one in split.facts) if h)
    return {
        "pairs": len(split.facts),
        "usable": len(split.usable),
        "sizes_width_by_height": dict(sizes.most_common(50)),
        "image_modes": dict(Counter(one.image_mode for one in split.facts)),
        "mask_modes": dict(Counter(one.mask_mode for one in split.facts)),
        "masks_hold": found._asdict() if found else None,
        "empty": sum(not one.things for one in split.usable),
        "tiny": sum(split.is_tiny(one) for one in split.usable),
        "at_the_border": sum(one.touches_border for one in split.usable),
        "things": sum(one.things for one in split.usable),
        "classes": {
            name: {"pixels": classes.pixels[i], "pictures": classes.images[i]}
            for i, name in enumerate(classes.names)
        },
        "quantiles": list(_QUANTILES),
        "box_width": _quantiles(boxes[:, 2] - boxes[:, 0]),
        "box_height": _quantiles(boxes[:, 3] - boxes[:, 1]),
        "object_pixels": _quantiles(boxes[:, 4]),
        "object_share": _quantiles(shares),
    }


def _quantiles(numbers: np.ndarray) -> list[float]:
    return np.quantile(numbers, _QUANTILES).tolist() if len(numbers) else []


def _write(folder: Path, report: dict, text: str, tiles: Sequence[Tile]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "check.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / "check.html").write_text(text, encoding="utf-8", errors="replace")
        if tiles:
            write_png(folder / "check.png", sheet_of(tiles))
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from None


def _in_words(splits: Sequence[Split], findings: Sequence[Finding]) -> list[str]:
    """What people read on the console."""
    lines = [", ".join(f"{split.name}: {len(split.facts)} pairs" for split in splits)]
    for level in LEVELS:
        found = [finding for finding in findings if finding.level == level]
        if found:
            lines.append(f"{level}s ({len(found)}):")
        for finding in found:
            of_split = f"{finding.split}: " if finding.split else ""
            lines.append(f"  {of_split}{finding.text}")
            told = finding.examples[: _SPOKEN[level]]
            lines += [f"      {example}" for example in told]
            if told and finding.count > len(told):
                lines.append(f"      and {finding.count - len(told)} more")
    return [printable(line) for line in lines]


def _cleaned(finding: Finding) -> Finding:
    return finding._replace(
        text=printable(finding.text), examples=tuple(map(printable, finding.examples))
    )
