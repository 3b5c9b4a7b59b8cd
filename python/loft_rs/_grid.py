"""Where a module sits in its model: its depth and its kind, read from its dotted name.

depth   the block's number: 3 in `model.layers.3.self_attn.q_proj`
kind    the name behind that number: `self_attn.q_proj`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Grid", "kind_and_depth"]


@dataclass(frozen=True)
class Grid:
    """Names laid out as kinds (rows) by depths (columns).

    kinds: short names, in the order of their first module. depths: ascending; None holds modules
    without a number in their name. places: of every name, in the order given, (row, column).
    """

    kinds: list[str]
    depths: list[int | None]
    places: list[tuple[int, int]]

    @classmethod
    def of(cls, names: Sequence[str]) -> Grid:
        """The grid of these names. Names that fall on one place get kinds of their own."""
        split = [(depth, tuple(kind.split("."))) for kind, depth in map(kind_and_depth, names)]
        if len(set(split)) < len(split):  # two towers, each with blocks of its own
            split = [_depth_and_others(name) for name in names]
        if len(set(split)) < len(split):
            split = [(None, tuple(name.split("."))) for name in names]
        rows = list(dict.fromkeys(kind for _, kind in split))
        found = {depth for depth, _ in split}
        depths: list[int | None] = [*sorted(depth for depth in found if depth is not None)]
        depths += [None] * (None in found)
        places = [(rows.index(kind), depths.index(depth)) for depth, kind in split]
        return cls(_without_shared_start(rows), depths, places)


def kind_and_depth(name: str) -> tuple[str, int | None]:
    """The name behind the last block's number, and that number."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts[:-1]) if part.isdecimal()]
    return (".".join(parts[numbered[-1] + 1 :]), int(parts[numbered[-1]])) if numbered else (name, None)


def _depth_and_others(name: str) -> tuple[int | None, tuple[str, ...]]:
    """The first number among the dotted parts, and the other parts."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return int(part), (*parts[:place], *parts[place + 1 :])
    return None, tuple(parts)


def _without_shared_start(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Dotted kinds without the beginning that all share; the last two parts of a single one."""
    if len(rows) == 1:
        return [".".join(rows[0][-2:])]
    shared = 0
    while all(len(parts) > shared + 1 and parts[shared] == rows[0][shared] for parts in rows):
        shared += 1
    return [".".join(parts[shared:]) for parts in rows]
