"""Fixtures of TS-SAM: encoder, fusion decoder, loss and gradients, and BatchNorm in training."""

from __future__ import annotations

from dataclasses import replace

import torch
from check_losses import batch_balanced
from check_models import (
    EXACT,
    GRADIENT,
    OUTPUT,
    check_gradients,
    check_recorded,
    gradient_names,
    model_type,
    record,
)
from fixture import Fixture, close
from torch.nn import functional as F

from samtune.adapters import ADAPTERS
from samtune.adapters.layers import high_pass
from samtune.adapters.options import TsSamOptions
from samtune.losses import bce_rows, iou_loss_rows
from samtune.models.sam import build_sam
from samtune.structures import Frame, Frames


def build(fixture: Fixture):
    """The whole model with the fixture's tensors: every one of them, and nothing else."""
    config = fixture.config
    sizes = replace(model_type(config), decoder_heads=1)  # SAM's decoder is thrown away
    options = TsSamOptions(
        use_fft=config["use_fft"],
        csa_blocks=blocks(config["csa_block_indice"]),
        mrm_blocks=blocks(config["mrm_block_indice"]),
        scale_factor=config["scale_factor"],
    )
    model = ADAPTERS["ts_sam"].build(build_sam(sizes).requires_grad_(False), options)
    model.load_state_dict(fixture.group("param."))
    return model.eval()


def blocks(indices: list[int]) -> str:
    return ",".join(map(str, indices)) or "none"


def run(fixture: Fixture, model) -> tuple:
    """Features at three scales, decoder logits, and logits where the target lies."""
    target = fixture["input.gt_mask"]
    features = model.image_encoder(fixture["input.image"])
    low_res = model.decode(features).logits
    size = tuple(target.shape[-2:])
    logits = Frames.collate([Frame(size, size)] * len(target), size).to_frame(low_res)
    return features, low_res, logits[:, 0]


def loss_terms(fixture: Fixture, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    target = fixture["input.gt_mask"][:, 0]
    return bce_rows(logits, target).mean(), iou_loss_rows(logits, target, smooth=0).mean()


def check_features(fixture: Fixture, group: str, features, tolerance: float) -> None:
    expected = fixture.group(f"{group}.features.")
    assert expected
    for name, value in expected.items():
        close(getattr(features, name), value, tolerance, f"{group} {name}")


def check_ts_sam(fixture: Fixture) -> None:
    model = build(fixture)
    encoder, depth = model.image_encoder, fixture.config["depth"]
    parts = {f"output.block.{i}": f"blocks.{i}" for i in range(depth)}
    parts |= {"output.patch_embed": "patch_embed", "output.neck": "neck"}
    side = [f"csa_blocks.{i}" for i in range(len(encoder.csa_blocks))]
    finer = [f"mrm_blocks.{i}" for i in range(len(encoder.mrm_blocks))]
    calls = record(encoder, parts | {name: name for name in side + finer})
    linear = record(encoder, {"output.csa_embedding": "csa_embedding"})["output.csa_embedding"]
    features, low_res, logits = run(fixture, model)

    first_term, iou_term = loss_terms(fixture, logits)
    (first_term + iou_term).backward()
    for expected, names in (("csa", ("side", "backbone")), ("mrm", ("x2", "x4"))):
        for index in range(sum(name.startswith(expected) for name in calls)):
            (results,) = calls.pop(f"{expected}_blocks.{index}")
            for name, result in zip(names, results, strict=True):
                where = f"output.{expected}.{index}.{name}"
                close(result, fixture[where], OUTPUT, where)
    check_recorded(fixture, calls)
    expected = fixture["output.csa_embedding"]
    close(linear[0].reshape(expected.shape), expected, OUTPUT, "csa_embedding")
    check_features(fixture, "output", features, OUTPUT)
    close(low_res, fixture["output.low_res_logits"], OUTPUT, "low_res_logits")
    close(logits[:, None], fixture["output.logits"], OUTPUT, "logits")
    close(first_term, fixture["output.loss_first_term"], OUTPUT, "loss_first_term")
    close(iou_term, fixture["output.loss_iou"], OUTPUT, "loss_iou")
    close(first_term + iou_term, fixture["output.loss"], OUTPUT, "loss")
    balanced = batch_balanced(logits, fixture["input.gt_mask"][:, 0])
    close(balanced, fixture["output.bbce.loss"], OUTPUT, "bbce")
    for name, graded in fixture.json["block_output_requires_grad"].items():
        assert calls[f"output.{name}"][0].requires_grad == graded, name
    gradients = fixture.group("grad.")
    without = set(fixture.json["parameters_without_gradient"])
    assert gradient_names(model) - without == gradients.keys()
    check_gradients(model, gradients, GRADIENT)
    if fixture.config["use_fft"]:
        check_high_frequencies(fixture, model)
    check_in_float64(fixture)
    check_in_training(fixture)


def check_high_frequencies(fixture: Fixture, model) -> None:
    edges = high_pass(fixture["input.image"])
    close(edges, fixture["output.fft_image"], OUTPUT, "fft_image")
    embedded = model.image_encoder.fft_embedding(edges)
    close(embedded, fixture["output.fft_embedding"], OUTPUT, "fft_embedding")


def check_in_float64(fixture: Fixture) -> None:
    model, target = build(fixture).double(), fixture["input.gt_mask"].double()
    with torch.no_grad():
        features = model.image_encoder(fixture["input.image"].double())
        low_res = model.decode(features).logits
    check_features(fixture, "output64", features, EXACT)
    close(low_res, fixture["output64.low_res_logits"], EXACT, "low_res_logits in float64")
    # The product takes losses in float32, so here they are written out.
    logits = F.interpolate(low_res, target.shape[-2:], mode="bilinear")
    q = logits.sigmoid()
    both, either = (q * target).sum((1, 2, 3)), (q + target - q * target).sum((1, 2, 3))
    loss = F.binary_cross_entropy_with_logits(logits, target) + (1 - both / either).mean()
    close(loss, fixture["output64.loss"], EXACT, "loss in float64")


def check_in_training(fixture: Fixture) -> None:
    """Batch statistics where a BatchNorm trains; the running ones move."""
    model = build(fixture).train()
    features, low_res, logits = run(fixture, model)
    loss = sum(loss_terms(fixture, logits))
    loss.backward()
    check_features(fixture, "output_train", features, OUTPUT)
    close(low_res, fixture["output_train.low_res_logits"], OUTPUT, "low_res_logits in training")
    close(loss, fixture["output_train.loss"], OUTPUT, "loss in training")
    check_gradients(model, fixture.group("grad_train."), GRADIENT)
    for name, expected in fixture.group("buffer_after_train.").items():
        close(model.get_buffer(name), expected, OUTPUT, name)


CHECKS = {"ts_sam": check_ts_sam, "ts_sam_nofft": check_ts_sam}
