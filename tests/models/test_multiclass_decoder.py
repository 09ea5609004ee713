"""Decoders for K classes: what they keep of SAM's, what starts anew, and that it is said."""

import json
from dataclasses import replace

import pytest
import torch

from samtune.adapters import _account
from samtune.adapters.layers import thaw_decoder
from samtune.engine.checkpoint import adapted_state
from samtune.models import MODEL_TYPES
from samtune.models.mask_decoder import ClassDecoder, decode_masks, masks_read
from samtune.models.sam import build_mask_decoder, build_sam
from samtune.models.segmenter import PromptedSam
from samtune.models.weights import give_classes, load_base
from samtune.structures import Prompts

LAYOUTS = ("samed", "gsam")


@pytest.fixture
def base(tiny, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "sam.pth"
    torch.save(build_sam(tiny).state_dict(), path)
    return path


def with_classes(tiny, base, num_classes, layout):
    sam = build_sam(tiny).requires_grad_(False)
    report = give_classes(sam, num_classes, layout, load_base(sam, base))
    return sam, report


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_classes", [3, 4, 7])
def test_one_mask_per_class(tiny, base, num_classes, layout):
    sam, _ = with_classes(tiny, base, num_classes, layout)
    model = PromptedSam(sam)
    prediction = model(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert prediction.logits.shape == (2, num_classes, 16, 16)
    assert prediction.iou is None
    asked = Prompts(boxes=torch.tensor([[1.0, 2, 30, 40]] * 3), image_index=torch.tensor([0, 1, 1]))
    assert model(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), asked).logits.shape[:2] == (
        3,
        num_classes,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_class_has_a_token_and_a_network_of_its_own(tiny, base, layout):
    """Changing the network of one class changes the mask of that class only."""
    sam, _ = with_classes(tiny, base, 3, layout)
    decoder = sam.mask_decoder
    torch.manual_seed(1)
    features, pe = torch.randn(2, 32, 4, 5), torch.randn(1, 32, 4, 5)
    inputs = (features, pe, torch.zeros(2, 0, 32), torch.zeros(1, 32, 1, 1))
    with torch.no_grad():
        before, _ = decode_masks(decoder, *inputs)
        decoder.output_hypernetworks_mlps[1].layers[2].bias += 1
        after, _ = decode_masks(decoder, *inputs)
    changed = (before != after).flatten(2).any(-1).any(0)
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize(("num_classes", "layout"), [(2, "samed"), (5, "samed"), (3, "gsam")])
def test_every_tensor_of_the_checkpoint_is_accounted_for(tiny, base, num_classes, layout):
    sam, report = with_classes(tiny, base, num_classes, layout)
    given, state = torch.load(base, weights_only=True), sam.state_dict()
    parts = (report.loaded, report.resized, report.unused, report.reset)
    assert sorted(name for part in parts for name in part) == sorted(given)
    assert all(torch.equal(state[name], given[name]) for name in report.loaded)
    assert set(report.reset) <= state.keys() and not set(report.unused) & state.keys()
    assert f"{len(report.reset)} started anew for the classes" in report.summary()
    assert "mask_decoder.mask_tokens.weight" in report.reset
    assert ("mask_decoder.iou_token.weight" in report.loaded) == (layout == "samed")
    network = "mask_decoder.output_hypernetworks_mlps.0.layers.0.weight"
    assert (network in report.loaded) == (layout == "gsam")
    assert "mask_decoder.iou_prediction_head.layers.0.weight" in report.reset


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_started_anew_is_saved(tiny, base, layout):
    """Also where it is frozen and has the base's shape, as four mask tokens have."""
    sam, report = with_classes(tiny, base, 4, layout)
    model = _account(PromptedSam(sam), report)
    saved = adapted_state(model).keys()
    assert saved == {*report.reset, *model.load_report.new}
    assert not set(report.reset) & set(model.load_report.new)
    assert "mask_decoder.transformer.norm_final_attn.weight" not in saved


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_that_a_loss_reads_trains_and_nothing_else(tiny, base, layout):
    sam, _ = with_classes(tiny, base, 6, layout)
    thaw_decoder(sam)
    PromptedSam(sam)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).logits.sum().backward()
    for name, p in sam.mask_decoder.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        assert p.requires_grad != name.startswith("iou_prediction_head."), name


def test_random_weights_have_no_report(tiny):
    assert give_classes(build_sam(tiny), 3, "samed", None) is None


def test_a_stock_decoder_answers_with_its_first_mask(tiny):
    assert masks_read(build_mask_decoder(tiny)) == slice(0, 1)


@pytest.mark.parametrize(
    ("num_classes", "layout", "message"),
    [(1, "samed", "at least 2"), (2, "gsam", "at least 3"), (4, "sam", "choose from samed, gsam")],
)
def test_refusals(tiny, num_classes, layout, message):
    with pytest.raises(ValueError, match=message):
        ClassDecoder(build_mask_decoder(tiny), num_classes, layout)


def test_published_sizes_and_names(golden_dir):
    """G-SAM's counts for 11 and 19 classes, and every tensor's shape at 19."""
    shapes = {}
    for num_classes, count in ((11, 5_050_052), (19, 6_178_756)):
        with torch.device("meta"):
            stock = build_mask_decoder(MODEL_TYPES["vit_b"])
            decoder = ClassDecoder(stock, num_classes, "gsam")
        assert sum(p.numel() for p in decoder.parameters()) == count
        shapes[num_classes] = {
            f"mask_decoder.{n}": [*t.shape] for n, t in decoder.state_dict().items()
        }
    table = json.loads((golden_dir / "gsam_state_dict_keys.json").read_text())
    published = {n: s for n, s in table["SAM"].items() if n.startswith("mask_decoder.")}
    assert shapes[19] == published | table["decoder_num_classes_19"]


def test_the_samed_layout_is_a_stock_decoder_with_k_masks(tiny):
    """Which is how SAMed builds it: the names and shapes of its files."""
    ours = ClassDecoder(build_mask_decoder(tiny), 9, "samed").state_dict()
    theirs = build_mask_decoder(replace(tiny, multimask_outputs=8)).state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
