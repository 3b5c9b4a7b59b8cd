"""Strict triangles of skew matrices as vectors: PEFT stores the upper one, LOFT the lower one, each
row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..transform.transforms import get_transform

__all__ = ["lower", "lower_from_upper", "size_of", "upper_from_lower"]


def lower_from_upper(v: Tensor, b: int) -> Tensor:
    """(..., b(b - 1)/2) strict upper triangles row by row -> v_ji for i > j, row by row."""
    i, j = torch.tril_indices(b, b, -1)
    return v[..., j * (2 * b - j - 1) // 2 + i - j - 1]


def upper_from_lower(theta: Tensor, b: int) -> Tensor:
    """The inverse of `lower_from_upper`."""
    j, i = torch.triu_indices(b, b, 1)
    return theta[..., i * (i - 1) // 2 + j]


def lower(a: Tensor) -> Tensor:
    i, j = torch.tril_indices(a.shape[-1], a.shape[-1], -1)
    return a[..., i, j]


def size_of(count: int) -> int | None:
    """b with b(b - 1)/2 = count."""
    cayley = get_transform("cayley")
    b = cayley.rank(torch.Size([count]))
    return b if cayley.parameter_shape(b) == (count,) else None
