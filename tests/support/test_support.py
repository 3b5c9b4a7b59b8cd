"""`select_support`, `Support` and their file: invariants by hypothesis, every refusal by its
message.
"""

from __future__ import annotations

import json
import math
import os
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from safetensors.numpy import load_file, save_file

import loft_rs
from loft_rs import Support, linalg, load_supports, save_supports, select_support
from loft_rs._files import whole_directory
from loft_rs.support.methods import METHODS

EPS = float(np.finfo(np.float32).eps)
KEY = "loft_rs.supports"
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

shapes = array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=24)
seeds = st.integers(0, 2**32 - 1)


def matrices(shape, seed, decay=0.7):
    """A gradient and a weight with decaying spectra."""
    chance = np.random.default_rng(seed)
    m, n = shape
    k = min(m, n)
    grad = chance.standard_normal((m, k)) * decay ** np.arange(k) @ chance.standard_normal((k, n))
    return grad.astype(np.float32), chance.standard_normal((m, n)).astype(np.float32)


def arguments(method, grad, weight):
    """The positional gradient and the weights that a method takes."""
    return {
        "gradsvd": (grad, None),
        "skewgrad": (grad, weight),
        "principal": (None, weight),
        "random": (grad, None),
        "coordinate": (None, weight),
    }[method]


def choose(method, grad, weight, rank, **options):
    first, weights = arguments(method, grad, weight)
    return select_support(first, rank, method=method, weights=weights, **options)


def objective(method, grad, weight, side):
    """The matrix whose captured fraction `energy` is, in float64, columns on the support's side."""
    g, w = grad.astype(np.float64), weight.astype(np.float64)
    if method == "skewgrad":
        product = w.T @ g if side == "input" else g @ w.T
        return (product - product.T) / 2
    chosen = w if method in ("principal", "coordinate") else g
    return chosen if side == "input" else chosen.T


