"""The stock path: the unmodified `segment_anything` package and the parent repository's procedure.

Written from the description of Kyyle2114/SAM-Adapter-Pytorch-Implementation 66b0e9e (SAM-Adapter
with box prompts), Kyyle2114/Fine-tuning-Segment-Anything a7cf899 (mask decoder only) and
usagisukisuki/G-SAM 31dfd1c (its LoRA): images encoded as a batch, then a loop over them through
prompt encoder, mask decoder, two resizings and the loss, which is taken on probabilities; float32;
AdamW. samtune is not imported.

    python benchmarks/stock.py --adapter sam_adapter --model_type vit_b --image_size 1024
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial

import torch
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from segment_anything.modeling.image_encoder import add_decomposed_rel_pos
from torch import Tensor, nn
from torch.nn import functional as F

import measure

ADAPTERS = ("sam_adapter", "decoder", "lora")
SMOOTH = 1e-3  # pixels, in the IoU loss and the scores
TUNE_OUT, HIDDEN = 192, 32  # the parent's channels of shared features and inside each adapter


@dataclass(frozen=True)
class Size:
    """The numbers that make one size of SAM: the encoder's, then the decoder's."""

    embed_dim: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]
    window_size: int = 14
    prompt_embed_dim: int = 256
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    iou_head_hidden_dim: int = 256


SIZES = {
    "vit_b": Size(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": Size(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": Size(1280, 32, 16, (7, 15, 23, 31)),
    # samtune's small one, of stock's classes all the same
    "vit_mini": Size(
        160, 6, 5, (2, 5), 8, prompt_embed_dim=128, decoder_mlp_dim=512, iou_head_hidden_dim=128
    ),
}


def build(size: Size, side: int, adapter: str) -> Sam:
    """A stock Sam for squares of `side` pixels with random weights and what the parent trains."""
    sam = build_sam(size, side).requires_grad_(False)
    if adapter == "sam_adapter":
        sam.image_encoder = SamAdapterEncoder(sam.image_encoder, size.embed_dim)
    elif adapter == "lora":
        for block in sam.image_encoder.blocks:
            block.attn = LoraAttention(block.attn)
    sam.mask_decoder.requires_grad_(True)
    return sam


def build_sam(size: Size, side: int) -> Sam:
    """Stock's parts, put together as stock does; its own function makes 1024 pixels only."""
    width, grid = size.prompt_embed_dim, (side // 16, side // 16)
    encoder = ImageEncoderViT(
        img_size=side,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        out_chans=width,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=size.window_size,
        global_attn_indexes=size.global_blocks,
    )
    decoder = MaskDecoder(
        transformer_dim=width,
        transformer=TwoWayTransformer(2, width, size.decoder_heads, size.decoder_mlp_dim),
        iou_head_hidden_dim=size.iou_head_hidden_dim,
    )
    return Sam(encoder, PromptEncoder(width, grid, (side, side), 16), decoder)


class SamAdapterEncoder(nn.Module):
    """The parent's image encoder: a term before the first block and one after every block.

    Features of patches and of high frequencies are shared by all adapters, whose terms are all
    computed before the first block runs.
    """

    def __init__(self, encoder: ImageEncoderViT, embed_dim: int):
        super().__init__()
        self.img_size = encoder.img_size
        self.patch_embed, self.pos_embed = encoder.patch_embed, encoder.pos_embed
        self.blocks, self.neck = encoder.blocks, encoder.neck
        self.patch_embed_tune = nn.Linear(embed_dim, TUNE_OUT)
        self.HFC_tune = nn.Linear(3 * 16 * 16, TUNE_OUT)
        self.task_adapter_up = nn.Linear(HIDDEN, embed_dim)
        self.task_adapter_blocks = nn.ModuleList(
            nn.ModuleDict({"down_projection": nn.Linear(TUNE_OUT, HIDDEN)})
            for _ in range(len(self.blocks) + 1)
        )

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, S, S) normalised -> (N, C', S / 16, S / 16)."""
        x = self.patch_embed(image) + self.pos_embed  # (N, h, w, C)
        patches = F.unfold(high_pass(image), 16, stride=16).transpose(1, 2)  # (N, h w, 768)
        features = self.patch_embed_tune(x.flatten(1, 2)) + self.HFC_tune(patches)
        terms = [
            self.task_adapter_up(F.gelu(adapter["down_projection"](features))).reshape(x.shape)
            for adapter in self.task_adapter_blocks
        ]
        x = x + terms[0]
        for block, term in zip(self.blocks, terms[1:], strict=True):
            x = block(x) + term
        return self.neck(x.permute(0, 3, 1, 2))


def high_pass(image: Tensor, rate: float = 0.25) -> Tensor:
    """(N, 3, H, W): the magnitude of what a square low-frequency cut leaves of each channel."""
    height, width = image.shape[-2:]
    half = int((height * width * rate) ** 0.5 // 2)
    spectrum = torch.fft.fftshift(torch.fft.fft2(image, norm="forward"))
    keep = torch.ones_like(image)
    rows = slice(height // 2 - half, height // 2 + half)
    keep[:, :, rows, width // 2 - half : width // 2 + half] = 0
    kept = torch.fft.ifftshift(spectrum * keep)
    return torch.fft.ifft2(kept, norm="forward").real.abs()


class LoraAttention(nn.Module):
    """G-SAM's: q, k and v as projected, each with a low-rank map that all heads share."""

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.num_heads, self.scale = stock.num_heads, stock.scale
        self.qkv, self.proj = stock.qkv, stock.proj
        self.rel_pos_h, self.rel_pos_w = stock.rel_pos_h, stock.rel_pos_w
        width = stock.qkv.in_features // stock.num_heads
        self.rank = width // 4
        for part in "qkv":
            down = nn.Parameter(torch.empty(width, self.rank))
            nn.init.kaiming_uniform_(down, a=5**0.5)
            self.register_parameter(f"{part}_A", down)
            self.register_parameter(f"{part}_B", nn.Parameter(torch.zeros(self.rank, width)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1)
        parts = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)  # (B heads, h w, d) each
        q, k, v = (
            part + 0.5 / self.rank * (part @ getattr(self, f"{n}_A") @ getattr(self, f"{n}_B"))
            for n, part in zip("qkv", parts, strict=True)
        )
        scores = (q * self.scale) @ k.transpose(-2, -1)
        grid = (height, width)
        scores = add_decomposed_rel_pos(scores, q, self.rel_pos_h, self.rel_pos_w, grid, grid)
        x = (scores.softmax(-1) @ v).unflatten(0, (batch, self.num_heads))
        x = x.permute(0, 2, 1, 3).reshape(batch, height, width, -1)
        return self.proj(x)


def segment(sam: Sam, image: Tensor, boxes: Tensor) -> list[Tensor]:
    """Logits (S, S) of each image under its box; image (N, 3, S, S) uint8, boxes (N, 4)."""
    side = image.shape[-1]
    features = sam.image_encoder(sam.preprocess(image))
    masks = []
    for embedding, box in zip(features, boxes, strict=True):
        with torch.no_grad():
            sparse, dense = sam.prompt_encoder(points=None, boxes=box[None], masks=None)
        low_res, _ = sam.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        masks.append(sam.postprocess_masks(low_res, (side, side), (side, side))[0, 0])
    return masks


def loss_of(masks: list[Tensor], target: Tensor) -> Tensor:
    """Cross-entropy plus IoU loss of probabilities, mean over images."""
    losses = []
    for logits, truth in zip(masks, target.float(), strict=True):
        probability = torch.sigmoid(logits)
        both = (probability * truth).sum()
        union = probability.sum() + truth.sum() - both
        iou_loss = 1 - (both + SMOOTH) / (union + SMOOTH)
        losses.append(F.binary_cross_entropy(probability, truth) + iou_loss)
    return torch.stack(losses).mean()


def scores_of(masks: list[Tensor], target: Tensor) -> list[float]:
    """Loss, mean IoU and mean Dice, read on the host."""
    ious, dices = [], []
    for logits, truth in zip(masks, target.float(), strict=True):
        mask = (logits > 0).float()
        both, total = (mask * truth).sum(), mask.sum() + truth.sum()
        ious.append(((both + SMOOTH) / (total - both + SMOOTH)).item())
        dices.append(((2 * both + SMOOTH) / (total + SMOOTH)).item())
    count = len(masks)
    return [loss_of(masks, target).item(), sum(ious) / count, sum(dices) / count]


def step_of(sam: Sam, args, device):
    """What is timed: a training step, or a scored forward pass."""
    image, target, boxes = measure.random_batch(args.batch_size, args.image_size, device)
    if args.evaluate:
        sam.eval()
        return torch.no_grad()(lambda: scores_of(segment(sam, image, boxes), target))
    optimizer = torch.optim.AdamW([p for p in sam.parameters() if p.requires_grad], lr=2e-4)
    sam.train()

    def step():
        loss = loss_of(segment(sam, image, boxes), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # what is logged is read in every step

    return step


def cost(size: Size, side: int, adapter: str) -> dict[str, float]:
    """See `measure.count_gmacs`."""

    def loss(sam, batch):
        image, target, boxes = batch
        return loss_of(segment(sam, image, boxes), target)

    return measure.count_gmacs(partial(build, size, side, adapter), loss, side)


def main(argv: list[str]) -> None:
    args = measure.parse(__doc__.split("\n")[0], ADAPTERS, tuple(SIZES), argv)
    if args.precision != "fp32":
        raise SystemExit("the stock path is float32: it takes its loss on probabilities")
    what = SIZES[args.model_type], args.image_size, args.adapter
    counted = cost(*what)
    torch.manual_seed(21)
    device = measure.device()
    sam = build(*what).to(device)
    measure.run("stock", step_of(sam, args, device), sam, counted, args)


if __name__ == "__main__":
    main(sys.argv[1:])
