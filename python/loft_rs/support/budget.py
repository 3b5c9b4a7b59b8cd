"""Budget: one number of trained parameters, shared out over the layers as even ranks by what each
rank captures.

With sigma_i the singular values of a layer's objective (skewgrad: every plane strength twice) and
p(r) the parameters of its transform, r (r - 1) / 2 (`cayley`, `exp`) or r^2 (`free`), `share_ranks`
chooses even ranks r_l that

    maximise  sum_l sum_{i <= r_l} sigma_{l,i}^2     with     sum_l p(r_l) <= params,    floor_l <= r_l <= cap_l

a multiple-choice knapsack (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11).
Captured energy is concave in r and p convex, so in every layer each step of two ranks gains less
per parameter than the one before it: taking steps by gain per parameter solves the linear
relaxation, which bounds any completion of a partial choice from above. A search layer by layer
keeps the partial choices that could still beat the best known one, and none that another beats in
both energy and parameters.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from .._checks import check_names, is_int, of
from .._transforms import TABLE

__all__ = ["PARAMETERS", "Allocation", "Budget", "T", "share_ranks"]


T = TypeVar("T")

PARAMETERS: dict[str, Callable[[Any], Any]] = {name: each.count for name, each in TABLE.items() if each.shared}
# Partial choices held at once. The narrow searches find a good choice, which leaves the next one
# little to look at.
_WIDTHS = (1 << 6, 1 << 10, 1 << 14)
# Sums of a few hundred float64 energies: what differs by less is equal.
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A number of trained parameters for all layers together, in place of a rank for each.

    params: the most that may be trained, at least what rank 2 takes
    transform: counts r (r - 1) / 2 parameters a layer ("cayley", "exp") or r^2 ("free")
    floor: smallest rank, even; an int or a mapping with the names of the layers. A layer may get
        less than 2 only where its floor is 0, and is then left out of the supports
    cap: largest rank, even, likewise; None: min(m, n)

    A layer with min(m, n) = 1 allows no even rank: it is left out whatever its floor, with one
    warning.

    >>> supports = loft_rs.select_support(grads, Budget(params=100))
    >>> sum(support.rank * (support.rank - 1) // 2 for support in supports.values()) <= 100
    True
    """

    params: int
    transform: str = "cayley"
    floor: int | Mapping[str, int] = 2
    cap: int | Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.transform not in tuple(PARAMETERS):
            raise ValueError(f"transform must be one of {', '.join(PARAMETERS)}, not {self.transform!r}")
        if not is_int(self.params):
            raise TypeError(f"params must be an integer, not {type(self.params).__name__}")
        if self.params < self.parameters(2):
            raise ValueError(
                f"params is {self.params}, but the smallest rank, 2, takes {self.parameters(2)} with {self.transform!r}"
            )
        _check_even("floor", self.floor)
        if self.cap is not None:
            _check_even("cap", self.cap)

    def parameters(self, rank: Any) -> Any:
        """Trained parameters of a layer of this rank."""
        return PARAMETERS[self.transform](rank)

    def allowed(self, limits: Mapping[str, int]) -> dict[str, range]:
        """The even ranks open to each layer, from min(m, n) by name; rank 0 alone where that is
        below 2.

        Those that would leave too little for the other layers' floors are not among them.
        ValueError for a floor above the cap or the limit, floors that take more than `params`, and
        names that are not those of `limits`.
        """
        floors, caps = _by_name("floor", self.floor, limits), _by_name("cap", self.cap, limits)
        ends = {}
        for name, limit in limits.items():
            low, cap = floors[name], limit if caps[name] is None else caps[name]
            if limit < 2:
                low = cap = 0
            if low > limit:
                raise ValueError(f"floor{of(name)} is {low}, but its rank can be {limit} at most")
            if low > cap:
                raise ValueError(f"floor{of(name)} is {low}, above its cap of {cap}")
            ends[name] = low, min(cap, limit)
        if all(high < 2 for _, high in ends.values()):
            raise ValueError("cap leaves no layer a rank of 2: there is nothing to share the parameters among")
        taken = sum(self.parameters(low) for low, _ in ends.values())
        if taken > self.params:
            raise ValueError(f"params is {self.params}, but the floors alone take {taken}")
        payable = {name: self.params - taken + self.parameters(low) for name, (low, _) in ends.items()}
        ranks = {name: range(low, high + 1, 2) for name, (low, high) in ends.items()}
        return {name: each[: bisect_right(each, payable[name], key=self.parameters)] for name, each in ranks.items()}


