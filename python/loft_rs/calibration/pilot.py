"""Pilots: supports from what a short run of low-rank training changes.

For a few Adam steps every layer computes y + (x A^T) B^T beside what it has, and so becomes
W = W0 + B A (of a refreshed adapter W_cur + B A). On the input side A (k x n) starts at zero and B
(m x k) at random, N(0, 1/k): the reverse of LoRA's start, so that the row space of B A is all
learnt. Then

    P = the top r right singular vectors of B A        (output side: A drawn, B learnt, and the left ones)

of layers that are tied of their changes B A stacked. With A^T = Q R (n x k) and B = U L, U
orthonormal, B A = U (L R^T) Q^T: P = Q V with V the right singular vectors of the k x k matrix L
R^T, in float64. Nothing of the pilot is left in the model, but that a kept one is where its
transform starts (`start.py`).

To first order a rotation adds W0 P A P^T: it reads span(P), and what it writes is W0's image of
that same span. With `Pilot(halves=True)` a half of P is there to be written to,

    P = [V, Y],  V = v_1, ..., v_h,  Y orthonormal, spans what (W0^T W0 + c I)^{-1} W0^T u_i has outside V,  c = ||W0||_F^2 / (100 n)

with h = r - r//2 and i <= r//2, of B A = sum s_i u_i v_i^T: W0 takes these partners nearly to u_i
(c leaves out what W0 hardly reaches), so that B A's strongest terms are nearly W0 Y M V^T for some
M, which is what a transform in halves makes, less a transposed term. On the output side of (B A)^T
and W0^T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._torch import no_autocast
from ..layer.base_layer import dense_weight
from ..layer.merging import dense_or_raise
from ..linalg import NonFiniteError, orthonormalize
from ..sketch.products import as_it_is, inner_product, product
from ..support.methods import PILOT_RANK, Pilot
from ..support.support import Support

if TYPE_CHECKING:
    from ..layer import AdaptedLinear

__all__ = ["LowRankChange", "PilotTap", "changes_for", "partners", "some_gradient"]

DAMPING = 1e-2
_BY_WEIGHTS = "halves needs dense weights, to find partners by"


class _AddChange(torch.autograd.Function):
    """y + (x D) U^T, in y's dtype, of y (N x m), x (N x n) and skinny D (n x k) and U (m x k).

    The products, and so the gradients of D and U, are `products.product`'s: float32 or wider, since
    the factors are float32, a first step's entries are as small as the rate, and float16 could
    overflow; bfloat16 on a GPU, where float32 would cost as much as the base does, is multiplied as
    it is and summed in float32. The sum is rounded to y's dtype once.
    """

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        ctx.half = as_it_is(y)
        with no_autocast(y.device.type):
            z = _as(product(_as(x, ctx.half), down), ctx.half)
            ctx.save_for_backward(x, z, down, up)
            return product(z, up.mT).add_(y).to(y.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        x, z, down, up = ctx.saved_tensors
        with no_autocast(gradient.device.type):
            dy = _as(gradient, ctx.half)
            dz = _as(product(dy, up), ctx.half)
            dx = product(dz, down.mT).to(x.dtype) if ctx.needs_input_grad[1] else None
            return gradient, dx, inner_product(_as(x, ctx.half), dz), inner_product(dy, z)


def _as(tensor: Tensor, half: bool) -> Tensor:
    return tensor.bfloat16() if half else tensor


class LowRankChange:
    """W - W0 of one layer, and of those tied to it, as a pilot trains it.

    Of each of them `learnt` (n x k), which starts at zero, and `drawn` (m x k): A^T and B; on the
    output side B and A^T.
    """

    tap_input = True

    def __init__(
        self, layer: AdaptedLinear, adapter: str, rank: int | None, draw: torch.Generator | None, home: torch.device
    ):
        self.side, self.rank = layer.adapters[adapter].side, layer.adapters[adapter].rank
        self.layers, self.read = layer.adapters[adapter].tied_layers, _read(layer, adapter)
        dtype = torch.promote_types(layer.adapters[adapter].support.dtype, torch.float32)
        self.learnt: list[Tensor] = []
        self.drawn: list[Tensor] = []
        for each in self.layers:
            own, other = (each.support_width(s) for s in (self.side, "output" if self.side == "input" else "input"))
            k = min(max(PILOT_RANK, self.read) if rank is None else rank, own, other)
            drawn = torch.randn(other, k, generator=draw, device="meta" if draw is None else "cpu") / k**0.5
            self.drawn.append(drawn.to(home, dtype).requires_grad_())
            self.learnt.append(torch.zeros(own, k, dtype=dtype, device=home, requires_grad=True))

    @property
    def factors(self) -> list[Tensor]:
        """What is trained."""
        return [*self.learnt, *self.drawn]

    def add(self, y: Tensor, x: Tensor, part: int) -> Tensor:
        """y (..., m) and what the change of the layer `part` makes of x (..., n)."""
        return self.add_factors(y, x, self.learnt[part], self.drawn[part])

    def add_factors(self, y: Tensor, x: Tensor, learnt: Tensor, drawn: Tensor) -> Tensor:
        """As `add`, of these factors."""
        down, up = (learnt, drawn) if self.side == "input" else (drawn, learnt)
        # Rows, and y's own shape again outside: what follows the layer may change it in place.
        rows = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (y, x))
        return _AddChange.apply(*rows, down, up).view(y.shape)

    def support(self, seed: int) -> Support | None:
        """P (n x r) and what it, in halves V, captures of ||B A||_F^2; None where nothing was
        learnt.
        """
        learnt, drawn = ([t.detach().double().cpu().numpy() for t in each] for each in (self.learnt, self.drawn))
        q, r = np.linalg.qr(np.hstack(learnt))
        ends = np.cumsum([a.shape[1] for a in learnt])
        parts = list(zip(drawn, np.split(r, ends[:-1], axis=1), strict=True))
        core = np.vstack([np.linalg.qr(b, mode="r") @ part.T for b, part in parts])
        if not core.any():
            return None
        _, values, v = np.linalg.svd(core)
        squares, last = np.square(values / values[0]), values[self.read - 1]
        following = values[self.read] if len(values) > self.read else math.nan
        basis, strengths = q @ v[: self.read].T, values[: self.read].copy()
        if self.read < self.rank:
            # u_i s_i: the lengths of what partners are of do not matter, but where s_i is zero.
            written = [b @ (part.T @ v[: self.rank - self.read].T) for b, part in parts]
            basis = self._with_partners(basis, np.vstack(written))
            strengths = np.concatenate([strengths, values[: self.rank - self.read]])  # a partner has its direction's
        return Support(
            basis=np.ascontiguousarray(basis, dtype=np.float32),
            energy=min(1.0, float(squares[: self.read].sum() / squares.sum())),
            energy_stderr=0.0,
            values=strengths,
            residuals=np.full(self.rank, math.nan),
            gap=float((last - following) / last) if last > 0 else math.nan,
            passes=0,
            seconds=math.nan,
            method="pilot",
            side=self.side,
            seed=seed,
        )

    def weight(self) -> Tensor:
        """W0, of tied layers stacked (m x n), on the output side its transpose; float64, on its own
        device (MPS: on the CPU).
        """
        weights = [dense_or_raise(layer, "a pilot in halves, or that is kept,").detach() for layer in self.layers]
        weight = torch.cat(weights) if self.side == "input" else weights[0].mT
        return weight.cpu().double() if weight.device.type == "mps" else weight.double()

    def times(self, p: Tensor) -> Tensor:
        """B A P, of tied layers stacked (m x r), on the output side (B A)^T P."""
        pairs = zip(self.drawn, self.learnt, strict=True)
        return torch.cat([drawn.detach().to(p) @ (learnt.detach().to(p).mT @ p) for drawn, learnt in pairs])

    def size(self) -> float:
        """||B A||_F^2."""
        pairs = zip(self.drawn, self.learnt, strict=True)
        grams = [[f.detach().double().mT @ f.detach().double() for f in pair] for pair in pairs]
        return float(sum((a * b).sum() for a, b in grams))

    def _with_partners(self, v: np.ndarray, u: np.ndarray) -> np.ndarray:
        """[V, Y] (n x r) of V and the u_i that Y's columns are to be partners of."""
        y = partners(self.weight(), torch.from_numpy(u)).cpu().numpy()
        lengths = np.linalg.norm(y, axis=0)
        return orthonormalize(np.hstack([v, y / np.where(lengths > 0, lengths, 1.0)]))

    # -- what `memory.MemorySurvey` asks of it ----------------------------------------------------

    def on_forward(self, x: Tensor, y0: Tensor | None) -> list[Tensor]:
        """What the forward keeps for the backward: X, and its product."""
        k, dtype = max(a.shape[1] for a in self.learnt), self.learnt[0].dtype
        return [x, x.new_empty(*x.shape[:-1], k, dtype=dtype)]

    def gaussians(self) -> list[Tensor]:
        return []

    def held(self) -> int:
        """Bytes of the factors, of their gradients, of Adam's two moments, and of what Adam makes
        and drops.
        """
        return 5 * sum(factor.nbytes for factor in self.factors)

    def workspace(self, rows: int, dtype: torch.dtype, device: str, offload: bool) -> int:
        tall = max(len(factor) for factor in self.factors)
        k, size = max(a.shape[1] for a in self.learnt), self.learnt[0].dtype.itemsize
        own, other = len(self.learnt[0]), sum(len(drawn) for drawn in self.drawn)
        # For partners W0 in float64 beside the stack of tied ones, and the Gram matrix with its
        # factor.
        solve = 16 * (own * other + min(own, other) ** 2) if self.read < self.rank else 0
        # The change, its input or gradient in float32, and the sum in the layer's dtype.
        return max(solve, rows * tall * (2 * size + dtype.itemsize) + 2 * rows * k * size)


