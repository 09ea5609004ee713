"""Fixtures of TinyViT: toy widths with gradients and BatchNorm, and the whole vit_t at 1024 px."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from fixture import Fixture
from timm.models.tiny_vit import TinyVit

from samtune.models import MODEL_TYPES, Stage
from samtune.models.sam import build_image_encoder
from samtune.models.tiny_vit import TinyViTEncoder

# The classifier: in the files, read by nothing.
UNUSED = {f"{part}.{kind}" for part in ("norm_head", "head") for kind in ("weight", "bias")}


def near(actual: torch.Tensor, expected: torch.Tensor, tolerance: dict, name: str) -> None:
    torch.testing.assert_close(
        actual.detach(), expected, **tolerance, msg=lambda text: f"{name}: {text}"
    )


def load(encoder: TinyViTEncoder, state: dict) -> TinyViTEncoder:
    """Published tensors under published names."""
    floats = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    missing, unexpected = encoder.load_state_dict(floats, strict=False)
    assert not missing and set(unexpected) <= UNUSED, (missing, unexpected)
    return encoder.eval()


def check_tiny_vit(fixture: Fixture) -> None:
    config = fixture.config
    names = ("embed_dims", "depths", "num_heads", "window_sizes", "mlp_ratio")
    names += ("mbconv_expand_ratio", "local_conv_size", "in_chans")
    trunk = TinyVit(num_classes=0, drop_path_rate=0.0, **{name: config[name] for name in names})
    out_chans = len(fixture["param.neck.1.weight"])
    encoder = TinyViTEncoder(trunk, out_chans, max(config["img_size"]))
    load(encoder, fixture.group("param."))
    check_stages(fixture, encoder)
    check_training(fixture, encoder)


def check_stages(fixture: Fixture, encoder: TinyViTEncoder) -> None:
    """Eval mode: the output of every stage, as maps or as tokens."""
    seen = {}
    parts = {"patch_embed": encoder.patch_embed}
    parts |= {f"layer{i}": layer for i, layer in enumerate(encoder.layers)}
    for name, part in parts.items():
        part.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        seen["neck"] = encoder(fixture["input.image"])
    expected = fixture.group("output.eval.")
    assert expected.keys() == seen.keys()
    for name, value in expected.items():
        actual = seen[name] if value.ndim == 4 else seen[name].flatten(2).transpose(1, 2)
        near(actual, value, fixture.json["tolerance"]["eval"], name)


def check_training(fixture: Fixture, encoder: TinyViTEncoder) -> None:
    """Batch statistics, gradients, and the running statistics after one forward."""
    tolerance = fixture.json["tolerance"]["train"]
    image = fixture["input.image"].clone().requires_grad_()
    features = encoder.train()(image)
    (features * fixture["input.cotangent"]).sum().backward()
    near(features, fixture["output.train.neck"], tolerance, "features in training")
    near(image.grad, fixture["output.train.grad_image"], tolerance, "gradient of the image")
    gradients = fixture.group("output.train.grad.")
    assert gradients
    for name, expected in gradients.items():
        near(encoder.get_parameter(name).grad, expected, tolerance, name)
    for name, expected in fixture.group("output.train.after.").items():
        near(encoder.get_buffer(name), expected, tolerance, name)


def check_tiny_vit_full1024(fixture: Fixture) -> None:
    config, tolerance = fixture.config, fixture.json["tolerance"]
    row, salt = MODEL_TYPES["vit_t"], fixture.json["recipe"]["salt"]
    names = ("embed_dims", "depths", "num_heads", "window_sizes")
    stages = [Stage(*numbers) for numbers in zip(*(config[name] for name in names), strict=True)]
    assert stages[0][:2] == row.stages[0][:2] and stages[1:] == list(row.stages[1:])
    encoder = build_image_encoder(row, config["img_size"])
    state = {n: fill(salt, n, t) for n, t in encoder.state_dict().items() if t.is_floating_point()}
    for name, expected in fixture.group("param.check.").items():
        assert torch.equal(state[name], expected), name
    encoder.load_state_dict(state, strict=False)  # but for counters of batches
    image = formula_image(salt, config["img_size"])
    corner = fixture["input.check_image_corner"]
    torch.testing.assert_close(image[:, :, :4, :4], corner)
    with torch.no_grad():
        features = encoder.eval()(image)
    parts = {
        "stride4": features[:, :, 1::4, 2::4],
        "last_row": features[:, :, -1],
        "last_col": features[:, :, :, -1],
        "channel_mean": features.mean((0, 2, 3)),
        "channel_std": features.std((0, 2, 3)),
    }
    expected = fixture.group("output.neck_")
    assert expected.keys() == parts.keys()
    for name, value in expected.items():
        near(parts[name], value, tolerance, name)


def noise(salt: str, key: str, count: int) -> np.ndarray:
    """(count,) float64 in 0..1, by the fixture's recipe."""
    start = zlib.crc32((salt + key).encode())
    u = (np.arange(1, count + 1, dtype=np.uint64) * 2654435761 + start) % 2**32
    for _ in range(2):
        u ^= u >> 16
        u = u * 0x45D9F3B % 2**32
    u ^= u >> 16
    return u.astype(np.float64) / 2**32


def fill(salt: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the recipe under its published name."""
    v = noise(salt, name, tensor.numel())
    if name.endswith(".running_var"):
        v = 0.5 + v
    elif name.endswith(".attention_biases"):
        v = 2 * (v - 0.5)
    elif tensor.ndim == 1 and name.endswith(".weight"):
        v = 0.7 + 0.6 * v
    elif tensor.ndim == 1:
        v = 0.2 * (v - 0.5)
    else:
        v = 2 * (v - 0.5) * np.sqrt(3 / tensor[0].numel())
    return torch.from_numpy(v).float().reshape(tensor.shape)


def formula_image(salt: str, size: int) -> torch.Tensor:
    """(1, 3, size, size): noise, and a wave along another direction per channel."""
    v = noise(salt, "image", 3 * size * size)
    image = torch.from_numpy(0.5 * (2 * (v - 0.5))).float().reshape(1, 3, size, size)
    y, x = torch.meshgrid(*[torch.arange(size, dtype=torch.float32)] * 2, indexing="ij")
    return image + torch.stack([torch.sin(x / 97), torch.cos(y / 61), torch.sin((x + y) / 143)])


CHECKS = {"tiny_vit": check_tiny_vit, "tiny_vit_full1024": check_tiny_vit_full1024}
