"""Skew matrices and their triangles: A_ij = theta_ij and A_ji = -theta_ij for i > j, the triangle
read row by row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._torch import plain

__all__ = ["skew"]


_Places = Callable[[int, torch.device], Tensor]
_INDICES: dict[tuple[_Places, int, torch.device], Tensor] = {}


def constant(places: _Places, r: int, like: Tensor) -> Tensor:
    """The places for rank r, on the device of `like`, found once."""
    # A fake tensor, of a tracing mode, mixes with no kept real one, nor may its own indices be
    # kept; and two traces must be alike.
    if plain() or torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return places(r, like.device)
    key = places, r, like.device
    if key not in _INDICES:
        # A kept index must not be born inside inference mode, or a later training step could not
        # save it for backward.
        with torch.inference_mode(False):
            _INDICES[key] = places(r, like.device)
    return _INDICES[key]


def _strict_lower(r: int, device: torch.device) -> Tensor:
    """Of the strict lower triangle, row by row, in a flattened r x r matrix."""
    rows, cols = torch.tril_indices(r, r, -1, device=device)
    return rows * r + cols


def between_halves(r: int, device: torch.device) -> Tensor:
    """Of the last r//2 rows' first r - r//2 entries, row by row, in a strict lower triangle."""
    rows, cols = torch.arange(r - r // 2, r, device=device), torch.arange(r - r // 2, device=device)
    return (rows * (rows - 1) // 2).unsqueeze(1).add(cols).flatten()


def skew(theta: Tensor, r: int) -> Tensor:
    """The skew matrices A (..., r, r) whose strict lower triangles, row by row, are theta (...,
    r(r - 1)/2).
    """
    lower = theta.new_zeros(*theta.shape[:-1], r * r).index_copy(-1, constant(_strict_lower, r, theta), theta)
    lower = lower.unflatten(-1, (r, r))
    return lower - lower.mT


def skew_gradient(h: Tensor) -> Tensor:
    """dL/dtheta = H_ij - H_ji for i > j, from H = dL/dA taken entry by entry."""
    return (h - h.mT).flatten(-2).index_select(-1, constant(_strict_lower, h.shape[-1], h))


def working_dtype(theta: Tensor) -> torch.dtype:
    # On a data-centre GPU a batched fp64 solve costs what fp32 does, and it makes T orthogonal to
    # fp32's last bit.
    return torch.float32 if theta.device.type == "mps" else torch.float64


def kept_dtype(theta: Tensor) -> torch.dtype:
    return torch.promote_types(theta.dtype, torch.float32)
