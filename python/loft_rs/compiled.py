"""What a `torch.compile`d model calls: operators that the compiler does not look into.

Inside them the eager code runs, so that one solve still serves all layers of a rank and nothing that is derived from frozen tensors is
computed twice; around them the graph has no break. A layer is found again by the memory of its tensors, which training does not move.

    delta(theta, P) -> E;    add_low_rank(x, E, W, b, P) -> (Y, z)
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .factor import AddInputs, Joined, gram_root, lay_down, lay_down_gradients, no_autocast
from .transform import DeltaGroup

if TYPE_CHECKING:
    from .layer import AdaptedLinear

__all__ = ["LIVE", "add_low_rank", "delta", "image"]

# Every adapted layer, for `_find`.
LIVE: weakref.WeakSet[AdaptedLinear] = weakref.WeakSet()

_found: dict[tuple[int, int], tuple[weakref.ref, str]] = {}


def _find(tensor: Tensor, basis: Tensor) -> tuple[AdaptedLinear, str] | None:
    """The layer and adapter with this P and this theta or W; None where these are no layer's own, as a sharded model's may be."""
    key = tensor.data_ptr(), basis.data_ptr()
    held = _found.get(key)
    layer = held and held[0]()
    if layer is None or key not in _keys(layer, held[1]):
        _found.clear()
        for each in LIVE:
            for adapter in each.loft_side:
                _found.update(dict.fromkeys(_keys(each, adapter), (weakref.ref(each), adapter)))
        held = _found.get(key)
        layer = held and held[0]()
    return None if layer is None else (layer, held[1])


def _keys(layer: AdaptedLinear, adapter: str) -> list[tuple[int, int]]:
    if not layer.has_adapter(adapter):
        return []
    weight, basis = layer.get_base_layer().weight, layer.support(adapter)
    own = [t for t in (layer.theta(adapter), weight) if type(t) in (Tensor, torch.nn.Parameter)]
    return [(t.data_ptr(), basis.data_ptr()) for t in own if t.numel()]


def _solution(theta: Tensor, basis: Tensor, transform: str, current: bool):
    """(solution, index) of the solve that holds E; `current` marks it as used."""
    found = _find(theta, basis)
    if found is not None:
        layer, adapter = found
        group, owner = layer.loft_group[adapter], layer.owner(adapter)
        entry = group.entry(owner, adapter, layer) if current else group.held(owner, adapter)
        if entry is not None:
            return entry.solution, entry.index
    return DeltaGroup(transform).solve(theta.detach()[None], [gram_root(basis)]), 0


@torch.library.custom_op("loft_rs::delta", mutates_args=())
def delta(theta: Tensor, basis: Tensor, transform: str) -> Tensor:
    """E = C (T - I) C (r x r), float32 or wider, of the generator theta and P (n x r)."""
    solution, index = _solution(theta, basis, transform, True)
    return solution.deltas[index].clone()


@delta.register_fake
def _(theta, basis, transform):
    return theta.new_empty(basis.shape[1], basis.shape[1], dtype=torch.promote_types(theta.dtype, torch.float32))


@torch.library.custom_op("loft_rs::delta_backward", mutates_args=())
def delta_backward(g: Tensor, theta: Tensor, basis: Tensor, transform: str) -> Tensor:
    solution, index = _solution(theta, basis, transform, False)
    return solution.gradients([index], [g])[0].to(theta.dtype).clone()


@delta_backward.register_fake
def _(g, theta, basis, transform):
    return torch.empty_like(theta)


def _save_delta(ctx, inputs, output):
    theta, basis, ctx.transform = inputs
    ctx.save_for_backward(theta, basis)


def _delta_gradient(ctx, g):
    return delta_backward(g, *ctx.saved_tensors, ctx.transform), None, None


delta.register_autograd(_delta_gradient, setup_context=_save_delta)


def image(weight: Tensor, basis: Tensor, side: str, dtype: torch.dtype) -> Tensor:
    """W0 P on the input side, W0^T P on the output side, in `dtype`."""
    work = torch.promote_types(weight.dtype, torch.float32)
    return ((weight if side == "input" else weight.mT).to(work) @ basis.to(work)).to(dtype)


def _inputs(weight: Tensor, bias: Tensor | None, basis: Tensor, side: str, dtype: torch.dtype) -> Joined:
    found = _find(weight, basis)
    if found is not None:
        left, right = found[0].products(found[1], dtype)
    else:
        p, q = basis.to(dtype), image(weight, basis, side, dtype)
        left, right = (p, q) if side == "input" else (q, p)
    return Joined.of((AddInputs(weight.to(dtype), None if bias is None else bias.to(dtype), left, right),))


@torch.library.custom_op("loft_rs::add_low_rank", mutates_args=())
def add_low_rank(
    x: Tensor, e: Tensor, weight: Tensor, bias: Tensor | None, basis: Tensor, side: str
) -> tuple[Tensor, Tensor]:
    """(Y, z) of `AddLowRank` for one layer, in x's dtype: Y (..., m), z (N x r)."""
    with no_autocast(x.device.type):
        (y,), z = lay_down(x, _inputs(weight, bias, basis, side, x.dtype), [e.to(x.dtype)], [False])
    return y, z


@add_low_rank.register_fake
def _(x, e, weight, bias, basis, side):
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(x.shape[:-1].numel(), basis.shape[1])


@torch.library.custom_op("loft_rs::add_low_rank_backward", mutates_args=())
def add_low_rank_backward(
    g: Tensor, z: Tensor, e: Tensor, weight: Tensor, basis: Tensor, side: str, needs_x: bool
) -> tuple[Tensor, Tensor]:
    with no_autocast(g.device.type):
        joined = _inputs(weight, None, basis, side, g.dtype)
        dx, (de,) = lay_down_gradients((g,), z, joined, [e.to(g.dtype)], [needs_x, True])
    return g.new_empty(0) if dx is None else dx, de.to(e.dtype)


@add_low_rank_backward.register_fake
def _(g, z, e, weight, basis, side, needs_x):
    return g.new_empty(*g.shape[:-1], weight.shape[1]) if needs_x else g.new_empty(0), torch.empty_like(e)


def _save_add(ctx, inputs, output):
    _, e, weight, _, basis, ctx.side = inputs
    ctx.save_for_backward(output[1], e, weight, basis)
    ctx.mark_non_differentiable(output[1])


def _add_gradient(ctx, g, _):
    z, e, weight, basis = ctx.saved_tensors
    dx, de = add_low_rank_backward(g, z, e, weight, basis, ctx.side, ctx.needs_input_grad[0])
    return dx if ctx.needs_input_grad[0] else None, de, None, None, None, None


add_low_rank.register_autograd(_add_gradient, setup_context=_save_add)
