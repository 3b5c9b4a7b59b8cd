"""`LowRank`: R = I + P E P^T, its product with a frozen one, and Householder reflections
(arXiv 2605.11872).

E = C D C has an orthonormal basis P and a small matrix D = T - I. A P that was ever rounded to half
precision is not orthonormal to better than 1e-3; the Gram root C = (P^T P)^{-1/2} multiplied into E
makes R orthogonal again to the rounding of E, with no second copy of P.

    RotateActivations   Y = X R^T    keeps z = X P (N x r) for the backward pass, and X only where P is trained

Where `_torch.plain` asks for it, the same formulas run as plain operations, whose graph keeps its
inputs and can be differentiated again.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .._format import ORTHONORMAL
from .._torch import first_order, no_autocast, plain, small_product

__all__ = ["Frozen", "LowRank", "RotateActivations", "gram_root", "gram_root_in_graph", "householder"]


def gram_root(basis: Tensor) -> Tensor | None:
    """C = (P^T P)^{-1/2} (r x r, in float32, or float64 as P is) of a basis (n x r); None where P
    is orthonormal as it stands.

    What P is decides, not its dtype: a P saved in half precision and loaded in full precision needs
    C as before.
    """
    p = basis.detach().double()
    values, vectors = torch.linalg.eigh(p.mT @ p)
    lowest, apart = torch.stack([values.min(), (values - 1).abs().max()]).tolist()
    # An unset support is all zero, and its adapter is the identity whatever C is.
    if lowest <= 0 or apart <= ORTHONORMAL:
        return None
    return ((vectors * values.rsqrt()) @ vectors.mT).to(torch.promote_types(basis.dtype, torch.float32))


def gram_root_in_graph(basis: Tensor) -> Tensor:
    """`gram_root` by plain operations that look at no number: six Newton-Schulz steps, each
    squaring the distance from the root.

    For ||P^T P - I||_2 of at most 1/4 the last step's is below 1e-15; of a P that is orthonormal
    the root is I to rounding.
    """
    p = basis.float() if basis.device.type == "mps" else basis.double()
    eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    gram, root = p.mT @ p, eye
    for _ in range(6):
        step = (3 * eye - root @ gram) / 2
        gram, root = gram @ step, step @ root
    return root.to(torch.promote_types(basis.dtype, torch.float32))


class LowRank(NamedTuple):
    """R = I + P E P^T. `basis`: P (n x r). `delta`: E (r x r), already folded with the Gram root
    where P needs it.
    """

    basis: Tensor
    delta: Tensor

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        """X R^T for rows X (..., n): what the input of W = W0 R sees. Differentiable in X, E and
        P.
        """
        if plain():
            with no_autocast(x.device.type):
                p, e = self.basis.to(x.dtype), self.delta.to(x.dtype)
                return x + ((x @ p) @ e.mT) @ p.mT
        if torch.is_grad_enabled():
            return RotateActivations.apply(x, self.delta, self.basis)
        return _rotate_activations(x, self.delta.to(x.dtype), self.basis.to(x.dtype))[0]

    def adjoint(self, x: Tensor) -> Tensor:
        """X R for rows X (..., n): the transpose of `apply`; also W R for a weight W (m x n)."""
        return self._replace(delta=self.delta.mT).apply(x)

    def reduced(self, tolerance: float) -> LowRank:
        """The same R with an orthonormal basis of the directions that it turns, in float64: [P,
        E] -> [Q V, V^T (L E L^T) V] with P = Q L.

        P may have any columns, also dependent ones and more than n: the rank falls to at most n. V
        spans what E' = L E L^T, and its transpose, move by more than `tolerance` (a singular value
        of [E', E'^T]); what is left out changes R by no more than that.
        """
        device = "cpu" if self.basis.device.type == "mps" else self.basis.device
        q, triangle = torch.linalg.qr(self.basis.detach().to(device, torch.float64))
        e = triangle @ self.delta.detach().to(device, torch.float64) @ triangle.mT
        left, strengths, _ = torch.linalg.svd(torch.cat([e, e.mT], 1), full_matrices=False)
        turned = left[:, strengths > tolerance]
        return LowRank(q @ turned, turned.mT @ e @ turned)

    def orthogonality_error(self) -> float:
        """||R^T R - I||_2, computed in float64 from the stored P and E through the r x r Gram
        matrix.
        """
        p, e = self.basis.detach().double(), self.delta.detach().double()
        values, vectors = torch.linalg.eigh(p.mT @ p)
        half = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
        k = torch.eye(self.rank, dtype=e.dtype, device=e.device) + half @ e @ half
        return float(torch.linalg.matrix_norm(k.mT @ k - torch.eye(self.rank, dtype=e.dtype, device=e.device), 2))


class Frozen(NamedTuple):
    """A frozen R_f = I + P_f E_f P_f^T beside the trained R = I + P E P^T of one layer: their
    product is one `LowRank` on B = [P_f, P].

        input side   W = W0 R_f R     M = [[E_f, K E], [0, E]]    K = E_f P_f^T P
        output side  W = R R_f W0     M = [[E_f, 0], [E K, E]]    K = P^T P_f E_f

    so that each placement, merging and the LoRA form see a single factor. `basis`: B (n x
    (r_f + r)); `delta`: E_f; `cross`: K.
    """

    basis: Tensor
    delta: Tensor
    cross: Tensor
    side: str

    @classmethod
    def of(cls, frozen: LowRank, basis: Tensor, side: str, dtype: torch.dtype | None = None) -> Frozen:
        """With both bases in `dtype` (None: the wider of the two), E_f with the Gram root that P_f
        needs in it. basis: P (n x r).
        """
        dtype = dtype or torch.promote_types(frozen.basis.dtype, basis.dtype)
        pf, p, e = frozen.basis.to(dtype), basis.to(dtype), frozen.delta.double()
        root = gram_root(pf)
        e = e if root is None else root.double() @ e @ root.double()
        cross = pf.double().mT @ p.double()
        cross = e @ cross if side == "input" else cross.mT @ e
        kept = frozen.delta.dtype
        return cls(torch.cat([pf, p], 1), e.to(kept), cross.to(kept), side)

    def times(self, delta: Tensor) -> Tensor:
        """M ((r_f + r) x (r_f + r)) for an E (r x r), differentiable in it."""
        e, ef, cross = delta, self.delta.to(delta.dtype), self.cross.to(delta.dtype)
        if self.side == "input":
            above = torch.cat([ef, cross @ e], 1)
            below = torch.cat([e.new_zeros(e.shape[0], ef.shape[0]), e], 1)
        else:
            above = torch.cat([ef, e.new_zeros(ef.shape[0], e.shape[0])], 1)
            below = torch.cat([e @ cross, e], 1)
        return torch.cat([above, below])


@functools.cache
def _pairs(r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The symmetric orthogonal matrix that takes columns 2k and 2k + 1 to their sum and difference
    over sqrt 2.
    """
    # Kept, as making it on a GPU waits for the device; and not born in inference mode, where
    # training could not use it.
    with torch.inference_mode(False):
        turn = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=dtype) * 0.5**0.5
        single = [torch.ones(1, 1, dtype=dtype)] * (r % 2)
        return torch.block_diag(*[turn] * (r // 2), *single).to(device)


def householder(u: Tensor, *, reflection: bool = False) -> LowRank:
    """R = H_0 H_1 ... H_{r-1} with H_i = I - 2 u_i u_i^T / |u_i|^2 (HRA, arXiv 2405.17484), for U
    (n x r); differentiable.

    With the columns of U scaled to norm 1, R = I - U S^{-1} U^T, S = I/2 + striu(U^T U). Columns
    that are equal in pairs give I. The basis returned is (u_0 + u_1, u_0 - u_1, u_2 + u_3,
    ...) / sqrt 2: where pairs have moved a little, their difference survives half precision, and
    the difference of two nearly equal z would not. reflection: R = I - 2 Q Q^T instead, Q an
    orthonormal basis of U's columns, which must be independent (HRA's `apply_GS`).
    """
    r, kept = u.shape[1], u.dtype
    # In float64: the triangular solve would lose float32's last digits, and with them the
    # orthogonality.
    u = u.to(torch.float32 if u.device.type == "mps" else torch.float64)
    eye = torch.eye(r, dtype=u.dtype, device=u.device)
    if reflection:
        return LowRank(torch.linalg.qr(u)[0].to(kept), -2 * eye.to(kept))
    unit = u / u.norm(dim=0)
    e = torch.linalg.solve_triangular(eye / 2 + (unit.mT @ unit).triu(1), -eye, upper=True)
    pairs = (_pairs.__wrapped__ if plain() else _pairs)(r, u.dtype, u.device)  # a tracer's tensors must not be kept
    return LowRank((unit @ pairs).to(kept), (pairs @ e @ pairs).to(kept))


def _rotate_activations(x: Tensor, e: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """(Y, z) of `RotateActivations`."""
    with no_autocast(x.device.type):
        z = x.reshape(-1, x.shape[-1]) @ p
        # The output is no view of anything, here and in `add_low_rank.py`, so that what follows may
        # change it in place.
        y = x.clone(memory_format=torch.contiguous_format)
        y.view(-1, y.shape[-1]).addmm_(z @ e.mT, p.mT)
    return y, z


class RotateActivations(torch.autograd.Function):
    """Y = X + z E^T P^T with z = X P.  dE = (dY P)^T z;  dX = dY + (dY P) E P^T;  dP = X^T (dY P E) + dY^T (z E^T).

    All of it in X's own dtype, also under autocast: rounding X first would round a small rotation
    away, and the base layer would no longer be given what it is given without the adapter.
    """

    @staticmethod
    def forward(ctx, x: Tensor, delta: Tensor, basis: Tensor) -> Tensor:
        e = delta.to(x.dtype)
        y, z = _rotate_activations(x, e, basis.to(x.dtype))
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(z, e, basis, rows if ctx.needs_input_grad[2] else None)
        ctx.delta_dtype = delta.dtype
        return y

    @staticmethod
    @first_order
    def backward(ctx, g: Tensor):
        z, e, basis, x = ctx.saved_tensors
        rows, p = g.reshape(-1, g.shape[-1]), basis.to(g.dtype)
        with no_autocast(g.device.type):
            gz = rows @ p
            d_delta = small_product(gz, z).to(ctx.delta_dtype) if ctx.needs_input_grad[1] else None
            u = gz @ e
            dx = torch.addmm(rows, u, p.mT).view(g.shape) if ctx.needs_input_grad[0] else None
            d_basis = None
            if x is not None:
                d_basis = (small_product(x, u) + small_product(rows, z @ e.mT)).to(basis.dtype)
        return dx, d_delta, d_basis


# Products of smaller blocks than the first are latency and half-empty loads; of larger ones than
# the second, arithmetic.
_LEAST_BLOCK, _LARGEST_BLOCK = 64, 128
