"""Fixtures of the models and adapters, built by the product's code from each fixture's `config`."""

from __future__ import annotations

import re

import torch
from fixture import Fixture, close
from torch.nn import functional as F

from samtune.adapters import ADAPTERS
from samtune.adapters.layers import high_pass
from samtune.adapters.options import DecoderOptions, SamAdapterOptions
from samtune.adapters.sam_adapter import OfficialEncoder, ParentEncoder
from samtune.losses import bce_rows, iou_loss_rows
from samtune.metrics.region import region_scores
from samtune.models import ModelType
from samtune.models.mask_decoder import decode_masks
from samtune.models.positions import resize_pos_embed, resize_rel_pos
from samtune.models.prompt_encoder import (
    embed_masks,
    embed_prompts,
    no_mask,
    position_encoding,
)
from samtune.models.sam import (
    build_image_encoder,
    build_mask_decoder,
    build_prompt_encoder,
    build_sam,
)
from samtune.structures import Batch, Frame, Frames, Prediction, Prompts

OUTPUT, GRADIENT, EXACT = 1e-5, 5e-5, 1e-12


def model_type(config: dict) -> ModelType:
    """The sizes that a fixture's config states; what it does not state keeps SAM's value."""
    names = {
        "img_size": "image_size",
        "out_chans": "prompt_embed_dim",
        "global_attn_indexes": "global_blocks",
        "num_multimask_outputs": "multimask_outputs",
    }
    known = ModelType.__dataclass_fields__
    sizes = {names.get(key, key): value for key, value in config.items()}
    assert sizes["prompt_embed_dim"] == config["out_chans"]
    sizes["global_blocks"] = tuple(sizes["global_blocks"])
    return ModelType(**{key: value for key, value in sizes.items() if key in known})


def check_gradients(module: torch.nn.Module, expected: dict, tolerance: float) -> None:
    """The named gradients; those of key biases are zero up to rounding."""
    for name, gradient in expected.items():
        actual = module.get_parameter(name).grad
        assert actual is not None, f"{name} has no gradient"
        if name.endswith("k_proj.bias"):
            assert (actual - gradient).abs().max() < 1e-7, name
        else:
            close(actual, gradient, tolerance, name)


