"""The contact sheet of `check`: masks drawn over their pictures, the strangest ones first."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from samtune.data.files import Pair
from samtune.data.findings import Split
from samtune.data.guesses import kind_of, kinds_in
from samtune.data.images import read_image
from samtune.data.inspection import Facts
from samtune.data.leaks import disagree, same_pictures
from samtune.data.loading import cores_per_process
from samtune.data.samples import read_sample
from samtune.errors import UserError
from samtune.gallery import Drawing, drawing_of
from samtune.pictures import BOX, captioned_sheet, thumbnail
from samtune.threads import InOrder

SIDE = 300  # pixels of a tile's longer side
COLUMNS = 6
_RARE = 0.2  # of a split's masks: a kind of values that fewer have is unusual
_GROUPS = 4  # of equal pictures


class Chosen(NamedTuple):
    """A picture for the sheet, and what is strange about it."""

    split: Split
    facts: Facts
    why: str


class Tile(NamedTuple):
    """A drawn picture. image: (h, w, 3) uint8 RGB, its longer side `SIDE`."""

    split: str
    id: str
    why: str
    image: np.ndarray


def draw_tiles(
    splits: Sequence[Split], count: int, seed: int, prompt: str, colours: Mapping[str, Sequence]
) -> list[Tile]:
    """At most `count` pictures of all splits, with outlines of objects or coloured classes, and the
    boxes of what is asked about. colours: RGB by class id, by the name of the split.

    Files are read again for it, in threads. What cannot be drawn is left out.
    """
    drawings = {
        split.name: drawing_of(split.read, prompt, colours.get(split.name, ())) for split in splits
    }
    pairs = {split.name: {pair.id: pair for pair in split.pairs} for split in splits}
    tiles: list[Tile | None] = []
    threads = InOrder(min(8, cores_per_process()), tiles.append)
    for chosen in choose(splits, count, seed):
        name = chosen.split.name
        threads.put(_draw, chosen, pairs[name][chosen.facts.id], drawings[name])
    threads.finish()
    return [tile for tile in tiles if tile]


def sheet_of(tiles: Sequence[Tile]) -> np.ndarray:
    """All tiles as one picture."""
    lines = [(tile.image, (f"{tile.split} {tile.id}", tile.why)) for tile in tiles]
    return captioned_sheet(lines, COLUMNS)


def choose(splits: Sequence[Split], count: int, seed: int) -> list[Chosen]:
    """What to show: some of each kind of strangeness, then a seeded sample of all splits."""
    chosen: dict[tuple[str, str], Chosen] = {}
    share = max(2, count // 8)  # for each kind of strangeness
    for why, candidates in _strange(splits):
        for split, one in candidates[:share]:
            known = chosen.get((split.name, one.id))
            reasons = f"{known.why}, {why}" if known else why
            chosen[split.name, one.id] = Chosen(split, one, reasons)
    listed = list(chosen.values())[:count]
    rest = [
        Chosen(split, one, "sample")
        for split in splits
        for one in split.usable
        if (split.name, one.id) not in chosen
    ]
    left = min(len(rest), count - len(listed))
    return listed + random.Random(seed).sample(rest, left)


def _strange(splits: Sequence[Split]) -> Iterator[tuple[str, list[tuple[Split, Facts]]]]:
    """Kinds of strangeness with their pictures, of each split in turn, the worst first."""
    groups = sorted(same_pictures(splits), key=disagree, reverse=True)[:_GROUPS]
    named = {split.name: split for split in splits}
    for group in groups:
        why = "same picture, other mask" if disagree(group) else "same picture twice"
        yield why, [(named[place.split], place.facts) for place in group[:2]]
    yield "cannot be used", _of_each(splits, lambda split: [f for f in split.facts if f.problems])
    yield "empty", _of_each(splits, lambda split: [f for f in split.usable if not f.things])
    yield "tiny", _of_each(splits, _smallest)
    yield "object all over", _of_each(splits, lambda s: [f for f in s.usable if s.covers_all(f)])
    yield "inverted?", _of_each(splits, lambda s: [f for f in s.usable if s.looks_inverted(f)])
    yield "unusual values", _of_each(splits, _unusual)
    yield "at the border", _of_each(splits, _at_border)


def _of_each(splits: Sequence[Split], find) -> list[tuple[Split, Facts]]:
    """The first that `find` gives of each split, then the second of each, ..."""
    found = [[(split, one) for one in find(split)] for split in splits]
    longest = max(map(len, found), default=0)
    return [part[i] for i in range(longest) for part in found if i < len(part)]


def _smallest(split: Split) -> list[Facts]:
    tiny = [one for one in split.usable if split.is_tiny(one)]
    return sorted(tiny, key=lambda one: one.boxes[:, 4].min())


def _unusual(split: Split) -> list[Facts]:
    kinds = kinds_in(split.usable)
    rare = {kind for kind, count in kinds.items() if count < _RARE * kinds.total()}
    found = [one for one in split.usable if one.values and kind_of(one.values) in rare]
    return sorted(found, key=lambda one: kinds[kind_of(one.values)])


def _at_border(split: Split) -> list[Facts]:
    touching = [one for one in split.usable if one.touches_border]
    return sorted(touching, key=lambda one: -one.border)


def _draw(chosen: Chosen, pair: Pair, drawing: Drawing) -> Tile | None:
    one, read = chosen.facts, chosen.split.read
    try:
        if one.problems:
            picture = read_image(pair.image_path, read)
        else:
            sample = read_sample(pair, read).sample
            picture = drawing.truth(sample.image, drawing.shown(sample))
    except (UserError, OSError):  # it was told already, or has gone since
        return None
    picture = picture.copy()
    width = max(1, round(min(picture.shape[:2]) / 200))
    for x0, y0, x1, y1, _ in one.boxes.tolist():
        cv2.rectangle(picture, (x0, y0), (x1, y1), BOX, width)
    return Tile(chosen.split.name, one.id, chosen.why, thumbnail(picture, SIDE))
