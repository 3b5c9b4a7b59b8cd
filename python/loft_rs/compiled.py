"""What a `torch.compile`d model calls: operators that the compiler does not look into.

Inside them the eager code runs, so that one solve still serves all layers of a rank and nothing that is derived from frozen tensors is
computed twice; around them the graph has no break. A layer is found again by the memory of its tensors, which training does not move.

    add_low_rank(x, theta, W, b, P) -> Y    the `add` placement of one layer
    delta(theta, P or None) -> E            every other use of a factor

Each is an operator for the forward and one for the backward pass, joined by an `autograd.Function` that the compiler traces through.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .factor import AddInputs, Joined, gram_root, lay_down, lay_down_gradients, no_autocast
from .transform import DeltaGroup, get_transform

if TYPE_CHECKING:
    from .layer import AdaptedLinear

__all__ = ["LIVE", "add_low_rank", "delta", "image"]

# Every adapted layer, for `_find`.
LIVE: weakref.WeakSet[AdaptedLinear] = weakref.WeakSet()

_found: dict[tuple[int, int], tuple[weakref.ref, str]] = {}


def _find(tensor: Tensor, basis: Tensor | None) -> tuple[AdaptedLinear, str] | None:
    """The layer and adapter with this P (or none) and this theta or W; None where these are no layer's own, as a sharded model's may be."""
    key = tensor.data_ptr(), 0 if basis is None else basis.data_ptr()
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
    if not layer.loft_kind[adapter].has_support:
        return [(layer.theta(adapter).data_ptr(), 0)]
    # Not through `get_base_layer`, which costs as much as a product: what is wrapped twice is never added to.
    weight, basis = layer._modules["base_layer"]._parameters.get("weight"), layer.support(adapter).data_ptr()
    own = [t for t in (layer.theta(adapter), weight) if type(t) in (Tensor, torch.nn.Parameter)]
    return [(t.data_ptr(), basis) for t in own if t.numel()]


def _solution(
    found: tuple[AdaptedLinear, str] | None, theta: Tensor, basis: Tensor | None, transform: str, grads: bool | None
) -> tuple:
    """(solution, index, whether E is known to be 0) of the solve that holds E; `grads`: whether gradients are wanted of the forward pass
    that asks, None where a backward pass asks."""
    if found is not None and found[0].theta(found[1]).data_ptr() == theta.data_ptr():
        layer, adapter = found
        group, owner = layer.loft_group[adapter], layer.owner(adapter)
        if grads is None:
            entry = group.held(owner, adapter)
        else:
            # A graph runs with gradients off whether or not they are wanted, and where they are thetas must not be compared.
            with torch.set_grad_enabled(grads):
                entry = group.entry(owner, adapter, layer)
        if entry is not None:
            return entry.solution, entry.index, entry.identity
    fold = None if basis is None else gram_root(basis)
    return DeltaGroup(transform).solve(theta.detach()[None], [fold]), 0, False


def image(weight: Tensor, basis: Tensor, side: str, dtype: torch.dtype) -> Tensor:
    """W0 P on the input side, W0^T P on the output side, in `dtype`."""
    work = torch.promote_types(weight.dtype, torch.float32)
    return ((weight if side == "input" else weight.mT).to(work) @ basis.to(work)).to(dtype)


def _inputs(
    found: tuple[AdaptedLinear, str] | None,
    weight: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    side: str,
    dtype: torch.dtype,
) -> Joined:
    if found is not None:
        inputs = found[0].add_inputs_in(found[1], dtype)
    else:
        p, q = basis.to(dtype), image(weight, basis, side, dtype)
        left, right = (p, q) if side == "input" else (q, p)
        inputs = AddInputs(weight.to(dtype), None if bias is None else bias.to(dtype), left, right)
    return Joined.of((inputs,))


_LIBRARY = torch.library.Library("loft_rs", "FRAGMENT")


def _operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Registers a function as an operator. At a small model's rate of calls, `torch.library.custom_op` and a gradient that is registered
    there, with their wrappers in Python, would cost as much as the products."""

    def register(run: Callable) -> Callable:
        name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"loft_rs::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.loft_rs, name).default

    return register


