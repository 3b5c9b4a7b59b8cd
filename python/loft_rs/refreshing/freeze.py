"""R_f R as one frozen factor, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..factor.low_rank import Frozen, LowRank, gram_root
from ..layer.adapter import LayerAdapter
from ..linalg import NonFiniteError
from ..transform.transforms import Transform
from ..tuner.layer import Linear
from .optimizer_state import transported

__all__ = ["change_of_basis", "frozen_product", "orthonormal", "own_factor"]

_NOT_ORTHOGONAL = 1e-4  # ||R_f^T R_f - I||_2 of a frozen factor in float32 is below 1e-6


def orthonormal(basis: Tensor) -> Tensor:
    """P C (n x r) in float64, C = (P^T P)^{-1/2}: P itself where it is orthonormal."""
    p = basis.detach().cpu().double()
    root = gram_root(p)
    return p if root is None else p @ root


def _transform(adapter: LayerAdapter) -> Transform:
    """Of the kinds that can be refreshed (`conditions.py`), all of which have one."""
    assert adapter.transform is not None
    return adapter.transform


@torch.no_grad()
def own_factor(layer: Linear, adapter: str) -> LowRank:
    """R = I + (P C) D (P C)^T of the present support in float64 on the CPU, D = T - I."""
    # Anew from theta: what the forward passes use is rounded to float32.
    held = layer.adapters[adapter]
    theta = held.theta.detach().cpu().double()
    return LowRank(orthonormal(held.support), _transform(held).delta(theta[None], held.rank)[0][0])


@torch.no_grad()
def frozen_product(name: str, layer: Linear, adapter: str) -> LowRank | None:
    """R_f R (or R R_f) as one factor, float32 or as wide as theta, on the CPU; None where nothing
    is turned.
    """
    own, transform = own_factor(layer, adapter), _transform(layer.adapters[adapter])
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


def change_of_basis(
    carried: dict[str, dict[str, Tensor]], layers: dict[str, Linear], adapter: str, bases: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The moments in the present bases of `layers`, from those in `bases`."""
    turns = {name: orthonormal(layers[name].adapters[adapter].support).mT @ bases[name] for name in carried}
    return {
        name: {key: transported(key, value, turns[name]) for key, value in state.items()}
        for name, state in carried.items()
    }
