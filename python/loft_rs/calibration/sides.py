"""Sides: whether calibration turns a module's input, W0 R, or its output, R W0, where
`LoftConfig(side="auto")` leaves that to the data.

With S = Skew(W0^T G) (n x n) on the input side, Skew(G W0^T) (m x m) on the output side, P the
support of rank r that was found there, and A skew, to first order

    dL = <P^T S P, A>,   W0 exp(P A P^T) or exp(P A P^T) W0      (Cayley: -2 times that)

so ||P^T S P||_F^2 is, up to one factor, the squared gradient of the r(r - 1)/2 parameters that
either side trains. They are as many on both, so the side with the larger one captures more energy
per parameter. (Of `free`, whose r^2 parameters are as many on both sides too, it is the part that
rotates.) What gradsvd itself captures says nothing of sides: G and G^T have the same singular
values.

Both sides are sketched from the same batches, each as if it were the only one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ..support.budget import Budget, share_ranks
from ..support.methods import SIDES
from ..tuner.layer import Linear

__all__ = ["ModuleSide", "by_module", "open_places", "share_both", "stronger"]


class ModuleSide(NamedTuple):
    """A side of a module."""

    module: str
    side: str

    def __str__(self) -> str:
        return self.module


def open_places(layers: Mapping[str, Linear], adapter: str) -> list[ModuleSide]:
    """Where the support of each layer may lie: on its side, or on both where nothing has decided
    that.
    """
    places = []
    for name, layer in layers.items():
        both = layer.adapters[adapter].config.side_of(name) == "auto" and not layer.adapters[adapter].frozen_rank
        places += [ModuleSide(name, side) for side in (SIDES if both else [layer.adapters[adapter].side])]
    return places


def by_module(places: Iterable[ModuleSide]) -> dict[str, list[ModuleSide]]:
    """The places of each module."""
    found: dict[str, list[ModuleSide]] = {}
    for place in places:
        found.setdefault(place.module, []).append(place)
    return found


def stronger(places: Iterable[ModuleSide], energy: Callable[[ModuleSide], float]) -> dict[str, ModuleSide]:
    """The place of each module that has the most energy; of two that are equal the input side."""
    return {name: max(each, key=energy) if len(each) > 1 else each[0] for name, each in by_module(places).items()}


def share_both(
    spectra: Mapping[ModuleSide, Any],
    budget: Budget,
    start: Mapping[str, int],
    energy: Callable[[ModuleSide, int], float],
) -> dict[ModuleSide, int]:
    """The place and the rank of each module: sides and ranks in turn, each the best for the other,
    until they stay or come round again: the sides are then the best for the ranks, and those the
    best for sides that were tried.

    spectra: of both sides where they are open. start: the ranks at which the sides are compared
    first. energy: what a place's support of a rank captures, for the comparison.
    """

    def best(ranks: Mapping[str, int]) -> dict[str, ModuleSide]:
        return stronger(spectra, lambda place: energy(place, ranks[place.module]))

    chosen, tried = best(start), []
    while chosen not in tried:
        tried.append(chosen)
        ranks = share_ranks({name: spectra[place] for name, place in chosen.items()}, budget)
        chosen = best(ranks)
    return {place: ranks[name] for name, place in chosen.items()}
