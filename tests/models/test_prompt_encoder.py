"""Rows of different kinds in one batch are stock's rows, each with its own kind."""

import pytest
import torch

from samtune.models.prompt_encoder import embed_masks, embed_prompts, no_mask
from samtune.models.sam import build_sam
from samtune.models.segmenter import PromptedSam
from samtune.structures import Prompts


@pytest.fixture
def sam(tiny):
    torch.manual_seed(3)
    sam = build_sam(tiny)
    for parameter in sam.parameters():
        parameter.data.normal_(std=0.2)
    return sam


def stock(sam, features, points=None, box=None, mask=None):
    """One row, by stock's prompt encoder and decoder."""
    sparse, dense = sam.prompt_encoder(points, box, mask)
    pe = sam.prompt_encoder.get_dense_pe()
    return sam.mask_decoder.predict_masks(features, pe, sparse, dense)[0][:, :1]


@torch.no_grad()
def test_rows_of_every_kind_share_a_batch(sam):
    """A box, a point and a box with a mask: two tokens each, so none is padded beyond stock."""
    features = torch.randn(2, 32, 4, 4)
    mask = torch.randn(1, 1, 16, 16)
    box, point = torch.tensor([[3.0, 5, 40, 30]]), torch.tensor([[[20.0, 9]]])
    tokens = torch.cat([box.view(1, 2, 2), torch.cat([point, torch.zeros(1, 1, 2)], 1)])[[0, 1, 0]]
    prompts = Prompts(
        points=tokens,
        point_labels=torch.tensor([[2, 3], [1, -1], [2, 3]]),
        image_index=torch.tensor([1, 0, 0]),
        masks=mask.expand(3, -1, -1, -1),
        mask_given=torch.tensor([False, False, True]),
        complete=True,
    )
    answers = PromptedSam(sam).decode(features, prompts).logits
    one = torch.ones(1, 1)
    assert torch.allclose(answers[:1], stock(sam, features[1:], box=box), atol=1e-5)
    assert torch.allclose(answers[1:2], stock(sam, features[:1], (point, one)), atol=1e-5)
    assert torch.allclose(answers[2:], stock(sam, features[:1], box=box, mask=mask), atol=1e-5)


@torch.no_grad()
def test_masks_alone_and_masks_on_another_grid(sam):
    encoder, mask = sam.prompt_encoder, torch.randn(2, 1, 16, 16)
    dense = embed_masks(encoder, Prompts(masks=mask), (4, 4))
    assert torch.allclose(dense, encoder(None, None, mask)[1], atol=1e-6)
    assert embed_prompts(encoder, Prompts(masks=mask), 2).shape == (2, 0, 32)
    constant = torch.full((1, 1, 9, 7), 3.0)
    resized = embed_masks(encoder, Prompts(masks=constant), (4, 4))
    expected = embed_masks(encoder, Prompts(masks=torch.full((1, 1, 16, 16), 3.0)), (4, 4))
    assert torch.allclose(resized, expected, atol=1e-6)
    assert torch.equal(embed_masks(encoder, Prompts(), (4, 4)), no_mask(encoder))


def test_some_of_the_rows(sam):
    prompts = Prompts(boxes=torch.arange(12.0).view(3, 4), image_index=torch.tensor([0, 0, 1]))
    part = prompts.rows(slice(1, 3))
    assert part.boxes.tolist() == prompts.boxes[1:].tolist()
    assert part.image_index.tolist() == [0, 1] and part.points is None and not part.complete
