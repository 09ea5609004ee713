"""What the fixtures of SAM-Adapter do not show."""

import math
from dataclasses import replace

import pytest
import torch

from samtune.adapters.layers import high_pass
from samtune.adapters.sam_adapter import OfficialEncoder, ParentEncoder
from samtune.models.sam import build_image_encoder


@pytest.fixture
def encoder(tiny):
    torch.manual_seed(0)
    return build_image_encoder(tiny, 64).requires_grad_(False).eval()


def test_straight_embedding_reads_each_patch_where_it_is(encoder):
    """One changed patch changes the straight feature there only, the published one elsewhere."""
    image, changed = torch.zeros(2, 1, 3, 64, 64).unbind()
    changed[:, :, 16:32, 48:64] = 1.0  # patch (1, 3)
    moved = {}
    for published in (True, False):
        seen = []
        adapted = OfficialEncoder(encoder, published, chosen=range(2))
        linear = adapted.prompt_generator.embedding_generator
        linear.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            adapted(image), adapted(changed)
        different = (seen[0] != seen[1]).any(-1)[0]  # (h, w)
        moved[published] = different.nonzero().tolist()
    assert moved[False] == [[1, 3]]
    assert moved[True] != [[1, 3]] and len(moved[True]) > 1


def test_the_parent_adds_one_more_adapter_than_there_are_blocks(encoder):
    adapted = ParentEncoder(encoder, 12, 6, chosen=range(2))
    calls = []
    adapted.task_adapter_up.register_forward_hook(lambda *_: calls.append(1))
    adapted(torch.zeros(1, 3, 64, 64))
    assert len(calls) == len(adapted.task_adapter_blocks) == len(encoder.blocks) + 1


MAKERS = {
    "parent": lambda encoder: ParentEncoder(encoder, tune_out=12, hidden_dim=6, chosen=range(2)),
    "official": lambda encoder: OfficialEncoder(encoder, published=True, chosen=range(2)),
}


@pytest.mark.parametrize("variant", MAKERS)
def test_a_silent_adapter_is_the_stock_encoder(encoder, variant):
    image = torch.randn(2, 3, 64, 64)
    adapted = MAKERS[variant](encoder)
    parent = variant == "parent"
    up = adapted.task_adapter_up if parent else adapted.prompt_generator.shared_mlp
    torch.nn.init.zeros_(up.weight), torch.nn.init.zeros_(up.bias)
    with torch.no_grad():
        assert torch.allclose(adapted(image), encoder(image), atol=1e-6)


def test_published_starting_values(tiny):
    torch.manual_seed(0)
    wide = replace(tiny, embed_dim=1024, num_heads=4, depth=1, global_blocks=())
    generator = OfficialEncoder(build_image_encoder(wide, 64), True, chosen=[0]).prompt_generator
    assert generator.embedding_generator.weight.std().item() == pytest.approx(0.02, rel=0.05)
    conv = generator.prompt_generator.proj
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (16 * 16 * 32)), rel=0.05)
    assert not conv.bias.any() and not generator.shared_mlp.bias.any()


def test_high_pass_removes_what_is_constant_and_keeps_the_finest():
    assert high_pass(torch.full((1, 3, 32, 32), 7.0)).abs().max() < 1e-4
    checks = torch.ones(32, 32)
    checks[::2, ::2] = checks[1::2, 1::2] = -1
    assert torch.allclose(high_pass(checks[None, None]), torch.ones(1, 1, 32, 32), atol=1e-5)


def test_high_pass_ignores_autocast():
    image = torch.randn(1, 3, 32, 48)
    with torch.autocast("cpu", torch.bfloat16):
        inside = high_pass(image)
        half = high_pass(image.bfloat16())
    assert torch.equal(inside, high_pass(image)) and half.dtype == torch.float32
