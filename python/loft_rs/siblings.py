"""Layers that read one input, such as the q, k and v projections: run as one autograd node.

One node reads X once for all their z, adds up their dX inside the products, and costs one sequence of launches. The first of them that is
called runs the others along, and they hand out their own result when they are called with the same X in their turn. Which layers belong
together is told by their names (`SHARED_INPUT`), so that a model computes the same bits from its first pass on; one that turns out to
read something else, as in cross attention, is left alone from then on.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .factor import AddInputs, Joined
from .transform import in_backward, steps

if TYPE_CHECKING:
    from .layer import AdaptedLinear

__all__ = ["SHARED_INPUT", "Siblings", "named_groups"]

# Children of one parent that read the same input, as transformers, diffusers and the original codes of models name them.
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


def _key(adapter: str, x: Tensor) -> tuple:
    """What else than x itself the results depend on; last, whether a backward pass computes them again."""
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return adapter, x._version, torch.is_grad_enabled(), cast, in_backward()


class Siblings:
    """One group of layers."""

    def __init__(self, members: list[AdaptedLinear]) -> None:
        self.members = members
        # By the layer called first and another: the optimiser step at which they turned out to read different things.
        self._apart: dict[tuple[int, int], int] = {}
        self._side_by_side: dict[int, tuple[tuple, Joined]] = {}
        self._leader: AdaptedLinear | None = None
        self._x: weakref.ref[Tensor] | None = None
        self._key: tuple = ()
        self._results: dict[int, Tensor] = {}

    def __reduce__(self):
        return Siblings, ([],), {"members": self.members}

    def take(self, layer: AdaptedLinear, adapter: str, x: Tensor) -> Tensor | None:
        """The layer's output, where it was computed along with that of another for this x."""
        if not self._results or self._x() is not x or x.is_inference() or self._key != _key(adapter, x):
            return None
        return self._results.pop(id(layer), None)

    def lead(self, layer: AdaptedLinear, adapter: str, x: Tensor, inputs: AddInputs) -> Tensor:
        """The layer's output, and for `take` those of the others that read this x; its own alone where another has led for x."""
        from .layer import add_low_rank

        if x.is_inference():  # nothing tells whether it was changed in place before the others are called with it
            return add_low_rank(x, Joined.of((inputs,)), [(layer, adapter)])
        key = _key(adapter, x)
        if layer is not self._leader and self._x is not None and self._x() is x and self._key == key:
            return add_low_rank(x, Joined.of((inputs,)), [(layer, adapter)])
        self._drop_unclaimed()
        members, parts = [layer], [inputs]
        for other in self.members:
            part = None if other is layer or self._separate(layer, other) else other.joins(adapter, x, inputs)
            if part is not None:
                members.append(other)
                parts.append(part)
        ys = add_low_rank(x, self._join(layer, tuple(parts)), [(member, adapter) for member in members])
        if len(members) == 1:
            return ys
        self._leader, self._x, self._key = layer, weakref.ref(x), key
        self._results = {id(member): y for member, y in zip(members[1:], ys[1:], strict=True)}
        return ys[0]

    def _separate(self, layer: AdaptedLinear, other: AdaptedLinear) -> bool:
        apart = self._apart.get((id(layer), id(other)))
        # Until the next optimiser step a checkpoint may compute a forward pass again, and has to find the same nodes.
        return apart is not None and (apart < steps() or not torch.is_grad_enabled())

    def _drop_unclaimed(self) -> None:
        # A checkpoint that computes again may stop early, which tells nothing.
        if self._results and not self._key[-1]:
            for other in self._results:
                self._apart.setdefault((id(self._leader), other), steps())
        self._results = {}

    def _join(self, layer: AdaptedLinear, parts: tuple[AddInputs, ...]) -> Joined:
        """`Joined.of`, its columns put side by side anew only where they are not those of the last time."""
        # A support may be written over in place, as `calibrate` and `refresh` do.
        key = tuple([(id(p.left), 0 if p.left.is_inference() else p.left._version) for p in parts])
        held = self._side_by_side.get(id(layer))
        if held is not None and held[0] == key:
            return held[1]._replace(layers=parts)
        joined = Joined.of(parts)
        # Of the layers only `left` is kept: a weight may be autocast's copy, made for one pass.
        only_left = tuple(AddInputs(p.left, None, p.left, p.left) for p in parts)
        self._side_by_side[id(layer)] = key, joined._replace(layers=only_left)
        return joined
