"""Triton kernel of the solve, for CUDA; where Triton is missing or does not fit, torch computes the
same.

`cayley`: Z = (I + A)^{-1} and D = T - I for a batch of small skew generators in one launch:
Gauss-Jordan elimination in place, in float64 registers, one matrix a program. No pivoting: the
symmetric part of I + A and of all its Schur complements is at least I, so every pivot is at least
1.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["LARGEST_RANK", "available", "cayley"]


# The largest matrix that a multiprocessor's registers hold in float64.
LARGEST_RANK = 128


@functools.cache
def _compiled():
    """The kernel, or None without Triton."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def eliminate(theta, delta, inverse, R, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64)
        line = tl.arange(0, BLOCK)
        i, j = line[:, None], line[None, :]
        theta += at * (R * (R - 1) // 2)
        lower = tl.load(theta + i * (i - 1) // 2 + j, mask=(j < i) & (i < R), other=0.0).to(tl.float64)
        upper = tl.load(theta + j * (j - 1) // 2 + i, mask=(i < j) & (j < R), other=0.0).to(tl.float64)
        a = lower - upper
        m = a + tl.where(i == j, 1.0, 0.0)
        for k in range(R):
            row = tl.sum(tl.where(i == k, m, 0.0), axis=0)
            column = tl.sum(tl.where(j == k, m, 0.0), axis=1)
            pivot = 1.0 / tl.sum(tl.where(line == k, row, 0.0), axis=0)
            row = tl.where(line == k, pivot, row * pivot)
            rest = tl.where(j == k, 0.0, m) - column[:, None] * row[None, :]
            m = tl.where(i == k, row[None, :], rest)
        # D = -2 A Z = 2 (Z - I), which keeps float32's digits in float64; -2 A is exact to them for
        # the smallest.
        largest = tl.max(tl.max(tl.abs(a), axis=1), axis=0)
        d = tl.where(largest < 1e-8, -2.0 * a, 2.0 * (m - tl.where(i == j, 1.0, 0.0)))
        inside = (i < R) & (j < R)
        out = at * R * R + i * R + j
        tl.store(delta + out, d.to(delta.dtype.element_ty), mask=inside)
        tl.store(inverse + out, m.to(inverse.dtype.element_ty), mask=inside)

    return eliminate


def available(theta: Tensor, r: int) -> bool:
    """Whether `cayley` serves these parameters."""
    return theta.is_cuda and 2 <= r <= LARGEST_RANK and theta.dtype == torch.float32 and _compiled() is not None


def cayley(theta: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(D, Z), each (B, r, r) float32, of the generators theta (B, r(r - 1)/2)."""
    theta = theta.contiguous()
    delta = theta.new_empty(len(theta), r, r)
    inverse = torch.empty_like(delta)
    block = max(16, 1 << (r - 1).bit_length())
    _compiled()[(len(theta),)](theta, delta, inverse, r, block, num_warps=max(4, block // 8))
    return delta, inverse
