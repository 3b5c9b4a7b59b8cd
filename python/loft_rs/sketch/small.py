"""The small dense problems that a sketch leaves: what a layer's sums say, solved in float64 on the
CPU (`sketch.py` has the equations).
"""

from __future__ import annotations

import math

import numpy as np

from .. import linalg

__all__ = ["descending", "left_vectors", "nystroem", "ordered_basis", "skew_core", "standard_error"]


def descending(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of a positive semidefinite matrix, strongest first, and its eigenvectors."""
    values, vectors = np.linalg.eigh(gram)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def standard_error(samples: np.ndarray) -> float:
    """Of their mean."""
    return float(np.std(samples, ddof=1) / math.sqrt(len(samples)))


def left_vectors(y: np.ndarray, count: int) -> np.ndarray:
    """The leading left singular vectors (n x count) of y (n x k), by its Gram matrix; completed
    where y has fewer.
    """
    _, v = descending(y.T @ y)
    return linalg.orthonormalize(np.pad(y @ v[:, :count], ((0, 0), (0, max(0, count - y.shape[1])))))


def skew_core(z: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The skew C (q x q) that minimises ||C Z - B||_F: C Z Z^T + Z Z^T C = B Z^T - Z B^T."""
    weights, u = np.linalg.eigh(z @ z.T)
    right = u.T @ (b @ z.T - z @ b.T) @ u
    c = u @ (right / np.maximum(weights[:, None] + weights, np.finfo(np.float64).tiny)) @ u.T
    return (c - c.T) / 2


def nystroem(left: np.ndarray, core: np.ndarray) -> np.ndarray:
    """L C^+ L^T of a positive semidefinite C that was summed in float32: eigenvalues that may be
    its rounding are left out.
    """
    weights, u = np.linalg.eigh((core + core.T) / 2)
    kept = weights > 64 * np.finfo(np.float32).eps * weights[-1]
    half = (left @ u[:, kept]) / np.sqrt(weights[kept])
    return half @ half.T


def ordered_basis(p: np.ndarray, moment: np.ndarray | None, first: int | None = None) -> np.ndarray:
    """P (n x r), its columns turned to the eigenvectors of sum z^T z = P^T M P where that is given:
    the first ones and the others apart, or all together."""
    if moment is not None:
        parts = [slice(first), slice(first, None)] if first else [slice(None)]
        p = np.hstack([p[:, part] @ descending(moment[part, part])[1] for part in parts])
    p = linalg.orthonormalize(p)  # in order: it only mends rounding
    largest = np.take_along_axis(p, np.abs(p).argmax(0)[None], 0)
    return np.ascontiguousarray(p * np.where(largest < 0, -1.0, 1.0), dtype=np.float32)