def gradient_names(module: torch.nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def record(module: torch.nn.Module, parts: dict[str, str]) -> dict[str, list]:
    """What the parts return, call by call, under the names of the fixture's outputs."""
    calls: dict[str, list] = {}
    for output, part in parts.items():
        keep = calls.setdefault(output, []).append
        hook = lambda _module, _inputs, result, keep=keep: keep(result)  # noqa: E731
        module.get_submodule(part).register_forward_hook(hook)
    return calls


def check_recorded(fixture: Fixture, calls: dict[str, list]) -> None:
    """One call is `output.NAME`, several are `output.NAME.0`, `output.NAME.1`, ..."""
    for output, results in calls.items():
        names = [output] if output in fixture else [f"{output}.{i}" for i in range(len(results))]
        for name, result in zip(names, results, strict=True):
            close(result.reshape(fixture[name].shape), fixture[name], OUTPUT, name)


# Image encoders with adapters


def build_encoder(fixture: Fixture):
    config = fixture.config
    encoder = build_image_encoder(model_type(config), config["img_size"]).requires_grad_(False)
    every = range(len(encoder.blocks))
    if "tune_out" in config:
        encoder = ParentEncoder(encoder, config["tune_out"], config["hidden_dim"], every)
    else:
        encoder = OfficialEncoder(encoder, published=True, chosen=every)
    encoder.load_state_dict(fixture.group("param.image_encoder."))
    return encoder.eval()


def check_encoder(fixture: Fixture, image: torch.Tensor, parts: dict[str, str]) -> None:
    """Embedding, loss and gradients, and what the parts return."""
    encoder = build_encoder(fixture)
    gradients = fixture.group("grad.image_encoder.")
    assert gradient_names(encoder) == gradients.keys()
    calls = record(encoder, parts)
    embedding = encoder(image)
    loss = embedding.square().mean()
    loss.backward()
    close(embedding, fixture["output.embedding"], OUTPUT, "embedding")
    close(loss, fixture["output.loss"], OUTPUT, "loss")
    check_recorded(fixture, calls)
    check_gradients(encoder, gradients, GRADIENT)


def check_encoder_in_float64(fixture: Fixture) -> None:
    encoder = build_encoder(fixture).double()
    embedding = encoder(fixture["input.image"].double())
    loss = embedding.square().mean()
    loss.backward()
    close(embedding, fixture["output64.embedding"], EXACT, "embedding in float64")
    close(loss, fixture["output64.loss"], EXACT, "loss in float64")
    check_gradients(encoder, fixture.group("grad64.image_encoder."), EXACT)


def stock_parts(config: dict) -> dict[str, str]:
    blocks = {f"output.block.{i}": f"blocks.{i}" for i in range(config["depth"])}
    return blocks | {"output.patch_embed": "patch_embed", "output.neck0": "neck.0"}


def check_sam_adapter_official(fixture: Fixture) -> None:
    image = fixture["input.image"]
    parts = {
        "output.embedding_feature": "prompt_generator.embedding_generator",
        "output.handcrafted_feature": "prompt_generator.prompt_generator.proj",
        "output.prompt": "prompt_generator.shared_mlp",
    }
    check_encoder(fixture, image, parts | stock_parts(fixture.config))
    check_encoder_in_float64(fixture)
    close(high_pass(image), fixture["output.fft_image"], OUTPUT, "high-pass image")
    close(high_pass(image.double()), fixture["output64.fft_image"], EXACT, "high-pass in float64")


def check_sam_adapter_kyyle(fixture: Fixture) -> None:
    parts = {
        "output.tune_patch_embed": "patch_embed_tune",
        "output.tune_hfc": "HFC_tune",
        "output.adapter": "task_adapter_up",
    }
    check_encoder(fixture, fixture["input.image"], parts | stock_parts(fixture.config))
    check_encoder_in_float64(fixture)


def check_sam_adapter_kyyle_1024(fixture: Fixture) -> None:
    image = formula_image(fixture)
    check_encoder(fixture, image, {})
    encoder = build_encoder(fixture)
    patches = {}
    encoder.HFC_tune.register_forward_pre_hook(lambda _, inputs: patches.update(hf=inputs[0]))
    with torch.no_grad():
        encoder(image)
    hf, first = patches["hf"], fixture["output.hfc_patches_first8"]
    close(hf[:, : first.shape[1]], first, OUTPUT, "first patches")
    close(hf.double().sum(), fixture["output.hfc_sum"], OUTPUT, "sum of patches")
    close(hf.double().square().sum(), fixture["output.hfc_sqsum"], OUTPUT, "squares of patches")


def formula_image(fixture: Fixture) -> torch.Tensor:
    """The input that the fixture describes by a formula, normalised."""
    size, salt = fixture.config["img_size"], fixture.json["salt"]
    n, c, i, j = torch.meshgrid(
        torch.arange(fixture.json["batch"]), torch.arange(3), torch.arange(size),
        torch.arange(size), indexing="ij",
    )  # fmt: skip
    pixels = (7 + 2 * c) * i + (13 + 3 * c) * j + i * j // (5 + c + n) + i * i // 97
    pixels = (pixels + salt * (n + 1)) % 256
    corner = fixture["input.image_uint8_corner"]
    assert torch.equal(pixels[:, :, : corner.shape[2], : corner.shape[3]].byte(), corner)
    mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
    return (pixels - mean) / torch.tensor([58.395, 57.12, 57.375])[:, None, None]


def check_fft_highpass(fixture: Fixture) -> None:
    for index, shape in enumerate(fixture.json["shapes"]):
        image = fixture[f"input.{index}"]
        assert list(image.shape) == shape
        for name, expected in fixture.group(f"output.{index}").items():
            rate = float(name.removeprefix(".rate_")) if name else 0.25
            close(high_pass(image, rate), expected, OUTPUT, f"{shape} {name}")
        close(high_pass(image.double()), fixture[f"output64.{index}"], EXACT, f"{shape} float64")


# Whole models


def rename(state: dict, adapter: str) -> dict:
    """Published names to ours."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in ADAPTERS[adapter].renames:
            if re.fullmatch(pattern, name):
                name = replacement and re.sub(pattern, replacement, name)
                break
        if name is not None:
            renamed[name] = tensor
    return renamed


def build_whole(fixture: Fixture, adapter: str, options):
    """The adapted model with the fixture's tensors; what the fixture leaves out is not used."""
    sam = build_sam(model_type(fixture.config)).requires_grad_(False)
    model = ADAPTERS[adapter].build(sam, options).eval()
    state = rename(fixture.group("param."), adapter)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith("prompt_encoder.") for name in missing), missing
    return model


