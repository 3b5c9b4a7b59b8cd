"""Gradients given as (dY, X): the supports of dY^T X, without forming it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loft_rs import NonFiniteError, select_support


def factors(tokens, m, n, seed, dtype=np.float32):
    chance = np.random.default_rng(seed)
    dy, x, w = (chance.standard_normal(shape).astype(dtype) for shape in ((tokens, m), (tokens, n), (m, n)))
    return dy, x, w


def captured(method, grad, weight, support):
    """The squared objective that a basis keeps, and the largest that one of its rank could."""
    basis = support.basis.astype(np.float64)
    if method == "skewgrad":
        product = weight.T @ grad if support.side == "input" else grad @ weight.T
        skew = (product - product.T) / 2
        return np.square(basis.T @ skew @ basis).sum(), np.square(np.linalg.svd(skew, compute_uv=False))
    matrix = grad if support.side == "input" else grad.T
    return np.square(matrix @ basis).sum(), np.square(np.linalg.svd(matrix, compute_uv=False))


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 40),
    m=st.integers(2, 40),
    n=st.integers(2, 40),
    rank=st.integers(1, 5),
    method=st.sampled_from(["gradsvd", "skewgrad"]),
    side=st.sampled_from(["input", "output"]),
    dtype=st.sampled_from([np.float32, np.float64, np.float16]),
    seed=st.integers(0, 2**31),
)
def test_factors_give_the_support_of_their_product(tokens, m, n, rank, method, side, dtype, seed):
    dy, x, w = factors(tokens, m, n, seed, dtype)
    rank = min(2 * rank, m - m % 2, n - n % 2)
    grad, weight = dy.astype(np.float64).T @ x.astype(np.float64), w.astype(np.float64)
    found = select_support((dy, x), rank, method=method, side=side, weights=w if method == "skewgrad" else None)
    kept, squares = captured(method, grad, weight, found)
    assert found.basis.shape == (n if side == "input" else m, rank)
    assert kept >= (1 - 1e-5) * squares[:rank].sum()
    assert found.energy == pytest.approx(kept / squares.sum(), abs=1e-5)
    # The strengths that loft_rs reports are those of the product itself.
    assert np.square(found.values).sum() == pytest.approx(kept, rel=1e-5, abs=1e-6 * squares.sum())


@pytest.mark.parametrize("method", ["gradsvd", "skewgrad"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_few_rows_of_a_large_layer(method, side):
    dy, x, w = factors(24, 700, 600, 3)
    weights = w if method == "skewgrad" else None
    found = select_support((dy, x), 64, method=method, side=side, weights=weights)
    kept, squares = captured(method, dy.astype(np.float64).T @ x, w.astype(np.float64), found)
    assert kept >= (1 - 1e-5) * squares[:64].sum()
    basis = found.basis.astype(np.float64)
    assert np.abs(basis.T @ basis - np.eye(64)).max() <= 50 * np.finfo(np.float32).eps


def test_a_mapping_mixes_factors_and_matrices():
    torch = pytest.importorskip("torch")
    dy, x, _ = factors(6, 30, 20, 5)
    half = tuple(torch.from_numpy(each).bfloat16() for each in (dy, x))
    found = select_support({"a": (dy, x), "b": dy.T @ x, "c": half}, 4)
    same = select_support((dy, x), 4)
    assert np.array_equal(found["a"].basis, same.basis)
    assert found["b"].energy == pytest.approx(same.energy, abs=1e-5)
    exact = tuple(each.float().numpy() for each in half)
    assert np.array_equal(found["c"].basis, select_support(exact, 4).basis)


def test_bad_factors_are_refused_by_name():
    dy, x, w = factors(6, 30, 20, 5)
    with pytest.raises(ValueError, match=r"grads as factors must be \(N, m\) and \(N, n\) with one N, not \(6, 30\)"):
        select_support((dy, x[:5]), 2)
    with pytest.raises(TypeError, match=r"grads\['q'\] as factors must be a pair"):
        select_support({"q": (dy, x, x)}, 2)
    with pytest.raises(ValueError, match="the shapes must be equal"):
        select_support((dy, x), 2, method="skewgrad", weights=w.T)
    with pytest.raises(ValueError, match="allows at most 20"):
        select_support((dy, x), 21)
    dy[2, 3] = np.nan
    with pytest.raises(NonFiniteError, match=r"grads\['q'\]\[0\] holds a NaN"):
        select_support({"q": (dy, x)}, 2)
