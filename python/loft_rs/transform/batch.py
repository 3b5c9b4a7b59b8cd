"""One solve and one backward pass for all layers of a rank.

    solve     E = C D C of a stack of thetas, D = T - I, C the Gram root that a support rounded to half precision needs
    Deltas    attaches the gradients of the thetas to their E: dL/dtheta of all of them in one batched closed form

Nothing is kept here: a `Solution` belongs to whoever asked for it. Under `torch.compile` the solve
is the one operator that the compiler does not look into, so that the same kernel runs there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch import LIBRARY, first_order, no_autocast
from .transforms import Transform, get_transform

__all__ = ["Deltas", "Solution", "attach", "differentiable_delta", "solve"]


class Solution:
    """E of several members of one transform (B, r, r), what their gradients need, and E in other
    dtypes.

    `roots`: C of every member (B, r, r), or None where none needs one. `thetas`: what it was
    computed from.
    """

    __slots__ = ("_casts", "deltas", "roots", "saved", "thetas", "transform")

    def __init__(self, transform: Transform, thetas: Tensor, deltas: Tensor, saved: Tensor, roots: Tensor | None):
        self.transform, self.thetas, self.deltas, self.saved, self.roots = transform, thetas, deltas, saved, roots
        self._casts: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def cast(self, index: int, dtype: torch.dtype) -> Tensor:
        """E (r, r), or a stack of them, of one member in `dtype`, no gradient; all members are cast
        at once.
        """
        # Remembered because all layers of a pass ask; it is a function of what never changes, so a
        # race writes one value twice.
        if dtype not in self._casts:
            if torch.compiler.is_compiling():  # a checkpointed part of a graph may write to nothing outside it
                return self.deltas[index].to(dtype)
            self._casts[dtype] = self.deltas.to(dtype).unbind(0)
        return self._casts[dtype][index]


def solve(transform: Transform, thetas: Tensor, roots: Tensor | None, half: torch.dtype | None = None) -> Solution:
    """E of parameters (B, ...) of one rank, with their Gram roots (B, r, r), outside autograd.

    half: a dtype in which a graph needs E besides its own.
    """
    with torch.no_grad(), no_autocast(thetas.device.type):
        if torch.compiler.is_compiling():
            return _solve_in_graph(transform, thetas, roots, half)
        return Solution(transform, thetas, *_solve(thetas, roots, transform.name), roots)


def _solve_in_graph(transform: Transform, thetas: Tensor, roots: Tensor | None, half: torch.dtype | None) -> Solution:
    # The cast too: a compiler would cast each member where it is used, a launch a layer.
    deltas, saved, cast = torch.ops.loft_rs.solve(thetas, roots, transform.name, half)
    solution = Solution(transform, thetas, deltas, saved, roots)
    if half is not None:
        solution._casts[half] = cast.unbind(0)
    return solution


def _solve(thetas: Tensor, roots: Tensor | None, transform: str) -> tuple[Tensor, Tensor]:
    made = get_transform(transform)
    deltas, saved = made.delta(thetas, made.rank(thetas.shape), kernel=True)
    if roots is not None:
        roots = roots.to(deltas.dtype)
        deltas = roots @ deltas @ roots
    return deltas.contiguous(), saved.contiguous()


def _solve_and_cast(
    thetas: Tensor, roots: Tensor | None, transform: str, half: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    deltas, saved = _solve(thetas, roots, transform)
    return deltas, saved, deltas.new_empty(0) if half is None else deltas.to(half, copy=True)


def _fake_solve(
    thetas: Tensor, roots: Tensor | None, transform: str, half: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    made = get_transform(transform)
    r = made.rank(thetas.shape)
    stack = thetas.shape[: thetas.dim() - len(made.parameter_shape(r))]
    dtype = torch.promote_types(thetas.dtype, torch.float32)
    saved = thetas.new_empty(*stack, *made.saved_shape(r), dtype=dtype)
    deltas = thetas.new_empty(*stack, r, r, dtype=dtype)
    return deltas, saved, deltas.new_empty(0) if half is None else torch.empty_like(deltas, dtype=half)


LIBRARY.define(
    "solve(Tensor thetas, Tensor? roots, str transform, ScalarType? half) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("solve", _solve_and_cast, "CompositeExplicitAutograd")
torch.library.register_fake("loft_rs::solve", _fake_solve, lib=LIBRARY)


def _members(stack: Tensor, indices: Sequence[int]) -> Tensor:
    # Not by a list of indices, which would wait for its own copy to the device.
    return torch.stack([stack[i] for i in indices])


class Deltas(torch.autograd.Function):
    """E of several thetas, so that one batched backward serves them all; a theta whose E nobody
    used gets no gradient.

    What it needs lies on `ctx`, not among the saved tensors: parts of a model may be run backward
    one after the other, as reentrant checkpointing does, and each time it serves those whose
    gradient has arrived.
    """

    @staticmethod
    def forward(ctx, transform: str, deltas: Tensor, saved: Tensor, roots: Tensor | None, *thetas: Tensor):
        ctx.set_materialize_grads(False)
        ctx.transform, ctx.saved, ctx.roots, ctx.dtype = transform, saved, roots, thetas[0].dtype
        return tuple(deltas.unbind(0))

    @staticmethod
    @first_order
    def backward(ctx, *grads: Tensor | None):
        given = [k for k, g in enumerate(grads) if g is not None]
        out: list[Tensor | None] = [None] * len(grads)
        if given:
            saved, roots = ctx.saved, ctx.roots
            if len(given) < len(grads):
                saved, roots = _members(saved, given), None if roots is None else _members(roots, given)
            g = torch.stack([g for g in grads if g is not None])
            with no_autocast(g.device.type):
                if roots is not None:
                    roots = roots.to(g.dtype)
                    g = roots @ g @ roots
                found = get_transform(ctx.transform).gradient(g, saved)
            for k, gradient in zip(given, found.to(ctx.dtype).unbind(0), strict=True):
                out[k] = gradient
        return None, None, None, None, *out


def attach(solution: Solution, indices: Sequence[int], thetas: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """E of the members `indices`, with the gradients of their thetas in one node."""
    deltas, saved, roots = solution.deltas, solution.saved, solution.roots
    if len(indices) < len(deltas):
        deltas, saved = _members(deltas, indices), _members(saved, indices)
        roots = None if roots is None else _members(roots, indices)
    return Deltas.apply(solution.transform.name, deltas, saved, roots, *thetas)


def differentiable_delta(transform: Transform, theta: Tensor, root: Tensor | None) -> Tensor:
    """E (..., r, r) of one theta by plain operations, which autograd may differentiate any number
    of times.
    """
    with no_autocast(theta.device.type):
        d = transform.delta(theta, transform.rank(theta.shape))[0]
        return d if root is None else root.to(d.dtype) @ d @ root.to(d.dtype)
