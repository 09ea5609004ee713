"""Every fixture in `--golden DIR` is checked by what its `kind` says; an unknown kind is listed.

A `check_*.py` beside this file has a dict `CHECKS = {kind: function(fixture)}`. It builds from the
fixture's `config`, so further fixtures of a kind run without new code.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from fixture import Fixture

HERE = Path(__file__).parent


def _all_checks() -> dict:
    checks = {}
    for path in sorted(HERE.glob("check_*.py")):
        module = importlib.import_module(path.stem)
        twice = checks.keys() & module.CHECKS.keys()
        assert not twice, f"{path.name} checks kinds that another file checks: {sorted(twice)}"
        checks |= module.CHECKS
    return checks


KINDS = _all_checks()


def _fixture_files(folder: Path) -> list[Path]:
    """The JSONs that name a kind (others are tables without tensors)."""
    return [p for p in sorted(folder.glob("*.json")) if "kind" in json.loads(p.read_text())]


def pytest_generate_tests(metafunc):
    folder = Path(metafunc.config.getoption("--golden"))
    files = [pytest.param(path, id=path.stem) for path in _fixture_files(folder)]
    if not files:
        reason = pytest.mark.skip(reason=f"no fixtures at {folder}")
        files = [pytest.param(None, id="absent", marks=reason)]
    metafunc.parametrize("path", files)


def test_fixture(path: Path):
    fixture = Fixture(path)
    if fixture.kind not in KINDS:
        pytest.skip(f"no test knows kind {fixture.kind} yet")
    KINDS[fixture.kind](fixture)
