"""`Blocks`: a product of rotations of disjoint blocks of coordinates, of full rank.

RotateBlocks   Y = X ... F_1^T F_0^T    keeps X (N x n) for the backward pass, once for all factors
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import HALF, first_order, no_autocast, plain
from . import kernels

__all__ = ["Blocks", "RotateBlocks"]


class Blocks(NamedTuple):
    """R = F_0 F_1 ..., each F_i a rotation I + D of every one of n/b disjoint blocks of b
    coordinates.

    `delta`: D (m, n/b, b, b), or (m, 1, b, b) where the blocks of a factor share one.
    `permutations` (m, n), int64: the coordinates of the first block of F_i, of its second, and so
    on; None: blocks of neighbours. `stretch`: permutations move coordinates only inside stretches
    of so many neighbours, in all of them alike; None: anywhere.
    """

    delta: Tensor
    permutations: Tensor | None = None
    stretch: int | None = None

    def apply(self, x: Tensor) -> Tensor:
        """X R^T for rows X (..., n). Differentiable in X and D."""
        return _rotate_blocks(x, *self._wide(x.shape[-1])[:2])

    def adjoint(self, x: Tensor) -> Tensor:
        """X R for rows X (..., n): the transpose of `apply`."""
        delta, permutations, _ = self._wide(x.shape[-1])
        return _rotate_blocks(x, delta.flip(0).mT, None if permutations is None else permutations.flip(0))

    def _wide(self, n: int) -> Blocks:
        """The same R for `RotateBlocks`, which wants few large blocks: neighbouring blocks put
        together, up to `_LEAST_BLOCK`, and all factors multiplied into one where a block of
        `_LARGEST_BLOCK` holds the stretch inside which they act."""
        with no_autocast(self.delta.device.type):
            return self._put_together(n)

    def _put_together(self, n: int) -> Blocks:
        m, _, b, _ = self.delta.shape
        stretch = b if self.permutations is None else self.stretch
        if stretch is None or stretch > max(b, _LARGEST_BLOCK):
            return Blocks(self.delta.expand(m, n // b, b, b), self.permutations)
        sizes = range(max(stretch, _LEAST_BLOCK // stretch * stretch), stretch - 1, -stretch)
        width = next(size for size in sizes if n % size == 0)
        product: Tensor | None = None
        for i, d in enumerate(self.delta):
            eye = torch.eye(width // b, dtype=d.dtype, device=d.device)
            d = d.expand(n // b, b, b).unflatten(0, (n // width, width // b))
            wide = torch.einsum("cgij,gh->cgihj", d, eye).reshape(-1, width, width)
            if self.permutations is not None:
                places = self.permutations[i, :width].argsort()
                wide = wide[:, places][:, :, places]
            product = wide if product is None else product + wide + product @ wide  # (I + D)(I + D') - I
        assert product is not None
        return Blocks(product[None])

    def orthogonality_error(self) -> float:
        """A bound of ||R^T R - I||_2 in float64: the sum over the factors of their largest ||T^T T
        - I||_2, exact for one factor.
        """
        t = self.delta.detach().double() + torch.eye(
            self.delta.shape[-1], dtype=torch.float64, device=self.delta.device
        )
        eye = torch.eye(t.shape[-1], dtype=t.dtype, device=t.device)
        return float(torch.linalg.matrix_norm(t.mT @ t - eye, 2).amax(-1).sum())


# Products of smaller blocks than the first are latency and half-empty loads; of larger ones than
# the second, arithmetic.
_LEAST_BLOCK, _LARGEST_BLOCK = 64, 128


def _by_block(rows: Tensor, b: int) -> Tensor:
    """(blocks, N, b), a view of rows (N, n)."""
    return rows.unflatten(1, (-1, b)).transpose(0, 1)


def _rotate_by_block(rows: Tensor, d: Tensor, order: Tensor | None) -> Tensor:
    """rows (N, n) times blockdiag(I + d), on the columns in the order of `order`."""
    b = d.shape[-1]
    compiling = torch.compiler.is_compiling()
    if not compiling and kernels.rotates(rows, b):
        return kernels.rotate_blocks(rows, d, order)
    blocks = _by_block(rows if order is None else rows.index_select(1, order), b)
    if compiling:  # which cannot write through such a view
        out = torch.baddbmm(blocks, blocks, d).transpose(0, 1).reshape(rows.shape)
    else:
        out = blocks.transpose(0, 1).reshape(rows.shape).clone()
        _by_block(out, b).baddbmm_(blocks, d)
    return out if order is None else out.index_select(1, order.argsort())


def _rotate_by_block_backward(
    g: Tensor, rows: Tensor, d: Tensor, order: Tensor | None, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    """(g blockdiag(I + d), or None; g^T rows block by block, (n/b, b, b), kept in float32) of g and
    rows (N, n).
    """
    b = d.shape[-1]
    if not torch.compiler.is_compiling() and kernels.rotates(rows, b):
        return kernels.rotate_blocks_backward(g, rows, d, order, needs_x)
    left, right = (_by_block(r if order is None else r.index_select(1, order), b) for r in (g, rows))
    half: dict[str, Any] = {"out_dtype": torch.float32} if g.dtype in HALF and g.is_cuda else {}
    return _rotate_by_block(g, d, order) if needs_x else None, torch.bmm(left.mT, right, **half)


class RotateBlocks(torch.autograd.Function):
    """Y = X F_{m-1}^T ... F_0^T with F_i = blockdiag(I + D_i) on coordinates in the order of
    permutation i.

    dX = dY F_0 ... F_{m-1};  dD_i = dY_i^T X_i block by block, X_i and dY_i the rows on either side of F_i. Only X is kept: what lies
    between the factors is computed again, which is one pass over the rows each, where keeping it
    would cost X's size each.
    """

    @staticmethod
    def forward(ctx, x: Tensor, delta: Tensor, permutations: Tensor | None) -> Tensor:
        rows, m = x.reshape(-1, x.shape[-1]), len(delta)
        ctx.orders = [None] * m if permutations is None else list(permutations)
        ctx.blocks, ctx.delta_dtype = list(delta.to(x.dtype)), delta.dtype
        with no_autocast(x.device.type):
            y = rows
            for i in reversed(range(m)):
                y = _rotate_by_block(y, ctx.blocks[i].mT, ctx.orders[i])
        ctx.save_for_backward(rows)
        return y.view(x.shape)

    @staticmethod
    @first_order
    def backward(ctx, g: Tensor):
        (rows,) = ctx.saved_tensors
        m = len(ctx.blocks)
        dx, d_delta = g.reshape(-1, g.shape[-1]), {}
        with no_autocast(g.device.type):
            inputs = [rows]
            for i in reversed(range(1, m)):
                inputs.append(_rotate_by_block(inputs[-1], ctx.blocks[i].mT, ctx.orders[i]))
            for i in range(m):
                needs_x = ctx.needs_input_grad[0] or i + 1 < m
                if ctx.needs_input_grad[1]:
                    rotated, d_delta[i] = _rotate_by_block_backward(
                        dx, inputs.pop(), ctx.blocks[i], ctx.orders[i], needs_x
                    )
                    dx = dx if rotated is None else rotated
                elif needs_x:
                    dx = _rotate_by_block(dx, ctx.blocks[i], ctx.orders[i])
        return (
            dx.view(g.shape) if ctx.needs_input_grad[0] else None,
            torch.stack([d_delta[i] for i in range(m)]).to(ctx.delta_dtype) if ctx.needs_input_grad[1] else None,
            None,
        )


def _rotate_blocks(x: Tensor, delta: Tensor, permutations: Tensor | None) -> Tensor:
    if not plain():
        return RotateBlocks.apply(x, delta, permutations)
    rows = x.reshape(-1, x.shape[-1])
    with no_autocast(x.device.type):
        for i in reversed(range(len(delta))):
            order = None if permutations is None else permutations[i]
            blocks = _by_block(rows if order is None else rows.index_select(1, order), delta.shape[-1])
            rows = torch.baddbmm(blocks, blocks, delta[i].mT.to(x.dtype)).transpose(0, 1).reshape(rows.shape)
            rows = rows if order is None else rows.index_select(1, order.argsort())
    return rows.view(x.shape)
