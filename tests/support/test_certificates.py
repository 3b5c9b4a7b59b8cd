"""Certificates against float64 truth: `energy` with its standard error, `values`, `residuals` and
`gap` over many kinds of matrix.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from loft_rs import linalg, select_support

SHAPES = [(1, 1), (1, 40), (40, 1), (30, 30), (64, 96), (96, 64), (200, 300), (400, 260), (700, 640), (500, 560)]
SPECTRA = {
    "flat": lambda i: np.ones_like(i),
    "decaying": lambda i: i**-0.5,
    "exponential": lambda i: 0.7**i,
    "clustered": lambda i: np.where(i <= 8, 1.0, np.where(i <= 30, 0.5, 1e-3)),
    "deficient": lambda i: np.where(i <= 5, 1 / i, 0.0),
}
SCALES = [1.0, 1e-30, 1e30]
# Sums of float32 products: what energies are right to, as fractions of the whole.
ROUNDING = {np.float32: 2e-6, np.float64: 2e-6}


def orthonormal(chance, n, k):
    return np.linalg.qr(chance.standard_normal((n, k)))[0]


def matrix(chance, shape, spectrum):
    k = min(shape)
    sigma = SPECTRA[spectrum](np.arange(1, k + 1.0))
    return orthonormal(chance, shape[0], k) * sigma @ orthonormal(chance, shape[1], k).T


def cases():
    """(name, matrix, rank), more than 200 of them; an entry of the spectrum more than `rank` is
    looked at for the gap.
    """
    chance = np.random.default_rng(0)
    for shape, spectrum, scale in itertools.product(SHAPES, SPECTRA, SCALES):
        a = matrix(chance, shape, spectrum) * scale
        # 130 columns of a wide matrix are found from the other side.
        deep = 130 if shape == (500, 560) else 24
        for rank in sorted({1, min(8, min(shape)), min(shape) if min(shape) < 300 else deep}):
            yield f"{shape[0]}x{shape[1]} {spectrum} {scale:g} r={rank}", a, rank


def truth(method, a, weight, basis):
    """(kept, whole) squared objective in float64."""
    basis = basis.astype(np.float64)
    if method == "gradsvd":
        return np.square(a @ basis).sum(), np.square(a).sum()
    product = weight.T @ a
    skew = (product - product.T) / 2
    return np.square(basis.T @ skew @ basis).sum(), np.square(skew).sum()


def energies(method, dtype):
    """(name, stated - true, standard error) of every case that has an answer."""
    chance = np.random.default_rng(1)
    for name, a, rank in cases():
        a = a.astype(dtype)
        weight = chance.standard_normal(a.shape).astype(dtype) if method == "skewgrad" else None
        if method == "skewgrad" and (rank % 2 or a.shape[1] < 2):
            continue
        found = select_support(a, rank, method=method, weights=weight)
        unit = float(np.abs(a).max())
        kept, whole = truth(method, a.astype(np.float64) / unit, weight, found.basis)
        yield name, found.energy - kept / whole, found.energy_stderr


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", ["gradsvd", "skewgrad"])
def test_energy_is_never_optimistic(method, dtype):
    seen = list(energies(method, dtype))
    assert len(seen) >= (300 if method == "gradsvd" else 100)
    for name, error, spread in seen:
        # Five standard errors: a false alarm in a million for a normal error.
        assert abs(error) <= ROUNDING[dtype] + 5 * spread, (name, error, spread)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_residuals_and_gap_are_true(dtype):
    eps = np.finfo(dtype).eps
    for name, a, rank in cases():
        a = a.astype(dtype)
        found = linalg.randomized_svd(a, rank)
        unit = float(np.abs(a).max())
        wide, u, v = a.astype(np.float64) / unit, found.u.astype(np.float64), found.vt.T.astype(np.float64)
        norm = np.linalg.norm(wide, 2)
        s = found.s / unit
        assert np.abs(np.linalg.norm(wide @ v, axis=0) - s).max() <= 200 * eps * norm, name
        missed = np.linalg.norm(wide.T @ u - v * s, axis=0)
        assert (missed <= found.residuals / unit * (1 + 1e-3) + 1e3 * eps * norm).all(), (name, missed)
        exact = np.linalg.svd(wide, compute_uv=False)
        assert (s <= exact[:rank] + 200 * eps * norm).all(), name
        # A residual that is small promises a singular value nearby.
        nearest = np.abs(exact[None] - s[:, None]).min(1)
        assert (nearest <= found.residuals / unit + 200 * eps * norm).all(), name
        assert np.isnan(found.gap) == (rank == min(a.shape)), name


def test_a_zero_matrix_is_refused_by_the_supports_and_solved_by_the_svd():
    zero = np.zeros((6, 5), np.float32)
    with pytest.raises(ValueError, match="all-zero"):
        select_support(zero, 2)
    found = linalg.randomized_svd(zero, 2)
    assert (found.s == 0).all() and found.gap == 0
    for basis in (found.u, found.vt.T):
        np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-6)


if __name__ == "__main__":
    for method, dtype in itertools.product(["gradsvd", "skewgrad"], ROUNDING):
        seen = list(energies(method, dtype))
        exact = [error for _, error, spread in seen if spread < 1e-7]
        ratios = [abs(error) / spread for _, error, spread in seen if spread >= 1e-7]
        print(
            f"{method} {dtype.__name__}: {len(seen)} matrices; {len(exact)} exact ones, {max(map(abs, exact)):.1e} off at most"
        )
        if ratios:
            print(f"    {len(ratios)} estimates, {max(ratios):.1f} standard errors off at most")
