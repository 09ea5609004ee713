"""Options and fixtures that all tests share."""

from pathlib import Path

import pytest

from samtune.models import MODEL_TYPES, ModelType
from tiny_models import TINY

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure():
    """The models here are tiny: threads would cost more than they bring."""
    import torch

    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--golden",
        default=str(ROOT.parent / "shared" / "golden"),
        help="folder of numeric fixtures; tests that need it skip where it does not exist",
    )
    parser.addoption(
        "--fuzz",
        type=float,
        default=0.0,
        metavar="MINUTES",
        help="how long the coverage-guided fuzzer runs; 0: some hundred cases of each target",
    )


@pytest.fixture(scope="session")
def golden_dir(request) -> Path:
    """The folder of numeric fixtures."""
    folder = Path(request.config.getoption("--golden"))
    if not folder.is_dir():
        pytest.skip(f"no fixtures at {folder}")
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data (isbi2012/, camvid/)."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}")
    return folder


@pytest.fixture
def tiny(monkeypatch) -> ModelType:
    """A small ViT; the table of model types holds it under `tiny`, and a TinyViT as `tiny_t`."""
    for name, row in TINY.items():
        monkeypatch.setitem(MODEL_TYPES, name, row)
    return TINY["tiny"]


@pytest.fixture
def tiny_t(tiny) -> ModelType:
    """A small TinyViT, under the name `tiny_t`."""
    return TINY["tiny_t"]
