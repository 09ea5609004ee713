"""Some of an image encoder's blocks, as a flag names them: '0,2,5-7', counted from 0.

Imports nothing heavy: flags are checked with it.
"""

from __future__ import annotations

import re

from samtune.errors import UserError


def check_blocks(flag: str, text: str, words: tuple[str, ...]) -> None:
    """Raise UserError unless the text is a list of numbers and ranges, or one of the words."""
    if text not in words and not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        either = " or ".join(repr(word) for word in words)
        raise UserError(f"--{flag} {text}: write it like 0,2,5-7, or {either}")


def choose_blocks(flag: str, text: str, depth: int, usual: int = 0) -> list[int]:
    """'0,2,5-7' -> [0, 2, 5, 6, 7]; 'all': of `depth`; 'auto': the last `usual`; 'none' -> [].

    Raises UserError, which names the flag, for a block that is not there.
    """
    if text in ("all", "auto", "none"):
        count = {"all": depth, "auto": min(usual, depth), "none": 0}[text]
        return list(range(depth - count, depth))
    blocks = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        blocks.update(range(int(first), int(last or first) + 1))
    if not blocks or max(blocks) >= depth:
        raise UserError(f"--{flag} {text}: the blocks of this --model_type are 0-{depth - 1}")
    return sorted(blocks)
