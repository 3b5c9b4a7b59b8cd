"""Refresh: a new support in the middle of training, at the weight that training has reached.

W = W0 R_f R with R_f what earlier refreshes froze (the identity at first) and R = I + P E P^T trained. A refresh

    freezes     R_f <- R_f R, one factor I + P_f E_f P_f^T: with Q L = [P_f, P] and M as `factor.Frozen` has it, P_f <- Q V and
                E_f <- V^T (L M L^T) V, V the directions that are turned; in float64. Its rank grows by at most r, never past the width.
                `fold`: W0 <- W0 R_f instead
    chooses     P at W_cur = W0 R_f: `calibrate` with its taps before (output side: after) the frozen factor, so that
                S = Skew(W_cur^T G); a support that needs no data is that of W_cur
    restarts    theta = 0, so the function is what it was
    carries     the optimiser's state over

The moments of theta, the strict lower triangle of A in the basis P1, are those of a gradient with respect to the ambient skew matrix
P1 A P1^T. With O = P2^T P1, both bases orthonormal, and for i > j, k > l

    first     skew(m) <- O skew(m) O^T                                       m_kl <- sum c_kl,ij m_ij,   c_kl,ij = O_ki O_lj - O_kj O_li
    second    v_kl <- sum c_kl,ij^2 v_ij + (1 - sum c_kl,ij^2) mean(v)       as of independent coordinates

where the second term stands for what lies outside the old support: from v = 0, Adam's first steps there would be 3 times too long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import CalibrationReport, calibrate, checked_batches
from .factor import Frozen, LowRank, gram_root
from .linalg import NonFiniteError
from .ranks import Ranks
from .transform import skew
from .tuner.config import CALIBRATED_SUPPORTS, DATA_FREE_SUPPORTS, LoftConfig
from .tuner.layer import Linear
from .tuner.model import adapted_layers, note_frozen_ranks, owners, require_plain
from .tuner.selection import choose_supports

__all__ = ["refresh"]

MOMENTS = ("transport", "restart")
# What the optimisers of torch and transformers call a mean of gradients and a mean of their squares.
_FIRST, _SECOND = ("exp_avg", "momentum_buffer", "grad_avg"), ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
_NOT_ORTHOGONAL = 1e-4  # ||R_f^T R_f - I||_2 of a frozen factor in float32 is below 1e-6


def refresh(
    model: nn.Module,
    dataloader: Iterable | None = None,
    *,
    train_step: Callable[[], Any] | None = None,
    max_batches: int = 8,
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
        model: a PEFT model whose only active adapter is the LOFT one, unmerged, not wrapped in DDP and not compiled. Call this between
            an optimiser's step and the next forward pass: gradients of the old transform are dropped.
        dataloader, train_step, max_batches, passes, oversampling, memory, offload, progress: as of `loft_rs.calibrate`. A gradient or
            activation support needs one of the first two; `principal`, `random` and `coordinate` need neither, and are put in input-PCA
            order where one is given and `LoftConfig.order` is not "natural".
        optimizer: the one that trains the adapter, whose state is then carried over; None: left as it is.
        adapter_name: default: the active one.
        moments: "transport": the moments are turned into the new basis (see this module), step counts go on. "restart": the state of
            these parameters is dropped, as of a new optimiser.
        fold: put the rotation into the base weight, rounded once, in place of a frozen factor. The base must be dense, float32 or
            float64, and have no other adapter. A saved adapter then belongs to the changed base: save that too.

    Returns the report of the new supports. A refresh that fails leaves model and optimiser as they were.
    ValueError: an adapter without a support (OFT, BOFT, HRA), with magnitudes, or with supports from a file, merged, disabled or not
    alone; an optimiser that does not train it or whose state has no such moments; no data where the support needs it; no support
    yet. TypeError: fold on a quantised base. `loft_rs.NonFiniteError`: NaN or Inf in a transform or in what a layer saw.
    """
    started = time.perf_counter()
    if moments not in MOMENTS:
        raise ValueError(f"moments must be one of {sorted(MOMENTS)}, got {moments!r}")
    require_plain(model, "refresh")
    ranks = Ranks(next(model.parameters()).device)
    with ranks.stage():
        adapter, adapted = adapted_layers(model, adapter_name)
        layers = owners(adapted, adapter)
        config = next(iter(layers.values())).loft_config[adapter]
        _require_refreshable(adapted, adapter, config)
        if fold:
            _require_foldable(adapted, adapter)
        data = _data(dataloader, train_step, max_batches, config)
        carried = {} if optimizer is None else _carried(optimizer, layers, adapter, moments)
        frozen = {name: _product(name, layer, adapter) for name, layer in layers.items()}
    frozen = {name: ranks.first(factor) for name, factor in frozen.items()}
    before = _Before(adapted, adapter)
    bases = {name: _orthonormal(layer.support(adapter)) for name, layer in layers.items()}
    try:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.set_frozen(adapter, frozen[name])
                layer.theta(adapter).zero_()
        with ranks.stage():
            supports = {} if config.needs_calibration else choose_supports(layers, config, adapter)
        report = CalibrationReport(config.support, "natural", 0, None, 0, time.perf_counter() - started, supports)
        if data:
            options = {"passes": passes, "oversampling": oversampling, "memory": memory, "offload": offload}
            report = calibrate(model, **data, **options, adapter_name=adapter, head_steps=0, progress=progress)
        with ranks.stage():
            if moments == "transport":
                turns = {name: _orthonormal(layer.support(adapter)).mT @ bases[name] for name, layer in layers.items()}
                carried = {
                    name: {key: _transported(key, value, turns[name]) for key, value in state.items()}
                    for name, state in carried.items()
                }
            if fold:
                _fold(adapted, adapter, before)
    except BaseException:
        before.restore()
        raise
    note_frozen_ranks(adapted, adapter)
    for name, layer in layers.items():
        layer.theta(adapter).grad = None
        if name in carried and moments == "restart":
            del optimizer.state[layer.theta(adapter)]
        for key, value in carried.get(name, {}).items() if moments == "transport" else ():
            optimizer.state[layer.theta(adapter)][key].copy_(value)
    return report


