"""A small set of pictures with masks, drawn on the spot: the first run needs no download.

Animals and plants in warm, patterned colours on cool, uneven ground among dull pebbles: one object
in each picture, which fills about half of its box. So the box alone scores an IoU of about 0.5, and
a model has something to learn.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from samtune.errors import UserError

COUNTS = {"train": 24, "val": 6, "test": 6}
_VERSION = "samtune sample set, version 1"
_FINE = 4  # drawn this much larger, then averaged down: smooth edges
_FILL = (0.42, 0.58)  # the share of its box that an object may fill


@dataclass(frozen=True)
class SampleSet:
    """The folders of a sample set."""

    root: Path

    def image_dir(self, split: str) -> Path:
        return self.root / split / "image"

    def mask_dir(self, split: str) -> Path:
        return self.root / split / "mask"


def make_sample_set(root: str | Path, seed: int = 0) -> SampleSet:
    """Draw the pictures into root/{train,val,test}/{image,mask}, or find them drawn already.

    PNG, masks 0 and 255, pictures of different sizes. The folder appears at once and whole, so that
    an interrupted or a second process does no harm. Raises UserError if the folder holds anything
    else, or cannot be written.
    """
    sample_set, label = SampleSet(Path(root)), f"{_VERSION}, seed {seed}\n"
    if _is_complete(sample_set, label):
        return sample_set
    draft = None
    try:
        sample_set.root.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".sample-", dir=sample_set.root.parent))
        draft.chmod(0o755)
        _draw_all(SampleSet(draft), seed)
        (draft / "ABOUT.txt").write_text(label)
        os.rename(draft, sample_set.root)  # fails unless the target is absent or an empty folder
    except OSError as error:
        if not _is_complete(sample_set, label):  # another process may have been quicker
            raise UserError(
                f"cannot make the sample set in {root}: {error.strerror}; remove what is there or "
                "choose another place"
            ) from None
    finally:
        if draft:
            shutil.rmtree(draft, ignore_errors=True)
    return sample_set


def _names(split: str) -> list[str]:
    """The file names of a split; the kinds of object take turns."""
    return [f"{list(_OBJECTS)[i % len(_OBJECTS)]}_{i:02d}.png" for i in range(COUNTS[split])]


def _is_complete(sample_set: SampleSet, label: str) -> bool:
    about = sample_set.root / "ABOUT.txt"
    return (
        about.is_file()
        and about.read_text() == label
        and all(
            (folder(split) / name).is_file()
            for folder in (sample_set.image_dir, sample_set.mask_dir)
            for split in COUNTS
            for name in _names(split)
        )
    )


def _draw_all(sample_set: SampleSet, seed: int) -> None:
    for number, split in enumerate(COUNTS):
        sample_set.image_dir(split).mkdir(parents=True)
        sample_set.mask_dir(split).mkdir()
        for index, name in enumerate(_names(split)):
            rng = np.random.default_rng([seed, number, index])
            image, mask = _draw(name.split("_")[0], rng)
            _write(sample_set.image_dir(split) / name, image[..., ::-1])
            _write(sample_set.mask_dir(split) / name, mask * 255)


def _write(path: Path, pixels: np.ndarray) -> None:
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())


def _draw(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One picture, (H, W, 3) uint8 RGB, and its mask of 0 and 1."""
    size = int(rng.integers(128, 201)), int(rng.integers(128, 225))
    image = _ground(size, rng)
    silhouette, detail = _place(_OBJECTS[kind](), size, rng)
    mask = silhouette >= 0.5

    red, green, blue = rng.uniform(190, 250), rng.uniform(60, 170), rng.uniform(10, 60)
    body = np.array([red, green, blue]) * (0.85 + 0.3 * _noise(size, 6, rng)[..., None])
    body *= 1 - 0.65 * detail[..., None]  # eyes, veins and stripes are darker
    rim = mask & (cv2.erode(mask.astype(np.uint8), np.ones((3, 3))) == 0)
    body[rim] *= 0.75
    image += (body - image) * silhouette[..., None]
    image += rng.normal(0, 6, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), mask.astype(np.uint8)


def _ground(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) float water or grass, with pebbles."""
    colours = np.array([[40, 90, 120], [50, 105, 70], [70, 100, 110]], np.float64)
    colour = colours[rng.integers(3)] * rng.uniform(0.8, 1.2)
    texture = 0.75 + 0.5 * (0.6 * _noise(size, 5, rng) + 0.4 * _noise(size, 40, rng))
    image = colour * texture[..., None]
    for _ in range(rng.integers(4, 9)):
        pebble = np.zeros(size, np.float32)
        center = (int(rng.integers(size[1])), int(rng.integers(size[0])))
        axes = tuple(int(axis) for axis in rng.integers(4, 15, 2))
        cv2.ellipse(pebble, center, axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1)
        grey = rng.uniform(70, 150) * np.array([0.95, 1.0, 1.05])
        image += (grey * texture[..., None] - image) * cv2.blur(pebble, (3, 3))[..., None]
    return image


def _noise(size: tuple[int, int], cells: int, rng: np.random.Generator) -> np.ndarray:
    """(H, W) smooth noise in 0..1 with about `cells` waves along a side."""
    coarse = rng.uniform(0, 1, (cells, cells)).astype(np.float32)
    return np.clip(cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC), 0, 1)


def _place(shape, size: tuple[int, int], rng: np.random.Generator):
    """The shape's silhouette and its detail, each (H, W) in 0..1, at a random pose."""
    outlines, details = shape
    for _ in range(50):
        angle = rng.uniform(0, 2 * np.pi)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points = np.concatenate(outlines) @ turn.T
        low, high = points.min(0), points.max(0)
        scale = rng.uniform(0.5, 0.8) * min(np.array(size[::-1]) / (high - low))
        room = np.array(size[::-1]) - scale * (high - low)
        offset = room * rng.uniform(0.1, 0.9, 2) - scale * low
        masks = [
            _fill([part @ turn.T * scale + offset for part in parts], size)
            for parts in (outlines, details)
        ]
        box = (high - low) * scale
        if _FILL[0] <= masks[0].sum() / box.prod() <= _FILL[1]:
            break
    return masks


