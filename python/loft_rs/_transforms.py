"""Transforms in NumPy: the grammar of their names, how many numbers each trains, and D = T - I of
one theta.

`transform/transforms.py` has the same definitions in torch, with their gradients; a test compares
the two. What reads adapters without torch (`inspection.py`) and what counts parameters
(`support/budget.py`) takes them from `TABLE`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["TABLE", "Definition", "TransformName", "delta"]


class TransformName(NamedTuple):
    """A transform's name taken apart, `base[:terms][+magnitudes][+halves]`, as in
    "cayley_neumann:5" and "cayley+halves".
    """

    base: str
    terms: int | None = None
    magnitudes: bool = False
    halves: bool = False

    @classmethod
    def of(cls, name: str) -> TransformName:
        """ValueError for a name that is not so built. Whether its base is known is not looked
        at.
        """
        base, *more = str(name).split("+")
        base, colon, terms = base.partition(":")
        known = {"magnitudes", "halves"}
        if set(more) - known or len(set(more)) < len(more) or (colon and not (terms.isdigit() and int(terms) > 0)):
            raise ValueError(
                f"transform must be as in 'cayley', 'cayley_neumann:5' or 'cayley+magnitudes', got {name!r}"
            )
        return cls(base, int(terms) if colon else None, "magnitudes" in more, "halves" in more)

    def __str__(self) -> str:
        terms = "" if self.terms is None else f":{self.terms}"
        return self.base + terms + "+magnitudes" * self.magnitudes + "+halves" * self.halves


class Definition(NamedTuple):
    """One base. count: trained numbers at rank r. delta: D of the skew A, or of theta (r x r)
    itself where the base has no A.

    skew: whether theta is the strict lower triangle of a skew A. halves: whether `+halves` goes
    with it. shared: whether a `Budget` may share its ranks.
    """

    count: Callable[[Any], Any]
    delta: Callable[[np.ndarray, int | None], np.ndarray]
    skew: bool = True
    halves: bool = False
    shared: bool = True


def _triangle(r: Any) -> Any:
    return r * (r - 1) // 2


def _cayley(a: np.ndarray, terms: int | None) -> np.ndarray:
    """-2 A (I + A)^{-1}."""
    return -2 * np.linalg.solve((np.eye(len(a)) + a).T, a.T).T


def _exp(a: np.ndarray, terms: int | None) -> np.ndarray:
    values, vectors = np.linalg.eigh(1j * a)  # A = -i * Hermitian
    return ((vectors * np.expm1(-1j * values)) @ vectors.conj().T).real


def _cayley_neumann(a: np.ndarray, terms: int | None) -> np.ndarray:
    powers = [np.linalg.matrix_power(-a, k) for k in range(1, int(terms or 1) + 2)]
    return 2 * sum(powers[:-1]) + powers[-1]


TABLE: dict[str, Definition] = {
    "cayley": Definition(_triangle, _cayley, halves=True),
    "exp": Definition(_triangle, _exp, halves=True),
    "free": Definition(lambda r: r * r, lambda theta, terms: theta, skew=False),
    "cayley_neumann": Definition(_triangle, _cayley_neumann, shared=False),
}


def delta(name: TransformName, theta: np.ndarray, rank: int) -> np.ndarray:
    """D = T - I (r x r) of one theta, float64. ValueError: what is wrong with the name or the
    shape.
    """
    base = TABLE.get(name.base)
    if base is None:
        raise ValueError(f"a transform {name.base!r}, which is not one of {', '.join(TABLE)}")
    if (name.halves and (name.magnitudes or not base.halves)) or (name.magnitudes and not base.skew):
        raise ValueError(f"a transform {str(name)!r}, which does not exist")
    count = base.count(rank)
    shape: tuple[int, ...] = ((count + 2 * rank * name.magnitudes),) if base.skew else (rank, rank)
    if name.halves:
        shape = (rank // 2, rank - rank // 2)
    if theta.shape != shape:
        raise ValueError(f"a theta of shape {theta.shape}; {name} at rank {rank} needs {shape}")
    if not base.skew:
        return base.delta(theta, name.terms)
    lower = np.zeros((rank, rank))
    if name.halves:
        lower[rank - rank // 2 :, : rank - rank // 2] = theta
    else:
        lower[np.tril_indices(rank, -1)] = theta[:count]
    found = base.delta(lower - lower.T, name.terms)
    if not name.magnitudes:
        return found
    a, b = theta[-2 * rank : -rank], theta[-rank:]
    return (1 + b)[:, None] * found * (1 + a) + np.diag(a + b + a * b)
