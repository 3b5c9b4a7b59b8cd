"""Triton kernels of block rotations, for CUDA; where Triton is missing or does not fit, torch
computes the same.

`rotate_blocks` and `rotate_blocks_backward`: rows times a block-diagonal matrix, each read and
written once where a copy and a batched product take five passes; a permutation of the columns costs
no pass of its own.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["BLOCK_SIZES", "rotate_blocks", "rotate_blocks_backward", "rotates"]


# Sizes of the blocks that `rotate_blocks` takes.
BLOCK_SIZES = (16, 32, 64, 128)


@functools.cache
def _rotating():
    """The kernels of `rotate_blocks` and `rotate_blocks_backward`, or None without Triton."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def rotate_blocks(
        x, d, order, out, rows, n, s0, s1, s2,
        PERMUTED: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        k = tl.arange(0, B)
        columns = block * B + k
        if PERMUTED:
            columns = tl.load(order + columns)
        at = row[:, None].to(tl.int64) * n + columns[None, :]
        inside = row[:, None] < rows
        value = tl.load(x + at, mask=inside, other=0.0)
        matrix = tl.load(d + block * s0 + k[:, None] * s1 + k[None, :] * s2)
        turned = tl.dot(value, matrix, input_precision=EXACT)
        tl.store(out + at, (value.to(tl.float32) + turned).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def rotate_blocks_backward(
        g, x, d, order, dx, partial, rows, n, chunk, s0, s1, s2,
        NEEDS_X: tl.constexpr, PERMUTED: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        block, part = tl.program_id(0), tl.program_id(1)
        k = tl.arange(0, B)
        columns = block * B + k
        if PERMUTED:
            columns = tl.load(order + columns)
        matrix = tl.load(d + block * s0 + k[:, None] * s1 + k[None, :] * s2)
        product = tl.zeros((B, B), tl.float32)
        for start in range(0, chunk, ROWS):
            row = part * chunk + start + tl.arange(0, ROWS)
            at = row[:, None].to(tl.int64) * n + columns[None, :]
            inside = row[:, None] < rows
            gradient = tl.load(g + at, mask=inside, other=0.0)
            value = tl.load(x + at, mask=inside, other=0.0)
            product += tl.dot(tl.trans(gradient), value, input_precision=EXACT)
            if NEEDS_X:
                turned = tl.dot(gradient, matrix, input_precision=EXACT)
                tl.store(dx + at, (gradient.to(tl.float32) + turned).to(dx.dtype.element_ty), mask=inside)
        to = (part * tl.num_programs(0) + block).to(tl.int64) * B * B
        tl.store(partial + to + k[:, None] * B + k[None, :], product)

    return rotate_blocks, rotate_blocks_backward


def rotates(rows: Tensor, b: int) -> bool:
    """Whether `rotate_blocks` and `rotate_blocks_backward` serve rows (N, n) and blocks of b."""
    return (
        rows.is_cuda
        and len(rows) > 0
        and b in BLOCK_SIZES
        and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and _rotating() is not None
    )


def _options(rows: Tensor, order: Tensor | None, b: int) -> dict:
    # Three tf32 products keep float32's digits and use the matrix unit, which Triton's exact
    # product, 20 times slower, does not.
    exact = "tf32x3" if rows.dtype == torch.float32 else "tf32"
    return {"PERMUTED": order is not None, "B": b, "EXACT": exact, "num_warps": 4 if b <= 64 else 8}


def rotate_blocks(rows: Tensor, d: Tensor, order: Tensor | None) -> Tensor:
    """rows (N, n) times blockdiag(I + d), d (n/b, b, b) of the same dtype, on the columns in the
    order of `order` (n,).
    """
    rows = rows.contiguous()
    out, (count, b, _), tile = torch.empty_like(rows), d.shape, 64
    grid = count, -(-len(rows) // tile)
    _rotating()[0][grid](rows, d, order, out, *rows.shape, *d.stride(), ROWS=tile, **_options(rows, order, b))
    return out


def rotate_blocks_backward(
    g: Tensor, rows: Tensor, d: Tensor, order: Tensor | None, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    """(g blockdiag(I + d), or None; g^T rows block by block, (n/b, b, b) float32) of g and rows
    (N, n).
    """
    g, rows = g.contiguous(), rows.contiguous()
    count, b, _ = d.shape
    tile = 64 if b <= 64 else 32
    # About four programs for each multiprocessor of a large card, of whole tiles.
    parts = min(max(1, 512 // count), -(-len(rows) // tile))
    chunk = -(-len(rows) // (parts * tile)) * tile
    dx = torch.empty_like(g) if needs_x else g
    partial = torch.empty(parts, count, b, b, dtype=torch.float32, device=g.device)
    _rotating()[1][count, parts](
        g,
        rows,
        d,
        order,
        dx,
        partial,
        *rows.shape,
        chunk,
        *d.stride(),
        NEEDS_X=needs_x,
        ROWS=tile,
        **_options(rows, order, b),
    )
    return dx if needs_x else None, partial.sum(0)
