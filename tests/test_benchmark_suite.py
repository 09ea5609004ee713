"""The suite in `benchmarks/`: what it runs, what it keeps, and what the README makes of it."""

import json
import socket
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import chart
import grid
import report
import run
import targets
from grid import Cell, Group
from results import OUT_OF_MEMORY, Results, load_all
from samtune import config
from samtune.adapters import ADAPTERS

ROOT = Path(__file__).resolve().parents[1]
MACHINE = {
    "kind": "test", "device": "cpu", "name": "a processor", "cores": 1, "bf16": False,
    "versions": {"torch": "2"}, "matmul_flops": {"fp32": 1e9},
}  # fmt: skip
# Stands in for a program: fails as flags say, too large from three images on.
PROGRAM = """
import json, os, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
batch = int(flags.get("--batch_size", 1))
if "--fail" in flags:
    sys.exit(f"{os.getcwd()}/code: a mistake")
if batch > 2:
    sys.exit("torch.OutOfMemoryError: CUDA out of memory")
print("a line before")
print(json.dumps({"images_per_second": 4.0 * batch, "seconds_per_step": 0.25, "batch_size": batch,
    "threads": os.environ["OMP_NUM_THREADS"], "flops_per_step": 5e7, "precision": "fp32"}))
"""
PAIR = Group("pair", "a pair", (Cell("a", "fake"), Cell("b", "fake", "--batch_size 2")), rounds=2)


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """run.py with one group of a stand-in; returns its results after a call with these flags."""
    (tmp_path / "fake.py").write_text(PROGRAM)
    monkeypatch.setitem(run.PROGRAMS, "fake", str(tmp_path / "fake.py"))
    monkeypatch.setitem(run.PRESETS, "cpu", (PAIR,))
    monkeypatch.setattr(run, "_python", lambda command: json.dumps(MACHINE))

    def call(*flags: str) -> Results:
        path = tmp_path / "results.json"
        assert run.main(["--results", str(path), "--preset", "cpu", *flags]) == 0
        return Results(path)

    return call


def test_it_measures_in_turn_and_goes_on_where_it_stopped(suite, monkeypatch):
    results = suite("--rounds", "1")
    assert [(r["cell"], r["round"]) for r in results.records] == [("a", 0), ("b", 0)]
    assert results.records[0]["measured"]["threads"] == "1"
    assert results.records[0]["measured"]["peak_memory_bytes"] > 2**20
    first = results.records
    results = suite()
    assert results.records[:2] == first, "what is measured stays"
    assert [(r["cell"], r["round"]) for r in results.records[2:]] == [("a", 1), ("b", 1)]
    changed = Group("pair", "a pair", (PAIR.cells[0], Cell("b", "fake", "--more 1")), rounds=2)
    monkeypatch.setitem(run.PRESETS, "cpu", (changed,))
    flags = [r["settings"]["flags"] for r in suite().records]
    assert flags == ["", "--more 1", "", "--more 1"], "with other flags a round is run as a whole"
    assert suite("--list").records == suite().records


def test_cells_that_stand_apart_are_measured_one_by_one(suite):
    apart = Group("pair", "a pair", PAIR.cells, apart=True)
    assert [job.cells for job in run._jobs(suite("--rounds", "1"), apart)] == []
    changed = Group("pair", "a pair", (PAIR.cells[0], Cell("b", "fake", "--more 1")), apart=True)
    (job,) = run._jobs(suite("--rounds", "1"), changed)
    assert [cell.name for cell in job.cells] == ["b"]
    assert len(run._jobs(suite("--rounds", "1"), changed, again=True)) == 2
    assert suite("--minutes", "0.1").records == suite("--rounds", "1").records, "no time for more"


@pytest.mark.usefixtures("suite")
def test_too_little_memory_is_answered_by_half_the_batch():
    outcome = run.measure(Cell("a", "fake", "--batch_size 8"), MACHINE)["measured"]
    assert (outcome["batch_size"], outcome["too_large_batch_size"]) == (2, 8)
    assert outcome["images_per_second"] == 8


@pytest.mark.usefixtures("suite")
def test_a_failure_is_kept_in_words_and_tried_again(tmp_path):
    cell = Cell("a", "fake", "--fail 1")
    assert run.measure(cell, MACHINE) == {"failed": "./code: a mistake"}
    results = Results(tmp_path / "r.json")
    results.machine = MACHINE
    group = Group("g", "", (cell,))
    record = run.measure_and_keep(results, group, 0, cell)
    assert Results(results.path).records == [record] and run._jobs(results, group)
    results.add(record | {"failed": OUT_OF_MEMORY})
    assert not run._jobs(results, group), "too little memory is an answer"
    assert run._lacking(Cell("a", "hf_peft"), MACHINE)
    assert run._lacking(Cell("a", "fake", "--precision bf16"), MACHINE)


