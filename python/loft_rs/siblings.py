"""Layers that read one input, such as the q, k and v projections: found in use, and run as one autograd node.

One node reads X once for all their z, adds up their dX inside the products, and costs one launch sequence. Nothing has to be named:
of the layers under one parent, those that were called with the very X of the first are run along with it later on, and handed their
own result when they are called. Whatever breaks the pattern only costs the saving. With gradients, what was learnt counts from the next
optimiser step on: until then a checkpoint may compute a forward pass again, and has to find the same nodes.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .factor import AddInputs, Joined
from .transform import in_backward, steps

if TYPE_CHECKING:
    from .layer import AdaptedLinear

__all__ = ["Siblings"]


class _Follower:
    """A layer seen to read a leader's X, with the optimiser steps at which that was learnt and unlearnt. It is learnt once."""

    def __init__(self, layer: AdaptedLinear) -> None:
        self.layer = weakref.ref(layer)
        self.since, self.until = steps(), None

    def counts(self) -> bool:
        if not torch.is_grad_enabled():
            return self.until is None
        return self.since < steps() and (self.until is None or self.until == steps())


class Siblings:
    """The layers under one parent module. A copy of the model learns anew."""

    def __init__(self) -> None:
        self._followers: weakref.WeakKeyDictionary[AdaptedLinear, list[_Follower]] = weakref.WeakKeyDictionary()
        self._side_by_side: weakref.WeakKeyDictionary[AdaptedLinear, Joined] = weakref.WeakKeyDictionary()
        self._leader: weakref.ref[AdaptedLinear] | None = None
        self._x: weakref.ref[Tensor] | None = None
        self._key: tuple = ()
        self._results: dict[AdaptedLinear, Tensor] = {}
        self._again = False

    def __reduce__(self):
        return Siblings, ()

    def forward(self, layer: AdaptedLinear, adapter: str, x: Tensor, inputs: AddInputs) -> Tensor:
        """The layer's output: from the run of the first of those that read this x, or as that first one."""
        from .layer import add_low_rank

        kind = x.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (adapter, 0 if x.is_inference() else x._version, torch.is_grad_enabled(), cast)
        if self._x is not None and self._x() is x and self._key == key:
            y = self._results.pop(layer, None)
            if y is not None:
                return y
            self._follow(layer)
            return add_low_rank(x, Joined.of((inputs,)), [(layer, adapter)])
        self._drop_unclaimed()
        members, parts = [layer], [inputs]
        for other in [f.layer() for f in self._followers.get(layer, ()) if f.counts()]:
            part = other and other.joins(adapter, x, inputs)
            if part is not None:
                members.append(other)
                parts.append(part)
        ys = add_low_rank(x, self._join(layer, tuple(parts)), [(member, adapter) for member in members])
        self._leader, self._x, self._key, self._again = weakref.ref(layer), weakref.ref(x), key, in_backward()
        if len(members) == 1:
            return ys
        self._results = dict(zip(members[1:], ys[1:], strict=True))
        return ys[0]

    def _follow(self, layer: AdaptedLinear) -> None:
        leader = None if self._leader is None else self._leader()
        if leader is None or layer is leader:
            return
        followers = self._followers.setdefault(leader, [])
        if all(f.layer() is not layer for f in followers):
            followers.append(_Follower(layer))

    def _join(self, layer: AdaptedLinear, parts: tuple[AddInputs, ...]) -> Joined:
        """`Joined.of`, its columns put side by side anew only where they are not those of the last time."""
        held = self._side_by_side.get(layer)
        if held is not None and len(held.layers) == len(parts):
            if all(old.left is new.left for old, new in zip(held.layers, parts, strict=True)):
                return held._replace(layers=parts)
        joined = Joined.of(parts)
        # Of the layers only `left` is kept: a weight may be autocast's copy, made for one pass.
        only_left = tuple(AddInputs(p.left, None, p.left, p.left) for p in parts)
        self._side_by_side[layer] = joined._replace(layers=only_left)
        return joined

    def _drop_unclaimed(self) -> None:
        """Runs along no more what was not asked for. A checkpoint that computes again may stop early, which tells nothing."""
        if self._results and not self._again:
            for follower in (f for followers in self._followers.values() for f in followers):
                if follower.layer() in self._results:
                    follower.until = steps() if follower.until is None else follower.until
        self._results = {}
