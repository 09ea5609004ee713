"""Fixtures of GSAM and of its parts, built by the product's code from each fixture's `config`.

In all but one of them the CNN's features are given instead of computed.
"""

from __future__ import annotations

from check_multiclass import check_gradients, check_trained, classes_of, decoder_sizes
from fixture import Fixture, close
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from samtune.adapters.bottleneck import DILATIONS
from samtune.adapters.gsam import Gsam, GsamEncoder
from samtune.adapters.gsam_blocks import (
    ADAPTER_SCALE,
    POOLED,
    CnnEncoder,
    FeaturePosition,
    GsamBlock,
    PooledAttention,
    Refinement,
    ResNet,
    TokenPosition,
)
from samtune.adapters.layers import thaw_decoder
from samtune.models import ModelType
from samtune.models.sam import build_image_encoder, build_sam
from samtune.models.weights import give_classes
from samtune.structures import Frame, Frames

STRIDE, PATCH = 8, 16
OUTPUT, WHOLE = 1e-5, 5e-5  # outputs of parts and encoders; of whole models and the refinement
GRADIENT, DECODED = 1e-4, 1e-3  # gradients of encoders; where the decoder is included


def check_part(fixture: Fixture, module: nn.Module, run, tolerance: float = OUTPUT) -> None:
    """Output, loss and gradients of what trains of a part; `run` calls it."""
    module.load_state_dict(fixture.group("param."))
    out = run(module.eval())
    loss = out.square().mean()
    loss.backward()
    close(out, fixture["output.out"], tolerance, "out")
    close(loss.reshape(1), fixture["output.loss"], tolerance, "loss")
    check_gradients(fixture, module, GRADIENT)


def vit_of(config: dict, **sizes) -> ModelType:
    """The image encoder that a config describes."""
    return ModelType(
        embed_dim=config["embed_dim"], depth=config["depth"], num_heads=config["num_heads"],
        window_size=config["window_size"], global_blocks=tuple(config["global_attn_indexes"]),
        prompt_embed_dim=config["out_chans"], mlp_ratio=config["mlp_ratio"], patch_size=PATCH,
        **sizes,
    )  # fmt: skip


def one_block(dim: int, num_heads: int, window_size: int, rows: int) -> nn.Module:
    """A stock block; rows: of its relative positions."""
    grid = (rows + 1) // 2
    sizes = ModelType(
        embed_dim=dim, depth=1, num_heads=num_heads, prompt_embed_dim=8, patch_size=PATCH,
        window_size=window_size or 1, global_blocks=() if window_size else (0,),
    )  # fmt: skip
    return build_image_encoder(sizes, grid * STRIDE, STRIDE).blocks[0].requires_grad_(False)


class Given(nn.Module):
    """In the place of the CNN: the features that a fixture brings."""

    def __init__(self, features: Tensor):
        super().__init__()
        self.features = features

    def forward(self, image: Tensor) -> Tensor:
        return self.features


# Parts


def check_cnn_encoder(fixture: Fixture) -> None:
    config = fixture.config
    kinds = {kind.expansion: kind for kind in (BasicBlock, Bottleneck)}
    sizes = ResNet(
        kinds[config["expansion"]], tuple(config["blocks"]), config["stem"], tuple(config["planes"])
    )
    cnn = CnnEncoder(config["embed_dim"], sizes)
    check_part(fixture, cnn, lambda cnn: cnn(fixture["input.image"]))


def check_patch_embed(fixture: Fixture) -> None:
    sizes = ModelType(
        embed_dim=fixture.config["dim"], depth=1, num_heads=1, global_blocks=(), patch_size=PATCH
    )
    encoder = GsamEncoder(build_image_encoder(sizes, 32 * STRIDE, STRIDE), nn.Identity())
    patch_embed = encoder.patch_embed
    check_part(fixture, patch_embed, lambda _: encoder.embed_patches(fixture["input.image"]))


def check_peg_encoder(fixture: Fixture) -> None:
    position, seen = TokenPosition(fixture.config["dim"]), []
    position.conv.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    check_part(fixture, position, lambda p: p(fixture["input.x"]))
    close(seen[0], fixture["output.conv"], OUTPUT, "conv")


