"""Refresh: a new support in the middle of training, at the weight that training has reached. Narrow: a part of the one there is.

W = W0 R_f R with R_f what earlier refreshes froze (the identity at first) and R = I + P E P^T trained. A refresh

    freezes     R_f <- R_f R, one factor I + P_f E_f P_f^T: with Q L = [P_f, P] and M as `factor.Frozen` has it, P_f <- Q V and
                E_f <- V^T (L M L^T) V, V the directions that are turned; in float64. Its rank grows by at most r, never past the width.
                `fold`: W0 <- W0 R_f instead
    chooses     P at W_cur = W0 R_f: `calibrate` with its taps before (output side: after) the frozen factor, so that
                S = Skew(W_cur^T G); a support that needs no data is that of W_cur
    restarts    theta = 0, so the function is what it was
    carries     the optimiser's state over (`moments.py`)

Narrowing freezes and restarts alike, but chooses nothing anew: P <- P V with V (r x rank) the strongest invariant planes of
S = Skew(T) = (T - T^T) / 2, in which T has turned the most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import is_int
from .calibration import CalibrationReport, calibrate, checked_batches
from .factor import Frozen, LowRank, gram_root
from .layer.merging import dense_or_raise, rotated_weight
from .linalg import NonFiniteError, skew_planes
from .moments import check_moments, held_moments, replace_parameter, transported, warn_of_replaced
from .pilot import Pilot, checked_pilot
from .ranks import Ranks
from .tuner.adapters import adapted_layers, note_frozen_ranks, owners, require_plain, set_ranks
from .tuner.config import CALIBRATED_SUPPORTS, DATA_FREE_SUPPORTS, LoftConfig
from .tuner.layer import Linear
from .tuner.selection import choose_supports
from .tuner.undo import unchanged_on_failure

__all__ = ["NarrowReport", "check_rank", "narrow", "refresh", "require_choosable", "require_refreshable_kind"]

_NOT_ORTHOGONAL = 1e-4  # ||R_f^T R_f - I||_2 of a frozen factor in float32 is below 1e-6


def refresh(
    model: nn.Module,
    dataloader: Iterable | None = None,
    *,
    train_step: Callable[[], Any] | None = None,
    max_batches: int | None = None,
    pilot: Pilot | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    adapter_name: str | None = None,
    moments: str = "transport",
    fold: bool = False,
    passes: int = 2,
    oversampling: int | None = None,
    memory: int | str | None = None,
    offload: bool = False,
    progress: bool | None = None,
) -> CalibrationReport:
    """Give a LOFT adapter a new support for its current weight and go on from there; the model's function stays what it is.

    The trained rotation is kept as a frozen factor of rank r_f, which grows by at most r a refresh and never past the layer's width,
    and is saved with the adapter (P_f (n x r_f) and E_f (r_f x r_f), float32). `export_lora` stays exact, at a rank of up to r_f + r.

    Args:
        model: a PEFT model whose only active adapter is the LOFT one, unmerged, not wrapped in DDP, not compiled, its LOFT parameters
            not sharded. Call this between an optimiser's step and the next forward pass: gradients of the old transform are dropped.
        dataloader, train_step, max_batches, pilot, passes, oversampling, memory, offload, progress: as of `loft_rs.calibrate`. A gradient,
            activation or pilot support needs one of the first two; `principal`, `random` and `coordinate` need neither, and are put in
            input-PCA order where one is given and `LoftConfig.order` is not "natural".
        optimizer: the one that trains the adapter, whose state is then carried over; None: left as it is.
        adapter_name: default: the active one.
        moments: "transport": the moments are turned into the new basis (see `moments.py`), step counts go on. "restart": the state of
            these parameters is dropped, as of a new optimiser.
        fold: put the rotation into the base weight, rounded once, in place of a frozen factor. The base must be dense, float32 or
            float64, and have no other adapter. A saved adapter then belongs to the changed base: save that too.

    Returns the report of the new supports. A refresh that fails leaves model and optimiser as they were.
    ValueError: an adapter without a support (OFT, BOFT, HRA), with magnitudes, in halves, or with supports from a file, merged, disabled or
    not alone; an optimiser that does not train it or whose state has no such moments; no data where the support needs it; no support
    yet. TypeError: fold on a quantised base. `loft_rs.NonFiniteError`: NaN or Inf in a transform or in what a layer saw.
    """
    started = time.perf_counter()
    check_moments(moments)
    require_plain(model, "refresh")
    ranks = Ranks(next(model.parameters()).device)
    with ranks.stage():
        adapter, adapted = adapted_layers(model, adapter_name)
        layers = owners(adapted, adapter)
        config = next(iter(layers.values())).adapters[adapter].config
        require_choosable(adapter, config)
        _require_refreshable(adapted, adapter, config, "refresh")
        if fold:
            _require_foldable(adapted, adapter)
        pilot = checked_pilot(pilot, config.support)
        data = _data(dataloader, train_step, max_batches, pilot, config)
        carried = {} if optimizer is None else held_moments(optimizer, layers, adapter, moments)
        frozen = {name: _product(name, layer, adapter) for name, layer in layers.items()}
    frozen = {name: ranks.first(factor) for name, factor in frozen.items()}
    bases = {name: _orthonormal(layer.adapters[adapter].support) for name, layer in layers.items()}
    with unchanged_on_failure(adapted, adapter) as weights:
        with ranks.stage(), torch.no_grad():
            for name, layer in layers.items():
                layer.adapters[adapter].set_frozen(frozen[name])
                layer.adapters[adapter].theta.zero_()
            supports = {} if config.needs_calibration else choose_supports(layers, config, adapter)
        report = CalibrationReport(config.support, "natural", 0, None, 0, time.perf_counter() - started, supports)
        if data:
            options = {"passes": passes, "oversampling": oversampling, "memory": memory, "offload": offload}
            options |= {"pilot": pilot, "adapter_name": adapter, "progress": progress}
            report = calibrate(model, **data, **options, head_steps=0)
        with ranks.stage():
            if moments == "transport":
                carried = _turned(carried, layers, adapter, bases)
            if fold:
                _fold(adapted, adapter, weights)
    note_frozen_ranks(adapted, adapter)
    for name, layer in layers.items():
        layer.adapters[adapter].theta.grad = None
        if name in carried and moments == "restart":
            del optimizer.state[layer.adapters[adapter].theta]
        for key, value in carried.get(name, {}).items() if moments == "transport" else ():
            optimizer.state[layer.adapters[adapter].theta][key].copy_(value)
    return report


@dataclass(frozen=True)
class NarrowReport:
    """What `narrow` did.

    rank: of every layer that was narrowed
    kept: name of such a layer -> ||V^T S V||_F^2 / ||S||_F^2, the fraction of the turning S = Skew(T) that was in the planes which
        stay trained (the rest is frozen, not lost); NaN where nothing had turned
    """

    rank: int
    kept: dict[str, float] = field(repr=False)

    def __str__(self) -> str:
        lines = [f"{len(self.kept)} layers narrowed to rank {self.rank}", f"{'layer':<48} {'kept':>8}"]
        return "\n".join(lines + [f"{name[-48:]:<48} {kept:>8.4f}" for name, kept in self.kept.items()])


def narrow(
    model: nn.Module,
    rank: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    adapter_name: str | None = None,
    moments: str = "transport",
) -> NarrowReport:
    """Go on with the planes of a LOFT adapter's support that training has turned the most; the model's function stays what it is.

    The cheap form of `refresh`, without data: train at rank 2r for a while, then narrow to r. Fewer parameters are trained from then on,
    but the trained rotation is kept as a frozen factor, as by `refresh`: the adapter and its forward pass get larger, by the old
    rank's columns. The new support lies in the old one. Layers of at most `rank` are left exactly as they are. The ranks
    are noted in the config (`rank_pattern`) that is saved with the adapter.

    Args:
        model: as of `refresh`. The narrowed layers get new, smaller parameters: a DDP wrapper, a captured graph, or an optimiser that is
            not given here, holds the old ones and must be made anew.
        rank: an even number of at least 2, less than the largest rank that the adapter has.
        optimizer: the one that trains the adapter: it goes on with the new parameters, in their places; None: there is none yet. One
            that is there all the same trains nothing any more, and its next step warns of it.
        adapter_name: default: the active one.
        moments: "transport": the moments are turned into the new basis (see `moments.py`), step counts go on. "restart": the state of
            these parameters is dropped.

    Returns how much of each layer's turning lay in the planes it keeps. A call that fails leaves model and optimiser as they were.
    ValueError: a `rank` that is none of these; an adapter without a support (OFT, BOFT, HRA), with magnitudes or in halves, merged,
    disabled or not alone; an optimiser that does not train it or whose state has no such moments; no support yet.
    `loft_rs.NonFiniteError`: NaN or Inf in a transform.
    """
    check_moments(moments)
    require_plain(model, "narrow")
    ranks = Ranks(next(model.parameters()).device)
    with ranks.stage():
        adapter, adapted = adapted_layers(model, adapter_name)
        layers = owners(adapted, adapter)
        _require_refreshable(adapted, adapter, next(iter(layers.values())).adapters[adapter].config, "narrow")
        check_rank(rank, layers, adapter)
        rank, layers = int(rank), {name: layer for name, layer in layers.items() if layer.adapters[adapter].rank > rank}
        carried = {} if optimizer is None else held_moments(optimizer, layers, adapter, moments)
        frozen = {name: _product(name, layer, adapter) for name, layer in layers.items()}
        planes = {name: _strongest(_own(layer, adapter), rank) for name, layer in layers.items()}
    frozen = {name: ranks.first(factor) for name, factor in frozen.items()}
    planes = {name: ranks.first(found) for name, found in planes.items()}
    thetas = {name: layer.adapters[adapter].theta for name, layer in layers.items()}
    bases = {name: _orthonormal(layer.adapters[adapter].support) for name, layer in layers.items()}
    with unchanged_on_failure(adapted, adapter), ranks.stage():
        set_ranks(adapted, adapter, dict.fromkeys(layers, rank))
        for name, layer in layers.items():
            layer.adapters[adapter].set_frozen(frozen[name])
            layer.adapters[adapter].set_basis(planes[name][0])
        if moments == "transport":
            carried = _turned(carried, layers, adapter, bases)
    note_frozen_ranks(adapted, adapter)
    kept = carried if moments == "transport" else {}
    if optimizer is None:
        warn_of_replaced(thetas.values())
    else:
        for name, theta in thetas.items():
            replace_parameter(optimizer, theta, layers[name].adapters[adapter].theta, kept.get(name))
    return NarrowReport(rank, {name: kept for name, (_, kept) in planes.items()})


def check_rank(rank: Any, layers: dict[str, Linear], adapter: str) -> None:
    """ValueError where an adapter cannot be narrowed to this rank."""
    largest = max(layer.adapters[adapter].rank for layer in layers.values())
    if not is_int(rank) or rank % 2 or not 2 <= rank < largest:
        raise ValueError(
            f"rank must be an even integer of at least 2 and less than {largest}, the largest rank of adapter {adapter!r}, got {rank!r}"
        )


# -- what can be refreshed -------------------------------------------------------------------------------------------------


def require_refreshable_kind(adapter: str, config: LoftConfig, caller: str) -> None:
    """ValueError for a kind of adapter that is neither refreshed nor narrowed."""
    if not config.has_support:
        raise ValueError(
            f"{caller} needs a support, but adapter {adapter!r} is of a kind that has none (OFT, BOFT, HRA)"
        )
    if config.magnitudes:
        raise ValueError(
            f"{caller} does not support magnitudes: what it freezes is a rotation, and theirs is none; use magnitudes=False"
        )
    if config.halves:
        raise ValueError(
            f"{caller} does not support halves: what the optimiser holds for them has no place in other halves; use halves=False"
        )


def _require_refreshable(layers: dict[str, Linear], adapter: str, config: LoftConfig, caller: str) -> None:
    require_refreshable_kind(adapter, config, caller)
    unset = [name for name, layer in layers.items() if not layer.ensure_support(adapter)]
    if unset:
        raise ValueError(
            f"{caller} needs a support, but adapter {adapter!r} has none yet in {unset[0]}: call loft_rs.calibrate first"
        )
    sharded = [name for name, layer in layers.items() if hasattr(layer.adapters[adapter].theta, "full_tensor")]
    if sharded:
        raise ValueError(
            f"{caller} cannot turn parameters that are sharded, as in {sharded[0]}: call it before fully_shard, or in a run "
            "without it"
        )
    if any(layer.merged for layer in layers.values()):
        raise ValueError(f"{caller} needs an unmerged model: call unmerge_adapter() first")
    for name, layer in layers.items():
        active = [each for each in layer.active_adapters if layer.has_adapter(each)]
        if active != [adapter] or layer.disable_adapters:
            raise ValueError(
                f"{caller} needs {adapter!r} to be the only active adapter, but in {name} the active ones are "
                f"{[] if layer.disable_adapters else active}: call set_adapter({adapter!r}) first"
            )


def require_choosable(adapter: str, config: LoftConfig) -> None:
    """ValueError for an adapter whose supports are a file's, which `refresh` could not choose anew."""
    if config.has_support and config.support not in (*DATA_FREE_SUPPORTS, *CALIBRATED_SUPPORTS):
        raise ValueError(
            f"refresh chooses supports, but those of adapter {adapter!r} come from the file {config.support}; build it with one of "
            f"{sorted((*DATA_FREE_SUPPORTS, *CALIBRATED_SUPPORTS))}"
        )