def _fill(polygons: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """(H, W) float32: how much of each pixel the union of the polygons covers."""
    fine = np.zeros((size[0] * _FINE, size[1] * _FINE), np.uint8)
    for polygon in polygons:
        cv2.fillPoly(fine, [np.round(polygon * _FINE).astype(np.int32)], 255)
    covered = cv2.resize(fine, size[::-1], interpolation=cv2.INTER_AREA)
    return covered.astype(np.float32) / 255


# The objects: outlines whose union is the silhouette, and darker details within it. x to the right,
# y down, about one unit large; each is turned by chance.


def _ellipse(x, y, width, height, degrees=0.0) -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    points = np.stack([width * np.cos(turn), height * np.sin(turn)], 1)
    angle = np.deg2rad(degrees)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return points @ rotation + (x, y)


def _polygon(*points) -> np.ndarray:
    return np.array(points, np.float64)


def _fish():
    tail = _polygon((-0.55, 0), (-1.1, -0.42), (-0.95, 0), (-1.1, 0.42))
    fin = _polygon((-0.2, -0.3), (0.25, -0.3), (-0.2, -0.62))
    stripes = [_ellipse(x, 0, 0.05, 0.28) for x in (-0.3, 0.0)]
    return [_ellipse(0, 0, 0.75, 0.4), tail, fin], [_ellipse(0.45, -0.1, 0.07, 0.07), *stripes]


def _starfish():
    turn = np.linspace(0, 2 * np.pi, 10, endpoint=False)
    radius = np.where(np.arange(10) % 2, 0.5, 1.0)
    star = np.stack([radius * np.sin(turn), -radius * np.cos(turn)], 1)
    spots = [_ellipse(*(0.5 * star[i]), 0.07, 0.07) for i in range(0, 10, 2)]
    return [star], [_ellipse(0, 0, 0.1, 0.1), *spots]


def _leaf():
    x = np.linspace(-1, 1, 40)
    edge = 0.48 * np.cos(np.pi * x / 2) ** 0.8
    blade = np.concatenate([np.stack([x, -edge], 1), np.stack([x, edge], 1)[::-1]])
    stalk = _polygon((0.95, -0.05), (1.35, -0.05), (1.35, 0.05), (0.95, 0.05))
    veins = [
        _polygon((v, 0), (v - 0.3, side * 0.26), (v - 0.22, side * 0.26), (v + 0.08, 0))
        for v in (-0.2, 0.2, 0.6)
        for side in (-1, 1)
    ]
    return [blade, stalk], [_polygon((-0.9, -0.02), (1, -0.03), (1, 0.03), (-0.9, 0.02)), *veins]


def _butterfly():
    wings = [
        _ellipse(side * x, y, w, h, side * angle)
        for side in (-1, 1)
        for x, y, w, h, angle in ((0.48, -0.38, 0.52, 0.24, 42), (0.4, 0.38, 0.42, 0.2, -42))
    ]
    body = _ellipse(0, 0, 0.09, 0.6)
    spots = [_ellipse(side * 0.58, -0.42, 0.12, 0.12) for side in (-1, 1)]
    return [*wings, body], [_ellipse(0, 0, 0.06, 0.55), *spots]


def _duck():
    beak = _polygon((0.85, -0.55), (1.2, -0.45), (0.85, -0.38))
    tail = _polygon((-0.6, -0.1), (-1.05, -0.4), (-0.75, 0.2))
    neck = _polygon((0.3, 0.1), (0.4, -0.5), (0.75, -0.4), (0.65, 0.2))
    wing = _ellipse(-0.1, 0.1, 0.32, 0.12, 15)
    outlines = [_ellipse(0, 0.15, 0.78, 0.4), _ellipse(0.62, -0.5, 0.28, 0.26), neck, beak, tail]
    return outlines, [wing, _ellipse(0.68, -0.56, 0.05, 0.05)]


def _mushroom():
    turn = np.linspace(np.pi, 2 * np.pi, 40)
    cap = np.stack([0.95 * np.cos(turn), 0.75 * np.sin(turn) + 0.05], 1)
    stem = _polygon((-0.22, 0), (0.22, 0), (0.3, 0.9), (-0.3, 0.9))
    spots = [_ellipse(x, y, 0.11, 0.09) for x, y in ((-0.5, -0.2), (0, -0.42), (0.45, -0.22))]
    return [cap, stem], spots


_OBJECTS = {
    "fish": _fish,
    "starfish": _starfish,
    "leaf": _leaf,
    "butterfly": _butterfly,
    "duck": _duck,
    "mushroom": _mushroom,
}
