"""Many questions per image, from the files through the model to the loss and the scores."""

import numpy as np
import pytest
import torch
from PIL import Image

from samtune.adapters import build_model
from samtune.adapters.options import DecoderOptions
from samtune.config import (
    PROMPTS,
    LoaderOptions,
    LossOptions,
    ModelOptions,
    OptimOptions,
    PromptOptions,
    ReadOptions,
)
from samtune.data.datasets import SampleKey, SegmentationDataset, collate
from samtune.data.files import Pair
from samtune.engine import distributed
from samtune.engine.distributed import Process
from samtune.engine.evaluator import Evaluator
from samtune.engine.optim import build_optimizer, build_schedule
from samtune.engine.trainer import Trainer
from samtune.judging import filled_box
from samtune.losses import EveryAnswer, MaskLoss
from samtune.metrics.region import overlap, region_scores
from samtune.models import MODEL_TYPES
from samtune.models.prompt_encoder import parts_used
from samtune.pipeline import evaluation_loader
from samtune.structures import Batch

ALONE = Process(0, 1, 0, torch.device("cpu"))
READ = ReadOptions(num_classes=4)
LOSS = MaskLoss(LossOptions())


@pytest.fixture
def tiny(monkeypatch):
    from dataclasses import replace

    sizes = replace(
        MODEL_TYPES["vit_mini"], embed_dim=32, depth=2, num_heads=2, global_blocks=(1,),
        image_size=64, window_size=3, prompt_embed_dim=32, decoder_heads=4, decoder_mlp_dim=32,
        iou_head_hidden_dim=16,
    )  # fmt: skip
    monkeypatch.setitem(MODEL_TYPES, "tiny", sizes)


@pytest.fixture
def pairs(tmp_path):
    """Pictures of one, two and three classes, of several sizes."""
    rng = np.random.default_rng(0)
    found = []
    for count, size in ((1, (40, 60)), (2, (64, 50)), (3, (45, 45))):
        mask = np.zeros(size, np.uint8)
        for c in range(1, count + 1):
            mask[2 + 11 * c : 10 + 11 * c, 4 * c : 20 + 5 * c] = c
        image = rng.integers(0, 60, (*size, 3)) + 50 * mask[..., None]
        files = tmp_path / f"{count}.bmp", tmp_path / f"{count}.png"
        Image.fromarray(image.astype(np.uint8)).save(files[0])
        Image.fromarray(mask).save(files[1])
        found.append(Pair(str(count), *files))
    return found


def build(prompt="box", **options):
    chosen = ModelOptions(model_type="tiny", adapter="decoder", train="adapter", **options)
    return build_model(chosen, DecoderOptions(), prompt, None, seed=1)


def batch_of(pairs, prompt, *indices, train=True) -> Batch:
    dataset = SegmentationDataset(pairs, READ, 64, prompt, "original", train=train)
    return collate([dataset[SampleKey(0, i)] for i in indices])


def gradients_after(batches, count) -> dict:
    """Gradients of one optimizer step over these micro-batches; the parameters do not move."""
    model = distributed.wrap(build(), ALONE).train()
    optimizer = build_optimizer(model, OptimOptions(lr=1e-30))
    seen = {}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()
                                if p.grad is not None})
    )  # fmt: skip
    schedule = build_schedule(optimizer, OptimOptions(), 1)
    trainer = Trainer(model, EveryAnswer(LOSS), [region_scores], optimizer, schedule, ALONE)
    trainer.train_step(batches, count)
    trainer.check()
    return seen | {"loss": torch.tensor(trainer.sums.means()["loss"])}


