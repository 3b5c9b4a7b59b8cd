"""SplitHalf: how far a support would change with other batches, from the sketches of two halves of
them.

With Y_h = S_h Omega the sketch of half h over its number of batches b_h, and P_h (n x r) chosen
from Y_h alone, so that the other half has no part in it (every product below is of P_h and both
halves, summed over h):

    overlap        t = ||P_0^T P_1||_F^2 / r, chance being r / n
    reproducible   beta = <P_h^T Y_0, P_h^T Y_1> / ||P_h^T Y_h||_F^2, and 2 beta / (1 + |beta|) for all B batches (Spearman-Brown's,
                   made odd: it is concave, and where beta is mostly noise its mean would be too
                   low)

The first product is signal alone, since the noise of the halves is independent: its mean is that of
<P_h^T Y_h, P_h^T Y>, Y of unlimited data, whatever P_h was fitted to. The second is signal and
noise, the noise falling as 1 / b. Their difference is the noise, direction by direction. Where one
batch in sixty has nearly all of the squared gradient no few batches tell of the mean: `dominance`
shows it.

The overlap of two supports is modelled the same way: with t free of chance, its odds t / (1 - t)
grow as the batches, so all B batches and as many others have 2 t / (1 + t). With the support of
unlimited data the overlap is no less than that. (Taking a half's overlap with it to be sqrt(t) says
up to 0.3 too much on real gradients.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

__all__ = ["SplitHalf", "overlap", "split_half_of"]


@dataclass(frozen=True, eq=False)
class SplitHalf:
    """How far a layer's support is that of its task and not of its batches; everything nan with a
    single batch, or none in one half.

    agreement: expected ||P^T P'||_F^2 / r with the support P' of as many other batches, in [0, 1]
    halves: the same of two supports, each from one half of the batches: measured, not modelled
    angles: (r,) principal angles between those two, radians, ascending
    reproducible: the part of the squared objective captured in the sample that other data would
        show too; in [-1, 1], below 0 where the halves contradict each other
    snr: signal over noise at all the batches, of every plane (skewgrad) or direction, strongest
    first; 0 where no signal is seen
    batches: how many there were, of all processes
    dominance: the stronger half's part of both halves' ||Y_h||_F^2, a half or little more where the
        batches are alike; near 1 one batch or two have nearly all of the gradient, and nothing here
        tells of other data

    One layer's `reproducible` is a noisy figure: with 2 to 16 batches of 8 sentence pairs its
    standard error is .16 to .19, and errors of neighbouring layers go the same way
    (bench/CALIBRATION.md). Two halves do not show that error themselves.
    """

    agreement: float
    halves: float
    angles: np.ndarray = field(repr=False)
    reproducible: float
    snr: np.ndarray = field(repr=False)
    batches: int
    chance: float
    dominance: float

    def batches_needed(self, agreement: float = 0.9) -> float:
        """Batches for an expected agreement: B o* / o with o = (t - chance) / (1 - t), the odds of
        the agreement t; inf where t is chance.

        ValueError for an agreement outside (0, 1).
        """
        if not 0 < agreement < 1:
            raise ValueError(f"agreement must lie between 0 and 1, got {agreement!r}")
        if math.isnan(self.agreement):
            return math.nan
        wanted, found = (max(t - self.chance, 0) / max(1 - t, 1e-12) for t in (agreement, self.agreement))
        return max(1, math.ceil(self.batches * wanted / found - 1e-9)) if found else math.inf

    def reproduced(self, squares: np.ndarray) -> np.ndarray:
        """The part of squared values (r,), descending, that other data would show too: each times
        snr / (1 + snr) of its plane.

        A single direction's ratio is noisy: the result is the nearest descending sequence with the
        same sums of what is pooled.
        """
        share = np.repeat(self.snr / (1 + self.snr), max(1, len(squares) // max(1, len(self.snr))))
        pools: list[list[float]] = []  # [mean, length]
        for value in squares * np.pad(share, (0, len(squares) - len(share))):
            pools.append([float(value), 1])
            while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
                (mean, length), (before, more) = pools.pop(), pools.pop()
                pools.append([(mean * length + before * more) / (length + more), length + more])
        return np.concatenate([np.full(length, mean) for mean, length in pools])


def overlap(p: np.ndarray, q: np.ndarray) -> float:
    """||P^T Q||_F^2 / r of two orthonormal bases (n x r): 1 where the spans are equal, r / n by
    chance.
    """
    return min(1.0, float(np.sum((p.T @ q) ** 2) / p.shape[1]))


def split_half_of(
    halves: np.ndarray, batches: np.ndarray, rank: int, choose: Callable[[np.ndarray], np.ndarray], *, pairs: bool
) -> SplitHalf:
    """halves (2, n, k) and batches (2,): the sketches and how many batches each has seen. choose:
    the support (n x rank) that one shows.

    pairs: two neighbouring directions are one plane.
    """
    count, chance = int(batches.sum()), rank / halves.shape[1]
    planes = rank // 2 if pairs else rank
    if not batches.all() or not halves.any((1, 2)).all():
        unknown = np.full(rank, math.nan), math.nan, np.full(planes, math.nan)
        return SplitHalf(math.nan, math.nan, *unknown, count, chance, math.nan)
    y = halves / batches[:, None, None]
    p = [choose(each) for each in y]
    # signal: s^2, twice; own: s^2 + n^2 / b_h, of each half.
    signal = sum(np.sum((each.T @ y[0]) * (each.T @ y[1]), 1) for each in p) / 2
    own = sum(np.sum((each.T @ half) ** 2, 1) for each, half in zip(p, y, strict=True)) / 2
    if pairs:
        signal, own = (each[: 2 * planes].reshape(-1, 2).sum(1) for each in (signal, own))
    left = 2 / (np.sum(1 / batches) * count)  # of a half's noise, when all batches are together
    noise = (own - signal) * left
    # Of halves that agree to rounding the noise is none, or less.
    least = np.finfo(np.float64).eps * np.maximum(own, np.finfo(np.float64).tiny)
    halved, energies = overlap(*p), np.sum(y**2, (1, 2))
    return SplitHalf(
        agreement=_all_of(halved, chance),
        halves=halved,
        angles=np.sort(np.arccos(np.clip(np.linalg.svd(p[0].T @ p[1], compute_uv=False), 0, 1))),
        reproducible=_reproducible(float(signal.sum()), float(own.sum()), left),
        snr=np.maximum(signal, 0) / np.maximum(noise, least),
        batches=count,
        chance=chance,
        dominance=float(energies.max() / energies.sum()),
    )


def _reproducible(signal: float, own: float, left: float) -> float:
    """beta / (beta + left (1 - beta)) of beta = signal / own, and minus that of -beta, so that
    noise alone has mean 0.
    """
    beta = min(abs(signal) / own, 1.0) if own > 0 else 0.0
    return math.copysign(beta / (beta + left * (1 - beta)), signal) if beta else 0.0


def _all_of(halves: float, chance: float) -> float:
    """The agreement of all the batches and as many others, from the overlap of two halves."""
    if chance >= 1:
        return 1.0
    t = max(halves - chance, 0.0) / (1 - chance)
    return chance + (1 - chance) * 2 * t / (1 + t)