# -- what can be refreshed -------------------------------------------------------------------------------------------------


def _require_refreshable(layers: dict[str, Linear], adapter: str, config: LoftConfig) -> None:
    if not config.has_support:
        raise ValueError(
            f"refresh renews supports, but adapter {adapter!r} is of a kind that has none (OFT, BOFT, HRA)"
        )
    if config.magnitudes:
        raise ValueError(
            "refresh does not support magnitudes: what it freezes is a rotation, and theirs is none; use magnitudes=False"
        )
    if config.support not in (*DATA_FREE_SUPPORTS, *CALIBRATED_SUPPORTS):
        raise ValueError(
            f"refresh chooses supports, but those of adapter {adapter!r} come from the file {config.support}; build it with one of "
            f"{sorted((*DATA_FREE_SUPPORTS, *CALIBRATED_SUPPORTS))}"
        )
    unset = [name for name, layer in layers.items() if not layer.ensure_support(adapter)]
    if unset:
        raise ValueError(
            f"refresh renews supports, but adapter {adapter!r} has none yet in {unset[0]}: call loft_rs.calibrate first"
        )
    if any(layer.merged for layer in layers.values()):
        raise ValueError("refresh needs an unmerged model: call unmerge_adapter() first")
    for name, layer in layers.items():
        active = [each for each in layer.active_adapters if layer.has_adapter(each)]
        if active != [adapter] or layer.disable_adapters:
            raise ValueError(
                f"refresh needs {adapter!r} to be the only active adapter, but in {name} the active ones are "
                f"{[] if layer.disable_adapters else active}: call set_adapter({adapter!r}) first"
            )


def _require_foldable(layers: dict[str, Linear], adapter: str) -> None:
    for name, layer in layers.items():
        dtype = layer.dense_or_raise("fold").dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"fold needs a float32 or float64 base, since rounding would change the function, but {name} is {dtype}"
            )
        others = [each for each in layer.loft_side if each != adapter]
        if others:
            raise ValueError(f"fold would change what adapter {others[0]!r} was trained on; use fold=False")


def _data(dataloader: Any, train_step: Any, max_batches: int, config: LoftConfig) -> dict[str, Any]:
    """The arguments of `calibrate`; none where the support takes nothing from data."""
    if dataloader is None and train_step is None:
        if config.needs_calibration:
            raise ValueError(f"support={config.support!r} comes from data: give refresh a dataloader or a train_step")
        return {}
    batches = checked_batches(dataloader, train_step, max_batches)
    if not config.needs_calibration and config.order == "natural":
        return {}
    return {"train_step": train_step} if batches is None else {"dataloader": batches, "max_batches": max_batches}


# -- model -----------------------------------------------------------------------------------------------------------------


def _orthonormal(basis: Tensor) -> Tensor:
    """P C (n x r) in float64, C = (P^T P)^{-1/2}: P itself where it is orthonormal."""
    p = basis.detach().cpu().double()
    root = gram_root(p)
    return p if root is None else p @ root


