"""Parts that several adapters share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samtune.models.anatomy import attention_blocks
from samtune.models.block_lists import choose_blocks
from samtune.models.mask_decoder import ClassDecoder, masks_read
from samtune.models.prefix import Stage
from samtune.models.prompt_encoder import parts_used
from samtune.models.sam import ImageEncoderViT, MaskDecoder, Sam
from samtune.models.segmenter import PromptedSam


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block whose random numbers on the CPU follow from the seed; the state outside stays."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def thaw_decoder(sam: Sam | PromptedSam) -> None:
    """Let the mask decoder train, but for the heads that no loss reads.

    These are the IoU head and the hyper-networks of masks that are not the answer. Without a
    gradient they would make distributed training fail, and with a zero one only decay. A decoder
    that an adapter brought has no such heads.
    """
    decoder = sam.mask_decoder
    decoder.requires_grad_(True)
    if not isinstance(decoder, MaskDecoder | ClassDecoder):
        return
    decoder.iou_prediction_head.requires_grad_(False)
    decoder.output_hypernetworks_mlps.requires_grad_(False)
    decoder.output_hypernetworks_mlps[masks_read(decoder)].requires_grad_(True)


def thaw_prompt_encoder(model: PromptedSam, prompt: str) -> None:
    """Let what this kind of prompt reads of the prompt encoder train, and nothing else of it.

    An adapter that takes no prompts has none. What only clicks that correct an answer read stays
    frozen.
    """
    if hasattr(model, "prompt_encoder"):
        for name in parts_used(prompt):
            model.prompt_encoder.get_submodule(name).requires_grad_(True)


def adapted_blocks(encoder: nn.Module, text: str) -> list[int]:
    """The numbers of the blocks that --adapter_blocks names. Raises UserError for others."""
    return choose_blocks("adapter_blocks", text, depth=len(attention_blocks(encoder)))


class AdaptedEncoder(nn.Module):
    """A base for encoders that write SAM's forward anew, around its own patch, blocks and neck.

    The stock parts hang directly on this module, so their names in the state dict do not change.
    """

    def __init__(self, encoder: ImageEncoderViT):
        super().__init__()
        self.img_size = encoder.img_size
        self.patch_embed = encoder.patch_embed
        self.pos_embed = encoder.pos_embed
        self.blocks = encoder.blocks
        self.neck = encoder.neck

    @property
    def embed_dim(self) -> int:
        return self.patch_embed.proj.out_channels

    @property
    def patch_size(self) -> int:
        """Side of a patch, pixels."""
        return self.patch_embed.proj.kernel_size[0]

    @property
    def stride(self) -> int:
        """From one patch to the next, pixels."""
        return self.patch_embed.proj.stride[0]

    def last_stage(self) -> Stage:
        """(B, h, w, C) tokens -> (B, C', h, w) features."""
        return Stage((self.neck,), lambda x: self.neck(x.permute(0, 3, 1, 2)))

    def embed_patches(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H // stride, W // stride, C), without positions.

        Where patches overlap, the image is first enlarged by the overlap.
        """
        if overlap := self.patch_size - self.stride:
            size = [side + overlap for side in image.shape[-2:]]
            image = F.interpolate(image, size, mode="bilinear", align_corners=False)
        return self.patch_embed(image)


def high_pass(image: Tensor, rate: float = 0.25) -> Tensor:
    """The magnitude of what is left of an image without its low frequencies, per channel.

    image: (..., H, W). A centred square of the spectrum with side 2 l, l = sqrt(H W rate) // 2, is
    removed. In float32 at least, whatever autocast says: half precision has no transform and too
    few bits. Source: arXiv 2304.09148; tianrun-chen/SAM-Adapter-PyTorch 665145d.
    """
    height, width = image.shape[-2:]
    half_side = int((height * width * rate) ** 0.5 // 2)
    with torch.autocast(image.device.type, enabled=False):
        spectrum = torch.fft.fft2(image if image.dtype == torch.float64 else image.float())
        low_rows = _is_low(height, half_side, image.device)
        low_columns = _is_low(width, half_side, image.device)
        spectrum = spectrum.masked_fill(low_rows[:, None] & low_columns, 0)
        return torch.fft.ifft2(spectrum).real.abs()


def _is_low(length: int, half_side: int, device: torch.device) -> Tensor:
    """(length,) bool: frequencies in [-half_side, half_side), in the order of the transform."""
    frequency = (torch.arange(length, device=device) + length // 2) % length - length // 2
    return (frequency >= -half_side) & (frequency < half_side)


def misread_channels(patches: Tensor) -> Tensor:
    """(B, h, w, C), its memory read as (B, C, h, w), put into the shape (B, h, w, C).

    A slip of SAM-Adapter's code that TS-SAM took over; the weights of both were trained with it.
    """
    batch, height, width, channels = patches.shape
    return patches.reshape(batch, channels, height, width).permute(0, 2, 3, 1)
