"""Factors: what one adapter does to a weight, R = I + P E P^T with E = C D C (arXiv 2605.11872).

`LowRank` is the one kind with a low-rank form: an orthonormal basis P and a small matrix D = T - I. A P that was ever rounded to
half precision is not orthonormal to better than 1e-3; the Gram root C = (P^T P)^{-1/2} folded into E makes R orthogonal again to
the rounding of E, with no second copy of P.

The two `autograd.Function`s save z = X P (N x r) and never X:

    RotateActivations   Y = X R^T                      works before (input side) or after (output side) any base layer
    AddLowRank          Y = X W^T + b + (X L) E^T Rt^T  the adapter's term first, the base product accumulated on it; for one layer or
                                                        for several that read the same X
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .inspection import ORTHONORMAL

__all__ = [
    "AddInputs",
    "AddLowRank",
    "Joined",
    "LowRank",
    "RotateActivations",
    "gram_root",
    "lay_down",
    "lay_down_gradients",
    "no_autocast",
]

_HALF = (torch.bfloat16, torch.float16)


def gram_root(basis: Tensor) -> Tensor | None:
    """C = (P^T P)^{-1/2} (r x r, in float32, or float64 as P is) of a basis (n x r); None where P is orthonormal as it stands.

    What P is decides, not its dtype: a P saved in half precision and loaded in full precision needs C as before.
    """
    p = basis.detach().double()
    values, vectors = torch.linalg.eigh(p.mT @ p)
    lowest, apart = torch.stack([values.min(), (values - 1).abs().max()]).tolist()
    # An unset support is all zero, and its adapter is the identity whatever C is.
    if lowest <= 0 or apart <= ORTHONORMAL:
        return None
    return ((vectors * values.rsqrt()) @ vectors.mT).to(torch.promote_types(basis.dtype, torch.float32))


class LowRank(NamedTuple):
    """R = I + P E P^T. `basis`: P (n x r). `delta`: E (r x r), already folded with the Gram root where P needs it."""

    basis: Tensor
    delta: Tensor

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        """X R^T for rows X (..., n): what the input of W = W0 R sees. Differentiable in X and E; saves z = X P only."""
        return RotateActivations.apply(x, self.delta, self.basis)

    def adjoint(self, x: Tensor) -> Tensor:
        """X R for rows X (..., n): the transpose of `apply`; also W R for a weight W (m x n)."""
        return RotateActivations.apply(x, self.delta.mT, self.basis)

    def orthogonality_error(self) -> float:
        """||R^T R - I||_2, computed in float64 from the stored P and E through the r x r Gram matrix."""
        p, e = self.basis.detach().double(), self.delta.detach().double()
        values, vectors = torch.linalg.eigh(p.mT @ p)
        half = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
        k = torch.eye(self.rank, dtype=e.dtype, device=e.device) + half @ e @ half
        return float(torch.linalg.matrix_norm(k.mT @ k - torch.eye(self.rank, dtype=e.dtype, device=e.device), 2))


def no_autocast(device_type: str) -> AbstractContextManager:
    """Autocast switched off, at no cost where it is off already."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _small_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b (r x r), accumulated over the tokens and kept in float32: a half-precision result would round the gradient."""
    if a.dtype in _HALF and a.is_cuda:
        return torch.mm(a.mT, b, out_dtype=torch.float32)
    return a.mT @ b


class RotateActivations(torch.autograd.Function):
    """Y = X + z E^T P^T with z = X P.  dE = (dY P)^T z;  dX = dY + (dY P) E P^T.

    All of it in X's own dtype, also under autocast: rounding X first would round a small rotation away, and the base layer would no
    longer be given what it is given without the adapter.
    """

    @staticmethod
    def forward(ctx, x: Tensor, delta: Tensor, basis: Tensor) -> Tensor:
        rows, p, e = x.reshape(-1, x.shape[-1]), basis.to(x.dtype), delta.to(x.dtype)
        with no_autocast(x.device.type):
            z = rows @ p
            # The output is no view of anything, here and in `AddLowRank`, so that what follows may change it in place.
            y = x.clone(memory_format=torch.contiguous_format)
            y.view(-1, y.shape[-1]).addmm_(z @ e.mT, p.mT)
        ctx.save_for_backward(z, e, basis)
        ctx.delta_dtype = delta.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):
        z, e, basis = ctx.saved_tensors
        rows, p = g.reshape(-1, g.shape[-1]), basis.to(g.dtype)
        with no_autocast(g.device.type):
            gz = rows @ p
            d_delta = _small_product(gz, z).to(ctx.delta_dtype) if ctx.needs_input_grad[1] else None
            dx = torch.addmm(rows, gz @ e, p.mT).view(g.shape) if ctx.needs_input_grad[0] else None
        return dx, d_delta, None


class AddInputs(NamedTuple):
    """What `AddLowRank` needs of one layer, all in the dtype of the product: W (m x n), b or None, left (n x r), right (m x r)."""

    weight: Tensor
    bias: Tensor | None
    left: Tensor
    right: Tensor