@torch.no_grad()
def _product(name: str, layer: Linear, adapter: str) -> LowRank | None:
    """R_f R (or R R_f) as one factor, float32 or as wide as theta, on the CPU; None where nothing is turned."""
    theta, transform = layer.theta(adapter).detach(), layer.loft_group[adapter].transform
    rank = layer.rank(adapter)
    # E anew from theta in float64: what the forward passes use is rounded to float32.
    delta = transform.delta(theta.cpu().double()[None], rank)[0][0]
    own = LowRank(_orthonormal(layer.support(adapter)), delta)
    held = layer.frozen_factor(adapter)
    if held is not None:
        held = LowRank(held.basis.cpu().double(), held.delta.cpu().double())
        both = Frozen.of(held, own.basis, layer.loft_side[adapter])
        own = LowRank(both.basis, both.times(own.delta))
    if not bool(torch.isfinite(own.delta).all()):
        raise NonFiniteError(f"the transform of layer {name} holds NaN or Inf; nothing was changed")
    dtype = torch.promote_types(theta.dtype, torch.float32)
    product = own.reduced(torch.finfo(dtype).eps / 2)
    if transform.orthogonal and (error := product.orthogonality_error()) > _NOT_ORTHOGONAL:
        raise ValueError(
            f"the rotation of layer {name} is not orthogonal: ||R^T R - I||_2 = {error:.1e}; nothing was changed"
        )
    return LowRank(product.basis.to(dtype), product.delta.to(dtype)) if product.rank else None


class _Before:
    """What a refresh changes of the layers, to be put back where it fails."""

    def __init__(self, layers: dict[str, Linear], adapter: str):
        self.adapter = adapter
        self.weights: list[tuple[Tensor, Tensor]] = []
        self.layers = [
            (layer, layer.frozen_factor(adapter), [(held, held.detach().clone()) for held in self._held(layer)])
            for layer in owners(layers, adapter).values()
        ]

    def _held(self, layer: Linear) -> tuple[Tensor, ...]:
        return layer.theta(self.adapter), layer.support(self.adapter), layer.loft_energy[self.adapter]

    @torch.no_grad()
    def restore(self) -> None:
        for layer, frozen, tensors in self.layers:
            layer.set_frozen(self.adapter, frozen)
            for tensor, value in tensors:
                tensor.copy_(value)
        for weight, value in self.weights:
            weight.copy_(value)


@torch.no_grad()
def _fold(layers: dict[str, Linear], adapter: str, before: _Before) -> None:
    for layer in layers.values():
        if layer.frozen_rank(adapter):
            weight = layer.dense_or_raise("fold")
            rotated = layer.rotated_weight([adapter], safe=True)
            before.weights.append((weight, weight.to("cpu", copy=True)))
            weight.copy_(rotated)
    for layer in owners(layers, adapter).values():
        layer.set_frozen(adapter, None)


# -- optimiser -------------------------------------------------------------------------------------------------------------


def _carried(
    optimizer: torch.optim.Optimizer, layers: dict[str, Linear], adapter: str, moments: str
) -> dict[str, dict[str, Tensor]]:
    """The moments of every transform that has a state; what is no moment, such as the step count, stays as it is."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, layer in layers.items() if id(layer.theta(adapter)) not in trained]
    if missing:
        raise ValueError(
            f"optimizer does not train adapter {adapter!r} in {missing[0]}; give the one that does, or None"
        )
    found = {}
    for name, layer in layers.items():
        theta = layer.theta(adapter)
        if theta not in optimizer.state:
            continue
        tensors = {
            key: value for key, value in optimizer.state[theta].items() if isinstance(value, Tensor) and value.dim()
        }
        unknown = [key for key, value in tensors.items() if key not in _FIRST + _SECOND or value.shape != theta.shape]
        if unknown and moments == "transport":
            raise ValueError(
                f"moments='transport' knows the states {', '.join(_FIRST + _SECOND)}, but {type(optimizer).__name__} has {unknown[0]!r}; "
                "use moments='restart'"
            )
        found[name] = tensors
    return found


def _transported(key: str, moment: Tensor, turn: Tensor) -> Tensor:
    """A moment of theta in the basis P2, from the one in P1. turn: O = P2^T P1 (r x r)."""
    r, value = len(turn), moment.detach().cpu().double()
    free = value.dim() == 2
    if key in _FIRST:
        moved = turn @ (value if free else skew(value, r)) @ turn.mT
    else:
        ones = torch.ones_like(value)
        share = _squared(ones if free else _symmetric(ones, r), turn, free).clamp(0, 1)
        moved = _squared(value if free else _symmetric(value, r), turn, free).clamp_min(0) + (1 - share) * value.mean()
    rows, columns = torch.tril_indices(r, r, -1)
    return (moved if free else moved[rows, columns]).to(moment.dtype)


def _symmetric(lower: Tensor, r: int) -> Tensor:
    return skew(lower, r).tril() + skew(lower, r).tril().mT


def _squared(v: Tensor, turn: Tensor, free: bool) -> Tensor:
    """sum over (i, j) of c_kl,ij^2 v_ij: c = O_ki O_lj of a free matrix, and O_ki O_lj - O_kj O_li over i > j of a skew one."""
    squares = turn.square()
    moved = squares @ v @ squares.mT
    if not free:
        for k, row in enumerate(turn):
            w = row * turn
            moved[k] -= ((w @ v) * w).sum(1)
    return moved
