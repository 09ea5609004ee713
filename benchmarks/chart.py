"""The README's picture: time and memory of a training step, samtune beside its peers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from results import Results, Spread

# (group, cell, what it is called, whether it is ours), in the order of the bars, by device
CPU = (
    ("sam_adapter", "stock", "SAM-Adapter, stock path, fp32", False),
    ("sam_adapter", "fp32", "SAM-Adapter, samtune, fp32", True),
    ("sam_adapter", "bf16", "SAM-Adapter, samtune, bf16", True),
    ("sam_adapter", "last4", "the same, fp32, last 4 blocks", True),
    ("lora", "hf_peft", "LoRA, transformers + peft, fp32", False),
    ("lora", "fp32", "LoRA, samtune, fp32", True),
)
GPU = (
    ("gpu-sam_adapter", "stock", "SAM-Adapter, stock path, fp32", False),
    ("gpu-sam_adapter", "compiled", "SAM-Adapter, samtune, bf16, compiled", True),
    ("gpu-lora", "hf_peft", "LoRA, transformers + peft, bf16", False),
    ("gpu-lora", "compiled", "LoRA, samtune, bf16, compiled", True),
)
OURS, THEIRS = "#1f77b4", "#b0b0b0"


class Bar(NamedTuple):
    """One line of the picture. seconds: per image; gib: peak memory, 2^30 bytes."""

    label: str
    ours: bool
    seconds: Spread
    gib: Spread


def bars(results: Results) -> list[Bar]:
    """What there is to draw."""
    found = []
    for group, cell, label, ours in CPU if results.machine["device"] == "cpu" else GPU:
        seconds = results.spread(group, cell, "seconds_per_image")
        memory = results.spread(group, cell, "peak_memory_bytes")
        if seconds and memory:
            gib = Spread(*(value / 2**30 for value in memory[:3]), memory.rounds)
            found.append(Bar(label, ours, seconds, gib))
    return found


def draw(results: Results, path: Path) -> None:
    """Write the picture; none where nothing was measured. Equal results make equal files."""
    lines = bars(results)
    if not lines:
        return
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    settings = {"svg.fonttype": "none", "svg.hashsalt": "samtune", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.6 + 0.4 * len(lines)), sharey=True)
        titles = ("seconds per image, training step", "peak memory, GiB")
        for panel, title, name in zip(axes, titles, ("seconds", "gib"), strict=True):
            _panel(panel, title, lines, [getattr(bar, name) for bar in lines])
        axes[0].set_yticks(range(len(lines)), [bar.label for bar in lines])
        axes[0].invert_yaxis()
        figure.tight_layout()
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def _panel(axes, title: str, lines: list[Bar], values: list[Spread]) -> None:
    """Medians as bars, the extremes as whiskers, the number behind each bar."""
    colours = [OURS if bar.ours else THEIRS for bar in lines]
    off = [[v.middle - v.low for v in values], [v.high - v.middle for v in values]]
    axes.barh(range(len(lines)), [v.middle for v in values], color=colours, xerr=off)
    for place, value in enumerate(values):
        axes.annotate(
            f" {value.middle:.3g}", (value.high, place), va="center", annotation_clip=False
        )
    axes.set_xlim(0, 1.15 * max(v.high for v in values))
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
