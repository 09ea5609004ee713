"""PromptedSam: images and prompts in, mask logits out; the one interface that training sees."""

from __future__ import annotations

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from samtune.config import Size
from samtune.errors import UserError
from samtune.models.mask_decoder import ClassDecoder, decode_masks
from samtune.models.prefix import run_frozen, run_rest
from samtune.models.prompt_encoder import embed_masks, embed_prompts, position_encoding
from samtune.models.refinement import with_corrections
from samtune.models.weights import LoadReport
from samtune.structures import Prediction, Prompts

NO_PROMPT = Prompts()  # one row per image, which asks for whatever SAM finds by itself


class PromptedSam(nn.Module):
    """SAM's three parts with a batched forward: no loop over images, no wait for the GPU.

    The parts hang directly on this module, so names in the state dict are those of stock SAM.
    An adapter that only alters parts of `sam` returns a plain `PromptedSam`. One with another
    path from image to masks (an own decoder, other position encodings, further loss terms)
    subclasses and overrides `encode`, `image_pe`, `decode` or `forward`; whatever `encode` returns
    goes to `decode` as it is, and further loss terms go into `Prediction.aux`.

    image_size: (S_h, S_w), pixels, of the frame that the model was built for.
    own_keys: names that the base checkpoint holds too but that an adapted checkpoint must carry.
    base_keys: names that need not be saved, as the base checkpoint brings them; empty when there is
    none. load_report: what became of each tensor of the base checkpoint, None when there is none.
    """

    def __init__(self, sam: Sam, own_keys: frozenset[str] = frozenset()):
        super().__init__()
        self.image_size = Size(*sam.prompt_encoder.input_image_size)
        self.image_encoder = sam.image_encoder
        self.prompt_encoder = sam.prompt_encoder
        self.mask_decoder = sam.mask_decoder
        self.register_buffer("pixel_mean", sam.pixel_mean.clone(), persistent=False)
        self.register_buffer("pixel_std", sam.pixel_std.clone(), persistent=False)
        self.own_keys = own_keys
        self.base_keys: frozenset[str] = frozenset()
        self.load_report: LoadReport | None = None

    def forward(
        self,
        image: Tensor,
        prompts: Prompts = NO_PROMPT,
        valid_size: Tensor | None = None,
        frozen: Tensor | None = None,
    ) -> Prediction:
        """Segment what the prompts ask for.

        image: (B, 3, S_h, S_w) uint8 RGB. valid_size: (B, 2) height and width without padding, None
        when nothing is padded. frozen: what `frozen` says of the image, where that is known; of the
        image itself only the shape is read then, unless `prefix.reads_image`. Returns logits
        (R, C, 4h, 4w) for a grid of h x w patches; C is 1, or K with a decoder for K classes.
        """
        features = self.encode(image, valid_size, frozen)
        return self.answer(features, prompts, tuple(image.shape[-2:]))

    def encode(
        self, image: Tensor, valid_size: Tensor | None = None, frozen: Tensor | None = None
    ) -> Tensor:
        """(B, 3, S_h, S_w) uint8 -> (B, C, h, w) features, which any prompts can share.

        frozen: see `forward`.
        """
        if frozen is not None:
            return run_rest(self.image_encoder, frozen, lambda: self.preprocess(image, valid_size))
        return self.image_encoder(self.preprocess(image, valid_size))

    @torch.no_grad()
    def frozen(self, image: Tensor, valid_size: Tensor | None = None) -> Tensor:
        """(B, 3, S_h, S_w) uint8 -> (B, ...): as far as `encode` comes without anything that
        trains; all the way where the image encoder is frozen. Training cannot change it.

        Raises UserError where the encoder trains from its beginning; see `frozen_stages`.
        """
        return run_frozen(self.image_encoder, self.preprocess(image, valid_size))

    def answer(self, features: Tensor, prompts: Prompts, frame_size: tuple[int, int]) -> Prediction:
        """What `encode` returned and prompts -> the answer, after the corrections they ask for."""
        if prompts.corrections is None:
            return self.decode(features, prompts, frame_size)
        return with_corrections(self.decode, features, prompts, frame_size)

    def decode(
        self,
        features: Tensor,
        prompts: Prompts = NO_PROMPT,
        frame_size: tuple[int, int] | None = None,
    ) -> Prediction:
        """(B, C, h, w) features and R prompts -> a prediction of R rows.

        frame_size: (S_h, S_w) of the image, in whose pixels the prompts are; None for the frame
        that the model was built for.
        """
        if prompts.image_index is not None:
            features = features[prompts.image_index]
        image_pe = self.image_pe(features)
        with torch.autocast(features.device.type, enabled=False):
            sparse = embed_prompts(self.prompt_encoder, prompts, len(features), frame_size)
            dense = embed_masks(self.prompt_encoder, prompts, tuple(features.shape[-2:]))
        logits, iou = self._decode_runs(prompts, features, image_pe, sparse, dense)
        # The IoU head of a decoder for K classes starts anew and no loss reads it.
        return Prediction(logits, None if isinstance(self.mask_decoder, ClassDecoder) else iou)

    def _decode_runs(
        self, prompts: Prompts, features: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`decode_masks`, one call for all rows with equally many tokens: padding would be seen."""
        runs = prompts.runs(len(features))
        if len(runs) == 1 and runs[0][1] in (None, sparse.shape[1]):
            return decode_masks(self.mask_decoder, features, image_pe, sparse, dense)
        answers = [
            decode_masks(
                self.mask_decoder,
                features[rows],
                image_pe if len(image_pe) == 1 else image_pe[rows],
                sparse[rows, sparse.shape[1] - length :],
                dense if len(dense) == 1 else dense[rows],
            )
            for rows, length in runs
        ]
        logits, iou = (torch.cat(parts) for parts in zip(*answers, strict=True))
        return logits, iou

    def image_pe(self, features: Tensor) -> Tensor:
        """(R, C, h, w) features -> (1 or R, C, h, w): where the decoder is to believe each cell."""
        with torch.autocast(features.device.type, enabled=False):
            return position_encoding(self.prompt_encoder, features.shape[-2:])

    def preprocess(self, image: Tensor, valid_size: Tensor | None = None) -> Tensor:
        """(B, 3, S_h, S_w) uint8 -> normalised floats, zero (the mean colour) where padded."""
        image = (image.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        if valid_size is None:
            return image
        height, width = (torch.arange(n, device=image.device) for n in image.shape[-2:])
        rows = height < valid_size[:, :1]  # (B, S_h)
        columns = width < valid_size[:, 1:]
        return image.where((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)

    def train(self, mode: bool = True) -> PromptedSam:
        """Training mode for what trains; frozen parts stay in eval mode, their statistics still."""
        super().train(mode)
        if mode:
            for module in self.modules():
                parameters = list(module.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
                    module.eval()
        return self

    def as_sam(self) -> Sam:
        """A stock Sam that shares these parts, for `segment_anything.SamPredictor`.

        Raises UserError where stock SAM has no place for it: a decoder for K classes, a frame that
        is not square.
        """
        if self.image_size.height != self.image_size.width:
            raise UserError(
                f"this run sees frames of {self.image_size} pixels, and stock SAM squares only"
            )
        if isinstance(self.mask_decoder, ClassDecoder):
            raise UserError("this run answers with a mask per class, so it is no stock SAM")
        sam = Sam(self.image_encoder, self.prompt_encoder, self.mask_decoder)
        sam.pixel_mean, sam.pixel_std = self.pixel_mean, self.pixel_std
        sam.training = self.training
        return sam
