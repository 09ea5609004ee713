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
    """A mask, a box, a point, and a box with a point and a mask: each as if it were alone."""
    features = torch.randn(2, 32, 4, 4)
    mask = torch.randn(1, 1, 16, 16)
    box, point = torch.tensor([[3.0, 5, 40, 30]]), torch.tensor([[[20.0, 9]]])
    near, far, click, nothing = *box.view(2, 2), point[0, 0], torch.zeros(2)
    tokens = [
        [nothing, nothing, nothing],
        [nothing, near, far],
        [nothing, click, nothing],
        [click, near, far],
    ]
    prompts = Prompts(
        points=torch.stack([torch.stack(row) for row in tokens]),
        point_labels=torch.tensor([[-1, -1, -1], [-1, 2, 3], [-1, 1, -1], [1, 2, 3]]),
        image_index=torch.tensor([1, 1, 0, 0]),
        masks=mask.expand(4, -1, -1, -1),
        mask_given=torch.tensor([True, False, False, True]),
        lengths=(0, 2, 2, 3),
    )
    told, (zero, one) = (point, torch.ones(1, 1)), (features[:1], features[1:])
    expected = [
        stock(sam, one, mask=mask),
        stock(sam, one, box=box),
        stock(sam, zero, told),
        stock(sam, zero, told, box, mask),
    ]
    answers = PromptedSam(sam).decode(features, prompts).logits
    assert torch.allclose(answers, torch.cat(expected), atol=1e-5)
    part = PromptedSam(sam).decode(features, prompts.rows(slice(2, 4))).logits
    assert torch.allclose(part, answers[2:], atol=1e-5)


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
    assert part.image_index.tolist() == [0, 1] and part.points is None