def _require_foldable(layers: dict[str, Linear], adapter: str) -> None:
    for name, layer in layers.items():
        dtype = dense_or_raise(layer, "fold").dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"fold needs a float32 or float64 base, since rounding would change the function, but {name} is {dtype}"
            )
        others = [each for each in layer.adapters if each != adapter]
        if others:
            raise ValueError(f"fold would change what adapter {others[0]!r} was trained on; use fold=False")


def _data(
    dataloader: Any, train_step: Any, max_batches: int | None, pilot: Pilot | None, config: LoftConfig
) -> dict[str, Any]:
    """The arguments of `calibrate`; none where the support takes nothing from data."""
    if dataloader is None and train_step is None:
        if config.needs_calibration:
            raise ValueError(f"support={config.support!r} comes from data: give refresh a dataloader or a train_step")
        return {}
    batches = checked_batches(dataloader, train_step, max_batches, pilot)
    if not config.needs_calibration and config.order == "natural":
        return {}
    return {"train_step": train_step} if batches is None else {"dataloader": batches, "max_batches": len(batches)}


# -- model -----------------------------------------------------------------------------------------------------------------


def _orthonormal(basis: Tensor) -> Tensor:
    """P C (n x r) in float64, C = (P^T P)^{-1/2}: P itself where it is orthonormal."""
    p = basis.detach().cpu().double()
    root = gram_root(p)
    return p if root is None else p @ root


