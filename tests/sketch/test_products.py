"""products.py: what a pass of calibration multiplies, and how often it reads what layers share."""

from __future__ import annotations

import pytest
import torch
from calibrated import build
from hypothesis import given
from hypothesis import strategies as st
from reference import token_batches

from loft_rs import SkewGrad, calibrate
from loft_rs.sketch import products
from loft_rs.sketch.base import Plan
from loft_rs.sketch.plan import SKETCHES


def tall_products(monkeypatch, call):
    """(A or A^T, its own length) of every product with the tokens' rows that `call` makes."""
    found, kept = [], products.product
    monkeypatch.setattr(products, "product", lambda a, b: (found.append(tuple(a.shape)), kept(a, b))[1])
    call()
    monkeypatch.setattr(products, "product", kept)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_reads_a_shared_input_as_rarely_as_it_can(monkeypatch, checkpointing):
    (batch,) = token_batches(1)

    def count(passes):
        model = build(support=SkewGrad(passes=passes))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        return len(tall_products(monkeypatch, lambda: calibrate(model, [batch])))

    # Two blocks of 7 linears, four products each: q, k and v, and gate and up, have X Omega
    # together. The moments are in one of X^T.
    assert count(passes=1) == 2 * (7 * 4 - 3)
    assert count(passes=2) == 2 * (7 * 4 - 3) + 2 * 7 * 4


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("method", ["skewgrad", "activation"])
@given(seed=st.integers(0, 2**16), rows=st.integers(1, 9), changed=st.booleans())
def test_the_sums_of_siblings_are_those_of_each_alone(method, single, seed, rows, changed):
    draw, n = torch.Generator().manual_seed(seed), 10
    plan = Plan(method, "input", "input_pca", seed, 4, n, (n,), 6, single)
    sketches = [SKETCHES[method](plan, torch.device("cpu"), torch.float64) for _ in range(2)]
    omega = sketches[0].omega.double()
    assert sketches[0].omega is sketches[1].omega
    wanted = [{}, {}]

    def passed(test):
        x = torch.randn(3, rows, n, generator=draw, dtype=torch.float64)
        for sums, sketch in zip(wanted, sketches, strict=True):
            sketch.begin_batch(0)
            a, b = x.reshape(-1, n), torch.randn(3 * rows, n, generator=draw, dtype=torch.float64)
            gram = a.mT @ (a @ test)
            skew = (b.mT @ (a @ test) - a.mT @ (b @ test)) / 2
            first = sketch.basis is None
            found = (
                {"sketch" if first else "image": skew, "moments": gram} if method == "skewgrad" else {"sketch": gram}
            )
            for key, value in found.items():
                sums[key] = sums.get(key, 0) + value
            sketch.on_backward(sketch.on_forward(x, None), b, 0)
            if changed:
                x.mul_(1.5)  # in place: the same storage, other numbers

    def compare(keys):
        for sums, sketch in zip(wanted, sketches, strict=True):
            for key in keys:
                held = sketch.pending[key]
                torch.testing.assert_close(held[0] if key == "sketch" else held, sums[key], atol=1e-11, rtol=1e-11)

    for _ in range(2):
        passed(omega)
    compare(["sketch", "moments"] if single and method == "skewgrad" else ["sketch"])
    if not single and method == "skewgrad":
        basis = torch.linalg.qr(torch.randn(n, 6, generator=draw, dtype=torch.float64))[0]
        wanted[:] = [{}, {}]
        for sketch in sketches:
            sketch.start_second_pass(basis)
        for _ in range(2):
            passed(basis)
        compare(["image", "moments"])