def _check_even(argument: str, value: Any) -> None:
    for name, each in value.items() if isinstance(value, Mapping) else [("", value)]:
        place = f" of {name!r}" if isinstance(value, Mapping) else ""
        if not is_int(each):
            raise TypeError(f"{argument}{place} must be an integer, not {type(each).__name__}")
        if each < 0 or each % 2:
            kind = "an odd rank gains nothing over the even one below it" if each % 2 else "no rank is negative"
            raise ValueError(f"{argument}{place} must be an even number from 0, not {each}: {kind}")


def _by_name(argument: str, value: Any, layers: Mapping) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return dict.fromkeys(layers, value)
    if "" in layers:
        raise TypeError(f"{argument} may be a mapping only where grads or weights are one")
    check_names(argument, value, "the matrices", layers)
    return dict(value)


class Allocation(dict[str, T]):
    """What a budget gave each layer: its rank (`share_ranks`) or its `Support` (`select_support`).

    params: trained parameters given out
    gap: the most that a better allocation could still add, as a fraction of the captured energy; 0
    where there is none better
    """

    params: int
    gap: float

    def __init__(self, layers: Mapping[str, T], params: int, gap: float) -> None:
        super().__init__(layers)
        self.params, self.gap = params, gap


def share_ranks(spectra: Mapping[str, Any], budget: Budget) -> Allocation[int]:
    """Even ranks by layer that capture the most energy for the budget, from spectra alone.

    spectra: name -> squared singular values in descending order; rank r captures the sum of the
        first r, and a layer can have no more ranks than it has values. With fewer than two it gets
        0, whatever its floor

    The result is optimal to rounding, or `gap` says how far from optimal it may be. A step that
    gains nothing is not taken. TypeError or ValueError for a spectrum that is no such sequence, and
    for what `Budget.allowed` refuses.
    """
    squares = {name: _squares(name, each) for name, each in spectra.items()}
    if not squares:
        raise ValueError("spectra is an empty mapping")
    allowed = budget.allowed({name: len(each) for name, each in squares.items()})
    scale = max(each[0] for each in squares.values() if len(each)) or 1.0
    energies, costs, held = [], [], 0.0
    for name, ranks in allowed.items():
        captured = np.cumsum(np.append(0.0, squares[name] / scale))[ranks.start : ranks[-1] + 1 : 2]
        captured = captured[: np.searchsorted(captured, captured[-1]) + 1]
        cost = budget.parameters(np.arange(ranks.start, ranks[-1] + 1, 2, dtype=np.int64)[: len(captured)])
        held += captured[0]
        energies.append(captured - captured[0])
        costs.append(cost - cost[0])
    floors = sum(budget.parameters(ranks.start) for ranks in allowed.values())
    levels, missed = _search(energies, costs, budget.params - floors)
    shared = {name: ranks[level] for (name, ranks), level in zip(allowed.items(), levels, strict=True)}
    total = held + _total(energies, levels)
    return Allocation(shared, sum(map(budget.parameters, shared.values())), missed / total if total else 0.0)


def _squares(name: str, values: Any) -> np.ndarray:
    try:
        squares = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"spectra{of(name)} must be numbers, not {type(values).__name__}") from None
    if squares.ndim != 1 or not np.isfinite(squares).all() or (squares < 0).any() or (np.diff(squares) > 0).any():
        raise ValueError(f"spectra{of(name)} must be one row of squares: finite, not negative, in descending order")
    return squares


