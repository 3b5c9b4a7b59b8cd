"""`Support`: the frozen orthonormal columns P of R = I + P D P^T, with what is known of them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

__all__ = ["Support", "check_basis", "cut_support"]

# ||P^T P - I||_2 of a float32 basis: ours stay under 50 eps; one that is read may have been made
# elsewhere.
_ORTHONORMAL = 100 * float(np.finfo(np.float32).eps)


@dataclass(frozen=True, eq=False, repr=False)
class Support:
    """A chosen basis and what it captured.

    basis: (n, r) float32, orthonormal columns (n is the layer's inputs, or its outputs on the
        output side)
    energy: captured fraction of the squared objective, in [0, 1]; nan where it is unknown
    energy_stderr: 0.0 where the energy is exact
    values: (r,) singular values (gradsvd, principal; of what a pilot changed, in halves for each of
        them), plane strengths twice each (skewgrad), ||G p_i|| (random, coordinate); nan where no
        matrix was given. From float32 or half input their squares are right to about 1e-6 of the
        largest, so values below 1e-3 of it are rounding; `loft_rs.linalg.randomized_svd` resolves
        more
    residuals: (r,) Ritz residual norms, rounding included; nan where no such problem was solved
    gap: (sigma_r - sigma_{r+1}) / sigma_r, in halves of what the first one reads; nan where there
        is no sigma_{r+1}
    passes: passes over the data
    halves: whether the second half of the columns are partners of the first, as of a
        `Pilot(halves=True)`
    columns: columns multiplied with the data, summed over the passes: 2 m n operations each (4 m n
        for skewgrad, which reads W0 and G); 0 where no product was made, or with a dense
        decomposition

    >>> support = loft_rs.select_support(G, 8)
    >>> support.basis.shape, support.rank, support.side
    ((64, 8), 8, 'input')
    """

    basis: np.ndarray
    energy: float
    energy_stderr: float
    values: np.ndarray
    residuals: np.ndarray
    gap: float
    passes: int
    seconds: float
    method: str
    side: str
    seed: int
    order: str = "natural"
    columns: int = 0
    halves: bool = False

    @property
    def identifiable(self) -> bool:
        """Whether the last direction is told from the next: gap sigma_r > residual_r, or
        rank = min(m, n).

        False where the gap is 0 or no larger than what the residual (rounding included) can
        resolve, and for the odd last column of skewgrad: another seed may then choose other last
        directions that capture as much. Where the residual is nan the gap alone decides, and a nan
        gap leaves nothing to confuse.
        """
        last = self.values[-1]
        return math.isnan(self.gap) or not (self.gap == 0 or self.gap * last <= self.residuals[-1])

    @property
    def rank(self) -> int:
        """The number of columns."""
        return self.basis.shape[1]

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """The matplotlib figure: the values with the energy captured so far, and which coordinates
        lie in the support.

        path: also written there, .png or .svg. ModuleNotFoundError without matplotlib.
        """
        from ..plots import draw_support, finish

        return finish(lambda: draw_support(self.values, self.energy, self.basis, repr(self)), path)

    def _repr_html_(self) -> str:
        from ..plots import as_page

        facts = {
            "chosen by": self.method,
            "side": self.side,
            "n x r": f"{self.basis.shape[0]} x {self.rank}",
            "order": self.order,
            "energy": f"{self.energy:.4f} +- {self.energy_stderr:.4f}",
            "gap": f"{self.gap:.3g}"
            + (", identifiable" if self.identifiable else ", the last directions are not identifiable"),
            "passes": f"{self.passes}, {self.seconds:.2f} s",
        }
        return as_page("\n".join(f"{name:<10} {value}" for name, value in facts.items()), self.plot)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.basis, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.basis.shape))
        passes = f"{self.passes} pass" + ("" if self.passes == 1 else "es")
        return f"Support({self.method}, {self.side} side, {size}, energy {self.energy:.4f}, {passes})"


def cut_support(support: Support, rank: int) -> Support:
    """The leading `rank` columns of a gradsvd, skewgrad or principal support (skewgrad: an even
    number), and their energy."""
    if rank == support.rank:
        return support
    squares = np.square(support.values / support.values[0])
    kept = float(squares[:rank].sum() / squares.sum())
    last, following = support.values[rank - 1 : rank + 1]
    # The core's rule: where sigma_r is rounding, its direction is as arbitrary as the next one's.
    known = last > 8 * np.finfo(np.float32).eps * support.values[0]
    return replace(
        support,
        basis=np.ascontiguousarray(support.basis[:, :rank]),
        energy=support.energy * kept,
        energy_stderr=support.energy_stderr * kept,
        values=support.values[:rank].copy(),
        residuals=support.residuals[:rank].copy(),
        gap=float((last - following) / last) if known else 0.0,
    )


def check_basis(basis: np.ndarray, what: str) -> None:
    """Refuse a basis that is not (n, r) float32 with 1 <= r <= n, finite, and orthonormal to its
    dtype."""
    if basis.dtype != np.float32 or basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0]:
        raise ValueError(
            f"{what} has a basis of {basis.dtype} {basis.shape}, float32 (n, r) with 1 <= r <= n is expected"
        )
    if not np.isfinite(basis).all():
        raise ValueError(f"{what} has a basis with a NaN or an infinite entry")
    wide = basis.astype(np.float64)
    error = float(np.linalg.norm(wide.T @ wide - np.eye(basis.shape[1]), 2))
    if error > _ORTHONORMAL:
        raise ValueError(
            f"{what} has a basis that is not orthonormal: ||P^T P - I|| is {error:.1e}, more than {_ORTHONORMAL:.1e}"
        )
