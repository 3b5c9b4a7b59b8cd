"""Placements: how a layer computes y = x (W0 R)^T + b or y = x (R W0)^T + b from its frozen base
layer and its rotations.

    rotate   the activations turn before (input side) or after (output side) any base layer
    add      the low-rank term is laid down, and the base product accumulates on it: a dense base layer, a rotation with a support

Layers that read one input, such as the q, k and v projections, run as one node where each of them
is `add`: it reads X once for all their z, adds up their dX inside the products, and costs one
sequence of launches. The first of them that is called runs the others along, and they claim their
own result when they are called with the same X in the same call of their parent
(`forward_pass.Scope`). Which layers belong together is told by their names (`SHARED_INPUT`), so
that a model computes the same bits from its first pass on; one that turns out to read something
else, as in cross attention, is left alone from then on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import HALF, no_autocast, plain
from ..factor.add_low_rank import (
    AddInputs,
    AddLowRank,
    JoinedInputs,
    add_low_rank_evaluated,
    add_low_rank_plainly,
    few_rows,
)
from ..factor.low_rank import LowRank
from ..factor.scale import scale_output
from .adapter import LayerAdapter
from .base_layer import fusible_weight
from .forward_pass import Scope, current, delta_of, value_of
from .values import Value, steps

__all__ = ["SHARED_INPUT", "apply", "choose_placement", "named_groups", "run"]

# Children of one parent that read the same input, as transformers, diffusers and the original codes
# of models name them.
SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)


def named_groups(parent: nn.Module, kind: type, known: tuple[tuple[str, ...], ...] = SHARED_INPUT) -> list[list[str]]:
    """Names of the children of type `kind` that read the same input, group by group."""
    groups = []
    for names in known:
        present = [name for name in names if isinstance(getattr(parent, name, None), kind)]
        if len({getattr(parent, name).in_features for name in present}) == 1 and len(present) > 1:
            groups.append(present)
    return groups


def choose_placement(in_features: int, out_features: int, side: str, dtype: torch.dtype) -> str:
    """`rotate` or `add` for a dense base.

    `rotate` reads and writes activations of the side's own width twice; `add` touches the other
    side's. In half precision rotating would round a small rotation away before the base product
    sees it, so there it is always `add`.
    """
    own, other = (in_features, out_features) if side == "input" else (out_features, in_features)
    return "rotate" if dtype not in HALF and other >= 2 * own else "add"


def run(layer: Any, adapters: list[LayerAdapter], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's output with `adapters` applied as if merged one after the other: W0 R_1 R_2 ...
    (input), ... R_2 R_1 W0 (output).
    """
    if layer.tap is not None:
        return layer.tap(layer, x, *args, **kwargs)
    return apply(layer, adapters, x, *args, **kwargs)