@torch.no_grad()
def _own(layer: Linear, adapter: str) -> LowRank:
    """R = I + (P C) D (P C)^T of the present support in float64 on the CPU, D = T - I."""
    # Anew from theta: what the forward passes use is rounded to float32.
    theta, transform = layer.adapters[adapter].theta.detach().cpu().double(), layer.adapters[adapter].transform
    return LowRank(
        _orthonormal(layer.adapters[adapter].support), transform.delta(theta[None], layer.adapters[adapter].rank)[0][0]
    )


@torch.no_grad()
def _product(name: str, layer: Linear, adapter: str) -> LowRank | None:
    """R_f R (or R R_f) as one factor, float32 or as wide as theta, on the CPU; None where nothing is turned."""
    own, transform = _own(layer, adapter), layer.adapters[adapter].transform
    held = layer.adapters[adapter].frozen_factor
    if held is not None:
        held = LowRank(held.basis.cpu().double(), held.delta.cpu().double())
        both = Frozen.of(held, own.basis, layer.adapters[adapter].side)
        own = LowRank(both.basis, both.times(own.delta))
    if not bool(torch.isfinite(own.delta).all()):
        raise NonFiniteError(f"the transform of layer {name} holds NaN or Inf; nothing was changed")
    dtype = torch.promote_types(layer.adapters[adapter].theta.dtype, torch.float32)
    product = own.reduced(torch.finfo(dtype).eps / 2)
    if transform.orthogonal and (error := product.orthogonality_error()) > _NOT_ORTHOGONAL:
        raise ValueError(
            f"the rotation of layer {name} is not orthogonal: ||R^T R - I||_2 = {error:.1e}; nothing was changed"
        )
    return LowRank(product.basis.to(dtype), product.delta.to(dtype)) if product.rank else None


