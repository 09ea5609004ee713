"""Distances between the borders of two masks: HD95, surface Dice, boundary IoU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from samtune.metrics.measure import Answer, MeanMetric, foreground, ratio


@dataclass(frozen=True)
class BoundaryIoU(MeanMetric):
    """IoU of the two masks' inner borders, a share of the picture's diagonal thick.

    Source: Cheng et al., CVPR 2021; bowenc0221/boundary-iou-api 8006aa9. The picture's edge counts
    as a border. ratio: thickness over diagonal; at least one pixel.
    """

    threshold: float = 0.5
    ratio: float = 0.02

    rules: ClassVar = {"both_empty": "undefined, left out", "one_empty": "0"}

    columns = ("boundary_iou",)

    def values(self, truth: np.ndarray, answer: Answer) -> dict[str, float]:
        predicted, true, _ = foreground(truth, answer, self.threshold)
        thickness = boundary_thickness(true.shape, self.ratio)
        predicted, true = (_inner_border(mask, thickness) for mask in (predicted, true))
        both, either = np.count_nonzero(predicted & true), np.count_nonzero(predicted | true)
        return {"boundary_iou": float(ratio(both, either))}


def boundary_thickness(size: tuple[int, int], share: float) -> int:
    """Pixels, at least 1."""
    return max(1, round(share * float(np.hypot(*size))))


def _inner_border(mask: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels of the mask within `thickness` steps (also diagonal ones) of what is outside it.

    One erosion by a large square, which OpenCV does along rows, then columns: as many by a 3 x 3
    square take away the same.
    """
    square = np.ones((2 * thickness + 1,) * 2, np.uint8)
    outside = {"borderType": cv2.BORDER_CONSTANT, "borderValue": 0}
    return mask & ~cv2.erode(mask.astype(np.uint8), square, **outside).astype(bool)


def surface_distances(
    predicted: np.ndarray, true: np.ndarray, spacing: Sequence[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each border voxel of one mask to the other's border, both directions.

    predicted, true: bool of any dimension, neither empty (ValueError). spacing: size of a voxel
    along each axis; None for voxel units. A border voxel has a face neighbour outside the mask; the
    array's edge counts as outside. The same as loli/medpy 0.5 and MONAI.
    """
    if not predicted.any() or not true.any():
        raise ValueError("an empty mask has no border")
    box = ndimage.find_objects((predicted | true).astype(np.uint8))[0]
    unit = np.ones(true.ndim) if spacing is None else np.asarray(spacing, np.float64)
    borders = [
        np.argwhere(mask[box] & ~ndimage.binary_erosion(mask[box])) for mask in (predicted, true)
    ]
    # Trees of border voxels: a distance transform would fill the whole box, with many bytes each.
    trees = [KDTree(border * unit, compact_nodes=False) for border in borders]
    nearest = [
        tree.query(border * unit)[1] for border, tree in zip(borders, trees[::-1], strict=True)
    ]
    steps = [(b[i] - a) * unit for a, b, i in zip(borders, borders[::-1], nearest, strict=True)]
    return tuple(np.sqrt((step * step).sum(1)) for step in steps)


def hd95(distances: tuple[np.ndarray, np.ndarray], combine: str = "joined") -> float:
    """95th percentile of the Hausdorff distances, from `surface_distances`.

    combine: "joined", of both directions as one list (MedPy, and with it SAMed and TransUNet);
    "larger", the larger of the two directions' percentiles (MONAI). They rarely agree.
    """
    if combine == "joined":
        return float(np.percentile(np.concatenate(distances), 95))
    return float(max(np.percentile(direction, 95) for direction in distances))


def surface_dice(distances: tuple[np.ndarray, np.ndarray], tolerance: float) -> float:
    """Share of both borders' voxels within the tolerance of the other (MONAI's count of voxels)."""
    near = sum(np.count_nonzero(direction <= tolerance) for direction in distances)
    return near / sum(direction.size for direction in distances)
