"""Put what was measured into the README: the table of targets, a chart, and a table of figures.

python benchmarks/report.py            # rewrites block, charts and results/README.md
python benchmarks/report.py --check    # exit code 1 if the README says anything else
"""

from __future__ import annotations

import sys
from pathlib import Path

import chart
import targets
from grid import PRESETS
from results import FOLDER, Results, Spread, figure, load_all

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!--benchmarks-->\n", "<!--/benchmarks-->"
HEAD = ("", "precision", "batch", "s per step", "images/s", "peak GiB", "GMACs", "share of peak")


def main(argv: list[str]) -> int:
    machines = load_all()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    new = before + BEGIN + block(machines) + END + after
    if "--check" in argv:
        return int(new != text)
    readme.write_text(new)
    for results in machines:
        chart.draw(results, chart_of(results))
    (FOLDER / "README.md").write_text(all_tables(machines))
    return 0


def block(machines: list[Results]) -> str:
    """What stands between the README's markers."""
    parts = [markdown(("target", "wanted", "measured", ""), targets.rows(machines))]
    for results in machines:
        picture = chart_of(results).relative_to(ROOT).as_posix()
        if chart.bars(results):
            parts.append(f"![time and memory of a training step on {label(results)}]({picture})\n")
        parts.append(f"Measured on {about(results)}.\n")
    return "\n".join(parts)


def all_tables(machines: list[Results]) -> str:
    """`results/README.md`: every figure of every machine."""
    parts = ["# What was measured\n", "Made by `python benchmarks/report.py`.\n"]
    titles = {group.name: group.title for groups in PRESETS.values() for group in groups}
    for results in machines:
        parts.append(f"## {label(results)}\n\nMeasured on {about(results)}.\n")
        for name in dict.fromkeys(record["group"] for record in results.records):
            parts += [f"### {titles.get(name, name)}\n", group_table(results, name)]
    return "\n".join(parts)


def group_table(results: Results, name: str) -> str:
    """A row per cell: median and extremes of its rounds."""
    records = [record for record in results.records if record["group"] == name]
    cells = dict.fromkeys(record["cell"] for record in records)
    return markdown(
        HEAD, [_row(results, [r for r in records if r["cell"] == cell]) for cell in cells]
    )


def _row(results: Results, records: list[dict]) -> tuple[str, ...]:
    settings = records[-1]["settings"]
    name = f"{records[-1]['cell']} ({settings['program']})"
    done = [record for record in records if "measured" in record]
    if not done:
        return name, records[-1]["failed"], *[""] * (len(HEAD) - 2)
    last = done[-1]["measured"]
    batch = str(last.get("batch_size", ""))
    if "too_large_batch_size" in last:
        batch += f" ({last['too_large_batch_size']} is too large for the memory)"
    seconds = _spread(done, _seconds_key(last))
    share = Spread.of([s for r in done if (s := results.share_of_peak(r)) is not None])
    return (
        name,
        str(last.get("precision", "")),
        batch,
        f"{seconds.middle:.3g} ({seconds.low:.3g} to {seconds.high:.3g}, {seconds.rounds})",
        _number(_spread(done, "images_per_second")),
        _number(_spread(done, "peak_memory_bytes"), 2**30),
        f"{last['gmacs']:.1f}" if "gmacs" in last else "",
        f"{100 * share.middle:.0f} %" if share else "",
    )


def _seconds_key(measured: dict) -> str:
    keys = ("seconds_per_step", "seconds_per_image", "launch_seconds", "wall_seconds")
    if measured.get("images") == 1:  # an epoch of one step: only its beginning was of interest
        keys = ("launch_seconds",)
    return next(key for key in keys if key in measured)


def _spread(records: list[dict], key: str) -> Spread | None:
    return Spread.of([value for r in records if (value := figure(r, key)) is not None])


def _number(spread: Spread | None, unit: float = 1.0) -> str:
    return f"{spread.middle / unit:.3g}" if spread else ""


def label(results: Results) -> str:
    machine = results.machine
    on_gpu = machine["device"] == "cuda"
    return machine["name"] if on_gpu else f"{machine['cores']} cores of {machine['name']}"


def about(results: Results) -> str:
    """The machine in one sentence's worth of words."""
    machine = results.machine
    peaks = ", ".join(f"{n} {f / 1e12:.3g}" for n, f in machine["matmul_flops"].items())
    dates = sorted({record["date"] for record in results.records})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "no day yet"
    return (
        f"{label(results)}, torch {machine['versions']['torch']}, {when}; a large matrix product "
        f"runs at {peaks} TFLOP/s"
    )


def chart_of(results: Results) -> Path:
    return FOLDER / f"{results.machine['kind']}.svg"


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
