"""Stock SAM in every size."""

import pytest
import torch

from samtune.config import Size
from samtune.errors import UserError
from samtune.models import MODEL_TYPES
from samtune.models.sam import build_sam

# Totals with the prompt encoder's 6,220: published sizes of the image encoder and mask decoder.
ENCODER = {"vit_b": 89_670_912, "vit_l": 308_278_272, "vit_h": 637_026_048}


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", ENCODER)
def test_official_sizes(name):
    with torch.device("meta"):
        sam = build_sam(name)
    assert count(sam.image_encoder) == ENCODER[name]
    assert count(sam.mask_decoder) == 4_058_340
    assert count(sam.prompt_encoder) == 6_220


def test_official_sizes_are_those_of_the_stock_builders():
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        for name in ENCODER:
            stock, ours = sam_model_registry[name](), build_sam(name)
            shapes = {key: tensor.shape for key, tensor in stock.state_dict().items()}
            assert shapes == {key: tensor.shape for key, tensor in ours.state_dict().items()}
            windows = [block.window_size for block in stock.image_encoder.blocks]
            assert windows == [block.window_size for block in ours.image_encoder.blocks]


def test_mini_is_a_few_million_parameters_at_256_pixels():
    sam = build_sam("vit_mini")
    assert 2e6 < count(sam) < 4e6
    assert sam.image_encoder.img_size == 256
    assert not sam.training


def test_each_official_type_has_a_file_an_address_and_a_digest():
    for name in ENCODER:
        row = MODEL_TYPES[name]
        assert row.url.endswith(row.file) and row.file.startswith(f"sam_{name}_")
        assert len(row.sha256) == 64 and int(row.sha256, 16)


@pytest.mark.parametrize("image_size", [100, -16, 1023, Size(64, 100), Size(0, 64)])
def test_image_size_must_be_a_multiple_of_the_patch(tiny, image_size):
    with pytest.raises(UserError, match=rf"--image_size {image_size}.*16"):
        build_sam(tiny, image_size)


def test_unknown_model_type_lists_the_known():
    with pytest.raises(UserError, match=r"--model_type vit_x.*vit_b"):
        build_sam("vit_x")


def test_image_size_sets_grid_and_frame(tiny):
    sam = build_sam(tiny, 96)
    assert sam.image_encoder.pos_embed.shape[1:3] == (6, 6)
    assert sam.prompt_encoder.input_image_size == (96, 96)
    assert sam.prompt_encoder.image_embedding_size == (6, 6)
    features = sam.image_encoder(torch.zeros(1, 3, 96, 96))
    assert features.shape == (1, 32, 6, 6)


@pytest.mark.parametrize("stride", [0, 8])
def test_a_frame_that_is_not_square(tiny, stride):
    """Rows and columns have position tables of their own lengths."""
    sam, step = build_sam(tiny, (48, 80), stride), stride or 16
    grid = (48 // step, 80 // step)
    assert sam.image_encoder.pos_embed.shape[1:3] == ((4, 4) if stride else grid)
    assert sam.prompt_encoder.input_image_size == (48, 80)
    assert sam.prompt_encoder.image_embedding_size == grid
    whole, window = sam.image_encoder.blocks[1].attn, sam.image_encoder.blocks[0].attn
    assert (len(whole.rel_pos_h), len(whole.rel_pos_w)) == (2 * grid[0] - 1, 2 * grid[1] - 1)
    assert len(window.rel_pos_h) == len(window.rel_pos_w) == 2 * 3 - 1


def test_random_weights_do_not_depend_on_the_frame(tiny):
    states = []
    for image_size in (64, (48, 80)):
        torch.manual_seed(4)
        states.append(build_sam(tiny, image_size).state_dict())
    differing = {n for n, t in states[0].items() if t.shape != states[1][n].shape}
    assert differing == {"image_encoder.pos_embed"} | {
        f"image_encoder.blocks.1.attn.rel_pos_{axis}" for axis in "hw"
    }
    drawn_before = [n for n in states[0] if n.startswith("image_encoder.") and n not in differing]
    assert all(torch.equal(states[0][n], states[1][n]) for n in drawn_before)
