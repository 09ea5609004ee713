"""What the fixtures of TS-SAM do not show."""

import math

import pytest
import torch

from samtune.adapters import ADAPTERS, build_model
from samtune.adapters.block_lists import choose_blocks
from samtune.adapters.options import TsSamOptions
from samtune.adapters.ts_sam import SideAdapter
from samtune.config import ModelOptions
from samtune.engine.checkpoint import adapted_state, load_adapted
from samtune.errors import UserError
from samtune.models.sam import build_sam
from samtune.structures import Prompts


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def make(options=None, checkpoint=None, seed=1):
    model_options = ModelOptions(model_type="tiny", adapter="ts_sam", train="adapter")
    return build_model(model_options, options or TsSamOptions(), "none", checkpoint, seed)


PUBLISHED = {
    "vit_b": (196_864, 5_284_352, 4_640_256, 11_892_865, 101_563_777),
    "vit_h": (327_936, 21_911_552, 5_426_688, 29_437_569, 666_463_617),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("use_fft", [False, True])
def test_published_parameter_counts(name, use_fft):
    with torch.device("meta"):
        sam = build_sam(name).requires_grad_(False)
        model = ADAPTERS["ts_sam"].build(sam, TsSamOptions(use_fft=use_fft))
    embedding, csa, mrm, trainable, total = PUBLISHED[name]
    encoder, fft = model.image_encoder, 196_864 * use_fft
    assert count(encoder.csa_embedding) == embedding
    assert count(encoder.csa_blocks) == csa and count(encoder.mrm_blocks) == mrm
    assert count(model.mask_decoder) == 1_771_393
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable + fft
    assert count(model) == total + fft


def test_vit_l_follows_the_rule_of_the_published_presets():
    with torch.device("meta"):
        sam = build_sam("vit_l").requires_grad_(False)
        encoder = ADAPTERS["ts_sam"].build(sam, TsSamOptions()).image_encoder
    assert encoder.csa_embedding.out_features == 256
    assert encoder.csa_places == tuple(range(24)) and encoder.mrm_places == tuple(range(12, 24))
    assert len(encoder.csa_blocks) == 26 and len(encoder.mrm_blocks) == 13


@pytest.mark.parametrize(
    ("text", "blocks"),
    [("auto", [2, 3, 4, 5]), ("none", []), ("3", [3]), ("5,0-2,1", [0, 1, 2, 5])],
)
def test_lists_of_blocks(text, blocks):
    assert choose_blocks("csa_blocks", text, depth=6, usual=4) == blocks


@pytest.mark.parametrize("text", ["6", "0,9", "3-6", "4-2"])
def test_blocks_that_are_not_there_are_refused(text):
    with pytest.raises(UserError, match=rf"--mrm_blocks {text}: the blocks .* are 0-5"):
        choose_blocks("mrm_blocks", text, depth=6, usual=4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"csa_blocks": "0;1"}, "--csa_blocks 0;1: write it like"),
        ({"mrm_blocks": ""}, "--mrm_blocks : write it like"),
        ({"scale_factor": -1}, "--scale_factor"),
    ],
)
def test_impossible_options_name_their_flag(values, message):
    with pytest.raises(UserError, match=message):
        TsSamOptions(**values)


def test_a_published_dict_loads_with_or_without_module(tiny, tmp_path):
    """The official file is a full state dict: image encoder and fusion decoder, statistics too."""
    base = tmp_path / "base.pth"
    torch.save(build_sam(tiny).state_dict(), base)
    published = make(seed=5).state_dict()
    assert {name.split(".")[0] for name in published} == {"image_encoder", "mask_decoder"}
    for prefix in ("", "module."):
        path = tmp_path / f"{prefix}best.pth"
        torch.save({prefix + name: tensor for name, tensor in published.items()}, path)
        model = make(checkpoint=base)
        loaded = load_adapted(model, path, ADAPTERS["ts_sam"].renames)
        assert set(loaded) == published.keys()
        assert all(torch.equal(t, published[n]) for n, t in model.state_dict().items())


def test_published_names(tiny):
    names = make(TsSamOptions(use_fft=True)).state_dict().keys()
    encoder = "image_encoder"
    wanted = {
        f"{encoder}.csa_embedding.bias", f"{encoder}.fft_embedding.proj.weight",
        f"{encoder}.csa_blocks.3.conv2.weight", f"{encoder}.csa_blocks.0.bn1.running_var",
        f"{encoder}.mrm_blocks.2.conv_in.1.num_batches_tracked",
        f"{encoder}.mrm_blocks.0.fpn1.3.bias", f"{encoder}.mrm_blocks.0.fpn1.4.weight",
        f"{encoder}.mrm_blocks.0.fpn1.6.res_gate.2.weight",
        f"{encoder}.mrm_blocks.0.fpn2.3.res_gate.0.weight",
        "mask_decoder.conv12_1.0.weight", "mask_decoder.conv24_2.1.bias",
        "mask_decoder.conv1_1.bias",
    }  # fmt: skip
    assert wanted < set(names)
    assert f"{encoder}.mrm_blocks.0.fpn1.6.res_gate.0.bias" not in names
    assert "mask_decoder.conv1.0.bias" not in names


def test_only_what_is_new_is_saved(tiny, tmp_path):
    """The base brings the image encoder; the fusion decoder shares only a prefix with SAM's."""
    base = tmp_path / "base.pth"
    torch.save(build_sam(tiny).state_dict(), base)
    model = make(checkpoint=base)
    saved = adapted_state(model)
    assert saved.keys() == set(model.load_report.new)
    assert saved.keys() == model.state_dict().keys() - build_sam(tiny).state_dict().keys()


def test_rows_may_ask_about_any_image(tiny):
    model = make()
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(image).logits
        rows = model(image, Prompts(image_index=torch.tensor([1, 0, 1]))).logits
    assert torch.allclose(rows, expected[[1, 0, 1]], atol=1e-5)


def test_what_it_cannot_do_is_one_sentence(tiny):
    with pytest.raises(UserError, match="ts_sam does not take --prompt box; it takes none"):
        ADAPTERS["ts_sam"].check(ModelOptions(adapter="ts_sam"), "box")
    with pytest.raises(UserError, match="decoder of its own"):
        make().as_sam()


def test_published_starting_values():
    torch.manual_seed(0)
    adapter = SideAdapter(512, 128, 128)
    assert adapter.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.05)
    assert adapter.conv2.weight.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.05)
    assert not adapter.conv1.bias.any() and not adapter.conv2.bias.any()
