"""A support of the user's own: checked and orthonormalised."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from torch import Tensor

from ..linalg import orthonormalize

__all__ = ["custom_basis"]


def custom_basis(support: Any) -> np.ndarray:
    """An orthonormal float32 basis (n, r) from a `Support` or the user's own (n, r) columns, same
    span, order kept.

    ValueError for NaN or Inf, more columns than rows, or columns that are linearly dependent.
    """
    if isinstance(support, Tensor):
        support = support.detach().double().cpu().numpy()
    basis = np.asarray(support, dtype=np.float64)
    if basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0]:
        raise ValueError(f"support must be (n, r) with 1 <= r <= n, got shape {basis.shape}")
    if not np.isfinite(basis).all():
        raise ValueError("support must be finite, but it holds NaN or Inf")
    norms = np.linalg.norm(basis, axis=0)
    if (norms == 0).any():
        raise ValueError(f"support column {int(np.argmin(norms))} is zero; give {basis.shape[1]} independent columns")
    spread = np.linalg.eigvalsh((basis / norms).T @ (basis / norms))
    if spread[0] < 1e-10 * spread[-1]:
        raise ValueError(
            f"support must have linearly independent columns (r = {basis.shape[1]}); give fewer or other columns"
        )
    if spread[-1] - spread[0] > 1e-3:
        warnings.warn("support is not orthonormal; its columns were orthonormalised in order", stacklevel=3)
    return orthonormalize(basis).astype(np.float32)
