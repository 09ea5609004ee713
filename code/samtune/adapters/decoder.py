"""Mask-decoder tuning: image and prompt encoder stay as they are.

Paper: "Segment Anything", arXiv 2304.02643, whose mask decoder trains on.
Source: Kyyle2114/Fine-tuning-Segment-Anything a7cf899.
Deviation: heads that no loss reads stay frozen instead of decaying.
"""

from __future__ import annotations

from torch import Tensor

from samtune.adapters.layers import thaw_decoder
from samtune.adapters.options import DecoderOptions
from samtune.models.sam import Sam
from samtune.models.segmenter import PromptedSam


def build(sam: Sam, options: DecoderOptions) -> PromptedSam:
    """Thaw the mask decoder of a frozen Sam."""
    thaw_decoder(sam)
    return PromptedSam(sam)


def merge(model: PromptedSam) -> dict[str, Tensor]:
    """The state of a stock Sam, which it is. Raises UserError with a decoder for K classes."""
    model.as_sam()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
