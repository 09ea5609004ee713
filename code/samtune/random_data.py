"""Batches of noise with boxes to find, for what is timed or measured without files."""

from __future__ import annotations

import numpy as np

from samtune.config import PromptOptions, Size
from samtune.data.datasets import Item, Row, collate
from samtune.data.prompts import RowPrompt, in_words, make_prompt
from samtune.errors import UserError
from samtune.structures import Batch, Frame


def random_batch(
    batch_size: int,
    image_size: int | tuple[int, int],
    prompt: PromptOptions,
    rows: int = 1,
    picture_size: Size = Size(0, 0),
) -> Batch:
    """Images of noise that fill their frame, and questions about box-shaped objects in them.

    image_size: (S_h, S_w), or the side of a square. rows: questions about each image; a single one
    is about a box in the middle, several are about random ones. picture_size: (H, W) of the targets
    as if the images had been fitted from pictures of that size; 0: targets lie in the frame.
    Always the same batch for the same arguments. Raises UserError for several questions without a
    prompt to tell them apart.
    """
    if rows < 1:
        raise UserError(f"--rows {rows}: must be at least 1")
    if rows > 1 and prompt.prompt == "none":
        raise UserError(f"--rows {rows}: several questions about an image need a --prompt")
    rng = np.random.default_rng(0)
    size = Size.read(image_size)
    frame = Frame(tuple(picture_size or size), tuple(size))

    def row(image: int, number: int) -> Row:
        target = _box(frame.original_size, rng if rows > 1 else None)
        told = RowPrompt()
        if prompt.prompt != "none":
            told = make_prompt(target, frame, size, prompt, train=True, words=(0, image, number))
        return Row("random", target, told)

    items = [
        Item(
            rng.integers(0, 256, (*size, 3), dtype=np.uint8),
            tuple(row(image, number) for number in range(rows)),
            frame, not picture_size, 1.0, "random", "random", in_words(prompt),
        )
        for image in range(batch_size)
    ]  # fmt: skip
    return collate(items)


def _box(size: tuple[int, int], rng: np.random.Generator | None) -> np.ndarray:
    """(H, W) uint8 with ones in a box: half as high and wide, in the middle; or a random one."""
    target = np.zeros(size, np.uint8)
    if rng is None:
        lines, columns = (slice(side // 4, 3 * side // 4) for side in size)
    else:
        lines, columns = (
            slice(int(start * side), int(start * side) + max(1, int(length * side)))
            for side in size
            for start, length in [rng.uniform((0, 0.1), (0.75, 0.25))]
        )
    target[lines, columns] = 1
    return target