def check_peg_decoder(fixture: Fixture) -> None:
    position = FeaturePosition(fixture.config["dim"])
    check_part(fixture, position, lambda p: p(fixture["input.x"]))


def check_mobileconv(fixture: Fixture) -> None:
    refinement, x = Refinement(fixture.config["dim"]), fixture["input.x"]
    assert refinement.conv[0].out_channels == fixture.config["hidden"]
    check_part(fixture, refinement, lambda r: r(x), WHOLE)
    close(refinement.conv(x), fixture["output.conv_path"], WHOLE, "conv_path")
    close(refinement.se(x), fixture["output.se_path"], WHOLE, "se_path")


def check_pooled_attention(fixture: Fixture) -> None:
    config = fixture.config
    assert config["kv_pool"] == POOLED
    block = one_block(config["dim"], config["num_heads"], 0, config["rel_pos_rows"])
    attention = PooledAttention(block.attn).requires_grad_(True)
    check_part(fixture, attention, lambda a: a(fixture["input.x"]))


def check_block(fixture: Fixture) -> None:
    config = fixture.config
    window = config["window_size"]
    rows = 2 * (window or config["rel_pos_grid"]) - 1
    block = GsamBlock(one_block(config["dim"], config["num_heads"], window, rows))
    x, cnn = fixture["input.x"], fixture["input.cnn"]
    check_part(fixture, block, lambda block: block(x, cnn)[0])
    close(block(x, cnn)[1], fixture["output.cnn_out"], OUTPUT, "cnn_out")


# Encoders and whole models


def check_encoder(fixture: Fixture) -> None:
    config = fixture.config
    assert tuple(config["dilations"]) == DILATIONS and config["adapter_scale"] == ADAPTER_SCALE
    stock = build_image_encoder(vit_of(config), config["rel_pos_grid"] * STRIDE, STRIDE)
    encoder = GsamEncoder(stock.requires_grad_(False), Given(fixture["input.cnn_feat"]))
    seen: list[tuple] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    check_part(fixture, encoder, lambda encoder: encoder(fixture["input.image"]))
    for index, (x, c) in enumerate(seen):
        close(x, fixture[f"output.block{index}"], OUTPUT, f"block{index}")
        close(c, fixture[f"output.block{index}_cnn"], OUTPUT, f"block{index}_cnn")
    check_trained(fixture, encoder)


def check_model(fixture: Fixture) -> None:
    config = fixture.config
    vit, image = config["vit"], fixture["input.image"]
    sizes = vit_of(vit, **decoder_sizes(config, fixture))
    sam = build_sam(sizes, vit["rel_pos_grid"] * STRIDE, STRIDE).requires_grad_(False)
    if classes_of(config) > 1:
        give_classes(sam, classes_of(config), "gsam", None)
    thaw_decoder(sam)
    sam.image_encoder = GsamEncoder(sam.image_encoder, Given(fixture["input.cnn_feat"]))
    model = Gsam(sam).eval()
    model.load_state_dict(fixture.group("param."))
    height, width = config["image_hw"]
    frames = Frames.collate([Frame((height, width), (height, width))], (height, width))
    logits = model.decode(model.image_encoder(image)).logits
    masks = frames.to_frame(logits)
    loss = masks.square().mean()
    loss.backward()
    close(logits, fixture["output.low_res"], WHOLE, "low_res")
    close(masks, fixture["output.masks"], WHOLE, "masks")
    close(loss.reshape(1), fixture["output.loss"], WHOLE, "loss")
    check_trained(fixture, model)
    check_gradients(fixture, model, DECODED)


CHECKS = {
    "gsam_cnn_encoder": check_cnn_encoder,
    "gsam_patch_embed": check_patch_embed,
    "gsam_peg_encoder": check_peg_encoder,
    "gsam_peg_decoder": check_peg_decoder,
    "gsam_mobileconv": check_mobileconv,
    "gsam_pooled_attention_window": check_pooled_attention,
    "gsam_pooled_attention_global": check_pooled_attention,
    "gsam_pooled_attention_tiny": check_pooled_attention,
    "gsam_block_window": check_block,
    "gsam_block_global": check_block,
    "gsam_encoder": check_encoder,
    "gsam_encoder_odd_size": check_encoder,
    "gsam_model_binary": check_model,
    "gsam_model_multiclass": check_model,
}
