"""TinyViT as an image encoder: MobileSAM's names, sizes and traps; and the common anatomy."""

from dataclasses import replace

import pytest
import torch
from timm.models.tiny_vit import TinyVit

from samtune.adapters import ADAPTERS, build_model, build_untuned
from samtune.adapters.options import DecoderOptions
from samtune.config import ModelOptions
from samtune.errors import UserError
from samtune.models import MODEL_TYPES
from samtune.models.anatomy import QkvLayout, attention_blocks
from samtune.models.sam import build_image_encoder, build_sam
from samtune.models.tiny_vit import WindowAttention
from samtune.models.weights import find_checkpoint, load_base


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomise(module):
    """Biases and norms start at values that hide mistakes."""
    torch.manual_seed(3)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(0.2 + 0.3 * torch.rand(tensor.shape))
    return module


@pytest.fixture
def encoder(tiny_t):
    return randomise(build_image_encoder(tiny_t, 64)).eval()


def test_official_size():
    sam = build_sam("vit_t")  # on the CPU: old versions of timm refuse the meta device
    encoder, state = sam.image_encoder, sam.image_encoder.state_dict()
    assert count(encoder) == 5_743_892 and count(encoder.neck) == 672_768
    assert count(encoder.patch_embed) == 19_488
    layers = [98_944, 448_232, 2_030_520, 2_473_940]
    assert [count(layer) for layer in encoder.layers] == layers
    assert count(sam) == 9_808_452
    assert len(state) == 302 - 4 and len(sam.state_dict()) == 439 - 4  # without the classifier
    shapes = {
        "patch_embed.seq.2.c.weight": (64, 32, 3, 3),
        "layers.0.blocks.1.conv2.c.weight": (256, 1, 3, 3),
        "layers.2.downsample.conv3.bn.running_var": (320,),
        "layers.1.blocks.0.attn.attention_biases": (4, 49),
        "layers.2.blocks.5.attn.attention_biases": (5, 196),
        "layers.3.blocks.1.attn.qkv.weight": (960, 320),
        "layers.3.blocks.0.mlp.fc1.bias": (1280,),
        "layers.1.blocks.1.local_conv.c.weight": (128, 1, 3, 3),
        "neck.2.weight": (256, 256, 3, 3),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


# Loading


def mobile_sam(tiny_t, path):
    """A file like MobileSAM's: with a classifier that nothing reads."""
    state = randomise(build_sam(tiny_t)).state_dict()
    classifier = {"norm_head.weight": 32, "norm_head.bias": 32, "head.bias": 10}
    state |= {f"image_encoder.{name}": torch.ones(n) for name, n in classifier.items()}
    state["image_encoder.head.weight"] = torch.ones(10, 32)
    torch.save(state, path)
    return path


@pytest.mark.parametrize("image_size", [64, 96])
def test_a_mobile_sam_file_loads_and_the_classifier_is_reported(tiny_t, tmp_path, image_size):
    path = mobile_sam(tiny_t, tmp_path / "mobile_sam.pt")
    sam = build_sam(tiny_t, image_size)
    report = load_base(sam, path)
    assert set(report.loaded) == sam.state_dict().keys() and not report.resized
    assert len(report.unused) == 4 and all("head." in name for name in report.unused)
    assert sam.image_encoder(torch.zeros(1, 3, image_size, image_size)).isfinite().all()


def test_another_family_is_guessed(tiny, tiny_t, tmp_path):
    path = mobile_sam(tiny_t, tmp_path / "mobile_sam.pt")
    with pytest.raises(UserError, match=r"width 32, 5 blocks\): add --model_type tiny_t"):
        load_base(build_sam(tiny), path)
    torch.save(build_sam(tiny).state_dict(), tmp_path / "sam.pth")
    with pytest.raises(UserError, match=r"width 32, 2 blocks\): add --model_type tiny,"):
        load_base(build_sam(tiny_t), tmp_path / "sam.pth")


@pytest.mark.parametrize("download", [False, True])
def test_a_missing_file_is_never_fetched(tmp_path, download):
    """Its digest is not known here, so there is nothing to trust a download by."""
    options = ModelOptions(model_type="vit_t", download=download)
    with pytest.raises(UserError, match=r"put mobile_sam\.pt \(from .*MobileSAM\) at") as error:
        find_checkpoint(options, tmp_path)
    assert "--download" not in str(error.value)
    (tmp_path / "mobile_sam.pt").touch()
    assert find_checkpoint(options, tmp_path) == tmp_path / "mobile_sam.pt"


def test_loading_in_eval_mode_leaves_nothing_stale(tiny_t, encoder):
    """timm and the published code would go on with the biases of before."""
    image = torch.randn(1, 3, 64, 64)
    fresh = build_image_encoder(tiny_t, 64).eval()
    with torch.no_grad():
        before = fresh(image)
        fresh.load_state_dict(encoder.state_dict())
        assert not torch.equal(fresh(image), before)
        assert torch.equal(fresh(image), encoder(image))


def test_biases_get_gradients_in_eval_mode_again_and_again(encoder):
    table = attention_blocks(encoder)[0].attn.attention_biases
    for _ in range(2):
        encoder(torch.randn(1, 3, 64, 64)).square().mean().backward()
        assert table.grad is not None and table.grad.any()
        table.grad = None


# Shapes and statistics


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (16, 16)])
def test_any_multiple_of_16_square_or_not(encoder, size):
    assert encoder(torch.zeros(2, 3, *size)).shape == (2, 32, size[0] // 16, size[1] // 16)


def test_frozen_statistics_stay_and_thawed_ones_move(tiny_t):
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    for train in ("adapter", "all"):
        options = ModelOptions(model_type="tiny_t", adapter="decoder", train=train)
        model = build_model(options, DecoderOptions(), "none", None, 1).train()
        before = {n: b.clone() for n, b in model.image_encoder.named_buffers()}
        model(image)
        moved = [not torch.equal(b, before[n]) for n, b in model.image_encoder.named_buffers()]
        assert all(moved) if train == "all" else not any(moved)


def test_adapters_that_need_a_vit_say_why():
    options = ModelOptions(model_type="vit_t")
    ADAPTERS["decoder"].check(options, "box")
    for name in ("sam_adapter", "ts_sam"):
        with pytest.raises(UserError, match=rf"{name} does not fit --model_type vit_t: it needs "):
            ADAPTERS[name].check(options, "none")


# Anatomy


def test_window_attention_equals_timm(tiny_t):
    widths, depths, heads, windows = zip(*tiny_t.stages, strict=True)
    trunk = TinyVit(
        num_classes=0, embed_dims=widths, depths=depths, num_heads=heads, window_sizes=windows
    )
    for stage in randomise(trunk).stages[1:]:
        stock = stage.blocks[0].attn
        x = torch.randn(3, stock.resolution[0] ** 2, stock.qkv.in_features)
        assert torch.allclose(WindowAttention(stock)(x), stock(x), atol=1e-5)


@pytest.fixture(params=["vit", "tiny_vit"])
def any_encoder(request, tiny, tiny_t):
    row = {"vit": tiny, "tiny_vit": tiny_t}[request.param]
    return randomise(build_image_encoder(row, 64)).eval()


def test_blocks_read_the_same(any_encoder):
    blocks = attention_blocks(any_encoder)
    seen = []
    for block in blocks:
        assert isinstance(block.mlp, torch.nn.Module)
        block.attn.qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    any_encoder(torch.randn(1, 3, 64, 64))
    seen = [x for x in seen if x.shape[1] > 1]  # but the zero beyond the border
    assert len(seen) == len(blocks) > 1
    for block, x in zip(blocks, seen, strict=True):
        assert x.ndim == 4 and x.shape[-1] == block.attn.qkv.in_features
        assert block.attn.qkv.out_features == 3 * block.attn.proj.in_features


def test_q_k_and_v_are_where_the_layout_says(any_encoder):
    """Without v nothing is attended to; the rows of a head lie as the specification says."""
    for block in attention_blocks(any_encoder):
        attention, layout = block.attn, QkvLayout.of(block.attn)
        weight, bias = attention.qkv.weight.data, attention.qkv.bias.data
        assert torch.equal(layout.join(layout.split(weight, 0), 0), weight)
        assert torch.equal(layout.join(layout.split(bias)), bias)
        q, k, v = layout.split(torch.arange(len(weight)))
        if layout.head_major:
            size = len(q) // layout.num_heads
            assert torch.equal(q // (3 * size), torch.arange(len(q)) // size)
            parts = [rows % (3 * size) // size for rows in (q, k, v)]
        else:
            parts = [rows // len(q) for rows in (q, k, v)]
        assert [part.unique().tolist() for part in parts] == [[0], [1], [2]]

        weight[v], bias[v] = 0.0, 0.0
        side = getattr(attention, "window", 4)
        x = torch.randn(2, side, side, attention.qkv.in_features)
        out = attention(x.flatten(1, 2) if layout.head_major else x)
        assert torch.allclose(out, attention.proj.bias.expand_as(out))


# Weights of others


def test_micro_sam_wrapping_is_taken_off(tiny_t, tmp_path):
    state = build_sam(tiny_t).state_dict()
    path = tmp_path / "best.pt"
    torch.save({"model_state": {f"sam.{n}": t for n, t in state.items()}, "epoch": 1}, path)
    assert set(load_base(build_sam(tiny_t), path).loaded) == state.keys()


def test_normalisation_belongs_to_the_model(tiny_t):
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 1, 1, 3).expand(1, 3, 1, 3)
    options = ModelOptions(model_type="tiny_t", adapter="decoder", normalisation="unit")
    for model in (
        build_model(options, DecoderOptions(), "box", None, 1),
        build_untuned(options, None, 1),
    ):
        assert model.preprocess(image)[0, 0, 0].tolist() == pytest.approx([0, 0.2, 1])
        assert model.as_sam().pixel_std.flatten().tolist() == [255] * 3
    usual = build_untuned(replace(options, normalisation="sam"), None, 1)
    assert usual.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])


def test_each_normalisation_can_be_chosen():
    from samtune.models import NORMALISATIONS

    field = ModelOptions.__dataclass_fields__["normalisation"]
    assert set(field.metadata["choices"]) == NORMALISATIONS.keys()
    assert MODEL_TYPES["vit_t"].sha256 == ""
