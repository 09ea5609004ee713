"""GSAM: any size and aspect, its CNN's weights, published names and counts."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_build import OFFICIAL, UNREAD, count
from torch.nn import functional as F
from torchvision.models import resnet18

from samtune.adapters import ADAPTERS, build_model, gsam
from samtune.adapters.gsam import Gsam, settle
from samtune.adapters.gsam_blocks import RESNETS, CnnEncoder, pool
from samtune.adapters.options import GsamOptions
from samtune.config import ModelOptions, Size
from samtune.engine.checkpoint import load_adapted
from samtune.errors import UserError
from samtune.models import NORMALISATIONS
from samtune.models.sam import build_sam
from samtune.structures import Prompts

SMALL = GsamOptions(resnet_depth=18)


def build(options=SMALL, **changes):
    return build_model(
        ModelOptions(model_type="tiny", adapter="gsam", **changes), options, "box", None, 1
    )


def on_meta(model_type: str = "vit_b", freeze_peg: bool = False) -> Gsam:
    with torch.device("meta"):
        sam = build_sam(model_type, 256, stride=8).requires_grad_(False)
        return ADAPTERS["gsam"].build(sam, GsamOptions(freeze_peg=freeze_peg)).eval()


# Sizes


@pytest.mark.parametrize("size", [(16, 16), (20, 61), (64, 64), (50, 122), (128, 40)])
def test_one_model_takes_any_size(tiny, size):
    model = build()
    boxes = torch.tensor([[2.0, 3, 11, 12]])
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    logits = model(image, Prompts(boxes=boxes)).logits
    assert logits.shape == (1, 1, size[0] // 8 * 4, size[1] // 8 * 4) and logits.isfinite().all()


def test_a_frame_is_asked_for_by_its_size(tiny):
    assert build().image_size == (256, 256) and build(image_size=100).image_size == (100, 100)
    assert build(image_size=(36, 100)).prompt_encoder.input_image_size == (36, 100)
    for size in (8, (8, 32), "32x8"):
        with pytest.raises(UserError, match=r"--image_size (8|8x32|32x8): it must be at least 16"):
            build(image_size=size)


def test_weights_do_not_depend_on_the_frame(tiny):
    one, two = build().state_dict(), build(image_size=520).state_dict()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_prompts_lie_in_the_pixels_of_their_frame(tiny):
    """A box over the same part of a frame is the same token, whatever the frame's size."""
    model, seen = build(), []
    model.mask_decoder.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    for height, width in ((32, 48), (64, 144)):
        corners = torch.tensor([[0.25 * width, 0.5 * height, 0.75 * width, 1.0 * height]]) - 0.5
        model(torch.zeros(1, 3, height, width, dtype=torch.uint8), Prompts(boxes=corners))
    assert torch.allclose(seen[0], seen[1], atol=1e-5)


def test_decode_without_a_frame_takes_the_models_own(tiny):
    model = build(image_size=(64, 40))
    image = torch.randint(0, 256, (1, 3, 64, 40), dtype=torch.uint8)
    prompts = Prompts(boxes=torch.tensor([[5.0, 6, 30, 50]]))
    assert torch.equal(
        model(image, prompts).logits, model.decode(model.encode(image), prompts).logits
    )


@pytest.mark.parametrize("grid", [(1, 2), (2, 3), (3, 3), (7, 14), (25, 38)])
def test_pooling_is_torchs(grid):
    x = torch.randn(2, 4, *grid, 5)
    expected = F.adaptive_avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), 3)
    assert torch.allclose(pool(x).flatten(0, 1).permute(0, 3, 1, 2), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("crop", "said"),
    [
        ((8, 32), "--crop 8x32: it must be at least 16"),
        ((32, 80), "--crop 32x80: it must lie within the frame, --image_size 48x64"),
        ((64, 32), "--crop 64x32: it must lie within the frame, --image_size 48x64"),
    ],
)
def test_a_crop_lies_within_the_frame(tiny, crop, said):
    options = ModelOptions(model_type="tiny", image_size=(48, 64))
    ADAPTERS["gsam"].check(options, "box", crop=Size(48, 64))
    with pytest.raises(UserError, match=said):
        ADAPTERS["gsam"].check(options, "box", crop=Size(*crop))


@pytest.mark.parametrize("name", sorted(ADAPTERS.keys() - {"gsam"}))
def test_the_other_adapters_refuse_crops(tiny, name):
    with pytest.raises(UserError, match=f"--crop 32: --adapter {name} .*gsam takes crops"):
        ADAPTERS[name].check(ModelOptions(model_type="tiny"), "none", crop=Size(32, 32))


# What trains and how it begins


def test_freeze_peg(tiny):
    for freeze in (False, True):
        model = build(GsamOptions(resnet_depth=18, freeze_peg=freeze), train="adapter")
        position = model.image_encoder.pos_embed
        assert all(p.requires_grad != freeze for p in position.parameters())
        assert all(p.requires_grad for p in model.positional_encoder.parameters())


def test_normalisation(tiny):
    pixel = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    for name, (mean, deviation) in NORMALISATIONS.items():
        normal = build(normalisation=name).preprocess(pixel)[0, :, 0, 0]
        assert torch.allclose(normal, (100 - torch.tensor(mean)) / torch.tensor(deviation))
    mean, deviation = (torch.tensor(values) / 255 for values in NORMALISATIONS["gsam"])
    assert torch.allclose(mean, torch.tensor([0.466, 0.471, 0.380]))
    assert torch.allclose(deviation, torch.tensor([0.195, 0.194, 0.192]))


