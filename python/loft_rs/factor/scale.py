"""ScaleOutput: Y' = Y diag(1 + s), a trained factor for every output; keeps Y (N x m) for the
backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import first_order, plain

__all__ = ["ScaleOutput", "scale_output"]


# Entries of a product that is summed at once: what a large GPU's cache, or 16 MiB of a CPU's
# memory, holds in float32.
_SUMMED = 1 << 22


def _column_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """(a * b).sum(0) of a and b (N, m), in `dtype`: products of half-precision gradients would
    underflow in their own.
    """
    if torch.compiler.is_compiling():  # which fuses the two
        return (a.to(dtype) * b.to(dtype)).sum(0)
    total = torch.zeros(a.shape[1], dtype=dtype, device=a.device)
    step = max(1, _SUMMED // a.shape[1])
    for left, right in zip(a.split(step), b.split(step), strict=True):
        total += torch.mul(left.to(dtype), right).sum(0)
    return total


class ScaleOutput(torch.autograd.Function):
    """Y' = Y diag(1 + s) for rows Y (..., m).  dY = dY' diag(1 + s);  ds = the sum of dY' * Y over the rows.

    Y is kept and not Y', which what follows may change in place, as it may a linear layer's output.
    """

    @staticmethod
    def forward(ctx, y: Tensor, scale: Tensor) -> Tensor:
        factor = 1 + scale
        # Into y's own dtype, with no float32 of Y's size in between.
        out = torch.mul(y, factor, out=torch.empty_like(y))
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, factor)
        return out

    @staticmethod
    @first_order
    def backward(ctx, g: Tensor):
        y, factor = ctx.saved_tensors
        d_scale = None
        if y is not None:
            d_scale = _column_products(g.reshape(-1, g.shape[-1]), y.reshape(-1, y.shape[-1]), factor.dtype)
        dy = torch.mul(g, factor, out=torch.empty_like(g)) if ctx.needs_input_grad[0] else None
        return dy, d_scale


def scale_output(y: Tensor, scale: Tensor) -> Tensor:
    """Y diag(1 + s) for rows Y (..., m), in Y's dtype."""
    return (y * (1 + scale)).to(y.dtype) if plain() else ScaleOutput.apply(y, scale)
