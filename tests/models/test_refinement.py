"""A user who corrects answers: where he clicks, and what the model is asked then."""

import pytest
import torch
from test_segmenter import Recorder

from samtune.models.refinement import _depth, next_click
from samtune.models.sam import build_sam
from samtune.models.segmenter import PromptedSam
from samtune.structures import IGNORE, Corrections, Prompts


@pytest.fixture
def model(tiny):
    torch.manual_seed(3)
    sam = build_sam(tiny)
    for parameter in sam.parameters():
        parameter.data.normal_(std=0.2)
    return PromptedSam(sam)


@pytest.fixture
def image():
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)


def asked(clicks=2, seed=(7, 8, 9), rows=3):
    truth = torch.zeros(rows, 16, 16, dtype=torch.uint8)
    truth[:, 3:9, 4:12] = 1
    boxes = torch.tensor([[3.0, 5, 40, 30], [10, 2, 60, 63], [0, 0, 20, 20]])[:rows]
    seed = None if seed is None else torch.tensor(seed)[:rows]
    index = torch.tensor([0, 1, 1])[:rows]
    return Prompts(boxes=boxes, image_index=index, corrections=Corrections(clicks, truth, seed))


def masks(*regions, size=(8, 10)):
    result = torch.zeros(len(regions), *size, dtype=torch.bool)
    for mask, (rows, columns) in zip(result, regions, strict=True):
        mask[rows, columns] = True
    return result


def test_clicks_fall_on_errors_and_say_which():
    truth = masks((slice(0, 4), slice(0, 5)), (slice(0, 0), slice(0, 0)), (slice(2, 5), 3)).byte()
    predicted = masks((slice(2, 4), slice(0, 5)), (slice(5, 7), slice(2, 9)), (slice(2, 5), 3))
    cells, labels = next_click(predicted, truth, torch.tensor([1, 2, 3]))
    assert labels.tolist() == [1, 0, -1], "missing, too much, nothing wrong"
    assert cells[0, 0] < 2 and cells[0, 1] < 5
    assert 5 <= cells[1, 0] < 7 and 2 <= cells[1, 1] < 9
    unread = truth.where(~(truth.bool() ^ predicted), IGNORE)
    assert next_click(predicted, unread, torch.tensor([1, 2, 3]))[1].tolist() == [-1, -1, -1]


def test_clicks_are_uniform_over_the_errors_and_follow_the_seed():
    truth = masks((slice(2, 5), slice(3, 7))).byte().expand(6000, -1, -1)
    nothing = torch.zeros_like(truth, dtype=torch.bool)
    cells, _ = next_click(nothing, truth, torch.arange(6000))
    counts = torch.bincount(cells[:, 0] * 10 + cells[:, 1], minlength=80).view(8, 10)
    assert counts[2:5, 3:7].sum() == 6000
    assert ((counts[2:5, 3:7] - 500).abs() < 120).all()
    again, _ = next_click(nothing[:9], truth[:9], torch.arange(9).flip(0))
    assert torch.equal(again.flip(0), cells[:9]), "a row's click does not depend on its place"


def test_in_scoring_the_middle_of_the_largest_error():
    truth = masks((slice(1, 6), slice(2, 7)), (slice(0, 2), slice(0, 2))).byte()
    predicted = masks((slice(7, 8), slice(0, 10)), (slice(3, 8), slice(4, 9)))
    cells, labels = next_click(predicted, truth, None)
    assert cells.tolist() == [[3, 4], [5, 6]] and labels.tolist() == [1, 0]


def test_depth_is_that_of_the_largest_square():
    regions = torch.rand(2, 2, 9, 12, generator=torch.Generator().manual_seed(1)) > 0.1
    regions[0, 0] = True
    padded = torch.nn.functional.pad(regions, [5] * 4)
    expected = torch.zeros_like(regions, dtype=torch.long)
    for half in range(1, 6):
        side = 2 * half - 1
        windows = padded.unfold(2, side, 1).unfold(3, side, 1).all(-1).all(-1)
        first = 5 - (half - 1)
        fits = windows[:, :, first : first + 9, first : first + 12]
        expected = expected.where(~fits, half)
    assert torch.equal(_depth(regions), expected)


@torch.no_grad()
def test_each_step_is_stock_sam_with_all_points_and_the_last_answer(model, image):
    prompts = asked()
    answer = model(image, prompts)
    assert len(answer.earlier) == 2
    features = model.encode(image)[prompts.image_index]
    box, points, labels = prompts.boxes, None, None
    logits = model.decode(features, Prompts(boxes=box)).logits
    for click in range(2):
        assert torch.allclose(answer.earlier[click], logits, atol=1e-5)
        seed = prompts.corrections.seed + click
        cell, label = next_click(logits[:, 0] > 0, prompts.corrections.truth, seed)
        pixel = (cell.flip(1) * 4 + 1.5)[:, None].float()  # 64 px over 16 cells
        points = pixel if points is None else torch.cat([points, pixel], 1)
        labels = label[:, None] if labels is None else torch.cat([labels, label[:, None]], 1)
        rows = []
        for r in range(3):
            told = (points[r : r + 1], labels[r : r + 1])
            sparse, dense = model.prompt_encoder(told, box[r : r + 1], logits[r : r + 1])
            rows.append(
                model.mask_decoder.predict_masks(
                    features[r : r + 1], model.prompt_encoder.get_dense_pe(), sparse, dense
                )[0][:, :1]
            )
        logits = torch.cat(rows)
    assert torch.allclose(answer.logits, logits, atol=1e-4)


def test_the_image_is_encoded_once_and_gradients_are_finite(model, image):
    calls = []
    model.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    answer = model(image, asked(clicks=3))
    sum(logits.square().mean() for logits in (*answer.earlier, answer.logits)).backward()
    assert calls == [1]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)
    assert any(g.any() for g in gradients)


def test_no_random_state_is_used_and_seeds_decide(model, image):
    state = torch.get_rng_state()
    first, again, other = (
        model(image, asked(seed=seed)).logits for seed in ((7, 8, 9), (7, 8, 9), (1, 2, 3))
    )
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("seed", [(7, 8, 9), None])
def test_no_loop_over_rows_and_no_wait_for_the_device(model, image, seed):
    names = []
    for rows in (2, 3):
        with Recorder() as recorder:
            model(image, asked(rows=rows, seed=seed))
        names.append(recorder.names)
    assert names[0] == names[1]
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "aten.equal")
    assert not [name for name in names[0] if any(wait in name for wait in waits)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("seed", [(7, 8, 9), None])
def test_no_wait_on_a_gpu(model, image, seed):
    model, image, prompts = model.cuda(), image.cuda(), asked(seed=seed)
    user = prompts.corrections
    user = Corrections(
        user.clicks, user.truth.cuda(), None if user.seed is None else user.seed.cuda()
    )
    prompts = Prompts(
        prompts.boxes.cuda(), image_index=prompts.image_index.cuda(), corrections=user
    )
    model(image, prompts).logits.sum().backward()  # the first call loads libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(image, prompts).logits.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_loss_over_all_answers_falls(tiny, image):
    torch.manual_seed(3)
    model, prompts = PromptedSam(build_sam(tiny)), asked(clicks=2)
    truth = prompts.corrections.truth[:, None].float()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        answer = model(image, prompts)
        each = [
            torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
            for logits in (*answer.earlier, answer.logits)
        ]
        loss = torch.stack(each).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