def check_sam_adapter_official_full(fixture: Fixture) -> None:
    options = SamAdapterOptions(variant="official")
    target = fixture["input.gt_mask"]

    def run(dtype=torch.float32):
        model = build_whole(fixture, "sam_adapter", options).to(dtype)
        features = model.image_encoder(fixture["input.image"].to(dtype))
        return model, features, model.decode(features)

    model, features, prediction = run()
    size = tuple(target.shape[-2:])
    frames = Frames.collate([Frame(size, size)] * len(target), size)
    logits = frames.to_frame(prediction.logits)
    bce = F.binary_cross_entropy_with_logits(logits, target)
    q = logits.sigmoid()
    both = (q * target).sum((1, 2, 3))
    iou_loss = (1 - both / (q.sum((1, 2, 3)) + target.sum((1, 2, 3)) - both)).mean()
    expected_pe = fixture["output.dense_pe"]
    pe = position_encoding(model.prompt_encoder, expected_pe.shape[-2:])
    close(pe, expected_pe, OUTPUT, "dense_pe")
    close(features, fixture["output.embedding"], OUTPUT, "embedding")
    close(prediction.logits, fixture["output.low_res_logits"], OUTPUT, "low_res_logits")
    close(prediction.iou, fixture["output.iou_pred"], OUTPUT, "iou_pred")
    close(logits, fixture["output.logits"], OUTPUT, "logits")
    close(bce, fixture["output.loss_first_term"], OUTPUT, "loss_first_term")
    close(iou_loss, fixture["output.loss_iou"], OUTPUT, "loss_iou")
    close(bce + iou_loss, fixture["output.loss"], OUTPUT, "loss")
    (bce + iou_loss).backward()
    check_all_gradients(fixture, model, "sam_adapter")

    model, _, prediction = run()
    logits = frames.to_frame(prediction.logits)
    positive, negative = target.sum() + 1e-10, (1 - target).sum() + 1e-10
    weighted = F.binary_cross_entropy_with_logits(logits, target, pos_weight=negative / positive)
    balanced = positive / (positive + negative) * weighted
    close(balanced, fixture["output.bbce.loss"], OUTPUT, "bbce")
    balanced.backward()
    check_gradients(model, rename(fixture.group("grad_bbce."), "sam_adapter"), GRADIENT)

    model, features, _ = run(torch.float64)
    encoder = model.prompt_encoder
    sparse = embed_prompts(encoder, Prompts(), len(features))
    # The published code encodes positions in float32 whatever the model's type is.
    pe = expected_pe.double()
    logits, _ = decode_masks(model.mask_decoder, features, pe, sparse, no_mask(encoder))
    close(logits, fixture["output64.low_res_logits"], EXACT, "logits in float64")


def check_all_gradients(fixture: Fixture, model, adapter: str) -> None:
    """The stored gradients are those of exactly what trains here."""
    gradients = rename(fixture.group("grad."), adapter)
    gradients = {
        name: g for name, g in gradients.items() if g.any()
    }  # unread heads are frozen here
    assert gradient_names(model) == gradients.keys()
    check_gradients(model, gradients, GRADIENT)


def check_train_step_decoder_only(fixture: Fixture) -> None:
    check_train_step(fixture, "decoder", DecoderOptions())


def check_train_step_sam_adapter(fixture: Fixture) -> None:
    config = fixture.config
    options = SamAdapterOptions(tune_out=config["tune_out"], hidden_dim=config["hidden_dim"])
    check_train_step(fixture, "sam_adapter", options)


