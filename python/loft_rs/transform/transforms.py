"""Transforms: the trained orthogonal matrix T (r x r) of LOFT, stored and computed as D = T - I.

| name     | T                          | trained parameters theta                        |
|----------|----------------------------|-------------------------------------------------|
| `cayley` | (I - A)(I + A)^{-1}        | strict lower triangle of the skew A, r(r - 1)/2 |
| `exp`    | matrix exponential of A    | strict lower triangle of the skew A, r(r - 1)/2 |
| `free`   | I + D, unconstrained       | D itself, r x r                                 |

A_ij = theta_ij and A_ji = -theta_ij for i > j, the triangle read row by row. Every transform is the
identity at theta = 0, and D is never formed as a difference of T and I, so a small rotation keeps
all its digits. A theta in half precision gives D in float32.

`NAME+halves` trains of A only what lies between the first r - r//2 coordinates and the others,
A = [[0, -B^T], [B, 0]], theta = B (r//2 x (r - r//2)): it turns the one half towards the other.

Two variants are not orthogonal and exist for the methods that trained with them (OFT, PSOFT):
`cayley_neumann:K`, Cayley's series cut off after K terms, and `NAME+magnitudes`, diag(1 + b) T
diag(1 + a) with theta followed by a and b.

Gradients are closed forms, so no graph runs through a solver. `batch.py` solves all layers of one
rank at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from . import kernels
from .skew import between_halves, constant, kept_dtype, skew, skew_gradient, working_dtype

__all__ = ["TRANSFORMS", "Cayley", "CayleyNeumann", "Exp", "Free", "Halves", "Magnitudes", "Transform", "get_transform"]


class Transform(Protocol):
    """One parametrisation of T. `delta` and `gradient` work on a batch (of any number of leading
    dimensions) of equal ranks.

    They are plain torch, which autograd and `torch.func` may differentiate, unless `kernel` lets
    `delta` launch one of our own.
    """

    name: str
    orthogonal: bool

    def parameter_shape(self, r: int) -> tuple[int, ...]:
        """Shape of theta for rank r."""

    def rank(self, shape: torch.Size) -> int:
        """r, from the shape of a theta or of a batch of them."""

    def delta(self, theta: Tensor, r: int, *, kernel: bool = False) -> tuple[Tensor, Tensor]:
        """(D, saved): D = T(theta) - I, (..., r, r), and what `gradient` needs, (..., *), in
        theta's dtype, at least float32.
        """

    def saved_shape(self, r: int) -> tuple[int, ...]:
        """The shape of `saved` of one matrix."""

    def gradient(self, g: Tensor, saved: Tensor) -> Tensor:
        """dL/dtheta from g = dL/dD (..., r, r)."""


class _Skew:
    """Transforms of a skew generator, r(r - 1)/2 numbers."""

    def parameter_shape(self, r: int) -> tuple[int, ...]:
        return (r * (r - 1) // 2,)

    def rank(self, shape: torch.Size) -> int:
        return (1 + int((1 + 8 * shape[-1]) ** 0.5 + 0.5)) // 2

    def saved_shape(self, r: int) -> tuple[int, ...]:
        return (r, r)


class Cayley(_Skew):
    """T = (I - A)(I + A)^{-1}. With Z = (I + A)^{-1}: D = -2 A Z and dL/dA = H = -2 Z^T g Z^T, as
    dD = -2 Z dA Z.
    """

    name = "cayley"
    orthogonal = True

    def delta(self, theta: Tensor, r: int, *, kernel: bool = False) -> tuple[Tensor, Tensor]:
        if kernel and kernels.available(theta, r):
            found = kernels.cayley(theta.flatten(0, -2), r)
            return found[0].unflatten(0, theta.shape[:-1]), found[1].unflatten(0, theta.shape[:-1])
        a = skew(theta.to(working_dtype(theta)), r)
        # inv_ex does not synchronise with the host to check for singularity, and I + A cannot be
        # singular.
        z = torch.linalg.inv_ex(a + torch.eye(r, dtype=a.dtype, device=a.device)).inverse
        return (-2 * (a @ z)).to(kept_dtype(theta)), z.to(kept_dtype(theta))

    def gradient(self, g: Tensor, saved: Tensor) -> Tensor:
        zt = saved.mT
        return skew_gradient(-2 * (zt @ g @ zt))


class Exp(_Skew):
    """T = exp(A). dL/dA = L(A^T, g), the Frechet derivative: the upper right block of
    exp([[A^T, g], [0, A^T]]).
    """

    name = "exp"
    orthogonal = True

    def delta(self, theta: Tensor, r: int, *, kernel: bool = False) -> tuple[Tensor, Tensor]:
        a = skew(theta.to(working_dtype(theta)), r)
        # exp(A) - I = integral of A exp(tA): the upper right block of exp([[A, A], [0, 0]]), with
        # no cancellation.
        block = torch.cat([torch.cat([a, a], -1), torch.zeros_like(torch.cat([a, a], -1))], -2)
        return torch.linalg.matrix_exp(block)[..., :r, r:].to(kept_dtype(theta)), a.to(kept_dtype(theta))

    def gradient(self, g: Tensor, saved: Tensor) -> Tensor:
        r = saved.shape[-1]
        at, g64 = saved.mT.to(working_dtype(saved)), g.to(working_dtype(saved))
        block = torch.cat([torch.cat([at, g64], -1), torch.cat([torch.zeros_like(at), at], -1)], -2)
        return skew_gradient(torch.linalg.matrix_exp(block)[..., :r, r:]).to(g.dtype)


class Free:
    """T = I + D with D unconstrained: not orthogonal once trained."""

    name = "free"
    orthogonal = False

    def parameter_shape(self, r: int) -> tuple[int, ...]:
        return (r, r)

    def rank(self, shape: torch.Size) -> int:
        return shape[-1]

    def delta(self, theta: Tensor, r: int, *, kernel: bool = False) -> tuple[Tensor, Tensor]:
        return theta.to(kept_dtype(theta), copy=True), theta.new_zeros(*theta.shape[:-2], 1, dtype=kept_dtype(theta))

    def saved_shape(self, r: int) -> tuple[int, ...]:
        return (1,)

    def gradient(self, g: Tensor, saved: Tensor) -> Tensor:
        return g


class CayleyNeumann(_Skew):
    """T = (I - A) sum_{k <= K} (-A)^k, so D = -2A + 2A^2 - ... + 2(-A)^K + (-A)^{K+1}.

    Its distance to Cayley is of order ||A||^{K+1}, and from ||A|| = 1 on it diverges.
    """

    orthogonal = False

    def __init__(self, terms: int):
        self.terms, self.name = terms, f"cayley_neumann:{terms}"

    def _series(self, a: Tensor) -> Tensor:
        power = -a
        d = 2 * power
        for _ in range(1, self.terms):
            power = -(power @ a)
            d = d + 2 * power
        return d - power @ a

    def delta(self, theta: Tensor, r: int, *, kernel: bool = False) -> tuple[Tensor, Tensor]:
        a = skew(theta.to(working_dtype(theta)), r)
        return self._series(a).to(kept_dtype(theta)), a.to(kept_dtype(theta))

    def gradient(self, g: Tensor, saved: Tensor) -> Tensor:
        """dA, from the last power back: p_1 = -A, p_{k+1} = -p_k A and D = 2
        (p_1 + ... + p_K) + p_{K+1}.
        """
        a = saved.to(g.dtype)
        powers = [-a]
        for _ in range(1, self.terms):
            powers.append(-(powers[-1] @ a))
        h, upper = torch.zeros_like(a), g
        for power in reversed(powers):
            h = h - power.mT @ upper
            upper = 2 * g - upper @ a.mT
        return skew_gradient(h - upper)


class Magnitudes:
    """diag(1 + b) T diag(1 + a) of a skew transform T (PSOFT). theta: T's own, then a (r), then b
    (r).
    """

    orthogonal = False

    def __init__(self, inner: Transform):
        self.inner, self.name = inner, f"{inner.name}+magnitudes"

    def parameter_shape(self, r: int) -> tuple[int, ...]:
        return (r * (r - 1) // 2 + 2 * r,)

    def rank(self, shape: torch.Size) -> int:
        return (int((9 + 8 * shape[-1]) ** 0.5 + 0.5) - 3) // 2

    def saved_shape(self, r: int) -> tuple[int, ...]:
        return (2 * r + 2, r)

    def delta(self, theta: Tensor, r: int, *, kernel: bool = False) -> tuple[Tensor, Tensor]:
        theta = theta.to(kept_dtype(theta))
        generator, a, b = theta[..., : -2 * r], theta[..., -2 * r : -r], theta[..., -r:]
        d, saved = self.inner.delta(generator, r, kernel=kernel)
        scaled = (1 + b).unsqueeze(-1) * d * (1 + a).unsqueeze(-2) + torch.diag_embed(a + b + a * b)
        return scaled, torch.cat([saved, d, a.unsqueeze(-2), b.unsqueeze(-2)], -2)

    def gradient(self, g: Tensor, saved: Tensor) -> Tensor:
        r = saved.shape[-1]
        inner, d, a, b = saved.split([r, r, 1, 1], -2)
        right, left = 1 + a, (1 + b).mT
        gt = g * (d + torch.eye(r, dtype=d.dtype, device=d.device))
        generator = self.inner.gradient(g * left * right, inner)
        return torch.cat([generator, (gt * left).sum(-2), (gt * right).sum(-1)], -1)


class Halves:
    """T of an orthogonal skew transform whose A is [[0, -B^T], [B, 0]]. theta: B (r//2 x
    (r - r//2)).
    """

    orthogonal = True

    def __init__(self, inner: Cayley | Exp):
        self.inner, self.name = inner, f"{inner.name}+halves"

    def parameter_shape(self, r: int) -> tuple[int, ...]:
        return (r // 2, r - r // 2)

    def rank(self, shape: torch.Size) -> int:
        return shape[-2] + shape[-1]

    def saved_shape(self, r: int) -> tuple[int, ...]:
        return self.inner.saved_shape(r)

    def delta(self, theta: Tensor, r: int, *, kernel: bool = False) -> tuple[Tensor, Tensor]:
        generator = theta.new_zeros(*theta.shape[:-2], r * (r - 1) // 2)
        generator = generator.index_copy(-1, constant(between_halves, r, theta), theta.flatten(-2))
        return self.inner.delta(generator, r, kernel=kernel)

    def gradient(self, g: Tensor, saved: Tensor) -> Tensor:
        r = g.shape[-1]
        generator = self.inner.gradient(g, saved)
        return generator.index_select(-1, constant(between_halves, r, generator)).unflatten(-1, self.parameter_shape(r))


TRANSFORMS: dict[str, Transform] = {t.name: t for t in (Cayley(), Exp(), Free())}


# By name, once made. Not `functools.cache`, of which a compiler that meets it warns.
_MADE: dict[str, Transform] = {}


def get_transform(name: str) -> Transform:
    """The transform called `name`, with `+magnitudes` or `+halves` where it says so; ValueError
    names the choices otherwise.
    """
    if name not in _MADE:
        _MADE[name] = _make_transform(name)
    return _MADE[name]


def _make_transform(name: str) -> Transform:
    plain, plus, option = name.partition("+")
    kind, colon, terms = plain.partition(":")
    found = TRANSFORMS.get(plain)
    if kind == "cayley_neumann" and colon and terms.isdecimal() and int(terms) > 0:
        found = CayleyNeumann(int(terms))
    kinds: dict[str, tuple[Callable[[Any], Transform], tuple[type, ...]]] = {
        "magnitudes": (Magnitudes, (_Skew,)),
        "halves": (Halves, (Cayley, Exp)),
    }
    if found is None or (plus and (option not in kinds or not isinstance(found, kinds[option][1]))):
        raise ValueError(
            f"transform must be one of {sorted(TRANSFORMS)}, the first two also with +magnitudes or +halves, got {name!r}"
        )
    return kinds[option][0](found) if plus else found
