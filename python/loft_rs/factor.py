"""Factors: what one adapter does to a weight, R = I + P E P^T with E = C D C (arXiv 2605.11872).

`LowRank` is the one kind with a low-rank form: an orthonormal basis P and a small matrix D = T - I. A P that was ever rounded to
half precision is not orthonormal to better than 1e-3; the Gram root C = (P^T P)^{-1/2} folded into E makes R orthogonal again to
the rounding of E, with no second copy of P.

The two `autograd.Function`s save z = X P (N x r) and never X:

    RotateActivations   Y = X R^T                      works before (input side) or after (output side) any base layer
    AddLowRank          Y = X W^T + b + (X L) E^T Rt^T  the adapter's term first, the base product accumulated on it
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .inspection import ORTHONORMAL

__all__ = ["AddLowRank", "LowRank", "RotateActivations", "gram_root"]

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
        with torch.autocast(x.device.type, enabled=False):
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
        with torch.autocast(g.device.type, enabled=False):
            gz = rows @ p
            d_delta = _small_product(gz, z).to(ctx.delta_dtype) if ctx.needs_input_grad[1] else None
            dx = torch.addmm(rows, gz @ e, p.mT).view(g.shape) if ctx.needs_input_grad[0] else None
        return dx, d_delta, None


class AddLowRank(torch.autograd.Function):
    """Y = X W^T + b + z E^T right^T with z = X left, for a frozen W (m x n) and b.

    Input side (W = W0 R): left = P, right = W0 P. Output side (W = R W0): left = W0^T P, right = P.
    dE = (dY right)^T z;  dX = (dY right) E left^T, and dY W is accumulated onto it.

    The term is laid down first and the base product accumulates on it in the matrix unit's float32: adding a small term to a Y that
    is already rounded to bf16 loses most of it. Where E is known to be 0 (`identity`), the base layer's own product gives its own bits.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        delta: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        identity: bool,
    ) -> Tensor:
        rows, e = x.reshape(-1, x.shape[-1]), delta.to(x.dtype)
        z = rows @ left
        if identity:
            y = torch.nn.functional.linear(x, weight, bias)
        else:
            y = (z.view(*x.shape[:-1], left.shape[1]) @ e.mT) @ right.mT
            if bias is not None:
                y += bias
            y.view(-1, y.shape[-1]).addmm_(rows, weight.mT)
        ctx.save_for_backward(z, e, weight, left, right)
        ctx.delta_dtype = delta.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):
        z, e, weight, left, right = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])
        with torch.autocast(g.device.type, enabled=False):
            gr = rows @ right
            d_delta = _small_product(gr, z).to(ctx.delta_dtype) if ctx.needs_input_grad[1] else None
            dx = None
            if ctx.needs_input_grad[0]:
                dx = (gr @ e) @ left.mT
                dx.addmm_(rows, weight)
                dx = dx.view(*g.shape[:-1], weight.shape[1])
        return dx, d_delta, None, None, None, None, None
