"""Fixtures of SAMUS's encoder and its cross-branch attention."""

from __future__ import annotations

from check_adaptformer import OUTPUT, check_loss_and_gradients
from check_models import model_type, record
from fixture import Fixture, close

from samtune.adapters.options import SamusOptions
from samtune.adapters.samus import CrossAttention, build
from samtune.models.sam import build_sam

SAM_PATCH = 16  # a fixture's `patch_size` is the stride of SAM's patches


def build_encoder(fixture: Fixture):
    config = fixture.config
    table = fixture["param.pos_embed"].shape[1]
    sizes = {**config, "img_size": table * SAM_PATCH, "patch_size": SAM_PATCH}
    stride = config["patch_size"]
    sam = build_sam(model_type(sizes), config["img_size"], stride).requires_grad_(False)
    encoder = build(sam, SamusOptions(cnn_width=config["cnn_width"])).image_encoder
    encoder.load_state_dict(fixture.group("param."))
    return encoder.eval()


def check_samus_encoder(fixture: Fixture) -> None:
    encoder = build_encoder(fixture)
    blocks = [i for i in range(fixture.config["depth"]) if f"output.block{i}" in fixture]
    calls = record(encoder, {str(i): f"blocks.{i}" for i in blocks})
    parts = record(encoder, {name: name for name in ("cnn_embed", "post_pos_embed")})
    output = encoder(fixture["input.image"])
    for name, (result,) in parts.items():
        close(result.permute(0, 2, 3, 1), fixture[f"output.{name}"], OUTPUT, name)
    for index, (result,) in calls.items():
        x, branch = result if isinstance(result, tuple) else (result, None)
        close(x, fixture[f"output.block{index}"], OUTPUT, f"block{index}")
        if branch is not None:
            expected = fixture[f"output.block{index}_cnn"]
            close(branch.permute(0, 2, 3, 1), expected, OUTPUT, f"block{index}_cnn")
    check_loss_and_gradients(fixture, encoder, output)


def check_space_adapter(fixture: Fixture) -> None:
    config = fixture.config
    assert not config["rel_pos"]
    module = CrossAttention(config["dim"], config["num_heads"])
    module.load_state_dict(fixture.group("param."))
    output = module(fixture["input.q"], fixture["input.kv"])
    check_loss_and_gradients(fixture, module, output)


CHECKS = {
    "samus_encoder": check_samus_encoder,
    "samus_space_adapter": check_space_adapter,
}
