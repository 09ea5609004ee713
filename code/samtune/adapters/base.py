"""What an adapter declares. Imports nothing heavy: `--help` and the README's table read it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from samtune.config import ModelOptions, Size
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
    backbones: families of image encoders that it fits; needs: what it asks of one, for the refusal
    of another. source: paper, repository and commit.
    renames: (regular expression, replacement) pairs from published names of tensors to ours, each
    to be matched against a whole name; a replacement of None drops the tensor. image_size: side of
    the square frame, pixels, where --image_size does not say it; 0: the model type's own. stride:
    pixels between patches that overlap, 0: side by side; see `build_image_encoder`. any_size: the
    frame may have any size and aspect from one patch upwards; the base is made for `image_size`
    then, whatever the frame, and --crop is taken. several_classes: whether it takes a mask decoder
    for K classes. start_options: options that only say with which values training starts; a model
    that is loaded is built without them, and the module's `settle(options, download)` decides what
    they leave open. mergeable: the module's `merge(model)` folds what was tuned into the state dict
    of a stock Sam.

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
    image_size: int = 0
    stride: int = 0
    needs: str = ""
    any_size: bool = False
    start_options: tuple[str, ...] = ()
    mergeable: bool = False
    several_classes: bool = True

    def check(
        self, model: ModelOptions, prompt: str, num_classes: int = 1, crop: Size = Size(0, 0)
    ) -> None:
        """Refuse an impossible combination before any weight is read, with a UserError.

        Whether --image_size fits patches is `build_sam`'s to say.
        """
        if num_classes < 1:
            raise UserError(f"--num_classes {num_classes}: it must be at least 1")
        if num_classes > 1 and not self.several_classes:
            raise UserError(
                f"--adapter {self.name} answers with one mask: it does not take --num_classes "
                f"{num_classes}"
            )
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
            needs = f": it needs {self.needs}" if self.needs else ""
            raise UserError(
                f"--adapter {self.name} does not fit --model_type {model.model_type}{needs}; it "
                f"fits {', '.join(fitting)}"
            )
        if self.any_size:
            self._check_any_size("--image_size", self.frame_size(model), model)
        if crop:
            self._check_crop(crop, model)

    def frame_size(self, model: ModelOptions) -> Size:
        """(S_h, S_w) that the model sees: what is said, else the adapter's own, else SAM's."""
        own = self.image_size or MODEL_TYPES[model.model_type].image_size
        return model.image_size or Size(own, own)

    def _check_any_size(self, flag: str, size: Size, model: ModelOptions) -> None:
        smallest = MODEL_TYPES[model.model_type].patch_size
        if min(size) < smallest:
            raise UserError(f"{flag} {size}: it must be at least {smallest} pixels on each side")

    def _check_crop(self, crop: Size, model: ModelOptions) -> None:
        if not self.any_size:
            raise UserError(
                f"--crop {crop}: --adapter {self.name} is made for one size of frame, so it trains "
                "on whole frames only; --adapter gsam takes crops"
            )
        self._check_any_size("--crop", crop, model)
        frame = self.frame_size(model)
        if crop.height > frame.height or crop.width > frame.width:
            raise UserError(f"--crop {crop}: it must lie within the frame, --image_size {frame}")

    def without_start(self, options):
        """The adapter's options for a model whose tensors are about to be loaded."""
        starting = [f for f in fields(options) if f.name in self.start_options]
        return replace(options, **{f.name: f.default for f in starting})

    def settle(self, options, download: bool) -> tuple:
        """The adapter's options with what was left open decided by the files that are there, and a
        line for the log ("" if there is nothing to say). download: missing ones may be fetched.
        """
        if not self.start_options:
            return options, ""
        return importlib.import_module(self.module).settle(options, download)

    def build(self, sam: Sam, options) -> PromptedSam:
        """Adapt a frozen Sam in place."""
        return importlib.import_module(self.module).build(sam, options)

    def merge(self, model: PromptedSam) -> dict[str, Tensor]:
        """A stock Sam's state dict with the model's outputs. Raises UserError if there is none."""
        if not self.mergeable:
            raise UserError(
                f"--adapter {self.name} cannot be merged into SAM's own weights: what it adds is "
                "no linear map of what SAM's layers read; --adapter lora and decoder can be"
            )
        return importlib.import_module(self.module).merge(model)
