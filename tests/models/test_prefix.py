"""What training cannot change of an encoder is found by construction; going on from it is exact."""

import pytest
import torch
from torch import nn

from samtune.adapters import ADAPTERS, build_model
from samtune.config import ModelOptions
from samtune.errors import UserError
from samtune.models.prefix import (
    Stage,
    fingerprint,
    frozen_stages,
    reads_image,
    run_frozen,
    stages_of,
)


@pytest.fixture
def image():
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=generator)


def model_of(model_type, adapter="decoder", **options):
    chosen = ModelOptions(model_type=model_type, adapter=adapter, train="adapter", **options)
    return build_model(chosen, ADAPTERS[adapter].options(), "none", None, seed=3).train()


@pytest.mark.parametrize(("model_type", "stages"), [("tiny", 4), ("tiny_t", 10)])
def test_what_follows_from_any_frozen_part_is_what_the_whole_encoder_says(
    tiny, image, model_type, stages
):
    """At each place where training may begin; padding is seen as it was."""
    model = model_of(model_type)
    assert frozen_stages(model.image_encoder) == len(stages_of(model.image_encoder)) == stages
    valid = torch.tensor([[64, 64], [30, 64], [64, 17]])
    whole = model.encode(image, valid)
    assert torch.equal(model.frozen(image, valid), whole), "all of it where nothing trains"
    for depth in range(stages - 1, 0, -1):
        next(stages_of(model.image_encoder)[depth].parameters()).requires_grad_(True)
        assert frozen_stages(model.image_encoder) == depth
        frozen = model.frozen(image, valid)
        assert not frozen.requires_grad
        assert torch.equal(model.encode(image, valid, frozen), model.encode(image, valid)), depth


def test_a_step_from_the_frozen_part_moves_what_trains_as_a_whole_step_does(tiny, image):
    model = model_of("tiny")
    model.image_encoder.blocks[1].requires_grad_(True)
    blank = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(image.shape)
    gradients = []
    for seen, frozen in ((image, None), (blank, model.frozen(image))):
        model.zero_grad()
        logits = model(seen, frozen=frozen).logits
        logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any(name.startswith("image_encoder.blocks.1.attn") for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())


@pytest.mark.parametrize("adapter", ["ts_sam", "samus", "gsam"])
def test_an_encoder_whose_parts_are_no_chain_has_no_frozen_part(tiny, image, adapter):
    model = model_of("tiny", adapter)
    assert frozen_stages(model.image_encoder) == 0
    with pytest.raises(UserError, match="nothing at the beginning"):
        model.frozen(image)


@pytest.mark.parametrize("adapter", ["lora", "conv_lora", "adaptformer"])
def test_adapters_in_every_block_leave_the_patches_only(tiny, adapter):
    assert frozen_stages(model_of("tiny", adapter).image_encoder) == 1


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        ("lora", {}),
        ("conv_lora", {}),
        ("adaptformer", {"dropout": 0.0}),
        ("sam_adapter", {}),
        ("sam_adapter", {"variant": "official"}),
        ("sam_adapter", {"variant": "official", "embedding": "straight"}),
    ],
)
def test_adapters_in_late_blocks_leave_those_before_them(tiny, image, adapter, options):
    """SAM-Adapter's read the image itself as well: it is to be there beside the frozen part."""
    chosen = ModelOptions(model_type="tiny", adapter=adapter, train="adapter")
    options = ADAPTERS[adapter].options(adapter_blocks="1", **options)
    model = build_model(chosen, options, "none", None, seed=3)  # eval: gates draw no noise
    assert frozen_stages(model.image_encoder) == 2, "the patches and block 0"
    frozen, whole = model.frozen(image), model.encode(image)
    assert reads_image(model.image_encoder) == (adapter == "sam_adapter")
    torch.testing.assert_close(model.encode(image, None, frozen), whole, rtol=0, atol=0)
    if not reads_image(model.image_encoder):
        blank = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(image.shape)
        assert torch.equal(model.encode(blank, None, frozen), whole)


class Chain(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def stages(self):
        return [Stage((part,), part) for part in self.parts]


def test_what_may_draw_or_count_in_training_is_not_frozen():
    """A dropout between frozen layers draws; a BatchNorm that trains moves its statistics."""
    norm = nn.BatchNorm2d(2)
    frozen = [nn.Conv2d(3, 2, 1).requires_grad_(False), nn.Conv2d(2, 2, 1).requires_grad_(False)]
    assert frozen_stages(Chain(*frozen)) == 2
    assert frozen_stages(Chain(frozen[0], nn.Dropout(), frozen[1])) == 1
    assert frozen_stages(Chain(frozen[0], norm, frozen[1])) == 1
    assert frozen_stages(Chain(frozen[0], nn.Sequential(frozen[1], nn.Linear(2, 2)))) == 1
    assert frozen_stages(Chain(norm.requires_grad_(False).eval(), frozen[0])) == 2


def test_a_fingerprint_tells_what_features_follow_from_and_nothing_else(tiny):
    model = model_of("tiny")
    encoder = model.image_encoder
    before = fingerprint(encoder)
    assert before == fingerprint(model_of("tiny").image_encoder)
    model.mask_decoder.mask_tokens.weight.data.add_(1)
    assert fingerprint(encoder.eval()) == before
    encoder.blocks[0].window_size += 1
    assert fingerprint(encoder) != before
    encoder.blocks[0].window_size -= 1
    encoder.neck[0].weight.data.view(-1)[0] += 1e-3
    changed = fingerprint(encoder)
    assert changed != before
    encoder.neck.requires_grad_(True)  # now it lies behind the frozen part
    shorter = fingerprint(encoder)
    assert shorter not in (before, changed)
    encoder.neck[0].weight.data.view(-1)[0] += 1
    assert fingerprint(encoder) == shorter


def test_the_frozen_part_reads_the_normalised_image(tiny, image):
    model = model_of("tiny")
    whole = run_frozen(model.image_encoder, model.preprocess(image))
    assert torch.equal(model.frozen(image), whole)
    assert not torch.equal(model.frozen(image, torch.tensor([[9, 9]] * 3)), whole)