def filled(path: Path, group: str, **cells: list[dict]) -> Results:
    results = Results(path)
    results.machine = MACHINE
    for cell, measured in cells.items():
        for index, figures in enumerate(measured):
            record = {"group": group, "cell": cell, "round": index, "date": "2000-01-01"}
            results.add(record | {"settings": {"program": "x"}, "measured": figures})
    return Results(path)


def of(seconds: float, gib: float) -> dict:
    return {
        "images_per_second": 1 / seconds, "seconds_per_step": seconds, "precision": "fp32",
        "peak_memory_bytes": int(gib * 2**30), "flops_per_step": 5e8, "gmacs": 0.1,
    }  # fmt: skip


def test_ratios_are_taken_round_by_round(tmp_path):
    stock = [of(10, 8), of(20, 8), of(10, 8)]
    results = filled(tmp_path / "r.json", "sam_adapter", stock=stock, fp32=[of(8, 4), of(18, 4)])
    time, memory = targets.TARGETS[0].checks
    found = time.measure(results)
    assert found == pytest.approx((0.85, 0.8, 0.9, 2))
    assert time.verdict(found) == "met" and memory.verdict(memory.measure(results)) == (
        "missed by 25 %"
    )
    row = targets.rows([results])[0]
    assert row[1] == "time ≤ 0.85x; memory ≤ 0.4x"
    assert row[2] == "time 0.85x (0.8x to 0.9x, 2 runs); memory 0.5x (0.5x to 0.5x, 2 runs)"
    assert row[3] == "time: met; memory: missed by 25 %"
    assert targets.rows([results])[2][2:] == ("-", "not measured")
    assert results.share_of_peak(results.records[0]) == pytest.approx(0.05)


def test_every_target_asks_for_cells_that_are_measured():
    groups = {g.name: g for preset in ("cpu", "gpu") for g in grid.PRESETS[preset]}
    for target in targets.TARGETS:
        for check in target.checks:
            cells = {cell.name for cell in groups[check.group].cells}
            assert check.cell in cells and (not check.base or check.base in cells), check
    drawn = [*chart.CPU, *chart.GPU]
    assert all(cell in {c.name for c in groups[group].cells} for group, cell, *_ in drawn)


def test_groups_and_cells_have_names_of_their_own():
    for groups in grid.PRESETS.values():
        assert len({g.name for g in groups}) == len(groups)
        for group in groups:
            assert len({cell.name for cell in group.cells}) == len(group.cells)
            assert all(cell.program in run.PROGRAMS for cell in group.cells)


def test_every_flag_of_the_grid_exists():
    groups = [value for value in vars(config).values() if is_dataclass(value)]
    groups += [adapter.options for adapter in ADAPTERS.values()]
    known = {f.name for group in groups for f in fields(group) if f.metadata}
    known |= {"images", "picture_size", "first_step"}  # of epochs.py itself
    cells = [c for groups in grid.PRESETS.values() for group in groups for c in group.cells]
    flags = {
        word.removeprefix("--")
        for cell in cells
        if cell.program in ("samtune", "epochs")
        for word in cell.flags.split()
        if word.startswith("--")
    }
    assert flags - known <= {
        "adapter_blocks", "cache_features", "compile", "evaluate", "rows", "tf32"
    }  # fmt: skip


def test_the_readme_says_what_was_measured():
    assert report.main(["--check"]) == 0, "run `python benchmarks/report.py`"
    assert (ROOT / "benchmarks/results/README.md").read_text() == report.all_tables(load_all())
    for results in load_all():
        assert report.chart_of(results).exists() == bool(chart.bars(results))


def test_results_name_neither_machine_nor_place():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        text = path.read_text()
        assert socket.gethostname() not in text and "/home" not in text and "/tmp" not in text


def test_tables_and_chart_of_some_results(tmp_path):
    cells = {"stock": [of(10, 8), of(12, 8)], "fp32": [of(5, 2), of(5, 2)]}
    results = filled(tmp_path / "test.json", "sam_adapter", **cells)
    text = report.all_tables([results])
    assert "| stock (x) | fp32 |  | 11 (10 to 12, 2) |" in text
    assert "1 cores of a processor" in report.block([results])
    for name in ("a.svg", "b.svg"):
        chart.draw(results, tmp_path / name)
    picture = (tmp_path / "a.svg").read_text()
    assert picture == (tmp_path / "b.svg").read_text()
    assert "SAM-Adapter, samtune, fp32" in picture and len(picture) < 40_000
