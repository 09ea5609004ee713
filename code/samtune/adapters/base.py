"""What an adapter declares. Imports nothing heavy: `--help` and the README's table read it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from samtune.config import ModelOptions
from samtune.errors import UserError
from samtune.models import MODEL_TYPES

if TYPE_CHECKING:
    from torch import Tensor

    from samtune.models.sam import Sam
    from samtune.models.segmenter import PromptedSam


@dataclass(frozen=True)
class Adapter:
    """One row of `ADAPTERS`.

    name: as in --adapter. summary: one line for help and README. options: the dataclass of its own
    flags. module: where it is built, imported only then. prompts: values of --prompt that it takes.
    backbones: families of image encoders that it fits. source: paper, repository and commit.
    renames: (regular expression, replacement) pairs from published names of tensors to ours, each
    to be matched against a whole name; a replacement of None drops the tensor. mergeable: the
    module's `merge(model)` folds what was tuned into the state dict of a stock Sam.

    The module's `build(sam, options) -> PromptedSam` gets a stock Sam, all of it frozen and with
    its base weights in place, and may alter any part of it. What it makes trains because it is new;
    a stock part is thawed by object, never by name. Base tensors keep their base names, so that
    they need not be saved with the adapter's. An adapter with its own path from image to masks
    returns a subclass of `PromptedSam`.
    """

    name: str
    summary: str
    options: type
    module: str
    prompts: tuple[str, ...]
    backbones: tuple[str, ...]
    source: str
    renames: tuple[tuple[str, str | None], ...] = ()
    mergeable: bool = False

    def check(self, model: ModelOptions, prompt: str) -> None:
        """Refuse an impossible combination before any weight is read, with a UserError."""
        if prompt not in self.prompts:
            raise UserError(
                f"--adapter {self.name} does not take --prompt {prompt}; it takes "
                f"{' or '.join(self.prompts)}"
            )
        if model.model_type not in MODEL_TYPES:
            raise UserError(
                f"--model_type {model.model_type}: choose from {', '.join(MODEL_TYPES)}"
            )
        if MODEL_TYPES[model.model_type].backbone not in self.backbones:
            fitting = [n for n, row in MODEL_TYPES.items() if row.backbone in self.backbones]
            raise UserError(
                f"--adapter {self.name} does not fit --model_type {model.model_type}; it fits "
                f"{', '.join(fitting)}"
            )

    def build(self, sam: Sam, options) -> PromptedSam:
        """Adapt a frozen Sam in place."""
        return importlib.import_module(self.module).build(sam, options)

    def merge(self, model: PromptedSam) -> dict[str, Tensor]:
        """A stock Sam's state dict with the model's outputs. Raises UserError if there is none."""
        if not self.mergeable:
            raise UserError(f"--adapter {self.name} cannot be merged into SAM's own weights")
        return importlib.import_module(self.module).merge(model)
