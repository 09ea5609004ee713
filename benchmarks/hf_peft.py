"""Hugging Face `transformers` SamModel with `peft` LoRA on its vision encoder, for comparison.

Random weights of the given size, nothing is downloaded. LoRA of rank 4 on the fused projection of
every attention; the mask decoder trains too, as in samtune's `--adapter lora`. Same images, boxes
and loss; attention as the library chooses it. `pip install -r benchmarks/requirements.txt`.

    python benchmarks/hf_peft.py --model_type vit_b --image_size 1024 --precision bf16
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    SamConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

import measure

RANK = 4
SMOOTH = 1e-3  # pixels, in the IoU loss
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_VIT_MINI = {"hidden_size": 160, "num_hidden_layers": 6, "num_attention_heads": 5}
VISION = {
    "vit_b": {},  # the library's defaults
    "vit_mini": {**_VIT_MINI, "global_attn_indexes": [2, 5], "window_size": 8},
}


def build(model_type: str, side: int) -> nn.Module:
    """A SamModel for squares of `side` pixels with LoRA in its encoder and a decoder that trains.

    samtune's vit_mini also has a narrower decoder; here it is SAM's own.
    """
    vision = SamVisionConfig(**VISION[model_type], image_size=side)
    prompt = SamPromptEncoderConfig(image_size=side, image_embedding_size=side // 16)
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt)
    model = SamModel(config)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=r"vision_encoder\..*\.attn\.qkv")
    model = get_peft_model(model, lora)
    decoder = model.base_model.model.mask_decoder
    decoder.requires_grad_(True)
    decoder.iou_prediction_head.requires_grad_(False)  # no loss reads it
    return model


def segment(model: nn.Module, image: Tensor, boxes: Tensor) -> Tensor:
    """Logits (N, S, S) of images (N, 3, S, S) uint8 under one box each."""
    mean, deviation = (
        torch.tensor(values, device=image.device)[:, None, None] for values in (MEAN, DEVIATION)
    )
    answer = model(
        pixel_values=(image.float() - mean) / deviation,
        input_boxes=boxes[:, None],
        multimask_output=False,
    )
    logits = answer.pred_masks[:, 0].float()  # (N, 1, S / 4, S / 4)
    return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy plus IoU loss, mean over images, in float32."""
    truth, probability = target.float(), logits.sigmoid()
    both = (probability * truth).sum((1, 2))
    union = probability.sum((1, 2)) + truth.sum((1, 2)) - both
    iou_loss = 1 - (both + SMOOTH) / (union + SMOOTH)
    return F.binary_cross_entropy_with_logits(logits, truth) + iou_loss.mean()


def step_of(model: nn.Module, args, device):
    """What is timed: a training step, or a forward pass with its loss."""
    image, target, boxes = measure.random_batch(args.batch_size, args.image_size, device)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, args.precision == "bf16")

    def loss() -> Tensor:
        with autocast():
            logits = segment(model, image, boxes)
        return loss_of(logits, target)

    if args.evaluate:
        model.eval()
        return torch.no_grad()(lambda: loss().item())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    model.train()

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(argv: list[str]) -> None:
    args = measure.parse(__doc__.split("\n")[0], ("lora",), tuple(VISION), argv)
    make = partial(build, args.model_type, args.image_size)
    cost = measure.count_gmacs(
        make,
        lambda model, batch: loss_of(segment(model, batch[0], batch[2]), batch[1]),
        args.image_size,
    )
    torch.manual_seed(21)
    device = measure.device()
    model = make().to(device)
    measure.run("hf_peft", step_of(model, args, device), model, cost, args)


if __name__ == "__main__":
    main(sys.argv[1:])
