"""`Budget`: ranks against brute force, and supports against exact spectra and against the same
ranks given one by one.
"""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from loft_rs import Budget, Support, load_supports, save_supports, select_support
from loft_rs.cli import main
from loft_rs.support.budget import PARAMETERS, Allocation, share_ranks
from loft_rs.support.support import cut_support

SPECTRAL = ("gradsvd", "skewgrad", "principal")


def descending(values):
    return sorted(values, reverse=True)


# Small whole numbers make ties and zeros; the others differ by orders of magnitude.
spectra_of_a_layer = st.one_of(
    st.lists(st.integers(0, 3).map(float), max_size=9).map(descending),
    st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=4, max_size=9).map(descending),
    st.lists(st.integers(-8, 8).map(lambda power: 10.0**power), min_size=2, max_size=9).map(descending),
)


@st.composite
def cases(draw):
    """Spectra of up to four layers and a Budget, which now and then is one parameter short of its
    floors.
    """
    drawn = draw(st.integers(1, 4).flatmap(lambda count: st.lists(spectra_of_a_layer, min_size=count, max_size=count)))
    spectra = {f"l{i}": each for i, each in enumerate(drawn)}
    if all(len(each) < 2 for each in spectra.values()):
        spectra["l0"] = [2.0, 1.0]
    limits = {name: len(each) // 2 * 2 for name, each in spectra.items()}
    even = {name: st.integers(0, limit // 2).map(lambda half: 2 * half) for name, limit in limits.items()}
    floors = draw(st.one_of(st.sampled_from((0, 2)), st.fixed_dictionaries(even)))
    lowest = floors if isinstance(floors, dict) else dict.fromkeys(spectra, floors)
    above = {name: st.integers(low // 2, 5).map(lambda half: 2 * half) for name, low in lowest.items()}
    one = st.integers(max(2, *lowest.values(), 0) // 2, 5).map(lambda half: 2 * half)
    caps = draw(st.one_of(st.none(), one, st.fixed_dictionaries(above)))
    if isinstance(caps, dict):
        assume(any(min(caps[name], limit) >= 2 for name, limit in limits.items()))
    transform = draw(st.sampled_from(sorted(PARAMETERS)))
    highest = caps if isinstance(caps, dict) else dict.fromkeys(spectra, 10 if caps is None else caps)
    most = sum(PARAMETERS[transform](min(highest[name], limit)) for name, limit in limits.items())
    least = sum(PARAMETERS[transform](min(lowest[name], limit)) for name, limit in limits.items())
    params = max(PARAMETERS[transform](2), draw(st.integers(least - 1, most + 1)))
    return spectra, Budget(params=params, transform=transform, floor=floors, cap=caps)


def every_choice(spectra, budget):
    """(energy, parameters, ranks) of every choice of even ranks between floors and caps, over the
    budget or not.
    """
    ranges = []
    for name, values in spectra.items():
        floor = budget.floor[name] if isinstance(budget.floor, dict) else budget.floor
        cap = budget.cap[name] if isinstance(budget.cap, dict) else budget.cap
        limit = len(values) if cap is None else min(cap, len(values))
        ranges.append(range(floor, limit + 1, 2) if len(values) >= 2 else [0])
    for ranks in product(*ranges):
        energy = math.fsum(math.fsum(each[:rank]) for each, rank in zip(spectra.values(), ranks, strict=True))
        yield energy, sum(PARAMETERS[budget.transform](rank) for rank in ranks), ranks


def energy_of(spectra, ranks):
    return math.fsum(math.fsum(spectra[name][:rank]) for name, rank in ranks.items())


@settings(max_examples=1000, deadline=None)
@given(case=cases())
def test_ranks_are_the_best_there_are(case):
    spectra, budget = case
    choices = list(every_choice(spectra, budget))
    allowed = {ranks for _, cost, ranks in choices if cost <= budget.params}
    if not allowed:
        cheapest = min(cost for _, cost, _ in choices)
        with pytest.raises(ValueError, match=f"params is {budget.params}, but the floors alone take {cheapest}$"):
            share_ranks(spectra, budget)
        return
    shared = share_ranks(spectra, budget)
    assert list(shared) == list(spectra) and tuple(shared.values()) in allowed
    assert shared.params == sum(PARAMETERS[budget.transform](rank) for rank in shared.values()) <= budget.params
    best = max(energy for energy, cost, _ in choices if cost <= budget.params)
    assert energy_of(spectra, shared) == pytest.approx(best, rel=1e-10)
    assert shared.gap == 0


@settings(max_examples=400, deadline=None)
@given(case=cases(), width=st.integers(1, 2))
def test_a_narrow_search_still_proves_its_gap(case, width):
    spectra, budget = case
    within = [energy for energy, cost, _ in every_choice(spectra, budget) if cost <= budget.params]
    if not within:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loft_rs.support.budget._WIDTHS", (width,))
        shared = share_ranks(spectra, budget)
    assert 0 <= shared.gap < math.inf and shared.params <= budget.params
    assert energy_of(spectra, shared) * (1 + shared.gap) >= max(within) * (1 - 1e-10)


def noisy_spectra(layers, ranks, decay, seed=0):
    """Squares of layers whose scales differ by orders of magnitude, as those of a model do."""
    chance = np.random.default_rng(seed)
    spectra = {}
    for layer in range(layers):
        noisy = np.arange(1, ranks + 1.0) ** -decay * chance.lognormal(0, 0.05, ranks) * chance.lognormal(0, 1.5)
        spectra[f"layer{layer}"] = np.sort(np.square(noisy))[::-1]
    return spectra


@pytest.mark.parametrize("decay", [0.3, 0.7, 1.2])
@pytest.mark.parametrize("transform", ["cayley", "free"])
def test_a_model_of_224_layers_is_proven_optimal(decay, transform):
    spectra, params = noisy_spectra(224, 512, decay), 224 * 2016
    shared = share_ranks(spectra, Budget(params=params, transform=transform))
    assert shared.gap <= 1e-9 and 0 <= params - shared.params < 100
    assert len(set(shared.values())) > 10 and all(rank % 2 == 0 and rank >= 2 for rank in shared.values())
    assert share_ranks(spectra, Budget(params=params, transform=transform)) == shared


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), params=st.integers(66, 6000), transform=st.sampled_from(["cayley", "free"]))
def test_many_layers_are_optimal_by_another_method_too(seed, params, transform):
    spectra, small = noisy_spectra(12, 40, 0.5, seed), Budget(params=params, transform=transform, cap=30)
    best = np.zeros(small.params + 1)  # the most energy that at most so many parameters capture
    for squares in spectra.values():
        after = np.full_like(best, -np.inf)
        for rank in range(2, 31, 2):
            cost = min(small.parameters(rank), len(best))
            after[cost:] = np.maximum(after[cost:], best[: len(best) - cost] + squares[:rank].sum())
        best = after
    assert energy_of(spectra, share_ranks(spectra, small)) == pytest.approx(best[-1], rel=1e-12)


def test_a_search_cut_short_owns_up_to_a_gap(monkeypatch):
    spectra, params = noisy_spectra(224, 512, 0.7), 224 * 2016
    exact = share_ranks(spectra, Budget(params=params))
    monkeypatch.setattr("loft_rs.support.budget._WIDTHS", (2,))
    short = share_ranks(spectra, Budget(params=params))
    assert 0 < short.gap < 1e-4 and short.params <= params
    assert energy_of(spectra, short) < energy_of(spectra, exact) <= energy_of(spectra, short) * (1 + short.gap)


def test_layers_that_are_alike_are_no_harder():
    spectra = {f"layer{i}": np.arange(256.0, 0, -1) for i in range(224)}
    shared = share_ranks(spectra, Budget(params=450_000))
    assert shared.gap == 0 and max(shared.values()) - min(shared.values()) == 2


def test_scale_and_dtype_do_not_matter():
    spectra = {"a": np.array([4.0, 3, 2, 1]), "b": np.array([5.0, 5, 0, 0])}
    small = Budget(params=7)
    wanted = {"a": 4, "b": 2}
    for scale in (1e-300, 1.0, 1e300):
        assert share_ranks({name: scale * each for name, each in spectra.items()}, small) == wanted
    assert share_ranks({name: each.astype(np.float32) for name, each in spectra.items()}, small) == wanted
    assert share_ranks({name: each.astype(int).tolist() for name, each in spectra.items()}, small) == wanted


def test_nothing_is_spent_on_what_gains_nothing():
    shared = share_ranks({"a": np.zeros(8), "b": [1.0, 1.0, 0.0, 0.0], "c": []}, Budget(params=10**30, floor=0))
    assert shared == {"a": 0, "b": 2, "c": 0} and (shared.params, shared.gap) == (1, 0)
    shared = share_ranks({"a": np.zeros(8), "b": np.zeros(4)}, Budget(params=100, floor={"a": 4, "b": 0}))
    assert shared == {"a": 4, "b": 0} and (shared.params, shared.gap) == (6, 0)


def test_parameters_are_those_of_the_transforms():
    transform = pytest.importorskip("loft_rs.transform")
    assert set(PARAMETERS) == set(transform.TRANSFORMS)
    for name, count in PARAMETERS.items():
        for rank in (2, 4, 10):
            shape = transform.get_transform(name).parameter_shape(rank)
            assert count(rank) == math.prod(shape) == Budget(params=100, transform=name).parameters(rank)


def test_an_allocation_is_a_dict_that_survives_pickling():
    shared = share_ranks({"a": [3.0, 2.0], "b": [1.0, 1.0]}, Budget(params=2))
    again = pickle.loads(pickle.dumps(shared))
    assert isinstance(again, Allocation) and again == {"a": 2, "b": 2} and (again.params, again.gap) == (2, 0)


def test_it_needs_no_torch():
    source = "import sys, loft_rs\nassert 'numpy' not in sys.modules\nloft_rs.Budget(params=3)\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BAD_BUDGETS = [
    (dict(params=0), ValueError, "params is 0, but the smallest rank, 2, takes 1 with 'cayley'"),
    (dict(params=3, transform="free"), ValueError, "params is 3, but the smallest rank, 2, takes 4 with 'free'"),
    (dict(params=3.0), TypeError, "params must be an integer, not float"),
    (dict(params=True), TypeError, "params must be an integer, not bool"),
    (dict(transform="magic"), ValueError, "transform must be one of cayley, exp, free, not 'magic'"),
    (dict(transform=["free"]), (TypeError, ValueError), "transform must be one of"),
    (dict(floor=3), ValueError, "floor must be an even number from 0, not 3: an odd rank gains nothing"),
    (dict(floor=-2), ValueError, "floor must be an even number from 0, not -2: no rank is negative"),
    (dict(floor=None), TypeError, "floor must be an integer, not NoneType"),
    (dict(floor={"q": 5}), ValueError, "floor of 'q' must be an even number from 0, not 5"),
    (dict(cap=7), ValueError, "cap must be an even number from 0, not 7"),
    (dict(cap={"q": 2.0}), TypeError, "cap of 'q' must be an integer, not float"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD_BUDGETS, ids=[str(each[0]) for each in BAD_BUDGETS])
def test_a_wrong_budgetis_refused_when_it_is_made(change, kind, message):
    with pytest.raises(kind, match=message):
        Budget(**{"params": 100, **change})


BAD_SPECTRA = [
    ({}, ValueError, "spectra is an empty mapping"),
    ({"a": [1.0, 2.0]}, ValueError, "spectra of 'a' must be .* in descending order"),
    ({"a": [1.0, -1.0]}, ValueError, "spectra of 'a' must be .* not negative"),
    ({"a": [math.nan, 0.0]}, ValueError, "spectra of 'a' must be .* finite"),
    ({"a": [math.inf, 0.0]}, ValueError, "spectra of 'a' must be .* finite"),
    ({"a": [[1.0, 0.0]]}, ValueError, "spectra of 'a' must be one row"),
    ({"a": "high"}, TypeError, "spectra of 'a' must be numbers, not str"),
    ({"a": [1.0]}, ValueError, "leaves no layer a rank of 2"),
]


@pytest.mark.parametrize(("spectra", "kind", "message"), BAD_SPECTRA, ids=[str(each[0]) for each in BAD_SPECTRA])
def test_wrong_spectra_are_refused_by_name(spectra, kind, message):
    with pytest.raises(kind, match=message):
        share_ranks(spectra, Budget(params=10))


def matrices(shape, seed, decay, scale=1.0):
    """A gradient with singular values scale * i^-decay, and a weight."""
    chance = np.random.default_rng(seed)
    m, n = shape
    left, right = (np.linalg.qr(chance.standard_normal((size, min(shape))))[0] for size in shape)
    grad = scale * (left * np.arange(1, min(shape) + 1.0) ** -decay) @ right.T
    return grad.astype(np.float32), chance.standard_normal((m, n)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    """Five layers of unlike spectra, one of which outweighs the rest; gradients and weights by
    name.
    """
    shapes = [(200, 120), (96, 160), (130, 130), (64, 48), (300, 90)]
    pairs = {f"l{i}": matrices(shape, i, 0.2 + 0.25 * i, 5.0 if i == 0 else 1.0) for i, shape in enumerate(shapes)}
    return tuple({name: pair[part] for name, pair in pairs.items()} for part in (0, 1))


def choose(model, method, rank, **options):
    grads, weights = model
    first = None if method == "principal" else grads
    return select_support(first, rank, method=method, weights=None if method == "gradsvd" else weights, **options)


def objectives(model, method, side="input"):
    """name -> the matrix whose energy is captured, in float64, columns on the support's side."""
    found = {}
    for name, grad in model[0].items():
        grad, weight = grad.astype(np.float64), model[1][name].astype(np.float64)
        product = weight.T @ grad if side == "input" else grad @ weight.T
        straight = weight if method == "principal" else grad
        found[name] = (product - product.T) / 2 if method == "skewgrad" else straight if side == "input" else straight.T
    return found


def squared_values(matrices):
    return {name: np.square(np.linalg.svd(matrix, compute_uv=False)) for name, matrix in matrices.items()}


def captured(method, matrix, support):
    basis = support.basis.astype(np.float64)
    return np.square(basis.T @ matrix @ basis if method == "skewgrad" else matrix @ basis).sum()


@pytest.mark.parametrize("transform", ["cayley", "free"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("method", SPECTRAL)
def test_supports_capture_what_the_exact_spectra_allow(model, method, side, transform):
    budget = Budget(params=1500, transform=transform)
    supports = choose(model, method, budget, side=side)
    ranks = {name: each.rank for name, each in supports.items()}
    assert list(ranks) == list(model[0]) and all(rank % 2 == 0 for rank in ranks.values())
    assert supports.params == sum(map(budget.parameters, ranks.values())) <= budget.params
    assert supports.gap == 0
    matrices_ = objectives(model, method, side)
    squares = {name: each[: min(model[0][name].shape)] for name, each in squared_values(matrices_).items()}
    optimum = energy_of(squares, share_ranks(squares, budget))
    caught = {name: captured(method, matrices_[name], each) for name, each in supports.items()}
    assert 0.999 * optimum <= sum(caught.values()) <= optimum * (1 + 1e-5)
    one_by_one = choose(model, method, ranks, side=side)
    for name, support in supports.items():
        assert (support.method, support.side) == (method, side)
        assert support.basis.shape == one_by_one[name].basis.shape
        assert caught[name] == pytest.approx(captured(method, matrices_[name], one_by_one[name]), rel=1e-2)
        assert support.energy == pytest.approx(caught[name] / np.square(matrices_[name]).sum(), abs=2e-5)
        sigma = np.sqrt(squares[name][support.rank - 1 : support.rank + 1])
        assert support.gap == pytest.approx((sigma[0] - sigma[1]) / sigma[0], abs=0.02)


@pytest.mark.parametrize("method", SPECTRAL)
def test_same_seed_same_bits_for_any_threads(model, method, tmp_path):
    wanted = choose(model, method, Budget(params=1500), seed=4)
    for threads in (1, 2):
        again = choose(model, method, Budget(params=1500), seed=4, threads=threads)
        assert list(again) == list(wanted) and (again.params, again.gap) == (wanted.params, wanted.gap)
        for name, support in wanted.items():
            for field in ("basis", "values", "residuals"):
                assert getattr(again[name], field).tobytes() == getattr(support, field).tobytes()
            assert (again[name].energy, again[name].passes) == (support.energy, support.passes)
    save_supports(tmp_path / "s.safetensors", wanted)
    assert {name: each.rank for name, each in load_supports(tmp_path / "s.safetensors").items()} == {
        name: each.rank for name, each in wanted.items()
    }


def test_a_layer_that_deserves_more_is_solved_again_and_counted_again():
    shape, calls = (300, 260), []
    grads = {f"l{i}": matrices(shape, i, 0.1 if i == 0 else 2.0, 50.0 if i == 0 else 1.0)[0] for i in range(6)}
    supports = select_support(grads, Budget(params=3000), progress=lambda *call: calls.append(call))
    ranks = {name: each.rank for name, each in supports.items()}
    assert ranks["l0"] > 4 * 32 // 2 and supports.params <= 3000
    squares = {
        name: np.square(np.linalg.svd(each.astype(np.float64), compute_uv=False)) for name, each in grads.items()
    }
    assert ranks == share_ranks(squares, Budget(params=3000))
    again = len(calls) - 6
    assert again >= 1 and [name for name, *_ in calls].count("l0") == 1 + again
    assert sorted(done for _, done, _ in calls) == list(range(1, 6 + again + 1))
    assert all(in_all == max(6, done) for _, done, in_all in calls)
    alone = select_support(grads["l0"], ranks["l0"])
    assert supports["l0"].passes > alone.passes

    def stop(*_):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        select_support(grads, Budget(params=3000), progress=stop)


def test_one_matrix_gets_the_whole_budget():
    grad = matrices((40, 30), 0, 0.5)[0]
    support = select_support(grad, Budget(params=100))
    assert isinstance(support, Support) and support.rank == 14
    assert select_support(grad, Budget(params=10**9, cap=8)).rank == 8
    assert select_support(grad, Budget(params=10**9)).rank == 30
    assert select_support(grad[:, :5], Budget(params=10**9, transform="free")).rank == 4


def test_floors_and_caps_hold_and_rank_zero_is_left_out(model):
    names = list(model[0])
    floors, caps = dict.fromkeys(names, 0) | {"l4": 10}, dict.fromkeys(names, 40) | {"l0": 4, "l3": 0}
    supports = choose(model, "gradsvd", Budget(params=200, floor=floors, cap=caps))
    assert "l3" not in supports and supports["l0"].rank == 4 and supports["l4"].rank >= 10
    only = choose(model, "gradsvd", Budget(params=1, floor=0))
    assert list(only) == ["l0"] and only["l0"].rank == 2 and only.params == 1


def test_a_layer_without_an_even_rank_is_left_out_with_one_warning():
    grad = matrices((12, 10), 0, 0.5)[0]
    grads = {"head": grad[:1], "q": grad, "score": grad[:, :1]}
    with pytest.warns(UserWarning, match="left out, as min.m, n. = 1 allows no even rank: head, score") as caught:
        supports = select_support(grads, Budget(params=20, floor={"head": 2, "q": 4, "score": 0}))
    assert len(caught) == 1 and caught[0].filename == __file__
    assert list(supports) == ["q"] and supports["q"].rank == 6
    for alone in (grad[:1], {"head": grad[:1]}):
        with pytest.raises(
            ValueError, match="a Budget gives even ranks, and min.m, n. = 1 allows none: (head|the matrix)"
        ):
            select_support(alone, Budget(params=20))


def test_float64_gradients_of_any_scale_share_alike():
    grads = {f"l{i}": matrices((30, 24), i, 0.3 + 0.3 * i)[0].astype(np.float64) for i in range(3)}
    wanted = {name: each.rank for name, each in select_support(grads, Budget(params=60)).items()}
    for scale in (1e-200, 1e200):
        scaled = select_support({name: scale * each for name, each in grads.items()}, Budget(params=60))
        assert {name: each.rank for name, each in scaled.items()} == wanted
        assert all(0 < each.energy <= 1 for each in scaled.values())


def test_cutting_a_support():
    grad = matrices((60, 40), 1, 0.5)[0]
    whole, wanted = select_support(grad, 12), select_support(grad, 6)
    assert cut_support(whole, 12) is whole
    cut = cut_support(whole, 6)
    np.testing.assert_array_equal(cut.basis, whole.basis[:, :6])
    np.testing.assert_array_equal(cut.values, whole.values[:6])
    np.testing.assert_array_equal(cut.residuals, whole.residuals[:6])
    assert cut.basis.flags.c_contiguous and cut.basis.base is None and cut.rank == 6
    assert cut.energy == pytest.approx(wanted.energy, rel=1e-4)
    assert cut.gap == pytest.approx(1 - whole.values[6] / whole.values[5]) == pytest.approx(wanted.gap, abs=1e-3)
    assert (cut.passes, cut.seconds, cut.seed) == (whole.passes, whole.seconds, whole.seed)
    low = (grad[:, :4] @ grad[:4, :4]).astype(np.float32) @ matrices((4, 40), 2, 0.1)[0]
    assert cut_support(select_support(low, 12), 8).gap == 0


G, W = matrices((8, 6), 0, 0.5)
BAD = [
    (dict(method="random"), ValueError, "rank may not be a Budget with 'random', which has no spectrum"),
    (dict(method="coordinate"), ValueError, "not be a Budget with 'coordinate'"),
    (dict(rank=Budget), TypeError, "rank must be an integer, not type"),
    (
        dict(rank=Budget(params=9, floor={"a": 2})),
        TypeError,
        "floor may be a mapping only where grads or weights are one",
    ),
    (dict(rank=Budget(params=9, cap={"a": 2})), TypeError, "cap may be a mapping only"),
    (dict(rank=Budget(params=9, floor=8)), ValueError, "floor is 8, but its rank can be 6 at most"),
    (dict(rank=Budget(params=9, floor=4, cap=2)), ValueError, "floor is 4, above its cap of 2"),
    (dict(rank=Budget(params=9, floor=0, cap=0)), ValueError, "cap leaves no layer a rank of 2"),
    (dict(rank=Budget(params=14, floor=6)), ValueError, "params is 14, but the floors alone take 15"),
    (
        dict(grads={"a": G, "b": G, "c": G}, rank=Budget(params=2)),
        ValueError,
        "params is 2, but the floors alone take 3",
    ),
    (
        dict(grads={"a": G, "b": G}, rank=Budget(params=9, floor={"a": 2})),
        ValueError,
        "floor must have the names of the matrices; it lacks 'b'",
    ),
    (
        dict(grads={"a": G}, rank=Budget(params=9, cap={"a": 2, "z": 2})),
        ValueError,
        "cap must have the names of the matrices; it has the unknown 'z'",
    ),
    (
        dict(grads={"a": G, "b": G[:3]}, rank=Budget(params=99, floor=4)),
        ValueError,
        "floor of 'b' is 4, but its rank can be 3 at most",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[message[:45] for _, _, message in BAD])
def test_wrong_arguments_are_refused_before_any_work(change, kind, message, monkeypatch):
    import loft_rs._core

    monkeypatch.setattr(loft_rs._core, "select", lambda *_, **__: pytest.fail("work was begun"))
    options = {"grads": G, "rank": Budget(params=9), **change}
    with pytest.raises(kind, match=message):
        select_support(options.pop("grads"), options.pop("rank"), **options)


def test_what_the_core_refuses_is_still_refused():
    poisoned, zero = G.copy(), np.zeros_like(G)
    poisoned[2, 3] = np.nan
    with pytest.raises(ValueError, match=r"layer\.q"):
        select_support({"first": G, "layer.q": poisoned}, Budget(params=9), progress=pytest.fail)
    with pytest.raises(ValueError, match=r"zero"):
        select_support({"first": G, "layer.q": zero}, Budget(params=9, floor=0), progress=pytest.fail)


def test_the_shell_takes_params_in_place_of_rank(model, tmp_path, capsys):
    file, out = tmp_path / "g.safetensors", tmp_path / "s.safetensors"
    save_file({f"{name}.weight": each for name, each in model[0].items()}, file)
    assert main(["select", str(file), "--params", "900", "--seed", "3", "--out", str(out)]) == 0
    wanted = select_support(model[0], Budget(params=900), seed=3)
    assert f"{wanted.params} of 900 parameters are given out\n5 supports are in" in capsys.readouterr().out
    supports = load_supports(out)
    assert set(supports) == set(wanted)
    for name, support in supports.items():
        np.testing.assert_array_equal(support.basis, wanted[name].basis)
    out.unlink()
    for arguments, message in (
        (["--params", "3"], "params is 3, but the floors alone take 5"),
        (["--params", "0"], "params is 0, but the smallest rank, 2, takes 1"),
        (["--params", "9", "--method", "random"], "rank may not be a Budget with 'random'"),
    ):
        assert main(["select", str(file), *arguments, "--out", str(out)]) == 1
        assert message in capsys.readouterr().err
    for arguments in (["--params", "9", "--rank", "4"], [], ["--params", "few"]):
        with pytest.raises(SystemExit) as stop:
            main(["select", str(file), *arguments, "--out", str(out)])
        assert stop.value.code == 2
    assert not out.exists()
