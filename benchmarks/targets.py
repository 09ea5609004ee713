"""What the suite is to show, as data, and what the results say about it."""

from __future__ import annotations

from dataclasses import dataclass

from results import Results, Spread

TINY = 1e-9  # what a sum may round to
MET, NOT_MEASURED = "met", "not measured"


@dataclass(frozen=True)
class Check:
    """One number that a target asks for.

    label: what is compared. limit: a bound from above, or from below where `at_least`. cell over
    base, both of `group`, round by round; without a base the cell's own figure. factor: what the
    ratio is multiplied with.
    """

    label: str
    limit: float
    group: str
    cell: str
    base: str = ""
    key: str = "seconds_per_image"
    at_least: bool = False
    factor: float = 1.0
    unit: str = "x"

    @property
    def wanted(self) -> str:
        return f"{self.label} {'≥' if self.at_least else '≤'} {self.said(self.limit)}"

    def said(self, value: float) -> str:
        if self.unit == "%":
            return f"{100 * value:.0f} %"
        return f"{value:.3g}{'' if self.unit == 'x' else ' '}{self.unit}"

    def measure(self, results: Results) -> Spread | None:
        if self.key == "share_of_peak":
            records = [r for r in results.records if (r["group"], r["cell"]) == self._place]
            shares = [results.share_of_peak(record) for record in records]
            return Spread.of([share for share in shares if share is not None])
        if not self.base:
            return results.spread(self.group, self.cell, self.key)
        found = results.ratio(self.group, self.cell, self.base, self.key)
        return found and Spread(*(self.factor * value for value in found[:3]), found.rounds)

    @property
    def _place(self) -> tuple[str, str]:
        return self.group, self.cell

    def verdict(self, found: Spread | None) -> str:
        """'met', by how much it is missed, or that nobody measured it."""
        if found is None:
            return NOT_MEASURED
        off = found.middle / self.limit - 1
        if (off >= -TINY) if self.at_least else (off <= TINY):
            return MET
        return f"missed by {100 * abs(off):.0f} %"


@dataclass(frozen=True)
class Target:
    """A row of the table. device: 'cpu' or 'cuda', whose results it is read from."""

    title: str
    checks: tuple[Check, ...]
    device: str = "cpu"


def _pair(group, cell, base, time: float, memory: float) -> tuple[Check, Check]:
    return (
        Check("time", time, group, cell, base),
        Check("memory", memory, group, cell, base, "peak_memory_bytes"),
    )


TARGETS = (
    Target(
        "CPU, SAM-Adapter vit_b 1024, fp32, against the stock path",
        _pair("sam_adapter", "fp32", "stock", 0.85, 0.4),
    ),
    Target(
        "the same in bf16, against the stock path in fp32",
        _pair("sam_adapter", "bf16", "stock", 0.45, 0.3),
    ),
    Target(
        "CPU, LoRA vit_b 1024, fp32, against transformers + peft",
        _pair("lora", "fp32", "hf_peft", 0.8, 0.5),
    ),
    Target(
        "CPU, decoder tuning vit_b 1024, a cached epoch against one without, per image",
        (Check("speed", 60, "cache", "cached", "uncached", "images_per_second", True),),
    ),
    Target(
        "CPU, SAM-Adapter vit_b 1024, adapters in the last 4 of 12 blocks against all",
        _pair("sam_adapter", "last4", "fp32", 0.65, 0.5),
    ),
    Target(
        "GPU, SAM-Adapter vit_b 1024, batch 8, bf16 + compile, against the stock path in fp32",
        (
            Check(
                "images/s", 8, "gpu-sam_adapter", "compiled", "stock", "images_per_second", True
            ),
            Check("memory", 0.25, "gpu-sam_adapter", "compiled", "stock", "peak_memory_bytes"),
            Check(
                "share of the bf16 matmul peak", 0.45, "gpu-sam_adapter", "compiled",
                key="share_of_peak", at_least=True, unit="%",
            ),
        ),
        "cuda",
    ),
    Target(
        "GPU, LoRA vit_b 1024, batch 8, bf16 + compile, against transformers + peft in bf16",
        (Check("images/s", 2, "gpu-lora", "compiled", "hf_peft", "images_per_second", True),),
        "cuda",
    ),
    Target(
        "CPU, two processes against one, a thread each",
        (
            Check(
                "of ideal", 0.9, "processes", "2", "1", "images_per_second", True, factor=0.5
            ),
        ),
    ),
    Target(
        "CPU, `--help`; launch to first step (vit_mini, torchrun)",
        (
            Check("help", 0.5, "launch", "help", key="wall_seconds", unit="s"),
            Check("first step", 15, "launch", "first_step", key="launch_seconds", unit="s"),
        ),
    ),
)  # fmt: skip


def rows(machines: list[Results]) -> list[tuple[str, str, str, str]]:
    """(target, wanted, measured, verdict) of each target, in words."""
    table = []
    for target in TARGETS:
        results = next((m for m in machines if m.machine["device"] == target.device), None)
        found = [results and check.measure(results) for check in target.checks]
        table.append(
            (
                target.title,
                "; ".join(check.wanted for check in target.checks),
                "; ".join(_said(c, s) for c, s in zip(target.checks, found, strict=True) if s)
                or "-",
                _verdict([c.verdict(s) for c, s in zip(target.checks, found, strict=True)], target),
            )
        )
    return table


def _said(check: Check, found: Spread) -> str:
    text = f"{check.label} {check.said(found.middle)}"
    if found.rounds > 1:
        text += f" ({check.said(found.low)} to {check.said(found.high)}, {found.rounds} runs)"
    return text


def _verdict(verdicts: list[str], target: Target) -> str:
    if len(set(verdicts)) == 1 and verdicts[0] in (MET, NOT_MEASURED):
        return verdicts[0]
    labelled = zip(target.checks, verdicts, strict=True)
    return "; ".join(f"{c.label}: {v}" if len(verdicts) > 1 else v for c, v in labelled)
