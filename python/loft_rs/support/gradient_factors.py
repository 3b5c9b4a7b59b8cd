"""Gradients given by their factors, G = dY^T X with dY (N, m) and X (N, n): the dense problem of N
rows that has the same support.

    skewgrad   Skew(W0^T G) = Skew((dY W0)^T X)          output side  Skew(G W0^T) = Skew(dY^T (X W0^T))
    gradsvd    dY^T = Q R: the right vectors of R X       output side  X^T = Q R: the left vectors of dY^T R^T

Exact, and cheaper than G itself as long as N is well below m and n; where it is not, G is formed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..linalg import Matrix, NonFiniteError, as_matrix, row_blocks
from .blind import BLIND

__all__ = ["Factored"]


class Factored:
    """One gradient dY^T X. `shape` is G's, (m, n)."""

    def __init__(self, pair: tuple[Any, Any], place: str):
        if len(pair) != 2:
            raise TypeError(
                f"{place} as factors must be a pair (dY, X) with the gradient dY^T X, not {len(pair)} matrices"
            )
        matrices = [as_matrix(matrix, f"{place}[{i}]") for i, matrix in enumerate(pair)]
        self.dy, self.x = (_wide(matrix, f"{place}[{i}]") for i, matrix in enumerate(matrices))
        if len(self.dy) != len(self.x):
            raise ValueError(
                f"{place} as factors must be (N, m) and (N, n) with one N, not {self.dy.shape} and {self.x.shape}"
            )
        self.shape = (self.dy.shape[1], self.x.shape[1])

    def dense(self) -> np.ndarray:
        """G itself."""
        return self.dy.T @ self.x

    def problem(self, weight: Any, method: str, side: str) -> tuple[np.ndarray, Any]:
        """(gradient, weight) of a dense problem with the same support on the same side."""
        if 2 * len(self.x) >= min(self.shape) or method in BLIND:
            return self.dense(), weight
        if method == "gradsvd":
            if side == "input":
                return np.linalg.qr(self.dy.T, mode="r") @ self.x, None
            triangle = np.linalg.qr(self.x.T, mode="r")
            return self.dy.T @ triangle.T, None  # type: ignore[attr-defined]  # NumPy's stubs know no mode "r"
        if side == "input":
            dx = sum(self.dy[:, start : start + len(rows)] @ rows for start, rows in row_blocks(weight))
            return self.x, dx.astype(self.x.dtype, copy=False)
        y0 = np.concatenate([rows @ self.x.T for _, rows in row_blocks(weight)])
        return self.dy.T, y0.astype(self.x.dtype, copy=False)


def padded(matrix: Matrix | None, rank: int, side: str) -> Matrix | None:
    """The few rows (input side) or columns filled up with zeros to `rank`, which changes no
    support.
    """
    axis = 0 if side == "input" else 1
    if not isinstance(matrix, np.ndarray) or matrix.shape[axis] >= rank:
        return matrix
    room = [(0, 0), (0, 0)]
    room[axis] = (0, rank - matrix.shape[axis])
    return np.pad(matrix, room)


def _wide(matrix: Any, place: str) -> np.ndarray:
    """float32, or float64 where it was that; finite."""
    rows = np.concatenate([rows for _, rows in row_blocks(matrix)])
    if not np.isfinite(rows).all():
        raise NonFiniteError(f"{place} holds a NaN or an infinity; every entry must be finite")
    wide = not isinstance(matrix, tuple) and matrix.dtype == np.float64
    return rows if wide else rows.astype(np.float32)
