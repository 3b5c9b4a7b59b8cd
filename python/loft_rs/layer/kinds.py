"""Kinds of adapters: which tensors of a layer an adapter consists of, and the factor they make.

| kind          | trained                            | frozen    | factor                      | recovers    |
|---------------|------------------------------------|-----------|-----------------------------|-------------|
| `SubspaceKind`   | theta of the transform             | support P | `LowRank(P, E)`             | LOFT, PSOFT |
| `BlocksKind`   | theta of every block's transform   | -         | `Blocks(D, permutations)`   | OFT, BOFT   |
| `ReflectionsKind` | U (n x r) itself                   | -         | `LowRank(U, -S^{-1})`       | HRA         |

A layer's adapter holds the tensors (`LayerAdapter`); a kind has none, and knows no layer: it is
handed what it computes with.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from .._torch import no_autocast, plain
from ..factor.blocks import Blocks
from ..factor.low_rank import LowRank, householder
from ..transform.transforms import Transform

__all__ = ["BlocksKind", "Kind", "ReflectionsKind", "SubspaceKind", "butterfly"]


class Kind(Protocol):
    """One kind of adapter. `has_support`: whether it has a frozen P, chosen before training.
    `full_rank`: whether its change of the weight has no low-rank form.

    A kind without a support or a transform is handed None for it: what is `Any` here, each kind's
    own signature says.
    """

    has_support: bool
    full_rank: bool

    def fit(self, rank: int, own: int, other: int) -> int:
        """`rank`, or the nearest that fits a layer whose turned side is `own` wide and whose other
        side is `other` wide.
        """

    def theta(self, transform: Any, width: int, rank: int, seed: int, identity: bool) -> Tensor:
        """The trained tensor at the start, float64: the identity, or a small random rotation."""

    def rank(self, theta: Tensor, transform: Any) -> int:
        """The rank, or the size of the blocks, of an adapter with this trained tensor."""

    def factor(self, theta: Any, basis: Any, delta: Any, width: int) -> LowRank | Blocks:
        """R, differentiable in theta and delta, of a side `width` wide.

        basis: P, of a kind that has one. delta: E, or D of all blocks, of a kind with a transform.
        """


def _start(shape: tuple[int, ...], rank: int, identity: bool) -> Tensor:
    theta = torch.zeros(shape, dtype=torch.float64)
    return theta if identity else theta.normal_(std=0.1 / rank**0.5)


class SubspaceKind:
    """R = I + P E P^T: a frozen support and a trained transform."""

    has_support, full_rank = True, False

    def fit(self, rank: int, own: int, other: int) -> int:
        limit = min(own, other)
        return rank if rank <= limit else max(limit - limit % 2, 1)

    def theta(self, transform: Transform, width: int, rank: int, seed: int, identity: bool) -> Tensor:
        return _start(transform.parameter_shape(rank), rank, identity)

    def rank(self, theta: Tensor, transform: Transform) -> int:
        return transform.rank(theta.shape)

    def factor(self, theta: Tensor, basis: Tensor, delta: Tensor, width: int) -> LowRank:
        return LowRank(basis, delta)


class BlocksKind:
    """Every coordinate in one block of each factor, every block with a transform of its own, or one
    for all blocks (`share`).

    The rank is the size b of the blocks. One factor: blocks of neighbours. More: those of a
    butterfly.
    """

    has_support, full_rank = False, True

    def __init__(self, factors: int = 1, share: bool = False):
        self.factors, self.share = factors, share

    def fit(self, rank: int, own: int, other: int) -> int:
        if self.factors == 1:
            # Blocks of one coordinate turn nothing (`free` ones scale it), and far larger ones are
            # not what was asked for.
            sizes = [b for b in range(min(rank, 2), min(own, 4 * rank) + 1) if own % b == 0]
        else:
            sizes = [b for b in range(2, own + 1, 2) if own % (b << (self.factors - 1)) == 0]
            if not sizes:
                raise ValueError(
                    f"factors={self.factors} is more than a layer {own} wide has: {own} must be a multiple of 2^{self.factors}"
                )
        if not sizes:
            raise ValueError(
                f"no block size near {rank} divides a layer {own} wide; leave it out with exclude_modules, or name a divisor of {own} "
                "for it in rank_pattern"
            )
        return min(sizes, key=lambda b: (abs(b - rank), b))

    def theta(self, transform: Transform, width: int, rank: int, seed: int, identity: bool) -> Tensor:
        blocks = 1 if self.share else width // rank
        return _start((self.factors, blocks, *transform.parameter_shape(rank)), rank, identity)

    def rank(self, theta: Tensor, transform: Transform) -> int:
        return transform.rank(theta.shape)

    def factor(self, theta: Tensor, basis: None, delta: Tensor, width: int) -> Blocks:
        if self.factors == 1:
            return Blocks(delta)
        b = delta.shape[-1]
        made = butterfly.__wrapped__ if plain() else butterfly  # a tracer's tensors must not be kept
        return Blocks(delta, made(width, b, self.factors, delta.device), b << (self.factors - 1))


class ReflectionsKind:
    """R = H_0 H_1 ... of trained vectors; `reflection`: R = I - 2 Q Q^T of an orthonormal basis Q
    of them.
    """

    has_support, full_rank = False, False

    def __init__(self, reflection: bool = False):
        self.reflection = reflection

    def fit(self, rank: int, own: int, other: int) -> int:
        return min(rank, own - own % 2)

    def theta(self, transform: None, width: int, rank: int, seed: int, identity: bool) -> Tensor:
        """As HRA's authors start: columns equal in pairs, which is the identity; an odd rank, and
        `reflection`, cannot be one.
        """
        draw = torch.Generator().manual_seed(seed)
        paired = identity and rank % 2 == 0 and not self.reflection
        columns = rank // 2 if paired else rank
        bound = math.sqrt(1 / columns)
        u = torch.empty(width, columns, dtype=torch.float64).uniform_(-bound, bound, generator=draw)
        return u.repeat_interleave(2, 1) if paired else u

    def rank(self, theta: Tensor, transform: None) -> int:
        return theta.shape[1]

    def factor(self, theta: Tensor, basis: None, delta: None, width: int) -> LowRank:
        with no_autocast(theta.device.type):
            return householder(theta, reflection=self.reflection)


@functools.cache
def butterfly(n: int, b: int, factors: int, device: torch.device) -> Tensor:
    """Coordinates of the blocks of each butterfly factor (BOFT, arXiv 2311.06243), (factors, n)
    int64.

    Factor i takes stretches of b 2^i coordinates; in each, chunks of b/2 coordinates, the even
    chunks first and then the odd ones, fill the blocks two by two.
    """
    with torch.inference_mode(False):
        every = torch.arange(n, device=device)
        orders = [every]
        for i in range(1, factors):
            chunks = every.view(-1, 2**i, 2, b // 2)  # stretch, pair, parity, coordinate
            # BOFT's permutation matrix has a row for each coordinate in its new place, and is
            # applied by its transpose.
            orders.append(chunks.transpose(1, 2).reshape(-1).argsort())
        return torch.stack(orders)
