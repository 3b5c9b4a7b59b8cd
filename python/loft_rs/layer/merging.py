"""Merging: rotations put into the base weight and taken out again, and their exact LoRA form.

input side   W = W0 R     A = P^T      B = W0 P E        W0 + B A = W
output side  W = R W0     A = P^T W0   B = P E
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..factor.low_rank import LowRank
from .adapter import LayerAdapter
from .base_layer import dense_weight
from .forward_pass import delta_of

__all__ = ["dense_or_raise", "factor_of", "lora_factors", "merge", "original_weight", "rotated_weight", "unmerge"]


def factor_of(adapter: LayerAdapter) -> Any:
    """R at the adapter's present parameters, differentiable in them."""
    return adapter.factor(delta_of(adapter))


def dense_or_raise(layer: Any, purpose: str) -> Tensor:
    """W (m x n) of the base layer; TypeError where it is quantised, sharded or a subclass."""
    weight = dense_weight(layer.get_base_layer())
    if weight is None:
        raise TypeError(
            f"{purpose} needs a dense base weight, but this layer's base is {type(layer.get_base_layer()).__name__}; "
            "load the base unquantised, or use loft_rs.export_lora where W0 P is enough"
        )
    return weight


def original_weight(layer: Any, purpose: str) -> Tensor:
    """W0 (m x n), also where an adapter is merged into it now."""
    weight = dense_or_raise(layer, purpose)
    return weight if layer.original is None else layer.original.to(weight.device)


@torch.no_grad()
def rotated_weight(
    layer: Any, adapters: list[LayerAdapter], weight: Tensor | None = None, *, safe: bool = False
) -> Tensor:
    """W R_1 R_2 ... or ... R_2 R_1 W (m x n), in float32 (float64 for a float64 base), W being
    `weight`, or else the layer's as it is. safe: ValueError for NaN or Inf in it."""
    weight = dense_or_raise(layer, "merging") if weight is None else weight
    work = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for adapter in adapters:
        factor = factor_of(adapter)
        work = factor.adjoint(work) if adapter.side == "input" else factor.apply(work.mT).mT
        if (scale := adapter.scale) is not None:
            work = torch.addcmul(work, work, scale.to(work.dtype).unsqueeze(1))
    if safe and not bool(torch.isfinite(work).all()):
        names = [adapter.name for adapter in adapters]
        raise ValueError(f"merging adapters {names} would write NaN or Inf into the base weight; nothing was changed")
    return work


@torch.no_grad()
def merge(layer: Any, adapters: list[LayerAdapter], *, safe: bool = False) -> None:
    """Replace W0 by the rotated weight, rounded once; the original bits are kept on the CPU for
    `unmerge`.
    """
    weight = dense_or_raise(layer, "merging")
    rotated = rotated_weight(layer, adapters, safe=safe)
    if layer.original is None:
        layer.original = weight.detach().to("cpu", copy=True)
    weight.copy_(rotated)
    _forget(layer)


@torch.no_grad()
def unmerge(layer: Any) -> None:
    """Put the original weight back, bit for bit."""
    if layer.original is not None:
        dense_or_raise(layer, "unmerging").copy_(layer.original)
        layer.original = None
        _forget(layer)


def _forget(layer: Any) -> None:
    for adapter in layer.adapters.values():
        adapter.forget_products()


@torch.no_grad()
def lora_factors(adapter: LayerAdapter) -> tuple[Tensor, Tensor]:
    """(A (r x n), B (m x r)) with W0 + B A equal to the rotated weight: exact. ValueError for one
    of full rank.

    Of a refreshed adapter the rank is that of all that is turned, up to r_f + r.
    """
    if adapter.full_rank:
        raise ValueError(
            f"adapter {adapter.name!r} rotates blocks of all coordinates, so its change of the weight has full rank and no exact LoRA "
            "form; merge it (merge_and_unload, loft-rs merge), or give export_lora an approximate_rank (loft-rs export-lora "
            "--approximate-rank) for the best LoRA of that rank"
        )
    weight = original_weight(adapter.layer, "the LoRA form")
    work = torch.promote_types(weight.dtype, torch.float32)
    factor, weight = factor_of(adapter), weight.to(work)
    if adapter.frozen_rank:
        # The two spans may overlap. A factor that turns nothing keeps a column, as a LoRA has at
        # least one.
        least = factor.reduced(torch.finfo(work).eps / 2)
        factor = least if least.rank else LowRank(factor.basis[:, -1:], torch.zeros_like(factor.delta[-1:, -1:]))
    p, e = factor.basis.to(weight.device, work), factor.delta.to(weight.device, work)
    with torch.autocast(weight.device.type, enabled=False):
        if adapter.side == "input":
            return p.mT.contiguous(), weight @ p @ e
        return p.mT @ weight, p @ e