def _strongest(own: LowRank, rank: int) -> tuple[Tensor, float]:
    """(P V (n x rank) in float64, ||V^T S V||_F^2 / ||S||_F^2), V the strongest planes of S = Skew(T); the first columns of P and NaN
    where S = 0."""
    s = (own.delta - own.delta.mT) / 2
    if not s.any():
        return own.basis[:, :rank], float("nan")
    v = torch.from_numpy(skew_planes(s, rank)[0])
    return own.basis @ v, float(((v.mT @ s @ v).norm() / s.norm()).square())


@torch.no_grad()
def _fold(layers: dict[str, Linear], adapter: str, weights: list[Tensor]) -> None:
    for layer in layers.values():
        if layer.adapters[adapter].frozen_rank:
            weight = dense_or_raise(layer, "fold")
            rotated = rotated_weight(layer, [layer.adapters[adapter]], safe=True)
            weights.append(weight)
            weight.copy_(rotated)
    for layer in owners(layers, adapter).values():
        layer.adapters[adapter].set_frozen(None)


def _turned(
    carried: dict[str, dict[str, Tensor]], layers: dict[str, Linear], adapter: str, bases: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The moments in the present bases of `layers`, from those in `bases`."""
    turns = {name: _orthonormal(layers[name].adapters[adapter].support).mT @ bases[name] for name in carried}
    return {
        name: {key: transported(key, value, turns[name]) for key, value in state.items()}
        for name, state in carried.items()
    }
