"""Narrow: a part of the support there is, while training goes on.

Narrowing freezes and restarts as a refresh does, but chooses nothing anew: P <- P V with V
(r x rank) the strongest invariant planes of S = Skew(T) = (T - T^T) / 2, in which T has turned the
most.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import is_int, retired
from ..calibration.processes import Processes
from ..factor.low_rank import LowRank
from ..linalg import skew_planes
from ..tuner.adapters import adapted_layers, note_frozen_ranks, owners, require_plain, set_ranks
from ..tuner.layer import Linear
from ..tuner.undo import unchanged_on_failure
from .conditions import require_refreshable
from .freeze import change_of_basis, frozen_product, orthonormal, own_factor
from .optimizer_state import held_moments, replace_parameter, warn_of_replaced

__all__ = ["NarrowReport", "check_rank", "narrow"]


@dataclass(frozen=True)
class NarrowReport:
    """What `narrow` did.

    rank: of every layer that was narrowed
    kept: name of such a layer -> ||V^T S V||_F^2 / ||S||_F^2, the fraction of the turning
        S = Skew(T) that was in the planes which stay trained (the rest is frozen, not lost); NaN
        where nothing had turned
    """

    rank: int
    kept: dict[str, float] = field(repr=False)

    def __str__(self) -> str:
        lines = [f"{len(self.kept)} layers narrowed to rank {self.rank}", f"{'layer':<48} {'kept':>8}"]
        return "\n".join(lines + [f"{name[-48:]:<48} {kept:>8.4f}" for name, kept in self.kept.items()])


@retired(moments="moments are turned into the new basis; give optimizer=None and make it anew to restart")
def narrow(
    model: nn.Module,
    rank: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    adapter_name: str | None = None,
) -> NarrowReport:
    """Experimental: go on with the planes that training has turned the most; the model's function
    stays what it is.

    The cheap form of `refresh`, without data: train at rank 2r for a while, then narrow to r. Fewer
    parameters are trained from then on, but the trained rotation is kept as a frozen factor, as by
    `refresh`: the adapter and its forward pass get larger, by the old rank's columns. The new
    support lies in the old one. Layers of at most `rank` are left exactly as they are. The ranks
    are noted in the config (`rank_pattern`) that is saved with the adapter.

    Args:
        model: as of `refresh`. The narrowed layers get new, smaller parameters: a DDP wrapper, a
            captured graph, or an optimiser that is not given here, holds the old ones and must be
            made anew.
        rank: an even number of at least 2, less than the largest rank that the adapter has.
        optimizer: the one that trains the adapter: it goes on with the new parameters, in their
            places; None: there is none yet. One that is there all the same trains nothing any more,
            and its next step warns of it. Its moments are turned into the new basis
            (see `optimizer_state.py`), step counts go on.
        adapter_name: default: the active one.

    Returns how much of each layer's turning lay in the planes it keeps. A call that fails leaves
    model and optimiser as they were. ValueError: a `rank` that is none of these; an adapter without
    a support (OFT, BOFT, HRA), with magnitudes or in halves, merged, disabled or not alone; an
    optimiser that does not train it or whose state has no such moments; no support yet.
    `loft_rs.NonFiniteError`: NaN or Inf in a transform.

    >>> model = get_peft_model(load_base(), LoftConfig(r=8, target_modules=["o_proj"]))
    >>> loft_rs.narrow(model, 4).rank
    4
    """
    require_plain(model, "narrow")
    processes = Processes(next(model.parameters()).device)
    with processes.stage():
        adapter, adapted = adapted_layers(model, adapter_name)
        layers = owners(adapted, adapter)
        require_refreshable(adapted, adapter, next(iter(layers.values())).adapters[adapter].config, "narrow")
        check_rank(rank, layers, adapter)
        rank, layers = int(rank), {name: layer for name, layer in layers.items() if layer.adapters[adapter].rank > rank}
        carried = {} if optimizer is None else held_moments(optimizer, layers, adapter)
        frozen = {name: frozen_product(name, layer, adapter) for name, layer in layers.items()}
        planes = {name: _strongest(own_factor(layer, adapter), rank) for name, layer in layers.items()}
    frozen = {name: processes.first(factor) for name, factor in frozen.items()}
    planes = {name: processes.first(found) for name, found in planes.items()}
    thetas = {name: layer.adapters[adapter].theta for name, layer in layers.items()}
    bases = {name: orthonormal(layer.adapters[adapter].support) for name, layer in layers.items()}
    with unchanged_on_failure(adapted, adapter), processes.stage():
        set_ranks(adapted, adapter, dict.fromkeys(layers, rank))
        for name, layer in layers.items():
            layer.adapters[adapter].set_frozen(frozen[name])
            layer.adapters[adapter].set_basis(planes[name][0])
        carried = change_of_basis(carried, layers, adapter, bases)
    note_frozen_ranks(adapted, adapter)
    if optimizer is None:
        warn_of_replaced(thetas.values())
    else:
        for name, theta in thetas.items():
            replace_parameter(optimizer, theta, layers[name].adapters[adapter].theta, carried.get(name))
    return NarrowReport(rank, {name: kept for name, (_, kept) in planes.items()})


def check_rank(rank: Any, layers: dict[str, Linear], adapter: str) -> None:
    """ValueError where an adapter cannot be narrowed to this rank."""
    largest = max(layer.adapters[adapter].rank for layer in layers.values())
    if not is_int(rank) or rank % 2 or not 2 <= rank < largest:
        raise ValueError(
            f"rank must be an even integer of at least 2 and less than {largest}, the largest rank of adapter {adapter!r}, got {rank!r}"
        )


def _strongest(own: LowRank, rank: int) -> tuple[Tensor, float]:
    """(P V (n x rank) in float64, ||V^T S V||_F^2 / ||S||_F^2), V the strongest planes of
    S = Skew(T); the first columns of P and NaN where S = 0."""
    s = (own.delta - own.delta.mT) / 2
    if not s.any():
        return own.basis[:, :rank], float("nan")
    v = torch.from_numpy(skew_planes(s, rank)[0])
    return own.basis @ v, float(((v.mT @ s @ v).norm() / s.norm()).square())