def check_train_step(fixture: Fixture, adapter: str, options) -> None:
    """From the resized picture and the box to the parameters after one step."""
    model = build_whole(fixture, adapter, options)
    image, frames = resized_batch(fixture, model.image_size)
    close(
        model.preprocess(image, frames.valid_size), fixture["output.preprocessed"], 1e-6,
        "preprocessed",
    )  # fmt: skip
    prompts = Prompts(boxes=fixture["output.box_model"].float())
    features = model.encode(image, frames.valid_size)
    prediction = model.decode(features, prompts)
    check_prompt_parts(fixture, model, prompts)
    close(features, fixture["output.embedding"], OUTPUT, "embedding")
    close(prediction.logits, fixture["output.low_res_logits"], OUTPUT, "low_res_logits")
    close(prediction.iou, fixture["output.iou_pred"], OUTPUT, "iou_pred")

    logits = frames.restore(prediction.logits)
    close(logits.sigmoid(), fixture["output.prob"], OUTPUT, "prob")
    certain = logits.abs() > 1e-5
    assert torch.equal((logits > 0)[certain], fixture["output.pred_mask"].bool()[certain])
    bce, iou_loss = (f(logits[:, 0], fixture["input.mask"]) for f in (bce_rows, iou_loss_rows))
    close(bce, fixture["output.per_image.bce"], OUTPUT, "bce")
    close(iou_loss, fixture["output.per_image.iou_loss"], OUTPUT, "iou_loss")
    check_scores(fixture, prediction, image, prompts, frames)

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, **optimizer_settings(fixture))
    (bce + iou_loss).mean().backward()
    check_all_gradients(fixture, model, adapter)
    optimizer.step()
    check_parameters_after(fixture, model)


def resized_batch(fixture: Fixture, image_size: tuple[int, int]) -> tuple[torch.Tensor, Frames]:
    """The resized pictures in the corner of the frame, and where they came from."""
    resized = fixture["output.resized_uint8"].permute(0, 3, 1, 2)
    rows, _, height, width = resized.shape
    image = resized.new_zeros(rows, 3, *image_size)
    image[:, :, :height, :width] = resized
    frame = Frame(tuple(fixture["input.mask"].shape[1:]), (height, width))
    return image, Frames.collate([frame] * rows, image_size)


def check_prompt_parts(fixture: Fixture, model, prompts: Prompts) -> None:
    encoder, dense = model.prompt_encoder, fixture["output.dense"]
    sparse = embed_prompts(encoder, prompts, len(dense))
    close(sparse, fixture["output.sparse"], OUTPUT, "sparse")
    close(no_mask(encoder).expand_as(dense), dense, OUTPUT, "dense")
    pe = position_encoding(encoder, tuple(dense.shape[-2:]))
    close(pe, fixture["output.dense_pe"], OUTPUT, "dense_pe")


def check_scores(fixture: Fixture, prediction: Prediction, image, prompts, frames) -> None:
    mask = fixture["input.mask"]
    scores = region_scores(prediction, Batch(image, mask, prompts, frames, torch.ones(len(mask))))
    for name in ("dice", "iou"):
        close(scores[name].float(), fixture[f"output.per_image.{name}"], 1e-4, name)


def optimizer_settings(fixture: Fixture) -> dict:
    return {key: value for key, value in fixture.json["optimizer"].items() if key != "name"}


def check_parameters_after(fixture: Fixture, model) -> None:
    """Adam's first step is the gradient's sign, so compare where that is no rounding noise."""
    compared = 0
    for name, expected in fixture.group("param_after.").items():
        parameter = model.get_parameter(name)
        if parameter.requires_grad:
            clear = parameter.grad.abs() > 1e-7
            compared += int(clear.sum())
            error = (parameter - expected).abs().where(clear, 0)
            assert error.max() < 1e-6, f"{name} differs by {error.max():.3g} after the step"
    assert compared > 100, "hardly any parameter was compared"


# Prompts and positions


