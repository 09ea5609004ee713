"""Numeric fixtures: a JSON that says what was computed, and tensors beside it."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


class Fixture:
    """One fixture: `fixture["output.logits"]` is a tensor, `fixture.config` says how to build."""

    def __init__(self, path: Path):
        self.path = path
        self.name = path.stem
        self.json: dict = json.loads(path.read_text())
        self.kind: str = self.json["kind"]
        self.config: dict = self.json.get("config", {})

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path.with_suffix(".safetensors"))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name begins with `prefix`, under what follows it."""
        return {
            name[len(prefix) :]: tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }


def close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> bool:
    """Assert max|actual - expected| <= tolerance * max|expected|; True when it holds."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} instead of {expected.shape}"
    if expected.numel():
        actual, expected = actual.detach().double(), expected.double()
        error, scale = (actual - expected).abs().max(), expected.abs().max()
        assert error <= tolerance * scale, (
            f"{name}: differs by {error:.3g} where the largest value is {scale:.3g} "
            f"(tolerance {tolerance:g})"
        )
    return True
