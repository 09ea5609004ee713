"""Which blocks forget their activations."""

import pytest

from samtune.errors import UserError
from samtune.models.anatomy import attention_blocks, checkpoint_activations, parse_blocks
from samtune.models.sam import build_sam


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
    assert parse_blocks("x", "0,2,5-7", 8) == [0, 2, 5, 6, 7]
    for text in ("4", "2-9", "3-2"):
        with pytest.raises(UserError, match=f"--activation_checkpointing {text}: .* are 0-3"):
            parse_blocks("activation_checkpointing", text, 4)
    with pytest.raises(UserError, match="global: no block"):
        checkpoint_activations(build_sam("tiny_t", 64).image_encoder, "global")
