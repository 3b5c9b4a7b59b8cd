"""The value of a transform in one pass: E of many adapters from one solve, and whether it is known
to be zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .._torch import HALF
from ..transform.batch import Solution, attach, solve
from .adapter import LayerAdapter

__all__ = ["Solved", "Value", "solve_all", "steps"]


# Counts optimiser steps. It tells when a guess may be made anew, never that a value still holds.
_steps = [0]


def _count_step(*_: object) -> None:
    _steps[0] += 1


register_optimizer_step_post_hook(_count_step)


def steps() -> int:
    """Optimiser steps so far in this process."""
    return _steps[0]


class Value:
    """E of one adapter in one pass. attached: with its gradient, where the pass began with
    gradients. identity: whether E is known to be exactly zero."""

    __slots__ = ("attached", "identity", "index", "solution")

    def __init__(self, solution: Solution, index: int, attached: Tensor | None, identity: bool):
        self.solution, self.index, self.attached, self.identity = solution, index, attached, identity

    @property
    def delta(self) -> Tensor:
        """E (r, r), or D of all blocks, in theta's dtype, at least float32, with its gradient where
        the pass has gradients.
        """
        return self.solution.deltas[self.index] if self.attached is None else self.attached

    def cast(self, dtype: torch.dtype) -> Tensor:
        """E in `dtype`, without a gradient."""
        return self.solution.cast(self.index, dtype)


def alike(adapters: Iterable[LayerAdapter]) -> dict[tuple, list[LayerAdapter]]:
    """The adapters that one solve can serve."""
    found: dict[tuple, list[LayerAdapter]] = {}
    for adapter in adapters:
        theta = adapter.theta
        if _is_there(theta):
            assert adapter.transform is not None
            key = adapter.transform.name, theta.shape, theta.device, theta.dtype
            found.setdefault(key, []).append(adapter)
    return found


def _is_there(theta: Tensor) -> bool:
    """Whether a theta can be read now: offloading leaves it on the meta device, FSDP2 sharded,
    FSDP1 and ZeRO-3 empty.
    """
    if theta.is_meta or type(theta) not in (Tensor, nn.Parameter):
        return False
    return torch.compiler.is_compiling() or bool(theta.untyped_storage().size()) or not theta.numel()


def gram_roots(adapters: Sequence[LayerAdapter]) -> Tensor | None:
    """The Gram roots of adapters of one rank (B, r, r); None where none needs one."""
    return _stacked([adapter.gram_root() for adapter in adapters])


def _stacked(roots: list[Tensor | None]) -> Tensor | None:
    some = next((root for root in roots if root is not None), None)
    if some is None:
        return None
    eye = torch.eye(some.shape[-1], dtype=some.dtype, device=some.device)
    return torch.stack([eye if root is None else root for root in roots])


def solve_all(adapters: Sequence[LayerAdapter], *, attaching: bool = True) -> dict[LayerAdapter, Value]:
    """E of these owners of tensors, as many at once as can be; of several, those whose theta is not
    there are left out.

    attaching: with gradients, where the pass has them.
    """
    if len(adapters) == 1:
        theta = adapters[0].present("theta", adapters[0].theta)
        return _solve_alike(adapters, [theta], attaching)
    found: dict[LayerAdapter, Value] = {}
    for together in alike(adapters).values():
        found |= _solve_alike(together, [adapter.theta for adapter in together], attaching)
    return found


def values_in_graph(adapters: Sequence[LayerAdapter]) -> dict[LayerAdapter, Value]:
    """E of adapters that one solve can serve."""
    thetas, transform = [adapter.theta for adapter in adapters], adapters[0].transform
    assert transform is not None
    stored = [adapter.support.dtype for adapter in adapters if adapter.kind.has_support]
    half = next((dtype for dtype in stored if dtype in HALF), None)
    solution = solve(transform, torch.stack([t.detach() for t in thetas]), gram_roots(adapters), half)
    attached = attach(solution, range(len(thetas)), thetas)
    return {adapter: Value(solution, i, attached[i], False) for i, adapter in enumerate(adapters)}


def _solve_alike(adapters: Sequence[LayerAdapter], thetas: list[Tensor], attaching: bool) -> dict[LayerAdapter, Value]:
    roots, grads, transform = gram_roots(adapters), torch.is_grad_enabled(), adapters[0].transform
    assert transform is not None
    # Values outlive an evaluation under inference mode, so they must not be inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        solution = solve(transform, torch.stack([theta.detach() for theta in thetas]), roots)
        identity = _identities(adapters, solution.thetas, grads)
    attached: dict[int, Tensor] = {}
    if grads and attaching:
        trained = [i for i, theta in enumerate(thetas) if theta.requires_grad]
        if trained:
            attached = dict(zip(trained, attach(solution, trained, [thetas[i] for i in trained]), strict=True))
    return {a: Value(solution, i, attached.get(i), i in identity) for i, a in enumerate(adapters)}


class Solved(NamedTuple):
    """A solve of a pass without gradients. `groups`: by solution its adapters, in their order
    there, and their Gram roots.
    """

    adapters: list[LayerAdapter]
    values: dict[LayerAdapter, Value]
    groups: list[tuple[Solution, list[LayerAdapter], list[Tensor | None]]]

    @classmethod
    def of(cls, adapters: list[LayerAdapter], values: dict[LayerAdapter, Value]) -> Solved:
        together: dict[Solution, list[LayerAdapter]] = {}
        for adapter, value in values.items():
            together.setdefault(value.solution, []).append(adapter)
        groups = [(solution, each, [a.gram_root() for a in each]) for solution, each in together.items()]
        return cls(adapters, values, groups)

    def stands(self, adapters: list[LayerAdapter]) -> bool:
        """Whether the same adapters hold the same bits. Looking synchronises with the device, as a
        token does anyway.
        """
        if adapters != self.adapters:
            return False
        for solution, together, roots in self.groups:
            held = solution.thetas
            thetas = [adapter.theta.detach() for adapter in together]
            if any([t.shape != held.shape[1:] or t.dtype != held.dtype or t.device != held.device for t in thetas]):
                return False
            if any([adapter.gram_root() is not root for adapter, root in zip(together, roots, strict=True)]):
                return False
            if not torch.equal(torch.stack(thetas), held):
                return False
        return True


def _identities(adapters: Sequence[LayerAdapter], stack: Tensor, grads: bool) -> set[int]:
    """Which of these are exactly the identity, so that the layer's output can be the base layer's,
    to the bit.

    Looking synchronises with the device. Training looks until the first optimiser step, other
    passes until theta was seen to be other than zero; what was not looked at is computed like any
    rotation.
    """
    if capturing():
        return set()
    open_ = [
        i
        for i, a in enumerate(adapters)
        if not a.moved and not (grads and a.looked_at is not None and a.looked_at < _steps[0])
    ]
    if not open_:
        return set()
    looked = stack if len(open_) == len(adapters) else torch.stack([stack[i] for i in open_])
    moved = (looked.flatten(1) != 0).any(1).tolist()
    for i, is_moved in zip(open_, moved, strict=True):
        adapters[i].moved, adapters[i].looked_at = is_moved, _steps[0]
    return {i for i, is_moved in zip(open_, moved, strict=True) if not is_moved}


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
