"""Ranks by a `Budget`: solve each layer's spectrum, share the parameters out, solve again where a
layer got more.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from .._words import some
from .budget import Allocation, Budget, share_ranks
from .support import Support, cut_support

__all__ = ["shared_supports"]


def shared_supports(
    budget: Budget,
    shapes: Mapping[str, tuple[int, int]],
    solve: Callable[[dict[str, int], Callable | None], dict[str, Support]],
    progress: Callable[[str, int, int], object] | None,
) -> Allocation[Support]:
    """Supports of the ranks that `share_ranks` gives, from the spectra that
    `solve(ranks, progress)` finds.

    Layers are solved at twice the even share at first. What lies past a layer's last value is taken
    to be as large as that, the most it can be, so a layer that is given more than it was solved for
    is solved again at twice the rank, and once there is none the ranks are optimal for the whole
    spectra, to the solver's accuracy. `progress` counts every solve of a layer.
    """
    narrow = [name or "the matrix" for name, shape in shapes.items() if min(shape) < 2]
    if len(narrow) == len(shapes):
        raise ValueError(f"a Budget gives even ranks, and min(m, n) = 1 allows none: {some(narrow)}")
    allowed = budget.allowed({name: min(shape) for name, shape in shapes.items()})
    if narrow:
        warnings.warn(f"left out, as min(m, n) = 1 allows no even rank: {some(narrow)}", stacklevel=3)
    layers = [name for name, ranks in allowed.items() if ranks[-1] > 0]
    share = budget.params // len(layers)
    even = 2 * bisect_right(range(2, max(allowed[name][-1] for name in layers) + 1, 2), share, key=budget.parameters)
    trial = {name: min(max(2 * even, allowed[name][0], 2), allowed[name][-1]) for name in layers}
    found: dict[str, Support] = {}
    calls = 0
    while trial:
        for name, support in solve(trial, _counted(progress, calls)).items():
            before = found.get(name)
            if before:
                spent = ("passes", "columns", "seconds")
                support = replace(
                    support, **{field: getattr(before, field) + getattr(support, field) for field in spent}
                )
            found[name] = support
        calls += len(trial)
        ranks = share_ranks(_spectra(found, allowed), budget)
        trial = {
            name: min(2 * found[name].rank, allowed[name][-1]) for name in layers if ranks[name] > found[name].rank
        }
    supports = {name: cut_support(found[name], rank) for name, rank in ranks.items() if rank}
    return Allocation(supports, ranks.params, ranks.gap)


def _counted(
    progress: Callable[[str, int, int], object] | None, before: int
) -> Callable[[str, int, int], object] | None:
    return progress and (lambda name, done, in_all: progress(name, before + done, before + in_all))


def _spectra(found: Mapping[str, Support], allowed: Mapping[str, range]) -> dict[str, np.ndarray]:
    """Squares up to each layer's largest rank, in units of the largest of all, so that no float64
    gradient overflows.
    """
    scale = max(support.values[0] for support in found.values())
    return {
        name: np.square(np.pad(found[name].values, (0, ranks[-1] - found[name].rank), mode="edge") / scale)
        if name in found
        else np.zeros(0)
        for name, ranks in allowed.items()
    }