@pytest.mark.parametrize(
    "prompt", [PromptOptions(), PromptOptions("mixed", refine_steps=1)], ids=lambda p: p.prompt
)
@pytest.mark.usefixtures("tiny")
def test_a_step_is_the_mean_over_images_however_they_are_batched(pairs, prompt):
    """An image with three objects counts as much as one with one, in one batch or in three."""
    one_by_one = [gradients_after([batch_of(pairs, prompt, i)], 1) for i in range(3)]
    joined = gradients_after([batch_of(pairs, prompt, 0, 1, 2)], 3)
    uneven = gradients_after([batch_of(pairs, prompt, 2, 0), batch_of(pairs, prompt, 1)], 3)
    for name in joined:
        mean = sum(gradients[name] for gradients in one_by_one) / 3
        torch.testing.assert_close(joined[name], mean, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(uneven[name], mean, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("tiny")
def test_a_loss_of_every_answer_is_their_mean(pairs):
    batch = batch_of(pairs, PromptOptions(refine_steps=2), 1, 2)
    prediction = build()(batch.image, batch.prompts, batch.frames.valid_size)
    total, terms = EveryAnswer(LOSS)(prediction, batch)
    each = [
        LOSS(prediction._replace(logits=logits), batch)[0]
        for logits in (*prediction.earlier, prediction.logits)
    ]
    assert len(each) == 3 and torch.allclose(total, sum(each) / 3)
    assert torch.allclose(total, terms["bce"] + terms["iou_loss"])
    plain = prediction._replace(earlier=())
    assert torch.equal(EveryAnswer(LOSS)(plain, batch)[0], LOSS(plain, batch)[0])


@pytest.mark.parametrize(
    "prompt",
    [PromptOptions(), PromptOptions("box+points", refine_steps=2), PromptOptions("mask")],
    ids=lambda p: p.prompt,
)
@pytest.mark.usefixtures("tiny")
def test_scores_do_not_depend_on_how_many_rows_are_decoded_at_once(pairs, prompt):
    model, encoded = build(), []
    model.image_encoder.register_forward_hook(lambda *_: encoded.append(1))
    results = []
    for rows in (0, 1, 4):
        loader = evaluation_loader(
            pairs, READ, prompt, 64, LoaderOptions(batch_size=3, workers=0), ALONE
        )
        evaluator = Evaluator(model, [LOSS.scores, region_scores], ALONE, "fp32", decode_rows=rows)
        results.append(evaluator.run(loader))
    assert len(encoded) == 3, "once per batch"
    names = ["1#1", "2#1", "2#2", "3#1", "3#2", "3#3"]
    for result in results:
        assert [row["id"] for row in result.rows] == names
        for row, expected in zip(result.rows, results[0].rows, strict=True):
            assert all(row[n] == pytest.approx(expected[n], rel=1e-4) for n in row if n != "id")
    assert results[0].scores["loss"] == pytest.approx(
        sum(row["loss"] for row in results[0].rows) / 6
    ), "scoring means over questions"


@pytest.mark.usefixtures("tiny")
def test_the_box_as_a_mask_is_compared_with_its_own_object(pairs):
    loader = evaluation_loader(pairs, READ, PromptOptions(), 64, LoaderOptions(3, 0), ALONE)
    (batch,) = loader
    box, truth = filled_box(None, batch), batch.target == 1
    both = (box * truth).sum((1, 2))
    scores = overlap(both, box.sum((1, 2)) + truth.sum((1, 2)))
    assert len(box) == 6 and (scores["iou"] > 0.97).all()  # they are rectangles


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("clicks", [0, 2])
@pytest.mark.usefixtures("tiny")
def test_which_parts_of_the_prompt_encoder_train(pairs, prompt, clicks):
    """Exactly these get a gradient, whatever was drawn: so distributed training can rely on it."""
    if prompt == "none" and clicks:
        return
    model = build(prompt).train()
    model.prompt_encoder.requires_grad_(True)
    options = PromptOptions(prompt, refine_steps=clicks)
    for indices in ((0,), (1, 2)):
        model.zero_grad()
        batch = batch_of(pairs, options, *indices)
        prediction = model(batch.image, batch.prompts, batch.frames.valid_size)
        sum(logits.sum() for logits in (*prediction.earlier, prediction.logits)).backward()
        reached = {
            name for name, p in model.prompt_encoder.named_parameters() if p.grad is not None
        }
        used = parts_used(prompt, clicks)
        assert {next(part for part in used if name.startswith(part)) for name in reached} == used
        assert reached == {
            name
            for name, _ in model.prompt_encoder.named_parameters()
            if any(name.startswith(f"{part}.") for part in used)
        }
