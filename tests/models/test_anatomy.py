"""Which blocks forget their activations; how frozen weights are held."""

import pytest
import torch

from samtune.errors import UserError
from samtune.models.anatomy import (
    attention_blocks,
    checkpoint_activations,
    hold_frozen,
)
from samtune.models.block_lists import choose_blocks
from samtune.models.sam import build_sam
from samtune.models.segmenter import PromptedSam


@pytest.mark.parametrize(
    ("which", "chosen"),
    [("no", []), ("yes", [0, 1, 2, 3, 4, 5]), ("global", [2, 5]), ("0,2-3", [0, 2, 3])],
)
def test_blocks_that_compute_again(which, chosen):
    encoder = build_sam("vit_mini", 64).image_encoder
    checkpoint_activations(encoder, which)
    wrapped = [i for i, block in enumerate(attention_blocks(encoder)) if "forward" in vars(block)]
    assert wrapped == chosen


def test_blocks_that_are_not_there(tiny_t):
    assert choose_blocks("x", "0,2,5-7", 8) == [0, 2, 5, 6, 7]
    for text in ("4", "2-9", "3-2"):
        with pytest.raises(UserError, match=f"--activation_checkpointing {text}: .* are 0-3"):
            choose_blocks("activation_checkpointing", text, 4)
    with pytest.raises(UserError, match="global: no block"):
        checkpoint_activations(build_sam("tiny_t", 64).image_encoder, "global")


def test_frozen_weights_in_half_precision_change_no_result(tiny):
    """Autocast would have converted them: outputs and gradients are the same to the last bit."""
    torch.manual_seed(0)
    model = PromptedSam(build_sam("tiny", 64).requires_grad_(False))
    model.image_encoder.blocks[1].mlp.lin1.requires_grad_(True)
    own = "image_encoder.neck.0.weight"  # no base file brings it, so it keeps its digits
    model.base_keys = frozenset(model.state_dict()) - {own}
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)

    def results():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(image).logits
        logits.float().square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        return [logits.detach(), *gradients]

    expected = results()
    hold_frozen(model, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
    held = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert "image_encoder.blocks.0.attn.qkv.weight" in held
    assert not held & {own, "image_encoder.pos_embed", "image_encoder.blocks.1.mlp.lin1.weight"}
    assert all(name.startswith("image_encoder.") for name in held)