def captured(method, matrix, basis):
    p = basis.astype(np.float64)
    kept = p.T @ matrix @ p if method == "skewgrad" else matrix @ p
    return np.square(kept).sum() / np.square(matrix).sum()


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("method", METHODS)
@QUICK
@given(shape=shapes, seed=seeds, data=st.data())
def test_basis_is_orthonormal_and_energy_is_true(method, side, shape, seed, data):
    grad, weight = matrices(shape, seed)
    rank = data.draw(st.integers(1, min(shape) // 2)) * 2 if min(shape) > 1 else 1
    if method == "skewgrad" and not np.any(objective(method, grad, weight, side)):
        return
    support = choose(method, grad, weight, rank, side=side, seed=seed)
    width = shape[1] if side == "input" else shape[0]
    assert support.basis.shape == (width, rank) and support.basis.dtype == np.float32
    gram = support.basis.astype(np.float64).T @ support.basis
    assert np.linalg.norm(gram - np.eye(rank), 2) <= 50 * EPS
    matrix = objective(method, grad, weight, side)
    assert support.energy == pytest.approx(captured(method, matrix, support.basis), abs=2e-5)
    assert 0 <= support.energy <= 1 and support.energy_stderr == 0
    assert support.values.shape == (rank,) and support.values.dtype == np.float64
    assert support.residuals.shape == (rank,)
    assert (support.rank, support.method, support.side, support.seed) == (rank, method, side, seed)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("method", ["gradsvd", "principal", "skewgrad"])
def test_energy_is_near_the_optimum(method, side):
    grad, weight = matrices((90, 70), 3, decay=0.85)
    matrix = objective(method, grad, weight, side)
    squares = np.square(np.linalg.svd(matrix, compute_uv=False))
    optimum = squares[:12].sum() / squares.sum()
    assert choose(method, grad, weight, 12, side=side).energy >= 0.999 * optimum


def test_values_are_singular_values_and_plane_strengths():
    grad, weight = matrices((60, 40), 1)
    singular = np.linalg.svd(grad.astype(np.float64), compute_uv=False)[:8]
    np.testing.assert_allclose(select_support(grad, 8).values, singular, rtol=1e-4)
    strengths = np.linalg.svd(objective("skewgrad", grad, weight, "input"), compute_uv=False)[:8]
    found = select_support(grad, 8, weights=weight, method="skewgrad").values
    np.testing.assert_allclose(found, strengths, rtol=1e-3)
    np.testing.assert_allclose(found[::2], found[1::2], rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_mapping_equals_single_calls_bit_for_bit(method):
    named = {"a": matrices((20, 30), 0), "b": matrices((33, 12), 1), "c.d": matrices((16, 16), 2)}
    ranks = {"a": 6, "b": 4, "c.d": 16}
    grads, weights = ({name: pair[side] for name, pair in named.items()} for side in (0, 1))
    together = choose(method, grads, weights, ranks, seed=5)
    assert list(together) == list(named)
    for name, (grad, weight) in named.items():
        alone = choose(method, grad, weight, ranks[name], seed=5)
        assert same(together[name], alone, timing=False)


def same(one: Support, other: Support, timing: bool = True) -> bool:
    arrays = all(
        getattr(one, key).tobytes() == getattr(other, key).tobytes() for key in ("basis", "values", "residuals")
    )
    scalars = ["energy", "energy_stderr", "gap", "passes", "columns", "method", "side", "seed", "order"]
    scalars += ["seconds"] * timing
    return arrays and all(repr(getattr(one, key)) == repr(getattr(other, key)) for key in scalars)


@pytest.mark.parametrize("method", METHODS)
def test_strides_and_threads_do_not_change_a_bit(method):
    grad, weight = matrices((40, 24), 4)
    wanted = choose(method, grad, weight, 6)
    turned = [choose(method, *map(np.asfortranarray, (grad, weight)), 6, threads=threads) for threads in (1, 2)]
    backwards = choose(
        method, np.ascontiguousarray(grad[::-1])[::-1], np.ascontiguousarray(weight[:, ::-1])[:, ::-1], 6, threads=1
    )
    assert same(wanted, backwards, timing=False) and same(*turned, timing=False)
    # Contiguous columns are summed in another order than contiguous rows.
    np.testing.assert_allclose(turned[0].values, wanted.values, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_torch_tensors_give_what_arrays_give(method, dtype):
    torch = pytest.importorskip("torch")
    grad, weight = (torch.from_numpy(each).to(getattr(torch, dtype)).requires_grad_() for each in matrices((30, 18), 6))
    exact = [
        each.detach().double().numpy() if dtype == "float64" else each.detach().float().numpy()
        for each in (grad, weight)
    ]
    np.testing.assert_array_equal(choose(method, grad, weight, 4).basis, choose(method, *exact, 4).basis)


def test_gpu_tensors():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    grad, weight = matrices((64, 48), 7)
    for method in METHODS:
        there = choose(method, torch.from_numpy(grad).cuda(), torch.from_numpy(weight).cuda(), 8)
        assert same(there, choose(method, grad, weight, 8), timing=False)


@pytest.mark.parametrize("method", ["gradsvd", "random"])
def test_progress_is_called_for_every_layer_and_may_stop_the_call(method):
    grads = {name: matrices((12, 12), number)[0] for number, name in enumerate("abc")}
    calls = []
    select_support(grads, 2, method=method, progress=lambda *each: calls.append(each))
    assert {each[0] for each in calls} == set("abc")
    assert [each[1:] for each in calls] == [(1, 3), (2, 3), (3, 3)]

    def stop(*_):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        select_support(grads, 2, method=method, progress=stop)


def test_support_is_an_array_and_prints_shortly():
    support = select_support(matrices((20, 12), 0)[0], 4)
    np.testing.assert_array_equal(np.asarray(support), support.basis)
    assert np.asarray(support, dtype=np.float64).dtype == np.float64
    assert repr(support).startswith("Support(gradsvd, input side, 12 x 4, energy 0.") and "\n" not in repr(support)


def test_an_odd_rank_warns_with_skewgrad_only():
    grad, weight = matrices((12, 12), 0)
    with pytest.warns(UserWarning, match="odd rank gains nothing"):
        assert select_support(grad, 3, weights=weight, method="skewgrad").basis.shape == (12, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select_support(grad, 3)


G, W = matrices((8, 6), 0)
BAD = [
    (dict(method="activation"), ValueError, "exists in loft_rs.calibrate only"),
    (dict(method="best"), ValueError, "method must be one of gradsvd, skewgrad"),
    (dict(side="left"), ValueError, "side must be 'input' or 'output'"),
    (dict(tol=-1.0), ValueError, "tol must be"),
    (dict(tol=math.nan), ValueError, "tol must be"),
    (dict(seed=-1), ValueError, "seed must be"),
    (dict(seed=1.5), ValueError, "seed must be"),
    (dict(threads=0), ValueError, "threads must be"),
    (dict(progress=3), TypeError, "progress must be callable"),
    (dict(weights=W), ValueError, "weights have no part in method 'gradsvd'"),
    (dict(method="skewgrad"), ValueError, "weights are missing: method 'skewgrad'"),
    (dict(method="principal"), ValueError, "grads have no part in method 'principal'"),
    (dict(method="principal", grads=None), ValueError, "weights are missing: method 'principal' needs weights"),
    (dict(grads=None), ValueError, "grads are missing: method 'gradsvd' needs grads"),
    (dict(method="skewgrad", grads=None, weights=W), ValueError, "grads are missing"),
    (dict(method="random", grads=None), ValueError, "for the shape, and neither"),
    (dict(rank=0), ValueError, "rank must be at least 1, not 0"),
    (dict(rank=-2), ValueError, "rank must be at least 1"),
    (dict(rank=7), ValueError, "rank is 7, but a 8 x 6 matrix allows at most 6"),
    (dict(rank=2.0), TypeError, "rank must be an integer, not float"),
    (dict(rank=True), TypeError, "rank must be an integer, not bool"),
    (dict(rank={"a": 2}), TypeError, "rank may be a mapping only"),
    (dict(grads={}), ValueError, "grads is an empty mapping"),
    (dict(grads={3: G}), TypeError, "non-empty strings, not 3"),
    (dict(grads={"a": None}), TypeError, r"grads\['a'\] must be a matrix, not None"),
    (
        dict(grads={"a": G}, rank={"b": 2}),
        ValueError,
        "rank must have the names of the matrices; it lacks 'a' and has the unknown 'b'",
    ),
    (dict(grads={"a": G}, weights=W, method="skewgrad"), TypeError, "both be single matrices, or both mappings"),
    (dict(grads={"a": G}, weights={"b": W}, method="skewgrad"), ValueError, "weights must have the names of grads"),
    (
        dict(weights=W[:, :5], method="skewgrad"),
        ValueError,
        r"\(8, 6\) and weights is \(8, 5\): the shapes must be equal",
    ),
    (dict(grads={"a": G}, weights={"a": W.T}, method="random"), ValueError, "weights of 'a' is"),
    (dict(grads=np.zeros((0, 4), np.float32)), ValueError, "empty"),
    (dict(grads=G[0]), (TypeError, ValueError), "grads"),
    (dict(grads=G.astype(np.int32)), (TypeError, ValueError), "grads"),
    (dict(grads=G.astype(np.complex64)), (TypeError, ValueError), "grads"),
    (dict(grads=[[1.0]]), TypeError, "grads"),
    (dict(grads={"layer.q": "x"}), TypeError, "layer.q"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_wrong_arguments_are_refused_by_name(change, kind, message):
    options = {"grads": G, "rank": 2, **change}
    with pytest.raises(kind, match=message):
        select_support(options.pop("grads"), options.pop("rank"), **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_non_finite_entries_are_refused_before_any_work(method, poison):
    grad, weight = (each.copy() for each in matrices((8, 6), 0))
    bad_grad, bad_weight = grad.copy(), weight.copy()
    bad_grad[3, 2] = bad_weight[3, 2] = poison
    argument = "grads" if arguments(method, grad, weight)[0] is not None else "weights"
    with pytest.raises(ValueError, match=f"(?s){argument}.*layer.q|layer.q.*{argument}"):
        choose(
            method,
            {"first": grad, "layer.q": bad_grad},
            {"first": weight, "layer.q": bad_weight},
            2,
            progress=pytest.fail,
        )
    if method in ("skewgrad", "random", "coordinate"):
        with pytest.raises(loft_rs.NonFiniteError, match="weights"):
            select_support(grad, 2, method=method, weights=bad_weight)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("method", ["random", "coordinate"])
def test_a_blind_energy_does_not_depend_on_the_scale(method, side):
    wanted = select_support(G.astype(np.float64), 2, method=method, side=side)
    for scale in (2.0**1000, 2.0**-1000):
        support = select_support(G.astype(np.float64) * scale, 2, method=method, side=side)
        assert support.energy == wanted.energy
        np.testing.assert_array_equal(support.values, wanted.values * scale)


@pytest.mark.parametrize("method", ["gradsvd", "skewgrad", "random"])
def test_all_zero_gradients_are_listed_together(method):
    grad, weight = matrices((8, 6), 0)
    zero = np.zeros_like(grad)
    grads, weights = {"a": zero, "b": grad, "c.d": zero}, dict.fromkeys(("a", "b", "c.d"), weight)
    with pytest.raises(ValueError, match=r"a.*c\.d") as caught:
        choose(method, grads, weights, 2)
    assert "zero" in str(caught.value)
    with pytest.raises(ValueError, match="zero"):
        choose(method, zero, weight, 2)


def test_meta_and_sparse_tensors_are_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises((TypeError, ValueError), match=r"grads.*meta"):
        select_support(torch.empty(8, 6, device="meta"), 2)
    with pytest.raises((TypeError, ValueError), match=r"grads.*sparse"):
        select_support(torch.eye(6).to_sparse(), 2)


@pytest.fixture
def saved(tmp_path):
    grad, weight = matrices((24, 18), 9)
    supports = {f"{method}.w": choose(method, grad, weight, 4, seed=3) for method in METHODS}
    path = tmp_path / "supports.safetensors"
    save_supports(path, supports)
    return path, supports


def test_round_trip_is_bit_for_bit_and_the_bytes_are_the_same(saved, tmp_path):
    path, supports = saved
    loaded = load_supports(path)
    assert set(loaded) == set(supports) and all(same(loaded[name], supports[name]) for name in supports)
    again = tmp_path / "again.safetensors"
    save_supports(again, dict(reversed(loaded.items())))
    assert again.read_bytes() == path.read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["again.safetensors", "supports.safetensors"]


def test_a_single_support_comes_back_single(tmp_path):
    support = select_support(matrices((10, 9), 0)[0], 2)
    save_supports(tmp_path / "one.safetensors", support)
    assert same(load_supports(tmp_path / "one.safetensors"), support)


def rewrite(path, tensors=None, header=None):
    """The file with some tensors replaced (None: removed) and its header changed by a function."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as opened:
        facts = json.loads(opened.metadata()[KEY])
    kept = {**load_file(path), **(tensors or {})}
    if header is not None:
        facts = header(facts)
    save_file({name: each for name, each in kept.items() if each is not None}, path, metadata={KEY: json.dumps(facts)})


def changed(**fields):
    def change(facts):
        facts["supports"]["gradsvd.w"].update(fields)
        return facts

    return change


def without(field):
    def change(facts):
        del facts["supports"]["gradsvd.w"][field]
        return facts

    return change


P = np.linalg.qr(np.random.default_rng(0).standard_normal((18, 4)))[0].astype(np.float32)
POISONED = P.copy()
POISONED[0, 0] = np.nan
HOSTILE = [
    (dict(header=lambda facts: facts | {"version": 2}), "format version 2 is not known"),
    (dict(header=lambda facts: [facts]), "format version None is not known"),
    (dict(header=lambda facts: facts | {"supports": {}}), "no list of supports"),
    (dict(header=lambda facts: facts | {"supports": {"gradsvd.w": 3}}), "no list of supports"),
    (dict(header=changed(energy=1.5)), "impossible energy: 1.5"),
    (dict(header=changed(energy="high")), "impossible energy"),
    (dict(header=changed(method="magic")), "impossible method: 'magic'"),
    (dict(header=changed(side=["input"])), "impossible side"),
    (dict(header=changed(seed=True)), "impossible seed"),
    (dict(header=changed(passes=-1)), "impossible passes"),
    (dict(header=changed(seconds=math.inf)), "impossible seconds"),
    (dict(header=changed(order="best")), "impossible order"),
    (dict(header=changed(surprise=1)), "unknown fields: surprise"),
    (dict(header=without("gap")), "missing or unknown fields: gap"),
    (dict(tensors={"gradsvd.w.basis": None}), "'gradsvd.w.basis' missing or unexpected"),
    (dict(tensors={"other.basis": P}), "'other.basis' missing or unexpected"),
    (dict(tensors={"gradsvd.w.basis": P[:, :3].copy()}), r"values of float64 \(4,\), float64 \(3,\) is expected"),
    (dict(tensors={"gradsvd.w.basis": P[:, 0].copy()}), "float32 .n, r. with"),
    (dict(tensors={"gradsvd.w.basis": P.T.copy()}), "float32 .n, r. with"),
    (dict(tensors={"gradsvd.w.basis": P.astype(np.float64)}), "basis of float64"),
    (dict(tensors={"gradsvd.w.basis": POISONED}), "NaN or an infinite"),
    (dict(tensors={"gradsvd.w.basis": P * 1.001}), "not orthonormal"),
    (dict(tensors={"gradsvd.w.basis": np.zeros_like(P)}), "not orthonormal"),
    (dict(tensors={"gradsvd.w.values": np.full(4, -np.inf)}), "values that are infinite"),
    (dict(tensors={"gradsvd.w.values": np.ones(4, np.float32)}), "values of float32"),
    (dict(tensors={"gradsvd.w.residuals": np.full(4, np.inf)}), "residuals that are infinite"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=[message[:40] for _, message in HOSTILE])
def test_hostile_files_are_refused(saved, change, message):
    rewrite(saved[0], **change)
    with pytest.raises(ValueError, match=message) as caught:
        load_supports(saved[0])
    assert str(saved[0]) in str(caught.value)


def test_columns_that_an_older_file_lacks_are_read_as_none(saved):
    path, supports = saved
    rewrite(path, header=without("columns"))
    loaded = load_supports(path)
    assert loaded["gradsvd.w"].columns == 0
    assert all(same(loaded[name], supports[name]) for name in supports)


@QUICK
@given(cut=st.floats(0, 0.999))
def test_truncated_files_are_refused(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "s.safetensors"
    save_supports(path, select_support(G, 2))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(ValueError, match="damaged"):
        load_supports(path)


@pytest.mark.skipif(os.name != "posix", reason="file modes are a POSIX matter")
def test_a_written_file_has_the_mode_that_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        save_supports(tmp_path / "s.safetensors", select_support(G, 2))
        with whole_directory(tmp_path / "out") as folder:
            save_file({"a": G}, folder / "t.safetensors")
    finally:
        os.umask(before)
    for file in (tmp_path / "s.safetensors", tmp_path / "out" / "t.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o640


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_supports(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="is a folder, not a safetensors file"):
        load_supports(tmp_path)
    save_file({"a": G}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"not a file that loft_rs\.save_supports wrote"):
        load_supports(tmp_path / "other.safetensors")
    save_file({"a": G}, tmp_path / "garbled.safetensors", metadata={KEY: "{"})
    with pytest.raises(ValueError, match="not JSON"):
        load_supports(tmp_path / "garbled.safetensors")


def test_what_load_would_refuse_save_refuses_and_leaves_nothing(tmp_path):
    good = select_support(G, 2)
    bad = Support(**{**vars(good), "basis": good.basis * 2})
    target = tmp_path / "s.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"supports of 'q'.*not orthonormal"):
        save_supports(target, {"p": good, "q": bad})
    with pytest.raises(ValueError, match="nothing to save"):
        save_supports(target, {})
    with pytest.raises(TypeError, match="must be a Support"):
        save_supports(target, {"p": good.basis})
    for names in ({1: good}, {"p": good, 1: good}, {"": good}):
        with pytest.raises(TypeError, match="the names in supports must be non-empty strings"):
            save_supports(target, names)
    for each in ([good], good.basis):
        with pytest.raises(TypeError, match="supports must be a Support or a mapping of names to them, not"):
            save_supports(target, each)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save_supports(tmp_path / "nowhere" / "s.safetensors", good)
    assert target.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [target]


def test_non_finite_error_is_the_packages_own():
    poisoned = G.copy()
    poisoned[0, 0] = np.nan
    for method in ("gradsvd", "random"):
        with pytest.raises(loft_rs.NonFiniteError):
            select_support(poisoned, 2, method=method)


def with_values(sigma, n, seed=0):
    chance = np.random.default_rng(seed)
    u, v = (np.linalg.qr(chance.standard_normal((k, len(sigma))))[0] for k in (len(sigma), n))
    return (u * sigma @ v.T).astype(np.float32)


@pytest.mark.parametrize("shape", [(40, 60), (600, 700)])
def test_last_directions_are_identifiable_where_the_gap_exceeds_the_residual(shape):
    steps = np.arange(1.0, shape[0] + 1)
    decaying = select_support(with_values(0.5**steps, shape[1]), 4)
    assert decaying.identifiable and decaying.gap * decaying.values[-1] > decaying.residuals[-1]
    assert not select_support(with_values(np.ones_like(steps), shape[1]), 4).identifiable
    # Equal to rounding, if not exactly: a gap of 1e-7 is nothing that float32 resolves.
    assert not select_support(with_values(1 - 1e-7 * steps / shape[0], shape[1]), 4).identifiable


def test_at_full_rank_there_is_nothing_to_confuse():
    assert select_support(with_values(np.ones(6), 9), 6).identifiable


def test_columns_are_those_of_the_products():
    deep = select_support(with_values(np.arange(1.0, 601) ** -0.5, 700), 16)
    assert deep.columns == 24 * deep.passes
    assert linalg.randomized_svd(with_values(np.ones(6), 9), 6).columns == 0
    found = linalg.randomized_svd(with_values(np.arange(1.0, 601) ** -0.5, 600), 16)
    assert found.columns == 24 * (found.passes - 1) + 16