def apply(layer: Any, adapters: list[LayerAdapter], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`run`, whether or not a tap is set."""
    if not adapters:
        return layer.base_layer(x, *args, **kwargs)
    if len(adapters) == 1 and not args and not kwargs:
        y = _add(layer, adapters[0], x)
        if y is not None:
            return y
    return _rotate(layer, adapters, x, *args, **kwargs)


# -- rotate --------------------------------------------------------------------------------------


def _rotate(layer: Any, adapters: list[LayerAdapter], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    scope = current()
    for adapter in reversed([a for a in adapters if a.side == "input"]):
        x = adapter.factor(delta_of(adapter, scope), x.dtype).apply(x)
    y = layer.base_layer(x, *args, **kwargs)
    deltas = {a: _output_delta(a, scope) for a in adapters if a.side == "output"}
    after = [a for a in adapters if deltas.get(a) is not None or a.scale is not None]
    if after:
        bias = getattr(layer.get_base_layer(), "bias", None)
        bias = None if bias is None else bias.to(y.device, y.dtype)
        y = y if bias is None else y - bias
        for adapter in after:
            if (delta := deltas.get(adapter)) is not None:
                y = adapter.factor(delta, y.dtype).apply(y)
            if (scale := adapter.scale) is not None:
                y = scale_output(y, adapter.present("scale", scale))
        y = y if bias is None else y + bias
    return y


def _output_delta(adapter: LayerAdapter, scope: Scope | None) -> Tensor | None:
    """E of a rotation after the base layer; None at the identity, where taking the bias off and on
    again would change bits.
    """
    if plain() or torch.compiler.is_compiling():
        return delta_of(adapter, scope)
    value = value_of(adapter, scope)
    return None if value.identity and not adapter.frozen_rank else value.delta


# -- add -----------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """One layer's part of a node. refreshed: whether its rotation is a product with a frozen
    one.
    """

    adapter: LayerAdapter
    inputs: AddInputs
    refreshed: bool


def _add(layer: Any, adapter: LayerAdapter, x: Tensor) -> Tensor | None:
    """The `add` placement, or None where the base layer or the shape asks for `rotate`."""
    if plain() or torch.compiler.is_compiling():
        return _add_in_graph(layer, adapter, x)
    scope = current()
    group = None if scope is None else scope.root.groups.get(layer)
    if scope is not None and group is not None and (y := _claim(scope, layer, adapter, x)) is not None:
        return y
    with no_autocast(x.device.type) as autocast:
        part = _part(layer, adapter, x, scope, autocast)
        if part is None:
            return None
        # Nothing tells whether an inference tensor is changed in place before the others are
        # called.
        if scope is None or group is None or x.is_inference():
            return _node(x, [part], scope, JoinedInputs.of((part.inputs,)))
        return _lead(scope, group, part, x, autocast)


def _add_in_graph(layer: Any, adapter: LayerAdapter, x: Tensor) -> Tensor | None:
    """`_add` for a graph that a compiler, a tracer or autograd is to look into: no pass but this
    one, one layer a node.
    """
    with no_autocast(x.device.type) as autocast:
        part = _part(layer, adapter, x, None, autocast)
        if part is None:
            return None
        x = x.to(part.inputs.left.dtype)
        if plain():
            delta = delta_of(adapter)
            assert delta is not None
            return add_low_rank_plainly(x, part.inputs, _with_frozen(part, delta, x.dtype))
        value = value_of(adapter, None)
        delta = _with_frozen(part, value.delta, x.dtype)
        cast = delta.detach().to(x.dtype) if part.refreshed else value.cast(x.dtype)
        if not torch.is_grad_enabled() and x.shape[:-1].numel() < delta.shape[-1]:
            # A graph keeps no product from one token to the next, and W0 P would cost more than the
            # token.
            basis = part.inputs.left if adapter.side == "input" else part.inputs.right
            return few_rows(x, part.inputs.weight, part.inputs.bias, LowRank(basis, cast), adapter.side)
        return AddLowRank.apply(x, JoinedInputs.of((part.inputs,)), [cast], [False], delta)


def _with_frozen(part: _Part, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """E of the adapter, or of its product with what is frozen."""
    frozen = part.adapter.frozen(dtype) if part.refreshed else None
    return delta if frozen is None else frozen.times(delta)


def _part(
    layer: Any, adapter: LayerAdapter, x: Tensor, scope: Scope | None, autocast: torch.dtype | None
) -> _Part | None:
    """What `AddLowRank` takes of a layer for an input like x; None where the `add` placement does
    not apply.

    autocast: to what autocast, which is off by now, casts a product.
    """
    weight = fusible_weight(layer.base_layer) if adapter.kind.has_support else None
    if weight is None:
        return None
    dtype = weight.dtype if autocast is None or x.dtype == torch.float64 else autocast
    placement = layer.placement or choose_placement(layer.in_features, layer.out_features, adapter.side, dtype)
    if placement == "rotate":
        return None
    bias, frozen = layer.base_layer.bias, adapter.frozen_factor
    sources = (weight, adapter.support) if frozen is None else (weight, adapter.support, *frozen)
    if weight.dtype != dtype:  # as nn.Linear under autocast: a copy for this pass only
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    p = _basis(adapter, dtype, scope, sources[1:])
    evaluation = None if scope is None else scope.evaluation
    if evaluation is None:
        image = _image(weight, p, adapter.side)
    else:
        image = adapter.kept(("image", dtype), evaluation, sources, lambda: _image(weight, p, adapter.side))
    left, right = (p, image) if adapter.side == "input" else (image, p)
    return _Part(adapter, AddInputs(weight, bias, left, right), frozen is not None)


def _basis(adapter: LayerAdapter, dtype: torch.dtype, scope: Scope | None, sources: tuple[Tensor, ...]) -> Tensor:
    """P (n x r), of a refreshed adapter [P_f, P], in `dtype`: one tensor for all tied layers of a
    pass.
    """
    if len(sources) == 1 and sources[0].dtype == dtype:
        return sources[0]

    def make() -> Tensor:
        frozen = adapter.frozen(dtype)
        return adapter.support.to(dtype) if frozen is None else frozen.basis

    if scope is None:
        return make()
    key = "basis", adapter.members[0], dtype
    if key not in scope.derived:
        scope.derived[key] = adapter.members[0].kept(("basis", dtype), scope.evaluation, sources, make)
    return scope.derived[key]


def _image(weight: Tensor, basis: Tensor, side: str) -> Tensor:
    """W0 P on the input side, W0^T P on the output side, summed in float32 or wider and rounded
    once.
    """
    weight = weight if side == "input" else weight.mT
    if weight.dtype in HALF and not weight.is_cuda:  # whose products in half precision are slow
        return (weight.float() @ basis.float()).to(weight.dtype)
    return weight @ basis


def _node(x: Tensor, parts: list[_Part], scope: Scope | None, joined: JoinedInputs) -> Any:
    """Y of one layer, or of each of several, at the values of this pass."""
    dtype, grads = joined.left.dtype, torch.is_grad_enabled()
    x = x if x.dtype == dtype else x.to(dtype)
    values = [value_of(part.adapter, scope) for part in parts]
    if grads:
        casts, identities, deltas = [], [], []
        for value, part in zip(values, parts, strict=True):
            delta = _with_frozen(part, value.delta, dtype)
            casts.append(delta.detach().to(dtype) if part.refreshed else value.cast(dtype))
            identities.append(value.identity and not part.refreshed)
            deltas.append(delta)
        return AddLowRank.apply(x, joined, casts, identities, *deltas)
    turned = [_right_delta(value, part, scope, dtype) for value, part in zip(values, parts, strict=True)]
    ys = add_low_rank_evaluated(x, joined, turned)
    return ys[0] if len(ys) == 1 else ys


def _right_delta(value: Value, part: _Part, scope: Scope | None, dtype: torch.dtype) -> Tensor | None:
    """right E (m x r), as often as an evaluation goes on with one solve; None at the identity."""
    adapter, right = part.adapter, part.inputs.right
    if part.refreshed:
        return right @ _with_frozen(part, value.delta, dtype).to(dtype)
    if value.identity:
        return None
    if scope is None or scope.evaluation is None:
        return right @ value.cast(dtype)
    return adapter.kept(("turned", dtype), value.solution, (right,), lambda: right @ value.cast(dtype))


# -- layers that read one input ------------------------------------------------------------------


def _state_of(adapter: LayerAdapter, x: Tensor) -> tuple:
    """What else than x itself the results depend on."""
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return adapter.name, x._version, torch.is_grad_enabled(), cast


def _claim(scope: Scope, layer: Any, adapter: LayerAdapter, x: Tensor) -> Tensor | None:
    """The layer's output, where it was computed along with that of another for this x."""
    held = scope.shared.pop(layer, None)
    if held is None:
        return None
    leader, led_x, state, y = held
    if led_x is x and not x.is_inference() and state == _state_of(adapter, x):
        return y
    scope.root.apart.setdefault((leader, layer), steps())
    return None


def _lead(scope: Scope, group: list, part: _Part, x: Tensor, autocast: torch.dtype | None) -> Tensor:
    """The layer's output, and for `_claim` those of the others that read this x."""
    layer, parts = part.adapter.layer, [part]
    for other in group:
        if other is not layer and other not in scope.shared and not _is_apart(scope, layer, other):
            along = _joins(other, part, x, scope, autocast)
            if along is not None:
                parts.append(along)
    if len(parts) == 1:
        return _node(x, parts, scope, JoinedInputs.of((part.inputs,)))
    ys = _node(x, parts, scope, _side_by_side(parts, scope))
    state = part.adapter.name, x._version, torch.is_grad_enabled(), autocast
    for (adapter, *_), y in zip(parts[1:], ys[1:], strict=True):
        scope.shared[adapter.layer] = layer, x, state, y
    return ys[0]


def _is_apart(scope: Scope, layer: Any, other: Any) -> bool:
    since = scope.root.apart.get((layer, other))
    # Until the next optimiser step a checkpoint may compute a forward pass again, and has to find
    # the same nodes.
    return since is not None and (since < steps() or not torch.is_grad_enabled())


def _joins(other: Any, part: _Part, x: Tensor, scope: Scope, autocast: torch.dtype | None) -> _Part | None:
    """The part of a layer that may run along: the same adapter alone is active there, dtypes
    agree.
    """
    applied = other.applied()
    if len(applied) != 1 or applied[0].name != part.adapter.name or not applied[0].ready:
        return None
    along = _part(other, applied[0], x, scope, autocast)
    if along is None or along.inputs.left.dtype != part.inputs.left.dtype:
        return None
    return along if along.inputs.left.device == part.inputs.left.device else None


def _side_by_side(parts: list[_Part], scope: Scope) -> JoinedInputs:
    """`JoinedInputs.of`, its columns put side by side once in an evaluation."""
    inputs = tuple([part.inputs for part in parts])
    lefts = tuple([each.left for each in inputs])
    columns = parts[0].adapter.kept(
        ("columns", lefts[0].dtype), scope.evaluation, lefts, lambda: JoinedInputs.of(inputs)[1:]
    )
    return JoinedInputs(inputs, *columns)