def test_imagenet_weights_are_torchvisions(tiny, tmp_path):
    """Without the max-pool, the trunk of a torchvision ResNet gives the same features."""
    torch.manual_seed(3)
    theirs, path = resnet18().eval(), tmp_path / "resnet18.pth"
    torch.save(theirs.state_dict(), path)
    cnn = build(GsamOptions(resnet_depth=18, cnn_weights=str(path))).image_encoder.cnn_embed
    image = torch.randn(1, 3, 40, 56)
    stem = theirs.relu(theirs.bn1(theirs.conv1(image)))
    expected = theirs.layer3(theirs.layer2(theirs.layer1(stem)))
    assert torch.allclose(cnn(image), cnn.conv_f(expected), atol=1e-5)
    with pytest.raises(
        UserError, match=r"--cnn_weights .*: no torchvision ResNet of --resnet_depth"
    ):
        CnnEncoder(32, RESNETS[50]).load_trunk(path)
    with pytest.raises(UserError, match=r"gone\.pth"):
        build(GsamOptions(resnet_depth=18, cnn_weights=str(tmp_path / "gone.pth")))


def test_a_trained_model_needs_no_imagenet_weights():
    options = GsamOptions(resnet_depth=18, cnn_weights="gone.pth", freeze_peg=True)
    assert ADAPTERS["gsam"].without_start(options) == GsamOptions(resnet_depth=18, freeze_peg=True)


# Published facts


@pytest.mark.parametrize("spelling", ["both", "long", "short"])
def test_published_files_load(tiny, tmp_path, spelling):
    """With the CNN under either name or both, its unread end, and DataParallel's prefix."""
    torch.manual_seed(0)
    model, trunk, end = build(), "image_encoder.cnn_embed.", torch.ones(1)
    long = {"res2": "backbone.layer1", "res3": "backbone.layer2", "res4": "backbone.layer3"}
    state = {
        name: torch.randn_like(t.float()).to(t.dtype) for name, t in model.state_dict().items()
    }
    file = {} if spelling == "long" else dict(state)
    for name, tensor in state.items():
        part = name.removeprefix(trunk).split(".")[0]
        if spelling == "short" or not name.startswith(trunk) or part == "conv_f":
            file[name] = tensor
        else:
            file[name.replace(part, long.get(part, f"backbone.{part}"), 1)] = tensor
    if spelling != "short":
        file |= {f"{trunk}backbone.fc.weight": end, f"{trunk}backbone.layer4.0.conv1.weight": end}
    torch.save({f"module.{name}": tensor for name, tensor in file.items()}, tmp_path / "g.pth")
    loaded = load_adapted(model, tmp_path / "g.pth", ADAPTERS["gsam"].renames)
    assert set(loaded) == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_published_parameter_counts():
    model = on_meta()
    encoder, sizes = model.image_encoder, Counter()
    for name, p in encoder.named_parameters():
        if p.requires_grad:
            part = next(
                (part for part in ("MLP_Adapter", "refine_Adapter", "rel_pos", "cnn_embed.conv_f")
                 if part in name), name.split(".")[0],
            )  # fmt: skip
            sizes[part] += p.numel()
    assert sizes == {
        "cnn_embed": 27_535_424, "cnn_embed.conv_f": 786_432, "MLP_Adapter": 19_918_080,
        "refine_Adapter": 1_784_448, "input_Adapter": 295_872, "rel_pos": 32_256,
        "pos_embed": 7_680,
    }  # fmt: skip
    assert count(model.positional_encoder.parameters()) == 2_560
    unread_cnn = 17_013_736
    assert count(model.parameters()) == 157_901_208 - unread_cnn
    trainable = count(p for p in model.parameters() if p.requires_grad)
    assert trainable == 54_413_412 + 7_680 - UNREAD
    frozen = on_meta(freeze_peg=True)
    assert count(p for p in frozen.parameters() if p.requires_grad) == trainable - 7_680


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_vit_has_its_own_global_blocks(name):
    blocks = on_meta(name).image_encoder.blocks
    refined = [i for i, block in enumerate(blocks) if hasattr(block, "refine_Adapter")]
    trained = [i for i, block in enumerate(blocks) if block.attn.rel_pos_h.requires_grad]
    every = len(blocks) // 4
    assert refined == trained == list(range(every - 1, len(blocks), every))


def test_where_the_cnn_starts_from_is_decided_by_the_files_and_said(tmp_path, monkeypatch):
    asked = GsamOptions(resnet_depth=18)
    options, said = settle(asked, download=False, folder=tmp_path)
    assert options.cnn_weights == "none" and "random weights" in said and "--download" in said

    def unreachable(url, path, sha256):
        assert url.endswith("/resnet18-f37072fd.pth")
        assert len(sha256) == 64 and sha256.startswith("f37072fd")
        raise OSError("no route")

    monkeypatch.setattr(gsam, "fetch", unreachable)
    options, said = settle(asked, download=True, folder=tmp_path)
    assert options.cnn_weights == "none" and "no route" in said
    (tmp_path / "resnet18-f37072fd.pth").touch()
    options, said = settle(asked, download=True, folder=tmp_path)
    assert options.cnn_weights == str(tmp_path / "resnet18-f37072fd.pth") and "ImageNet" in said
    assert settle(replace(asked, cnn_weights="none"), True, tmp_path)[1] == ""
