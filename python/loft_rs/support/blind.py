"""Supports that look at no gradient: random and coordinate ones, and the energy that such a one
captures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .._checks import of
from .._words import some
from ..linalg import NonFiniteError, row_blocks
from .support import Support

__all__ = ["BLIND", "blind_support"]


def _random(width: int, rank: int, seed: int) -> np.ndarray:
    from .. import _core

    return _core.random_basis(width, rank, seed)


def _coordinate(width: int, rank: int, seed: int) -> np.ndarray:
    from .. import _core

    basis = np.zeros((width, rank), np.float32)
    basis[_core.coordinate_indices(width, rank, seed), np.arange(rank)] = 1
    return basis


# By name: the basis (width x rank) of a seed.
BLIND: dict[str, Callable[[int, int, int], np.ndarray]] = {"random": _random, "coordinate": _coordinate}


def select_blind(jobs: list, method: str, side: str, seed: int, progress: Callable | None) -> list[Support]:
    """Those of `BLIND`: the matrix gives the shape, and the energy that was captured by chance."""
    scales = []
    for name, grad, weight, _ in jobs:
        given = [_scale(name, what, each) for what, each in (("grads", grad), ("weights", weight)) if each is not None]
        scales.append(given[0])
    zero = [name or "the matrix" for (name, *_), scale in zip(jobs, scales, strict=True) if scale == 0]
    if zero:
        raise ValueError(f"all entries are zero in {some(zero)}: there is no direction to choose")
    chosen = []
    for done, ((name, grad, weight, rank), scale) in enumerate(zip(jobs, scales, strict=True), start=1):
        chosen.append(_blind(grad if grad is not None else weight, scale, rank, method, side, seed))
        if progress is not None:
            progress(name, done, len(jobs))
    return chosen


def _blind(matrix: Any, scale: float, rank: int, method: str, side: str, seed: int) -> Support:
    begun = time.perf_counter()
    support = blind_support(shape_of(matrix)[1 if side == "input" else 0], rank, method=method, side=side, seed=seed)
    total = sum(float(np.square(rows).sum()) for _, rows in row_blocks(matrix, scale))
    captured = _captured(matrix, scale, support.basis.astype(np.float64), side)
    return replace(
        support,
        energy=min(1.0, float(captured.sum() / total)),
        energy_stderr=0.0,
        values=np.sqrt(captured) * scale,
        passes=1,
        seconds=time.perf_counter() - begun,
    )


def blind_support(width: int, rank: int, *, method: str, side: str, seed: int) -> Support:
    """A `random` or `coordinate` support of a layer `width` wide, chosen without any matrix, so of
    unknown energy.
    """
    unknown, basis = np.full(rank, math.nan), BLIND[method](width, rank, seed)
    return Support(basis, math.nan, math.nan, unknown, unknown.copy(), math.nan, 0, 0.0, method, side, seed)


def _scale(name: str, argument: str, matrix: Any) -> float:
    """The power of two below the largest entry, so that no square of an entry over it overflows or
    vanishes; 0 if all are zero.
    """
    largest = 0.0
    for _, rows in row_blocks(matrix):
        if not np.isfinite(rows).all():
            raise NonFiniteError(f"{argument}{of(name)} has a NaN or an infinite entry")
        largest = max(largest, float(np.abs(rows).max()))
    return math.ldexp(1.0, math.frexp(largest)[1] - 1) if largest else 0.0


def _captured(matrix: Any, scale: float, basis: np.ndarray, side: str) -> np.ndarray:
    """||G p_i||^2 for every column (input side), ||G^T p_i||^2 (output side), of G over `scale`."""
    if side == "input":
        return sum(np.square(rows @ basis).sum(0) for _, rows in row_blocks(matrix, scale))
    product = sum(basis[start : start + len(rows)].T @ rows for start, rows in row_blocks(matrix, scale))
    return np.square(product).sum(1)


def shape_of(matrix: Any) -> tuple[int, int]:
    return (matrix[0] if isinstance(matrix, tuple) else matrix).shape