class Joined(NamedTuple):
    """Layers that read one X: their inputs, all `left` side by side (n x sum r), and each layer's columns in it.

    Layers with one transform in common have the same columns.
    """

    layers: tuple[AddInputs, ...]
    left: Tensor
    columns: tuple[slice, ...]

    @classmethod
    def of(cls, layers: tuple[AddInputs, ...]) -> Joined:
        lefts: list[Tensor] = []
        columns, width = [], 0
        for layer in layers:
            if any(layer.left is left for left in lefts):
                columns.append(columns[-1])
                continue
            lefts.append(layer.left)
            columns.append(slice(width, width + layer.left.shape[1]))
            width += layer.left.shape[1]
        return cls(layers, lefts[0] if len(lefts) == 1 else torch.cat(lefts, 1), tuple(columns))


def lay_down(
    x: Tensor, joined: Joined, casts: list[Tensor], identities: list[bool]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """(Y_i, z) of `AddLowRank`.

    The term is laid down first and the base product accumulates on it in the matrix unit's float32: adding a small term to a Y that
    is already rounded to bf16 loses most of it. Where E is known to be 0 (`identities`), the base layer's own product gives its own bits.
    """
    rows = x.reshape(-1, x.shape[-1])
    z = rows @ joined.left
    ys = []
    for layer, columns, e, identity in zip(joined.layers, joined.columns, casts, identities, strict=True):
        if identity:
            ys.append(torch.nn.functional.linear(x, layer.weight, layer.bias))
            continue
        y = x.new_empty(*x.shape[:-1], layer.weight.shape[0])
        flat = y.view(-1, y.shape[-1])
        t = (z if len(joined.layers) == 1 else z[:, columns]) @ e.mT
        if layer.bias is None:
            torch.mm(t, layer.right.mT, out=flat)
        else:
            torch.addmm(layer.bias, t, layer.right.mT, out=flat)
        flat.addmm_(rows, layer.weight.mT)
        ys.append(y)
    return tuple(ys), z


def _small_gradients(given, z, joined, casts, needs, d_deltas) -> Tensor | None:
    """u (N x sum r), the blocks (dY_i right_i) E_i side by side; fills in dE_i. Layers with one transform share one block and one dE."""
    u = (torch.empty_like(z) if len(given) == len(d_deltas) else torch.zeros_like(z)) if needs[0] else None
    blocks: list[tuple[slice, int, Tensor]] = []
    for i, rows in given:
        right, columns = joined.layers[i].right, joined.columns[i]
        same = next((gr for block, _, gr in blocks if block == columns), None)
        if same is None:
            blocks.append((columns, i, rows @ right))
        else:
            same.addmm_(rows, right)
    for columns, i, gr in blocks:
        if needs[1 + i]:
            d_deltas[i] = _small_product(gr, z[:, columns])
        if u is not None:
            torch.mm(gr, casts[i], out=u[:, columns])
    return u


def lay_down_gradients(
    grads: tuple[Tensor | None, ...],
    z: Tensor,
    joined: Joined,
    casts: list[Tensor],
    needs: list[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(dX, dE_i) of `AddLowRank` from dY_i; `needs` says whether dX and each dE_i are wanted."""
    d_deltas: list[Tensor | None] = [None] * len(grads)
    given = [(i, g.reshape(-1, g.shape[-1])) for i, g in enumerate(grads) if g is not None]
    if not given:
        return None, d_deltas
    if len(grads) == 1:
        gr = given[0][1] @ joined.layers[0].right
        d_deltas[0] = _small_product(gr, z) if needs[1] else None
        u = gr @ casts[0] if needs[0] else None
    else:
        u = _small_gradients(given, z, joined, casts, needs, d_deltas)
    if u is None:
        return None, d_deltas
    dx = u @ joined.left.mT
    for i, rows in given:
        dx.addmm_(rows, joined.layers[i].weight)
    shape = next(g for g in grads if g is not None).shape
    return dx.view(*shape[:-1], dx.shape[1]), d_deltas


class AddLowRank(torch.autograd.Function):
    """Y_i = X W_i^T + b_i + z_i E_i^T right_i^T with z = X left, for the frozen W_i (m_i x n) and b_i of layers that read one X.

    Input side (W = W0 R): left = P, right = W0 P. Output side (W = R W0): left = W0^T P, right = P.
    dE_i = (dY_i right_i)^T z_i;  dX = sum_i (dY_i right_i) E_i left_i^T, and each dY_i W_i is accumulated onto it, which spares the
    additions of one dX a layer.

    casts: each E_i in X's dtype; deltas: the same with a gradient. Returns one Y, or a tuple of them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, joined: Joined, casts: list[Tensor], identities: list[bool], *deltas: Tensor):
        ys, z = lay_down(x, joined, casts, identities)
        # Only z is saved; what is frozen or r x r lies on ctx.
        ctx.save_for_backward(z)
        ctx.set_materialize_grads(False)
        ctx.joined, ctx.casts, ctx.dtypes = joined, casts, [delta.dtype for delta in deltas]
        return ys[0] if len(ys) == 1 else ys

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None):
        (z,) = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
        with no_autocast(z.device.type):
            dx, d_deltas = lay_down_gradients(grads, z, ctx.joined, ctx.casts, needs)
        d_deltas = [None if d is None else d.to(dtype) for d, dtype in zip(d_deltas, ctx.dtypes, strict=True)]
        return dx, None, None, None, *d_deltas
