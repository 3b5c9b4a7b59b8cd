"""Pairs: a support in which a rotation can make a given change of the weight.

To first order a rotation adds W0 P A P^T, A skew: it reads span(P), and what it writes is W0's image of that same span. The change

    D = sum_i s_i u_i v_i^T     (m x n)

needs its v_i in span(P) to be read, and something there whose image is u_i to be written. The right singular vectors alone have the first
and not the second. So each comes with its partner:

    P = span(v_1, y_1, ..., v_r/2, y_r/2),   y_i = W0^+ u_i,   since W0 (y_i v_i^T - v_i y_i^T) = u_i v_i^T - (W0 v_i) y_i^T

On the output side, (P A P^T) W0, the same holds of D^T and W0^T. Of layers that are tied D and W0 are stacked.

W0^+ is a few steps of CGLS (Bjorck, Elfving and Strakos 1998), which needs products with W0 alone and stops before the directions that W0
hardly reaches, where a partner would be long and its image small.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from . import linalg

__all__ = ["ieee_products", "paired_basis", "preimages", "rotation_makes"]

ITERATIONS = 16


def preimages(weights: Sequence[Tensor], images: Sequence[Tensor]) -> Tensor:
    """Y (n x k), nearly W0^+ U, of W0 (m x n) and U (m x k), both in parts that are stacked, in one floating dtype.

    A column that W0 does not reach is zero. On CUDA it wants `ieee_products`.
    """
    norm = sum(torch.linalg.vector_norm(w) ** 2 for w in weights).sqrt()
    scale = torch.where(
        norm > 0, 1 / norm, 0.0
    )  # W0 / ||W0||_F is what is inverted: no square of it under- or overflows
    y = images[0].new_zeros(weights[0].shape[1], images[0].shape[1])
    missing = list(images)
    direction = back = _back(weights, missing, scale)
    size = back.square().sum(0)
    # What W0^T gives of no more than rounding: the rest is made, or cannot be.
    rounding = (4 * torch.finfo(y.dtype).eps) ** 2 * sum(u.square().sum(0) for u in images)
    for _ in range(ITERATIONS):
        made = [scale * (w @ direction) for w in weights]
        step = torch.where(size > rounding, size / sum(part.square().sum(0) for part in made), 0.0)
        y = y + step * direction
        missing = [u - step * part for u, part in zip(missing, made, strict=True)]
        back = _back(weights, missing, scale)
        before, size = size, back.square().sum(0)
        direction = back + torch.where(before > rounding, size / before, 0.0) * direction
    return scale * y


def _back(weights: Sequence[Tensor], images: Sequence[Tensor], scale: Tensor) -> Tensor:
    return scale * sum(w.mT @ u for w, u in zip(weights, images, strict=True))


@contextmanager
def ieee_products():
    """float32 products on CUDA as float32, whatever is set: TF32's rounding lies outside W0's row space too and would be blown up."""
    settings = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(settings, "fp32_precision") else ("allow_tf32", False)
    held = getattr(settings, name)
    setattr(settings, name, exact)
    try:
        yield
    finally:
        setattr(settings, name, held)


def paired_basis(v: np.ndarray, y: np.ndarray, rank: int) -> np.ndarray:
    """P (n x r), float64, of v (n x r/2 or one more) and their partners y (n x r/2): pairs in order, strongest first."""
    columns = np.zeros((len(v), 2 * v.shape[1]))
    lengths = np.linalg.norm(y, axis=0)
    columns[:, ::2] = v
    columns[:, 1 : 2 * y.shape[1] : 2] = y / np.where(lengths > 0, lengths, 1.0)
    return linalg.orthonormalize(np.ascontiguousarray(columns[:, :rank]))


def rotation_makes(images: np.ndarray, change: np.ndarray) -> float:
    """||D||_F^2 - min ||W0 P A P^T - D||_F^2 over skew A, of W0 P and D P (m x r each)."""
    gram = images.T @ images
    skew = images.T @ change
    skew = skew - skew.T
    values, v = np.linalg.eigh(gram)
    # A gram (r x r) A + A gram = skew, in the basis where gram is diagonal; where it is zero so is the change that could be made.
    turned = v.T @ skew @ v
    sums = np.maximum(values[:, None] + values, 4 * len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0))
    return float(np.sum(np.square(turned) / np.where(sums > 0, sums, np.inf)) / 2)