def check_prompt_decode(fixture: Fixture) -> None:
    config, transformer = fixture.config, fixture.config["transformer"]
    sizes = ModelType(
        embed_dim=8, depth=1, num_heads=1, global_blocks=(0,),  # an image encoder is not part of it
        patch_size=config["input_image_size"][0] // config["image_embedding_size"][0],
        prompt_embed_dim=config["embed_dim"], mask_in_chans=config["mask_in_chans"],
        decoder_depth=transformer["depth"], decoder_heads=transformer["num_heads"],
        decoder_mlp_dim=transformer["mlp_dim"], iou_head_depth=config["iou_head_depth"],
        iou_head_hidden_dim=config["iou_head_hidden_dim"],
        multimask_outputs=config["num_multimask_outputs"],
    )  # fmt: skip
    encoder = build_prompt_encoder(sizes, tuple(config["image_embedding_size"]))
    assert encoder.input_image_size == tuple(config["input_image_size"])
    decoder = build_mask_decoder(sizes)
    encoder.load_state_dict(fixture.group("param.prompt_encoder."))
    decoder.load_state_dict(fixture.group("param.mask_decoder."))

    features, index = fixture["input.image_embeddings"], fixture["input.image_index_of_box"]
    boxes = fixture["input.boxes"]
    points, labels = fixture["input.points"], fixture["input.point_labels"]
    masks, grid = fixture["input.mask_inputs"], tuple(features.shape[-2:])
    expected = fixture["output.box_mask.dense"]
    close(embed_masks(encoder, Prompts(masks=masks), grid), expected, OUTPUT, "dense")
    pe = position_encoding(encoder, tuple(features.shape[-2:]))
    close(pe, fixture["output.dense_pe"], OUTPUT, "dense_pe")
    cases = {
        "box": (Prompts(boxes=boxes), features[index]),
        "box_mask": (Prompts(boxes=boxes, masks=masks), features[index]),
        "points": (Prompts(points=points, point_labels=labels), features),
        "points_box": (Prompts(boxes, points[index], labels[index]), features[index]),
        "none": (Prompts(), features),
    }
    for case, (prompts, rows) in cases.items():
        dense = embed_masks(encoder, prompts, grid)
        sparse = embed_prompts(encoder, prompts, len(rows))
        close(sparse, fixture[f"output.{case}.sparse"], OUTPUT, f"{case} sparse")
        logits, iou = decode_masks(decoder, rows, pe, sparse, dense, slice(None))
        close(logits, fixture[f"output.{case}.low_res_all4"], OUTPUT, f"{case} logits")
        close(iou, fixture[f"output.{case}.iou_all4"], OUTPUT, f"{case} iou")


def check_pos_interp(fixture: Fixture) -> None:
    from segment_anything.modeling.image_encoder import get_rel_pos

    for height, width in fixture.config["target_grids"]:
        table = resize_pos_embed(fixture["input.pos_embed"], (height, width))
        close(table, fixture[f"output.pos_embed_bilinear.{height}x{width}"], OUTPUT, "pos_embed")
    for name, expected in fixture.group("output.rel_pos_resized.").items():
        table = resize_rel_pos(fixture["input.rel_pos"], 2 * int(name) - 1)
        close(table, expected, OUTPUT, f"rel_pos {name}")
        # The resized table, looked up as the encoder does, is what stock resizes on the fly.
        looked_up = get_rel_pos(int(name), int(name), table)
        close(looked_up, fixture[f"output.rel_table.{name}"], OUTPUT, f"rel_table {name}")
    check_encoder_on_other_grid(fixture)


def check_encoder_on_other_grid(fixture: Fixture) -> None:
    config = dict(fixture.config["encoder"])
    grid = tuple(config["evaluated_on_grid"])
    config |= {"global_attn_indexes": config["global_blocks"]}
    config |= {"img_size": config["built_for_grid"] * config["patch_size"]}
    encoder = build_image_encoder(model_type(config), config["img_size"])
    encoder.load_state_dict({n: t.float() for n, t in fixture.group("param.encoder.").items()})
    encoder.pos_embed.data = resize_pos_embed(encoder.pos_embed.data, grid)
    with torch.no_grad():
        actual = encoder(fixture["input.encoder_image"].float())
    close(actual, fixture["output.encoder_neck"], OUTPUT, "features on another grid")


CHECKS = {
    "sam_adapter_official": check_sam_adapter_official,
    "sam_adapter_official_full": check_sam_adapter_official_full,
    "sam_adapter_kyyle": check_sam_adapter_kyyle,
    "sam_adapter_kyyle_1024": check_sam_adapter_kyyle_1024,
    "fft_highpass": check_fft_highpass,
    "train_step_decoder_only": check_train_step_decoder_only,
    "train_step_sam_adapter": check_train_step_sam_adapter,
    "prompt_decode": check_prompt_decode,
    "pos_interp": check_pos_interp,
}
