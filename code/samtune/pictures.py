"""Pictures for people: a prediction drawn over its image, and a sheet of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from samtune.structures import IGNORE

TRUTH, PREDICTION, BOX = (90, 220, 90), (240, 70, 90), (250, 210, 60)  # RGB
LABEL_HEIGHT = 22


def overlay(image: np.ndarray, mask: np.ndarray, truth: np.ndarray, box=None) -> np.ndarray:
    """Draw a predicted mask (tinted, red outline), the true one (green) and the box (yellow).

    image: (H, W, 3) uint8 RGB. mask, truth: (H, W), 1 is foreground. box: x0, y0, x1, y1 or None.
    Returns (H, W, 3) uint8 RGB.
    """
    picture = image.copy()
    inside = mask == 1
    picture[inside] = (0.6 * picture[inside] + 0.4 * np.array(PREDICTION)).astype(np.uint8)
    width = max(1, round(min(image.shape[:2]) / 200))
    for region, colour in ((truth, TRUTH), (mask, PREDICTION)):
        outlines, _ = cv2.findContours(
            (region == 1).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE
        )
        cv2.drawContours(picture, outlines, -1, colour, width)
    if box is not None:
        x0, y0, x1, y1 = (round(float(value)) for value in box)
        cv2.rectangle(picture, (x0, y0), (x1, y1), BOX, width)
    return picture


def class_colours(count: int) -> np.ndarray:
    """(count, 3) uint8 RGB, the colours of PASCAL VOC: class 0 black, neighbours far apart."""
    ids = np.arange(count)[:, None]
    bits = ids >> np.arange(0, 24, 3)[None, :]  # (count, 8): three bits of the id at a time
    place = 7 - np.arange(8)
    return np.stack([((bits >> c & 1) << place).sum(1) for c in range(3)], 1).astype(np.uint8)


def paint_classes(image: np.ndarray, classes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Tint each pixel by its class, half and half; `IGNORE` is grey.

    image: (H, W, 3) uint8 RGB. classes: (H, W) uint8 ids. colours: (K, 3) uint8 RGB.
    """
    table = np.full((256, 3), 128, np.uint8)
    table[: len(colours)] = colours
    picture = cv2.addWeighted(image, 0.4, table[classes], 0.6, 0)
    picture[classes == IGNORE] = 128
    return picture


def write_classes(path: Path, classes: np.ndarray, colours: np.ndarray) -> None:
    """Write (H, W) uint8 ids as a palette PNG: its values are the ids, its looks the colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(classes, "L")
    picture.putpalette(colours.tobytes())
    picture.save(path)


def sheet(rows: list[list[np.ndarray]], titles: list[str], side: int = 220) -> np.ndarray:
    """Lay pictures out in a grid with a title over each column; all are fitted into side x side."""
    header = [_label(title, side) for title in titles]
    lines = [np.hstack(header)]
    lines += [np.hstack([_fit(picture, side) for picture in row]) for row in rows]
    return np.vstack(lines)


def captioned_sheet(
    tiles: list[tuple[np.ndarray, Sequence[str]]], columns: int, side: int = 220
) -> np.ndarray:
    """Lay pictures out in a grid, each fitted into side x side over its lines of text, as many for
    each. Letters that the drawn font lacks become question marks.
    """
    drawn = [
        np.vstack([_fit(picture, side), *(_label(_plain(line, side), side) for line in lines)])
        for picture, lines in tiles
    ]
    blank = np.full_like(drawn[0], 255)
    drawn += [blank] * (-len(drawn) % columns)
    rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)]
    return np.vstack([np.hstack(row) for row in rows])


def thumbnail(picture: np.ndarray, side: int) -> np.ndarray:
    """The picture (H, W, 3), resized so that its longer side is `side` pixels."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(picture, size, interpolation=method)


def jpeg(picture: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB as a JPEG file."""
    return cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])[1].tobytes()


def truth_picture(image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The image with the true mask outlined and ignored pixels greyed."""
    picture = overlay(image, np.zeros_like(truth), truth)
    picture[truth == IGNORE] = 128
    return picture


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write RGB or grey uint8 as PNG, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bgr = picture[..., ::-1] if picture.ndim == 3 else picture
    path.write_bytes(cv2.imencode(".png", bgr)[1].tobytes())


def _fit(picture: np.ndarray, side: int) -> np.ndarray:
    small = thumbnail(picture, side - 4)
    height, width = small.shape[:2]
    tile = np.full((side, side, 3), 255, np.uint8)
    y, x = (side - height) // 2, (side - width) // 2
    tile[y : y + height, x : x + width] = small
    return tile


def _plain(text: str, side: int) -> str:
    """What the font can draw of a text, and there is room for."""
    return text.encode("ascii", "replace").decode()[: side // 7]


def _label(text: str, side: int) -> np.ndarray:
    tile = np.full((LABEL_HEIGHT, side, 3), 255, np.uint8)
    cv2.putText(tile, text, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return tile
