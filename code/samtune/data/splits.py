"""A part of the pictures held out, in whole groups: what resembles each other stays together."""

from __future__ import annotations

import hashlib
from collections import defaultdict

from samtune.data.files import Pair
from samtune.errors import UserError


def hold_out(pairs: list[Pair], share: float, flag: str) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into (kept, held), both in their order; `held` is at least `share` of them.

    Groups are taken in the order of a hash of their names, so the split is the same on every
    machine and does not follow the order of recording. A picture without group is its own. flag:
    what said `share`, for messages. Raises UserError if a share is none or one side would be empty.
    """
    if not 0 < share < 1:
        raise UserError(f"{flag} {share:g}: must be between 0 and 1")
    sizes = defaultdict(int)
    for pair in pairs:
        sizes[pair.group or pair.id] += 1
    held, count = set(), 0
    for group in sorted(sizes, key=_hash):
        if count >= share * len(pairs):
            break
        held.add(group)
        count += sizes[group]
    if len(held) == len(sizes):
        raise UserError(
            f"{flag} {share:g}: the {len(pairs)} images are of {len(sizes)} group(s) (sequences, "
            "volumes, scenes), so none can be held out and something be left; split them by hand"
        )
    return (
        [pair for pair in pairs if (pair.group or pair.id) not in held],
        [pair for pair in pairs if (pair.group or pair.id) in held],
    )


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
