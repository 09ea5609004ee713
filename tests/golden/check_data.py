"""Fixtures of what happens to pictures, masks and coordinates outside the model."""

import numpy as np
import PIL
import torch

from samtune.data.prompts import box_from_mask
from samtune.data.transforms import fit_image, fit_size
from samtune.structures import Frame, Frames


def check_preprocess(fixture):
    """Resizing, coordinates and the way back, against segment-anything."""
    side = fixture.config["target_length"]
    # Pillow 13 rounds otherwise than the releases before it, by one grey level at most.
    same_pillow = PIL.__version__.split(".")[0] == fixture.json["versions"]["pillow"].split(".")[0]
    for k, size in enumerate(fixture.config["sizes_hw"]):
        image = fixture[f"input.image.{k}"].numpy()
        padded, frame = fit_image(image, (side, side), "pad")
        height, width = frame.valid_size
        assert frame.original_size == tuple(size) == image.shape[:2]
        assert frame.valid_size == tuple(fixture["output.target_sizes"][k].tolist())
        expected = fixture[f"output.resized.{k}"].numpy().astype(int)
        difference = np.abs(padded[:height, :width] - expected).max()
        assert difference <= (0 if same_pillow else 1)
        padded[:height, :width] = expected

        _check_normalised(fixture, padded, frame, k)
        _check_coordinates(fixture, frame, k)

        frames = Frames.collate([frame], (side, side))
        logits = frames.restore(fixture[f"input.low_res.{k}"])
        torch.testing.assert_close(
            logits, fixture[f"output.logits.{k}"], rtol=0, atol=fixture.json["tolerance"]["logits"]
        )
        mask = (logits > fixture.config["mask_threshold"]).to(torch.uint8)
        differing = mask != fixture[f"output.mask.{k}"]
        assert (fixture[f"output.logits.{k}"][differing].abs() < 1e-4).all()
    _check_size_table(fixture)


def _check_normalised(fixture, padded, frame, k):
    """Zero in the padding of bytes, and zero there after normalisation by the valid size."""
    height, width = frame.valid_size
    assert not padded[height:].any() and not padded[:, width:].any()
    mean, std = (torch.tensor(fixture.config[f"pixel_{name}"]) for name in ("mean", "std"))
    tensor = torch.zeros(1, 3, *padded.shape[:2])
    values = (torch.from_numpy(padded[:height, :width]) - mean) / std
    tensor[0, :, :height, :width] = values.permute(2, 0, 1)
    torch.testing.assert_close(tensor, fixture[f"output.tensor.{k}"], rtol=0, atol=1e-5)


def _check_coordinates(fixture, frame, k):
    tolerance = fixture.json["tolerance"]
    points = frame.scale_xy(fixture[f"input.points.{k}"].numpy())
    np.testing.assert_allclose(
        points, fixture[f"output.points.{k}"], rtol=0, atol=tolerance["boxes float64"]
    )
    boxes = frame.scale_xy(fixture[f"input.boxes.{k}"].numpy().reshape(-1, 2, 2)).reshape(-1, 4)
    for name, kind in (("boxes", "boxes float64"), ("boxes_torch_path", "boxes float32")):
        expected = fixture[f"output.{name}.{k}"]
        np.testing.assert_allclose(boxes, expected, rtol=0, atol=tolerance[kind])


def _check_size_table(fixture):
    """Sizes for a frame of 1024; where stock SAM makes a side of zero, ours keeps one pixel."""
    sizes, expected = fixture["input.size_grid_1024"], fixture["output.size_grid_1024"]
    for size, fitted in zip(sizes.tolist(), expected.tolist(), strict=True):
        assert fit_size(tuple(size), (1024, 1024), "pad") == tuple(max(side, 1) for side in fitted)


def check_box_prompts(fixture):
    """Boxes around masks for several scales, and in the model's frame."""
    masks = fixture["input.mask"].numpy()
    for name, corners in fixture.group("output.xyxy.scale_").items():
        sizes = fixture[f"output.xywh.scale_{name}"].tolist()
        for mask, expected, xywh in zip(masks, corners.tolist(), sizes, strict=True):
            box = box_from_mask(mask, float(name))
            if not mask.any():
                assert box is None  # the reference makes a box of nothing at the origin
                continue
            assert list(box) == expected
            assert [box[2] - box[0], box[3] - box[1]] == xywh[2:]
    for name, boxes in fixture.group("output.model_xyxy.scale_").items():
        frame = Frame(masks.shape[1:], tuple(fixture["output.model_image_hw"].tolist()))
        for mask, expected in zip(masks, boxes.numpy(), strict=True):
            if mask.any():
                corners = np.reshape(box_from_mask(mask, float(name)), (2, 2))
                np.testing.assert_allclose(frame.scale_xy(corners).ravel(), expected, rtol=1e-15)


CHECKS = {"preprocess": check_preprocess, "box_prompts": check_box_prompts}