def _fake_delta(theta, basis, transform, grads):
    made = get_transform(transform)
    r = made.rank(theta.shape)
    stack = theta.shape[: theta.dim() - len(made.parameter_shape(r))]
    return theta.new_empty(*stack, r, r, dtype=torch.promote_types(theta.dtype, torch.float32))


@_operator("delta(Tensor theta, Tensor? basis, str transform, bool grads) -> Tensor", _fake_delta)
def _delta(theta, basis, transform, grads):
    solution, index, _ = _solution(_find(theta, basis), theta, basis, transform, grads)
    return solution.deltas[index].clone()


@_operator(
    "delta_backward(Tensor g, Tensor theta, Tensor? basis, str transform) -> Tensor",
    lambda g, theta, basis, transform: torch.empty_like(theta),
)
def _delta_backward(g, theta, basis, transform):
    solution, index, _ = _solution(_find(theta, basis), theta, basis, transform, None)
    # A copy, as an operator's result must not be a view of what it is given.
    return solution.gradients([index], [g])[0].to(theta.dtype, copy=True)


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, theta, basis, transform, grads):
        ctx.save_for_backward(theta, basis)
        ctx.transform = transform
        return _delta(theta, basis, transform, grads)

    @staticmethod
    def backward(ctx, g):
        return _delta_backward(g, *ctx.saved_tensors, ctx.transform), None, None, None


def delta(theta: Tensor, basis: Tensor | None, transform: str) -> Tensor:
    """E = C (T - I) C (r x r), float32 or wider, of the generator theta and P (n x r); without a P the stack of D of all blocks."""
    return _Delta.apply(theta, basis, transform, torch.is_grad_enabled())


def _fake_add(x, theta, weight, bias, basis, transform, side, grads):
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(x.shape[:-1].numel(), basis.shape[1])


@_operator(
    "add_low_rank(Tensor x, Tensor theta, Tensor weight, Tensor? bias, Tensor basis, str transform, str side, bool grads)"
    " -> (Tensor, Tensor)",
    _fake_add,
)
def _add(x, theta, weight, bias, basis, transform, side, grads):
    found = _find(weight, basis)
    solution, index, identity = _solution(found, theta, basis, transform, grads)
    with no_autocast(x.device.type):
        joined = _inputs(found, weight, bias, basis, side, x.dtype)
        (y,), z = lay_down(x, joined, [solution.cast(index, x.dtype)], [identity])
    return y, z


def _fake_add_backward(g, z, theta, weight, basis, transform, side, needs_x):
    dx = g.new_empty(*g.shape[:-1], weight.shape[1]) if needs_x else g.new_empty(0)
    return dx, torch.empty_like(theta)


@_operator(
    "add_low_rank_backward(Tensor g, Tensor z, Tensor theta, Tensor weight, Tensor basis, str transform, str side, bool needs_x)"
    " -> (Tensor, Tensor)",
    _fake_add_backward,
)
def _add_backward(g, z, theta, weight, basis, transform, side, needs_x):
    found = _find(weight, basis)
    solution, index, _ = _solution(found, theta, basis, transform, None)
    with no_autocast(g.device.type):
        joined = _inputs(found, weight, None, basis, side, g.dtype)
        dx, (de,) = lay_down_gradients((g,), z, joined, [solution.cast(index, g.dtype)], [needs_x, True])
        d_theta = solution.gradients([index], [de.to(solution.deltas.dtype)])[0]
    return g.new_empty(0) if dx is None else dx, d_theta.to(theta.dtype)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, theta, weight, bias, basis, transform, side, grads):
        y, z = _add(x, theta, weight, bias, basis, transform, side, grads)
        ctx.save_for_backward(z, theta, weight, basis)
        ctx.names = transform, side
        return y

    @staticmethod
    def backward(ctx, g):
        needs_x = ctx.needs_input_grad[0]
        dx, d_theta = _add_backward(g, *ctx.saved_tensors, *ctx.names, needs_x)
        return dx if needs_x else None, d_theta, None, None, None, None, None, None


def add_low_rank(
    x: Tensor, theta: Tensor, weight: Tensor, bias: Tensor | None, basis: Tensor, transform: str, side: str
) -> Tensor:
    """Y (..., m) of `factor.AddLowRank` for one layer, in x's dtype."""
    return _AddLowRank.apply(x, theta, weight, bias, basis, transform, side, torch.is_grad_enabled())