@torch.no_grad()
def partners(weight: Tensor, images: Tensor) -> Tensor:
    """Y = (W^T W + c I)^{-1} W^T U (n x k), nearly W^+ U, of W (m x n) and U (m x k), float64 on
    W's device.

    c = ||W||_F^2 / (100 n), so that Y's directions do not depend on W's scale. Of W = 0 it is zero.
    """
    w = weight.double()
    u, (m, n) = images.to(w), w.shape
    wide = m < n  # (W^T W + c I)^{-1} W^T = W^T (W W^T + c I)^{-1}: whichever is smaller is solved
    gram = w @ w.mT if wide else w.mT @ w
    c = DAMPING * gram.trace() / n
    gram.diagonal().add_(torch.where(c > 0, c, 1.0))
    factor = torch.linalg.cholesky(gram)
    return w.mT @ torch.cholesky_solve(u, factor) if wide else torch.cholesky_solve(w.mT @ u, factor)


def _read(layer: AdaptedLinear, adapter: str) -> int:
    """How many of the v_i a support has; the rest of its rank are partners."""
    return layer.adapters[adapter].first_half or layer.adapters[adapter].rank


class PilotTap:
    """What a layer runs in place of its adapted forward during a pilot. part: which of the tied
    layers it is.
    """

    def __init__(self, change: LowRankChange, adapter: str, part: int):
        self.change, self.adapter, self.part = change, adapter, part

    def __call__(self, layer: AdaptedLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.change.add(layer.at_identity(x, self.adapter, *args, **kwargs), x, self.part)


def changes_for(
    layers: Mapping[Any, AdaptedLinear], adapter: str, pilot: Pilot, seed: int | None
) -> dict[Any, LowRankChange]:
    """The changes that a pilot starts from: the same on every process and device. seed: None for
    their shapes alone.

    ValueError where the pilot's rank is below the adapter's, in halves the first one's. TypeError
    where partners need dense weights.
    """
    most = max(_read(layer, adapter) for layer in layers.values())
    halved = [name for name, layer in layers.items() if _read(layer, adapter) < layer.adapters[adapter].rank]
    dense, why = (list(layers), "keep needs dense weights, to start from") if pilot.keep else (halved, _BY_WEIGHTS)
    if pilot.rank is not None and most > pilot.rank:
        what = "half the adapter's" if halved else "the adapter's"
        raise ValueError(
            f"pilot must have a rank of at least {what}, which is {most}, got {pilot.rank}; None takes what is needed"
        )
    for name in dense:
        for each in layers[name].adapters[adapter].tied_layers:
            if dense_weight(base := each.get_base_layer()) is None:
                raise TypeError(
                    f"{why}, but that of {name}, a {type(base).__name__}, is quantised or sharded; calibrate before fully_shard, or "
                    f"use Pilot() without {why.split()[0]}"
                )
    draw = None if seed is None else torch.Generator().manual_seed(seed)
    meta = torch.device("meta")
    return {
        name: LowRankChange(
            layer, adapter, pilot.rank, draw, meta if draw is None else layer.adapters[adapter].support.device
        )
        for name, layer in layers.items()
    }


def some_gradient(changes: Mapping[Any, LowRankChange], where: str) -> bool:
    """Whether a step gave any layer a gradient. NonFiniteError where one is NaN or Inf; the sums
    that tell are read at once.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    for change in changes.values():
        for factor in change.factors:
            if factor.grad is not None:
                sums.setdefault(factor.device, []).append(factor.grad.sum())
    if not all(bool(torch.isfinite(torch.stack(each)).all()) for each in sums.values()):
        for name, change in changes.items():
            if not all(factor.grad is None or bool(torch.isfinite(factor.grad).all()) for factor in change.factors):
                raise NonFiniteError(f"layer {name} saw NaN or Inf in {where} (gradient); nothing was changed")
    return bool(sums)