def _search(energies: list[np.ndarray], costs: list[np.ndarray], room: int) -> tuple[list[int], float]:
    """(level of each layer, what a better choice could still add) for concave energies and convex
    costs, both 0 at level 0.
    """
    layer, gain, cost = _steps(energies, costs)
    spent = np.cumsum(cost)
    room = min(room, int(cost.sum()))
    taken = int(np.searchsorted(spent, room, side="right"))
    levels = np.bincount(layer[:taken], minlength=len(energies)).tolist()
    if taken == len(gain):
        return levels, 0.0
    best = _total(energies, levels)
    price = gain[taken] / cost[taken]
    upper = best + price * (room - (spent[taken - 1] if taken else 0))
    # upper - loss bounds every choice with that level in it (Lagrange, at the relaxation's price)
    profits = [energy - price * cost for energy, cost in zip(energies, costs, strict=True)]
    losses = [profit.max() - profit for profit in profits]
    for width in _WIDTHS:
        open_levels = [np.flatnonzero(loss <= upper - best + _ROUNDING * upper) for loss in losses]
        found, dropped = _beam(energies, costs, open_levels, room, best * (1 + _ROUNDING), width)
        if found and _total(energies, found) > best:
            levels, best = found, _total(energies, found)
        if dropped <= best * (1 + _ROUNDING):
            return levels, 0.0
    return levels, min(upper, dropped) - best


def _total(energies: list[np.ndarray], levels: Sequence[int]) -> float:
    return float(sum(energy[level] for energy, level in zip(energies, levels, strict=True)))


def _steps(energies: list[np.ndarray], costs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(layer, gain, cost) of every step, by gain per parameter; a layer's own stay in order."""
    layer = np.repeat(np.arange(len(energies)), [len(each) - 1 for each in energies])
    gain, cost = (np.concatenate([np.diff(each) for each in arrays]) for arrays in (energies, costs))
    order = np.argsort(-gain / cost, kind="stable")
    return layer[order], gain[order], cost[order]


def _beam(
    energies: list[np.ndarray], costs: list[np.ndarray], levels: list[np.ndarray], room: int, best: float, width: int
) -> tuple[list[int] | None, float]:
    """(the best choice above `best` among these levels, the largest bound of what was dropped for
    want of width).
    """
    energies = [each[some] for each, some in zip(energies, levels, strict=True)]
    costs = [each[some] for each, some in zip(costs, levels, strict=True)]
    layer, gain, step = _steps(energies, costs)
    later_energy, later_cost = sum(each[0] for each in energies), sum(each[0] for each in costs)
    energy, cost, trail, dropped = np.zeros(1), np.zeros(1, np.int64), [], -np.inf
    for number, (gains, prices) in enumerate(zip(energies, costs, strict=True)):
        later_energy, later_cost = later_energy - gains[0], later_cost - prices[0]
        energy, cost = np.add.outer(energy, gains).ravel(), np.add.outer(cost, prices).ravel()
        left, later = room - later_cost - cost, layer > number
        reach = np.interp(left, np.cumsum(np.append(0, step[later])), np.cumsum(np.append(0.0, gain[later])))
        bound = np.where(left >= 0, energy + later_energy + reach, -np.inf)
        kept = _undominated(np.flatnonzero(bound > best), energy, cost)
        if len(kept) > width:
            kept = kept[np.argsort(-bound[kept], kind="stable")]
            dropped, kept = max(dropped, float(bound[kept[width]])), kept[:width]
        if not len(kept):
            return None, dropped
        trail.append(np.divmod(kept, len(gains)))
        energy, cost = energy[kept], cost[kept]
    at, choice = int(np.argmax(energy)), []
    for (parent, level), some in zip(reversed(trail), reversed(levels), strict=True):
        choice.append(int(some[level[at]]))
        at = parent[at]
    return choice[::-1], dropped


def _undominated(chosen: np.ndarray, energy: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Those that capture more than every one as cheap or cheaper."""
    chosen = chosen[np.lexsort((-energy[chosen], cost[chosen]))]
    before = np.maximum.accumulate(np.append(-np.inf, energy[chosen]))[:-1]
    return chosen[energy[chosen] > before]
