"""The door to an adapted model: seeds, base weights, what trains, and what is refused."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from samtune.adapters import ADAPTERS, build_model, build_untuned
from samtune.adapters.layers import thaw_decoder
from samtune.adapters.options import DecoderOptions, SamAdapterOptions, TsSamOptions
from samtune.config import ModelOptions
from samtune.engine.checkpoint import adapted_state, load_adapted, save_adapted
from samtune.errors import UserError
from samtune.models import MODEL_TYPES
from samtune.models.sam import build_sam

CODE = Path(__file__).resolve().parents[2] / "code"


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def test_equal_seeds_give_equal_models_and_leave_the_random_state(tiny):
    options = ModelOptions(model_type="tiny")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, two = (build_model(options, SamAdapterOptions(), "box", None, 7) for _ in range(2))
    other = build_model(options, SamAdapterOptions(), "box", None, 8)
    assert torch.equal(torch.rand(3), expected)
    state = two.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
    weight = one.image_encoder.HFC_tune.weight
    assert not torch.equal(weight, other.image_encoder.HFC_tune.weight)


@pytest.mark.parametrize("from_file", [False, True])
def test_untuned_and_tuned_share_their_base(tiny, tmp_path, from_file):
    path = tmp_path / "tiny.pth" if from_file else None
    if path:
        torch.manual_seed(2)
        torch.save(build_sam(tiny).state_dict(), path)
    options = ModelOptions(model_type="tiny")
    untuned = build_untuned(options, path, seed=7)
    tuned = build_model(options, SamAdapterOptions(), "box", path, seed=7).state_dict()
    assert all(torch.equal(t, tuned[name]) for name, t in untuned.state_dict().items())
    assert not any(p.requires_grad for p in untuned.parameters())
    assert bool(untuned.base_keys) == from_file


@pytest.mark.parametrize(
    ("train", "from_file", "encoder_trains"),
    [("auto", False, True), ("auto", True, False), ("all", True, True), ("adapter", False, False)],
)
def test_what_train_means(tiny, tmp_path, train, from_file, encoder_trains):
    path = tmp_path / "tiny.pth" if from_file else None
    if path:
        torch.save(build_sam(tiny).state_dict(), path)
    options = ModelOptions(model_type="tiny", adapter="decoder", train=train)
    model = build_model(options, DecoderOptions(), "box", path, seed=7)
    assert all(p.requires_grad == encoder_trains for p in model.image_encoder.parameters())
    read = {"point_embeddings.2.weight", "point_embeddings.3.weight", "no_mask_embed.weight"}
    thawed = {n for n, p in model.prompt_encoder.named_parameters() if p.requires_grad}
    assert thawed == (read if encoder_trains else set())
    assert model.mask_decoder.mask_tokens.weight.requires_grad
    assert not any(p.requires_grad for p in model.mask_decoder.iou_prediction_head.parameters())
    assert bool(model.base_keys) == from_file


@pytest.mark.parametrize(
    ("prompt", "read"),
    [("box", {"point_embeddings.2", "point_embeddings.3", "no_mask_embed"}),
     ("none", {"no_mask_embed"})],
)  # fmt: skip
def test_what_a_prompt_reads_of_the_prompt_encoder_can_train(tiny, tmp_path, prompt, read):
    """It is saved with what the adapter trains, and comes back."""
    torch.save(build_sam(tiny).state_dict(), tmp_path / "tiny.pth")
    made = [
        build_model(
            ModelOptions(model_type="tiny", adapter="decoder", train=train), DecoderOptions(),
            prompt, tmp_path / "tiny.pth", seed=7,
        )
        for train in ("adapter", "prompt_encoder", "prompt_encoder")
    ]  # fmt: skip
    plain, model, again = made
    saved = [adapted_state(m).keys() for m in (plain, model)]
    assert saved[1] - saved[0] == {f"prompt_encoder.{part}.weight" for part in read}
    with torch.no_grad():
        model.prompt_encoder.no_mask_embed.weight += 1
    save_adapted(tmp_path / "best.safetensors", model, {})
    load_adapted(again, tmp_path / "best.safetensors")
    vectors = (m.prompt_encoder.no_mask_embed.weight for m in (model, again))
    assert torch.equal(*vectors)


def test_an_adapter_without_a_prompt_encoder_cannot_train_it(tiny):
    options = ModelOptions(model_type="tiny", adapter="ts_sam", train="prompt_encoder")
    with pytest.raises(UserError, match="--train prompt_encoder: --adapter ts_sam takes no prompt"):
        build_model(options, TsSamOptions(), "none", None, seed=7)


# Adapter parameters and (with the mask decoder, as published, all of it) trainable ones.
PARENT = {"vit_b": (400_928, 4_459_268), "vit_l": (532_640, 4_590_980)}
PARENT |= {"vit_h": (639_648, 4_697_988)}
OFFICIAL = {"vit_b": (63_312, 4_121_908), "vit_l": (116_544, 4_175_140)}
OFFICIAL |= {"vit_h": (186_960, 4_245_556)}
UNREAD = 132_612 + 419_424  # IoU head and three hyper-networks, frozen here


@pytest.mark.parametrize("name", PARENT)
@pytest.mark.parametrize(("variant", "table"), [("parent", PARENT), ("official", OFFICIAL)])
def test_published_parameter_counts(name, variant, table):
    with torch.device("meta"):
        sam = build_sam(name).requires_grad_(False)
        model = ADAPTERS["sam_adapter"].build(sam, SamAdapterOptions(variant=variant))
    own, trainable = table[name]
    assert count(p for p in model.image_encoder.parameters() if p.requires_grad) == own
    assert count(p for p in model.parameters() if p.requires_grad) == trainable - UNREAD


def test_decoder_trains_all_that_a_loss_reads():
    with torch.device("meta"):
        sam = build_sam("vit_b").requires_grad_(False)
        thaw_decoder(sam)
    assert count(p for p in sam.parameters() if p.requires_grad) == 4_058_340 - UNREAD


def rename(names, adapter: str) -> list[str]:
    """What the published names become; dropped ones are left out."""
    result = []
    for name in names:
        for pattern, replacement in ADAPTERS[adapter].renames:
            if re.fullmatch(pattern, name):
                name = replacement and re.sub(pattern, replacement, name)
                break
        result += [name] if name is not None else []
    return result


def test_a_full_dict_of_the_parent_loads(tiny):
    """Its full state dict lists the shared projection under every adapter too."""
    options = ModelOptions(model_type="tiny")
    model = build_model(options, SamAdapterOptions(), "box", None, 1)
    published = list(model.state_dict())
    prefix = "image_encoder.task_adapter_blocks"
    aliases = [f"{prefix}.{i}.up_projection.{w}" for i in range(3) for w in ("weight", "bias")]
    shared = [f"image_encoder.task_adapter_up.{w}" for w in ("weight", "bias")]
    assert rename(published + aliases, "sam_adapter") == published + 3 * shared
    assert {*shared} < {*published}
    assert len([n for n in published if n.startswith(prefix)]) == 2 * (tiny.depth + 1)
    assert {"image_encoder.HFC_tune.weight", "image_encoder.patch_embed_tune.bias"} < {*published}


def test_an_official_dict_loads(tiny):
    """It keeps the no-mask vector and the position encoding outside the prompt encoder."""
    options = ModelOptions(model_type="tiny")
    model = build_model(options, SamAdapterOptions(variant="official"), "none", None, 1)
    ours = model.state_dict()
    published = [n for n in ours if not n.startswith("prompt_encoder.")]
    published += ["no_mask_embed.weight", "pe_layer.positional_encoding_gaussian_matrix"]
    renamed = rename(published, "sam_adapter")
    assert set(renamed) < set(ours) and len(renamed) == len(published)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained | model.own_keys <= set(renamed)
    d = "image_encoder.prompt_generator"
    assert ours[f"{d}.prompt_generator.proj.weight"].shape == (1, 3, 16, 16)
    assert ours[f"{d}.lightweight_mlp_1.0.bias"].shape == (1,)
    assert ours[f"{d}.shared_mlp.weight"].shape == (32, 1)
    assert ours[f"{d}.embedding_generator.weight"].shape == (1, 32)


def test_refusals_name_the_flag():
    row = replace(ADAPTERS["decoder"], prompts=("box",), backbones=("swin",))
    with pytest.raises(UserError, match="decoder does not take --prompt none; it takes box"):
        row.check(ModelOptions(), "none")
    with pytest.raises(UserError, match="decoder does not fit --model_type vit_mini"):
        row.check(ModelOptions(), "box")
    with pytest.raises(UserError, match=r"--model_type vit_x: choose from .*vit_b"):
        row.check(ModelOptions(model_type="vit_x"), "box")
    with pytest.raises(UserError, match="--adapter sam: choose from decoder, sam_adapter"):
        build_model(ModelOptions(adapter="sam"), None, "box", None, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "parent", "embedding": "straight"}, "--embedding .* --variant parent"),
        ({"variant": "official", "tune_out": 8}, "--tune_out .* --variant official"),
        ({"hidden_dim": 0}, "--hidden_dim must be at least 1"),
    ],
)
def test_options_of_the_other_variant_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        SamAdapterOptions(**values)


def test_rows_are_listed_under_their_names():
    assert all(name == adapter.name for name, adapter in ADAPTERS.items())
    families = {row.backbone for row in MODEL_TYPES.values()}
    assert all(families & set(adapter.backbones) for adapter in ADAPTERS.values())


def test_the_tables_import_without_torch():
    code = "import sys, samtune.adapters, samtune.models; assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(CODE)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
