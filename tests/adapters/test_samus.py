"""What the fixtures of SAMUS do not show."""

from dataclasses import replace

import pytest
import torch

from samtune.adapters import ADAPTERS, build_model, build_untuned
from samtune.adapters.options import SamusOptions
from samtune.adapters.samus import SamusEncoder
from samtune.config import ModelOptions, Size
from samtune.errors import UserError
from samtune.models import MODEL_TYPES
from samtune.models.positions import resize_rel_pos
from samtune.models.sam import build_image_encoder, build_sam

ROW = ADAPTERS["samus"]
UNREAD = 132_612 + 419_424  # IoU head and three hyper-networks of the decoder, frozen here


def build_on_meta(name: str, options: SamusOptions):
    with torch.device("meta"):
        sam = build_sam(name, ROW.image_size, ROW.stride).requires_grad_(False)
        return ROW.build(sam, options)


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def trained(dim: int, width: int = 64, blocks: int = 4, head: int = 64) -> int:
    """What trains in the encoder of width `dim`, part by part."""
    conv = lambda before, after: 9 * before * after + 2 * after  # noqa: E731
    cnn = conv(3, width) + conv(width, 2 * width) + conv(2 * width, 4 * width)
    cnn += conv(4 * width, dim)
    bottleneck = 2 * dim * (dim // 4) + dim // 4 + dim
    per_block = 4 * (dim * dim + dim) + conv(dim, dim) + bottleneck + 2 * 63 * head
    return cnn + conv(dim, dim) + bottleneck + blocks * per_block


@pytest.mark.parametrize(("name", "dim", "head"), [("vit_b", 768, 64), ("vit_l", 1024, 64),
                                                   ("vit_h", 1280, 80)])  # fmt: skip
def test_parameter_counts(name, dim, head):
    model = build_on_meta(name, SamusOptions(freeze_decoder=True))
    own = count(p for p in model.parameters() if p.requires_grad)
    assert own == trained(dim, head=head)
    model = build_on_meta(name, SamusOptions())
    assert count(p for p in model.parameters() if p.requires_grad) == own + 4_058_340 - UNREAD
    if name == "vit_b":
        assert own == 39_653_120
        assert count(model.image_encoder.parameters()) == 129_259_008
        assert count(model.parameters()) == 133_323_568


def test_published_names_and_shapes():
    model = build_on_meta("vit_b", SamusOptions())
    state = {n: tuple(t.shape) for n, t in model.image_encoder.state_dict().items()}
    for name, shape in PUBLISHED.items():
        assert state[name] == shape, name
    new = {n for n in state if "dapter" in n or "cnn_embed" in n or "post_pos_embed" in n}
    blocks = {n for n in new if n.startswith("blocks.")}
    assert blocks == {
        f"blocks.{g}.{n.removeprefix('blocks.2.')}"
        for n in PUBLISHED
        if n.startswith("blocks.2.") and "rel_pos" not in n
        for g in (2, 5, 8, 11)
    }
    assert new - blocks <= PUBLISHED.keys()


def both(name: str, weight: tuple, bias: int) -> dict:
    return {f"{name}.weight": weight, f"{name}.bias": (bias,)}


PUBLISHED = {
    "cnn_embed.inc.conv.0.weight": (64, 3, 3, 3),
    **both("cnn_embed.inc.conv.1", (64,), 64),
    "post_pos_embed.downs.0.maxpool_conv.1.weight": (768, 768, 3, 3),
    **both("post_pos_embed.downs.0.maxpool_conv.2", (768,), 768),
    **both("input_Adapter.D_fc1", (192, 768), 192),
    **both("input_Adapter.D_fc2", (768, 192), 768),
    **both("blocks.2.MLP_Adapter.D_fc1", (192, 768), 192),
    **both("blocks.2.MLP_Adapter.D_fc2", (768, 192), 768),
    "blocks.2.refine_Adapter.conv.0.weight": (768, 768, 3, 3),
    **both("blocks.2.refine_Adapter.conv.1", (768,), 768),
    "blocks.2.attn.rel_pos_h": (63, 64),
    "blocks.2.attn.rel_pos_w": (63, 64),
    "blocks.0.attn.rel_pos_h": (27, 64),
    "pos_embed": (1, 64, 64, 768),
}
for _part in "q", "k", "v", "proj":
    PUBLISHED |= both(f"blocks.2.Space_Adapter.{_part}", (768, 768), 768)
for _i, (_before, _after) in enumerate([(64, 128), (128, 256), (256, 768)]):
    _down = f"cnn_embed.downs.{_i}.maxpool_conv"
    PUBLISHED[f"{_down}.1.weight"] = (_after, _before, 3, 3)
    PUBLISHED |= both(f"{_down}.2", (_after,), _after)


@pytest.mark.parametrize(
    ("image_size", "stages"),
    [
        *[(8, 2), (16, 1), (24, 0), (32, 0), (48, 0), (64, 0), (128, 0)],
        *[((8, 16), 1), ((16, 8), 1), ((8, 64), 0), ((24, 40), 0)],
    ],
)
def test_the_position_table_is_halved_to_the_grid(tiny, image_size, stages):
    """SAM's table of 4 x 4 stays as it is; what does not hit the grid is resized first."""
    image_size = Size.read(image_size)
    torch.manual_seed(0)
    encoder = SamusEncoder(build_image_encoder(tiny, image_size, 8), 4).eval()
    assert encoder.pos_embed.shape[1:3] == (4, 4)
    assert len(encoder.post_pos_embed.downs) == stages
    grid = tuple(side // 8 for side in image_size)
    with torch.no_grad():
        assert encoder.positions(grid).shape == (1, *grid, 32)
        features = encoder(torch.randn(1, 3, *image_size))
    assert features.shape == (1, 32, *grid)


def test_an_image_of_another_shape_than_the_frame(tiny):
    torch.manual_seed(0)
    encoder = SamusEncoder(build_image_encoder(tiny, 16, 8), 4).eval()
    with torch.no_grad():
        assert encoder(torch.randn(2, 3, 24, 40)).shape == (2, 32, 3, 5)


def test_position_stages_train(tiny):
    torch.manual_seed(0)
    sam = build_sam(tiny, 16, 8).requires_grad_(False)
    encoder = ROW.build(sam, SamusOptions(cnn_width=4)).image_encoder.train()
    encoder(torch.randn(1, 3, 16, 16)).square().mean().backward()
    without = {n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None}
    assert not without and encoder.post_pos_embed.downs[0].maxpool_conv[1].weight.grad.any()


def test_base_weights_are_loaded_as_published(tiny, tmp_path, monkeypatch):
    """Absolute positions stay on SAM's own grid; relative ones of global blocks are resized."""
    monkeypatch.setitem(MODEL_TYPES, "tiny", replace(tiny, image_size=256))
    torch.manual_seed(0)
    sam = build_sam("tiny")
    for block in sam.image_encoder.blocks:
        torch.nn.init.normal_(block.attn.rel_pos_h), torch.nn.init.normal_(block.attn.rel_pos_w)
    torch.save(sam.state_dict(), tmp_path / "tiny.pth")
    options = ModelOptions(model_type="tiny", adapter="samus", image_size=64)
    model = build_model(options, SamusOptions(cnn_width=4), "none", tmp_path / "tiny.pth", 0)
    stock, ours = sam.image_encoder, model.image_encoder
    assert torch.equal(ours.pos_embed, stock.pos_embed)
    assert torch.equal(ours.blocks[0].attn.rel_pos_h, stock.blocks[0].attn.rel_pos_h)
    expected = resize_rel_pos(stock.blocks[1].attn.rel_pos_h.detach(), 15)
    assert torch.equal(ours.blocks[1].attn.rel_pos_h, expected)
    assert len(ours.post_pos_embed.downs) == 1
    assert set(model.load_report.resized) == {
        f"image_encoder.blocks.1.attn.rel_pos_{axis}" for axis in "hw"
    }


def test_the_published_frame_is_the_default_and_the_untuned_model_shares_it(tiny):
    options = ModelOptions(model_type="tiny", adapter="samus")
    model = build_model(options, SamusOptions(cnn_width=4), "box", None, 0)
    assert model.image_size == build_untuned(options, None, 0).image_size == (256, 256)
    assert model.prompt_encoder.input_image_size == (256, 256)
    assert model.prompt_encoder.image_embedding_size == (32, 32)


def test_a_frame_that_the_step_does_not_divide_is_refused(tiny):
    options = ModelOptions(model_type="tiny", adapter="samus", image_size=60)
    with pytest.raises(UserError, match=r"--image_size 60: .* multiple of 8 pixels"):
        build_model(options, SamusOptions(), "none", None, 0)


@pytest.mark.parametrize("freeze", [False, True])
def test_the_decoder_trains_unless_frozen(tiny, freeze):
    sam = build_sam(tiny, 64, 8).requires_grad_(False)
    model = ROW.build(sam, SamusOptions(cnn_width=4, freeze_decoder=freeze))
    assert model.mask_decoder.mask_tokens.weight.requires_grad == (not freeze)
    rel_pos = [block.attn.rel_pos_h.requires_grad for block in model.image_encoder.blocks]
    assert rel_pos == [False, True]
    assert not model.image_encoder.pos_embed.requires_grad


def test_width_must_be_positive():
    with pytest.raises(UserError, match="--cnn_width 0"):
        SamusOptions(cnn_width=0)
