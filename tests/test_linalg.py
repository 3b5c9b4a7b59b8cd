"""The Python surface of the Rust core: what goes in (strides, dtypes, refusals) and what comes out,
against float64.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loft_rs import _core, linalg

EPS = float(np.finfo(np.float32).eps)
SEEDS = st.integers(0, 2**32 - 1)


def gaussian(m, n, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((m, n)).astype(dtype)


def with_spectrum(m, n, power, seed=0):
    k = min(m, n)
    left, right = np.linalg.qr(gaussian(m, k, seed, float))[0], np.linalg.qr(gaussian(n, k, seed + 1, float))[0]
    return (left * np.arange(1, k + 1) ** -power) @ right.T


def skew(k, seed=0):
    a = gaussian(k, k, seed, float)
    return a - a.T


def defect(q):
    """The largest entry of |Q^T Q - I|."""
    q = np.asarray(q, float)
    return np.abs(q.T @ q - np.eye(q.shape[1])).max()


def layouts(a):
    """The same matrix in every memory layout that NumPy knows."""
    wide = np.zeros((2 * a.shape[0], 3 * a.shape[1]), a.dtype)
    wide[::2, ::3] = a
    packed = np.zeros(a.shape, np.dtype([("pad", "u1"), ("x", a.dtype)]))
    packed["x"] = a
    return {
        "C": np.ascontiguousarray(a),
        "Fortran": np.asfortranarray(a),
        "reversed": np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1],
        "strided": wide[::2, ::3],
        "unaligned": packed["x"],
    }


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.sampled_from([np.float32, np.float64]), SEEDS)
def test_svd_of_any_small_matrix(m, n, fraction, dtype, seed):
    a = gaussian(m, n, seed, dtype)
    rank = 1 + int(fraction * (min(m, n) - 1))
    found = linalg.randomized_svd(a, rank, seed=seed)
    eps, size = np.finfo(dtype).eps, np.linalg.norm(a)
    exact = np.linalg.svd(a.astype(float), compute_uv=False)
    assert found.u.dtype == found.vt.dtype == dtype and found.s.dtype == np.float64
    assert found.u.shape == (m, rank) and found.vt.shape == (rank, n)
    assert np.abs(found.s - exact[:rank]).max() <= 20 * eps * size
    assert max(defect(found.u), defect(found.vt.T)) <= 50 * eps
    assert found.energy == pytest.approx((exact[:rank] ** 2).sum() / (exact**2).sum(), abs=1e-6)
    largest = np.take_along_axis(found.vt, np.abs(found.vt).argmax(1)[:, None], 1)
    assert (largest > 0).all()
    assert np.isnan(found.gap) == (rank == min(m, n))


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("shape", [(768, 500), (400, 900)])
def test_krylov_keeps_more_than_svd_lowrank(shape, power):
    torch = pytest.importorskip("torch")
    a, rank = with_spectrum(*shape, power).astype(np.float32), 16
    found = linalg.randomized_svd(a, rank)
    best = (np.arange(1, rank + 1) ** (-2 * power)).sum()
    torch.manual_seed(0)
    theirs = torch.svd_lowrank(torch.from_numpy(a), q=rank, niter=4)[2].double().numpy()
    kept = [np.square(a.astype(float) @ v).sum() / best for v in (found.vt.T.astype(float), theirs)]
    assert kept[0] >= kept[1]
    assert kept[0] >= 0.99  # what the default depth aims at
    assert found.passes > 1


def test_tol_buys_energy():
    a = with_spectrum(600, 600, 0.2)
    loose, tight = linalg.randomized_svd(a, 8, tol=1e-2), linalg.randomized_svd(a, 8, tol=1e-8)
    best = np.square(np.arange(1, 9) ** -0.2).sum()
    assert tight.passes > loose.passes
    assert 1 - np.square(tight.s).sum() / best < 1e-8 < 1e-2
    assert 1 - np.square(loose.s).sum() / best < 1e-2


@pytest.mark.parametrize("shape", [(60, 45), (300, 280), (700, 520)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_strides_and_threads_change_no_bit(shape, dtype):
    """Columns that are contiguous are summed in another order than rows that are; all else is the
    same to the bit.
    """
    a, w = gaussian(*shape, 1, dtype), gaussian(*shape, 2, dtype)

    def run(a, w, threads):
        svd = linalg.randomized_svd(a, 6, threads=threads)
        (found,) = _core.select(
            [("", a, w, 6)], method="skewgrad", side="input", tol=None, seed=0, threads=threads, progress=None
        )
        return [svd.u, svd.s, svd.vt, svd.energy, found["basis"], found["values"], found["energy"]]

    by_row, by_column = run(a, w, 1), run(np.asfortranarray(a), np.asfortranarray(w), 1)
    for threads in (1, 2, 4):
        for (layout, a2), w2 in zip(layouts(a).items(), layouts(w).values(), strict=True):
            wanted = by_column if layout == "Fortran" else by_row
            for x, y in zip(wanted, run(a2, w2, threads), strict=True):
                assert np.array_equal(x, y), (layout, threads)
    eps = max(np.finfo(dtype).eps, np.finfo(np.float32).eps)
    for i in (1, 3, 5, 6):  # singular values and energies; single directions of a flat spectrum may turn
        np.testing.assert_allclose(by_row[i], by_column[i], rtol=100 * eps)


def test_bits_are_the_same_in_another_process():
    code = (
        "import numpy as np, hashlib; from loft_rs import linalg;"
        "a = np.random.default_rng(1).standard_normal((700, 520)).astype('f4');"
        "f = linalg.randomized_svd(a, 6); print(hashlib.sha256(f.vt.tobytes() + f.s.tobytes()).hexdigest())"
    )
    runs = {"1": "", "2": "", "3": "import torch; "}
    hashes = {
        subprocess.run(
            [sys.executable, "-c", before + code],
            env={**os.environ, "LOFT_RS_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads, before in runs.items()
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
def test_torch_tensors_are_read_in_place(name):
    torch = pytest.importorskip("torch")
    a = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).to(getattr(torch, name))
    matrix = linalg.as_matrix(a, "a")
    array = matrix[0] if isinstance(matrix, tuple) else matrix
    assert array.ctypes.data == a.data_ptr()
    wide = a.double().numpy()
    for tensor in (a, torch.nn.Parameter(a), a.T.contiguous().T, a.flip(0).flip(0)):
        found = linalg.randomized_svd(tensor, 5)
        assert found.s == pytest.approx(np.linalg.svd(wide, compute_uv=False)[:5], rel=1e-5)
    assert linalg.randomized_svd(a[:1].expand(7, 20), 2).s[1] < 1e-5


def test_ml_dtypes_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    a = gaussian(20, 10).astype(ml_dtypes.bfloat16)
    assert linalg.randomized_svd(a, 3).s == pytest.approx(np.linalg.svd(a.astype(float))[1][:3], rel=1e-5)


def refused(kind, message, call, *args, **kwargs):
    with pytest.raises(kind, match=message):
        call(*args, **kwargs)


def test_what_is_not_a_matrix_is_refused_by_name():
    a = gaussian(4, 4)
    refused(TypeError, "a must be a 2-D", linalg.randomized_svd, a.tolist(), 1)
    refused(TypeError, "weight must be .*int64", linalg.skew_project, a.astype(np.int64), a)
    refused(TypeError, "grad must be .*complex64", linalg.skew_project, a, a.astype(np.complex64))
    refused(TypeError, "masked", linalg.orthonormalize, np.ma.masked_array(a))
    refused(ValueError, r"u must be 2-D, got shape \(4,\)", linalg.householder_wy, a[0])
    refused(TypeError, "grads of layer 'q' must be", select, [("q", [1], None, 1)])
    refused(TypeError, "another tuple", select, [("q", (a, "bfloat16"), None, 1)])
    refused(TypeError, "another tuple", select, [("q", (a.view(np.uint32).astype(np.uint16), "float8"), None, 1)])
    refused(TypeError, "native byte order", select, [("q", a.astype(">f4"), None, 1)])
    assert np.array_equal(linalg.orthonormalize(a.astype(">f4")), linalg.orthonormalize(a))


def test_torch_refusals():
    torch = pytest.importorskip("torch")
    refused(ValueError, "a is a meta tensor", linalg.randomized_svd, torch.empty(3, 3, device="meta"), 1)
    refused(TypeError, "a must be .*layout", linalg.randomized_svd, torch.eye(3).to_sparse(), 1)
    refused(TypeError, "a must be .*int64", linalg.randomized_svd, torch.ones(3, 3, dtype=torch.int64), 1)
    refused(ValueError, "a must be 2-D", linalg.randomized_svd, torch.ones(3), 1)


def select(jobs, method="gradsvd", **kwargs):
    options = {"side": "input", "tol": None, "seed": 0, "threads": None, "progress": None}
    return _core.select(jobs, method=method, **{**options, **kwargs})


def test_wrong_values_are_refused_before_any_work():
    a = gaussian(6, 4)
    bad = a.copy()
    bad[3, 2] = np.inf
    calls = []
    refused(
        linalg.NonFiniteError,
        "grads of layer 'k'.*row 3, column 2",
        select,
        [("q", a, None, 1), ("k", bad, None, 1)],
        progress=calls.append,
    )
    refused(ValueError, "grads of layer 'q', grads of layer 'v'", select, [(x, 0 * a, None, 1) for x in "qv"])
    for rank in (0, 5):
        refused(ValueError, r"rank must be from 1 to min\(m, n\) = 4", linalg.randomized_svd, a, rank)
    refused(ValueError, "rank must be at least 1, got -1", linalg.randomized_svd, a, -1)
    refused(ValueError, "one shape", select, [("q", a, a.T, 1)], "skewgrad")
    refused(ValueError, "weights of layer 'q': needed", select, [("q", a, None, 1)], "skewgrad")
    refused(ValueError, "weights of layer 'q': not used", select, [("q", a, a, 1)])
    refused(ValueError, "zero to rounding.*gradsvd", select, [("q", a, a, 2)], "skewgrad")
    refused(ValueError, "method must be", select, [], "svd")
    refused(ValueError, "side must be", select, [], side="left")
    refused(ValueError, "tol must lie", linalg.randomized_svd, a, 1, tol=0.0)
    refused(ValueError, "threads must be from 1 to 1024", linalg.randomized_svd, a, 1, threads=0)
    refused(ValueError, "seed must be from 0", linalg.randomized_svd, a, 1, seed=-1)
    refused(ValueError, "s must be square", linalg.skew_planes, a, 2)
    refused(ValueError, "s must be skew-symmetric", linalg.skew_planes, np.eye(3), 2)
    refused(ValueError, "rank must be from 1 to n = 3", linalg.random_basis, 3, 4)
    refused(ValueError, "1 to n columns", linalg.orthonormalize, a.T)
    refused(linalg.NonFiniteError, "a holds a NaN", linalg.orthonormalize, bad)
    assert calls == []


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.floats(0, 1), st.floats(-30, 30), st.booleans(), SEEDS)
def test_orthonormalize(n, fraction, power, deficient, seed):
    r = 1 + int(fraction * (n - 1))
    a = gaussian(n, r, seed)
    if deficient:
        a[:, r // 2 :] = a[:, :1]
    a = (a * 10.0**power).astype(np.float32)
    q = linalg.orthonormalize(a)
    upper = q.T.astype(float) @ (a / np.float32(10.0**power)).astype(float)
    size = np.abs(upper).max()
    assert defect(q) <= 50 * EPS
    assert np.abs(np.tril(upper, -1)).max() <= 1e-5 * size and upper.diagonal().min() >= -1e-5 * size


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 64), st.floats(1e-3, 100), st.sampled_from([np.float32, np.float64]), SEEDS)
def test_cayley(r, norm, dtype, seed):
    a = skew(r, seed)
    a = (a * (norm / max(np.linalg.norm(a, 2), 1e-300))).astype(dtype)
    t, eye = linalg.cayley(a), np.eye(r)
    assert t.dtype == dtype
    assert np.linalg.norm(t.T.astype(float) @ t - eye, 2) <= (EPS if dtype == np.float32 else 1e-13 * max(norm, 1))
    assert np.abs(t - (eye - a) @ np.linalg.inv(eye + a.astype(float))).max() <= 4 * max(1, norm) * np.finfo(dtype).eps


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 8), SEEDS)
def test_householder_wy(n, k, seed):
    u = gaussian(n, k, seed, float)
    y, t = linalg.householder_wy(u)
    product = np.eye(n)
    for v in (u / np.linalg.norm(u, axis=0)).T:
        product = product @ (np.eye(n) - 2 * np.outer(v, v))
    assert np.abs(np.eye(n) - y @ t @ y.T - product).max() < 1e-9
    assert np.array_equal(t, np.triu(t))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 50), st.floats(0, 1), st.floats(-20, 20), SEEDS)
def test_skew_planes(k, fraction, power, seed):
    s = skew(k, seed) * 10.0**power
    rank = 1 + int(fraction * (k - 1))
    v, sigma = linalg.skew_planes(s, rank)
    exact = np.linalg.svd(s, compute_uv=False)
    even = rank - rank % 2
    assert defect(v) <= 50 * np.finfo(float).eps
    assert sigma[:even] == pytest.approx(exact[:even], rel=1e-9) and (sigma[even:] == 0).all()
    inside = v.T @ s @ v
    for i in range(0, even, 2):
        assert inside[i, i + 1] == pytest.approx(sigma[i], rel=1e-9)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_skew_project(side, dtype):
    w, g = gaussian(33, 20, 1, dtype), gaussian(33, 20, 2, dtype)
    product = w.T.astype(float) @ g if side == "input" else g.astype(float) @ w.T
    s = linalg.skew_project(w, np.asfortranarray(g), side=side)
    assert s.dtype == dtype and np.array_equal(s, -s.T)
    assert np.abs(s - (product - product.T) / 2).max() < 100 * np.finfo(dtype).eps


def test_random_and_coordinate_depend_on_the_seed_alone():
    basis = linalg.random_basis(50, 7, seed=3)
    assert basis.dtype == np.float32 and defect(basis) < 50 * EPS
    assert np.array_equal(basis, linalg.random_basis(50, 7, seed=3))
    assert not np.array_equal(basis, linalg.random_basis(50, 7, seed=4))
    indices = linalg.coordinate_indices(50, 7, seed=3)
    assert indices.dtype == np.int64 and (np.diff(indices) > 0).all() and 0 <= indices[0] and indices[-1] < 50
    assert not np.array_equal(indices, linalg.coordinate_indices(50, 7, seed=4))


def test_threads_variable(monkeypatch):
    a = gaussian(40, 30)
    monkeypatch.setenv("LOFT_RS_NUM_THREADS", "three")
    refused(ValueError, "LOFT_RS_NUM_THREADS must be a number", linalg.randomized_svd, a, 2)
    linalg.randomized_svd(a, 2, threads=1)
    monkeypatch.setenv("LOFT_RS_NUM_THREADS", "3")
    linalg.randomized_svd(a, 2)


def test_progress_and_an_exception_in_it():
    jobs = [(str(i), gaussian(30, 20, i), None, 2) for i in range(6)]
    seen = []
    select(jobs, progress=lambda *step: seen.append(step))
    assert sorted(name for name, *_ in seen) == list("012345") and [done for _, done, _ in seen] == [1, 2, 3, 4, 5, 6]

    def fail(*_):
        raise LookupError("enough")

    refused(LookupError, "enough", select, jobs, progress=fail)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_works():
    a = gaussian(300, 200)
    wanted = linalg.randomized_svd(a, 4, threads=2).vt
    child = os.fork()
    if child == 0:
        same = np.array_equal(wanted, linalg.randomized_svd(a, 4, threads=2).vt)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_of_the_caller_work_side_by_side():
    a = gaussian(300, 200)
    wanted = linalg.randomized_svd(a, 4).vt
    results = []
    workers = [threading.Thread(target=lambda: results.append(linalg.randomized_svd(a, 4).vt)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 6 and all(np.array_equal(wanted, vt) for vt in results)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is sent the POSIX way")
def test_keyboard_interrupt_stops_a_long_call():
    a = gaussian(3000, 3000)
    sent = []

    def interrupt():
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    # A shell's background job inherits SIGINT ignored, and Python then installs no handler of its
    # own.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, interrupt)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            # A flat spectrum and a hopeless tolerance: without the signal this goes on for many
            # seconds.
            linalg.randomized_svd(a, 24, tol=1e-14)
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, previous)
    # The signal is looked for every 100 ms; the bound only tells a prompt stop from a call that ran
    # to its end.
    assert time.perf_counter() - sent[0] < 5
