"""A SAM small enough to build and train in milliseconds."""

import pytest
from tiny_models import TINY

from samtune.models import MODEL_TYPES, ModelType


@pytest.fixture
def tiny(monkeypatch) -> ModelType:
    """A small ViT; the table of model types holds it under `tiny`, and a TinyViT as `tiny_t`."""
    for name, row in TINY.items():
        monkeypatch.setitem(MODEL_TYPES, name, row)
    return TINY["tiny"]
