"""evidence.py, saved_sketches.py and calibrate's passes, tol and budget: against float64 truth, against each other, saved and refused."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import basis_of, make_bert, make_llama, token_batches
from test_calibration import build, dense_gradients, skew_of, span_energy

import loft_rs
from loft_rs import Budget, Evidence, calibrate
from loft_rs.sketch.small import left_vectors, nystroem, skew_core
from loft_rs.sketch.split_half import evidence_of, overlap
from loft_rs.tuner.adapters import adapted_layers

SUPPORTS = ("skewgrad", "gradsvd", "activation")


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k].nan_to_num(), before[k].nan_to_num()) for k in before)


# -- evidence ----------------------------------------------------------------------------------------------------------------


def noisy_sketches(batches, *, noise, n=60, r=6, k=30, seed=0, draws=0):
    """(sketches of two halves of `batches` matrices, signal plus independent noise, the signal's planes)."""
    draw = np.random.default_rng(seed + draws)
    u, v = basis_of(n, r, seed), basis_of(n, r, seed + 1)
    signal = u @ np.diag(np.linspace(3, 2, r)) @ v.T
    omega, halves = draw.standard_normal((n, k)), np.zeros((2, n, k))
    for i in range(batches):
        halves[i % 2] += (signal + noise * draw.standard_normal((n, n)) / np.sqrt(n)) @ omega
    counts = np.array([(batches + 1) // 2, batches // 2], float)
    return halves, counts, u


def told(halves, counts, r=6):
    return evidence_of(halves, counts, r, lambda y: left_vectors(y, r), pairs=False)


def test_halves_without_noise_agree_and_halves_of_noise_do_not():
    clear = told(*noisy_sketches(8, noise=0)[:2])
    assert clear.agreement == pytest.approx(1) and clear.halves == pytest.approx(1)
    assert clear.reproducible == pytest.approx(1) and (clear.snr > 1e6).all() and clear.batches_needed() == 1
    assert clear.angles.max() < 1e-6 and clear.batches == 8
    noise = [told(*noisy_sketches(8, noise=1e4, seed=s)[:2]) for s in range(20)]
    assert np.mean([e.halves for e in noise]) == pytest.approx(0.1, abs=0.04)  # r / n
    assert abs(np.mean([e.reproducible for e in noise])) < 0.1
    assert np.median([e.batches_needed() for e in noise]) > 100


def test_a_single_batch_tells_nothing():
    e = told(*noisy_sketches(1, noise=1)[:2])
    assert np.isnan([e.agreement, e.halves, e.reproducible, e.dominance, e.batches_needed()]).all()
    assert np.isnan(e.angles).all() and np.isnan(e.snr).all() and e.batches == 1
    with pytest.raises(ValueError, match="agreement must lie between 0 and 1, got 1"):
        e.batches_needed(1)


@pytest.mark.parametrize("batches", [4, 16, 64])
def test_the_agreement_and_the_reproducible_part_are_those_of_other_data(batches):
    agreements, fractions, needed = [], [], []
    for seed in range(12):
        halves, counts, truth = noisy_sketches(batches, noise=4, seed=seed)
        e, p = told(halves, counts), left_vectors(halves.sum(0), 6)
        other = left_vectors(noisy_sketches(batches, noise=4, seed=seed, draws=99)[0].sum(0), 6)
        agreements.append((e.agreement, overlap(p, other), overlap(p, truth)))
        y, clean = halves.sum(0) / batches, noisy_sketches(batches, noise=0, seed=seed)[0].sum(0) / batches
        fractions.append((e.reproducible, np.sum((p.T @ clean) * (p.T @ y)) / np.sum((p.T @ y) ** 2)))
        needed.append(e.batches_needed(0.9))
    told_, true, limit = np.mean(agreements, 0)
    assert told_ == pytest.approx(true, abs=0.06) and told_ <= limit + 0.03
    told_, true = np.mean(fractions, 0)
    assert told_ == pytest.approx(true, abs=0.12)
    # With as many batches as most of them ask for, the supports agree as asked: with others, and so with the truth.
    count = int(np.median(needed))
    reached = [
        overlap(left_vectors(h.sum(0), 6), u) for h, _, u in (noisy_sketches(count, noise=4, seed=s) for s in range(6))
    ]
    assert np.mean(reached) >= 0.87


@pytest.mark.parametrize(("noise", "batches"), [(2, 4), (4, 8), (8, 8)])
def test_what_a_half_reproduces_is_unbiased_whatever_its_basis_was_fitted_to(noise, batches):
    """E <P_h^T Y_0, P_h^T Y_1> = E <P_h^T Y_h, P_h^T Y> with Y the truth, in units of E ||P_h^T Y_h||^2: within 4 standard errors of it."""
    gaps, owns = [], []
    for seed in range(60):
        halves, counts, _ = noisy_sketches(batches, noise=noise, seed=2, draws=seed)
        clean = noisy_sketches(batches, noise=0, seed=2, draws=seed)[0].sum(0) / batches
        y = halves / counts[:, None, None]
        for h, p in enumerate(left_vectors(each, 6) for each in y):
            own = p.T @ y[h]
            gaps.append(np.sum((p.T @ y[0]) * (p.T @ y[1])) - np.sum(own * (p.T @ clean)))
            owns.append(np.sum(own**2))
    gaps = np.mean(np.reshape(gaps, (-1, 2)), 1)  # those of one draw are not independent
    assert abs(np.mean(gaps)) <= 4 * np.std(gaps) / len(gaps) ** 0.5 <= 0.1 * np.mean(owns)


def test_one_batch_that_is_all_of_the_gradient_is_noticed():
    halves, counts, _ = noisy_sketches(8, noise=1)
    alike = told(halves, counts)
    assert 0.5 <= alike.dominance < 0.6
    halves[1] *= 30
    ruled = told(halves, counts)
    assert ruled.dominance > 0.99
    build_ = {"evidence": {"q": ruled, "k": alike}, "layers": {}}
    assert "in 1 layers one half" in str(loft_rs.CalibrationReport("skewgrad", "natural", 2, 8, 0, 1.0, **build_))


@given(squares=st.lists(st.floats(0, 1e6), min_size=2, max_size=12), seed=st.integers(0, 99))
def test_reproduced_squares_descend_and_never_exceed(squares, seed):
    squares = np.sort(squares)[::-1]
    snr = np.random.default_rng(seed).exponential(1, len(squares))
    e = Evidence(0.5, 0.5, np.zeros(1), 0.5, snr, 4, 0.1, 0.5)
    kept = e.reproduced(squares)
    assert kept.shape == squares.shape and (np.diff(kept) <= 1e-9 * squares[0]).all() and (kept >= 0).all()
    assert kept.sum() == pytest.approx(np.sum(squares * snr / (1 + snr)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("support", SUPPORTS)
def test_calibrate_reports_evidence_and_one_batch_gives_nan(support):
    report = calibrate(build(support=support), token_batches(4))
    assert report.evidence.keys() == report.layers.keys() and "agreement" in str(report)
    for e in report.evidence.values():
        assert e.batches == 4 and 0 <= e.halves <= e.agreement <= 1 and e.reproducible <= 1
        assert e.snr.shape == ((3,) if support == "skewgrad" else (6,)) and e.angles.shape == (6,)
    lone = calibrate(build(support=support), token_batches(1))
    assert all(np.isnan(e.agreement) for e in lone.evidence.values()) and "nan" in str(lone)
    assert not calibrate(build(), token_batches(2)).evidence


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_halves_agree_and_a_train_step_splits_as_a_dataloader_does(support, checkpointing):
    batch, other = token_batches(2)
    model, twin = build(support=support), build(support=support)
    if checkpointing:
        twin.gradient_checkpointing_enable({"use_reentrant": False})
        twin.enable_input_require_grads()
    same = calibrate(model, [batch] * 4)
    assert all(e.agreement > 1 - 1e-6 and e.reproducible > 1 - 1e-6 for e in same.evidence.values())
    wanted = calibrate(build(support=support), [batch, other] * 2)

    def step():
        for each in [batch, other] * 2:
            twin.train()  # which transformers asks for to checkpoint
            twin(**each).loss.backward()

    found = calibrate(twin, train_step=step)
    for name, e in found.evidence.items():
        assert e.batches == 4
        assert e.halves == pytest.approx(wanted.evidence[name].halves, abs=1e-3)
        assert e.reproducible == pytest.approx(wanted.evidence[name].reproducible, abs=1e-3)


def test_two_forwards_before_one_backward_are_one_batch():
    model = build(support="skewgrad")
    batches = token_batches(4)

    def step():
        for one, two in (batches[:2], batches[2:]):
            (model(**one).loss + model(**two).loss).backward()

    assert {e.batches for e in calibrate(model, train_step=step).evidence.values()} == {2}


# -- one pass, two passes ----------------------------------------------------------------------------------------------------


@given(q=st.integers(1, 8), extra=st.integers(0, 6), seed=st.integers(0, 2**31))
def test_the_skew_core_is_the_least_squares_solution(q, extra, seed):
    draw = np.random.default_rng(seed)
    s, z = draw.standard_normal((q, q)), draw.standard_normal((q, q + extra + 2))
    s = s - s.T
    np.testing.assert_allclose(skew_core(z, s @ z), s, atol=1e-6 * (1 + np.linalg.norm(s)))
    b = draw.standard_normal(z.shape)
    c = skew_core(z, b)
    gradient = (c @ z - b) @ z.T
    np.testing.assert_allclose(gradient, gradient.T, atol=1e-8 * np.linalg.norm(z) ** 2 * (1 + np.linalg.norm(b)))


@given(n=st.integers(2, 10), rank=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_nystroem_is_exact_on_a_matrix_of_low_rank_and_never_above(n, rank, seed):
    draw = np.random.default_rng(seed)
    a, test = draw.standard_normal((min(rank, n), n)), draw.standard_normal((n, 6))
    m = a.T @ a
    np.testing.assert_allclose(nystroem(m @ test, test.T @ m @ test), m, atol=1e-3 * np.linalg.norm(m))
    more = m + np.eye(n)
    below = more - nystroem(more @ test[:, :1], test[:, :1].T @ more @ test[:, :1])
    assert np.linalg.eigvalsh(below)[0] >= -1e-8 * np.linalg.norm(more)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("support", SUPPORTS)
def test_one_pass_is_one_pass_and_captures_what_two_would(support, side):
    batches = token_batches(3)
    report = calibrate(build(support=support, side=side), batches, passes=1)
    weights, gradients, inputs, outputs = dense_gradients(batches)
    assert report.passes == 1 and {s.passes for s in report.layers.values()} == {1}
    for name, s in report.layers.items():
        p = torch.from_numpy(s.basis).double()
        if support == "skewgrad":
            matrix = skew_of(weights[name], gradients[name], side)
            captured = span_energy(p, matrix)
        else:
            matrix = gradients[name] if side == "input" else gradients[name].mT
            matrix = (inputs if side == "input" else outputs)[name] if support == "activation" else matrix
            captured = float((matrix @ p).square().sum())
        squares = torch.linalg.svdvals(matrix) ** 2
        # The sketch is as wide as these layers; a gradsvd one is still a sample of the other side.
        assert captured >= (0.75 if support == "gradsvd" else 0.9999) * float(squares[:6].sum())
        assert abs(s.energy - captured / float(squares.sum())) <= 1e-3 + 5 * s.energy_stderr
        z = (inputs if side == "input" else outputs)[name] @ p
        moment = z.mT @ z
        # The sketch of a gradsvd moment has as many columns as that of G, fewer here than the layer has inputs.
        assert (moment - torch.diag(moment.diagonal())).abs().max() <= (
            0.1 if support == "gradsvd" else 1e-3
        ) * moment.diagonal().max()


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("support", ["skewgrad", "gradsvd"])
def test_a_narrow_sketch_captures_nearly_as_much_and_says_how_much(support, passes):
    # Layers 96 and 160 wide, of flat spectra (random weights), a sketch of 32 columns.
    base = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1}
    batches = token_batches(2, size=2)
    model = peft.get_peft_model(
        make_llama(**base), loft_rs.LoftConfig(r=8, target_modules=["q_proj", "down_proj"], support=support)
    )
    report = calibrate(model, batches, passes=passes, oversampling=24)
    plain = make_llama(**base).double()
    for batch in batches:
        plain(**batch).loss.backward()
    for name, s in report.layers.items():
        w, g = plain.get_submodule(name).weight.detach(), plain.get_submodule(name).weight.grad
        p = torch.from_numpy(s.basis).double()
        matrix = skew_of(w, g, "input") if support == "skewgrad" else g
        squares = torch.linalg.svdvals(matrix) ** 2
        captured = span_energy(p, matrix) if support == "skewgrad" else float((matrix @ p).square().sum())
        assert captured >= (0.97 if passes == 2 else 0.4) * float(squares[:8].sum())
        assert abs(s.energy - captured / float(squares.sum())) <= 0.01 + 5 * s.energy_stderr


def test_half_precision_calibrates_in_one_pass():
    report = calibrate(build(make_llama(torch.bfloat16), support="skewgrad"), token_batches(2), passes=1)
    assert all(0 < s.energy <= 1 and np.isfinite(s.values).all() for s in report.layers.values())


# -- early stop --------------------------------------------------------------------------------------------------------------


def test_calibration_stops_when_a_batch_changes_nothing_and_gives_what_those_batches_give():
    batch = token_batches(1)[0]
    report = calibrate(build(support="skewgrad"), [batch] * 8, tol=1e-3)
    assert report.batches == 2 and report.passes == 2
    wanted = calibrate(build(support="skewgrad"), [batch] * 2)
    for name, s in report.layers.items():
        np.testing.assert_array_equal(s.basis, wanted.layers[name].basis)
    restless = calibrate(build(support="skewgrad"), token_batches(5), tol=1e-6)
    assert restless.batches == 5


# -- saved sketches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"side": "output"}], ids=["plain", "tied", "output"])
@pytest.mark.parametrize("support", SUPPORTS)
def test_saved_sketches_add_up_to_one_calibration(support, options, tmp_path):
    batches = token_batches(4)
    model = build(support=support, **options)
    wanted = calibrate(model, batches, passes=1)
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path, some in zip(paths, (batches[:2], batches[2:]), strict=True):
        calibrate(build(support=support, **options), some, passes=1, save_sketches=path)
    supports = loft_rs.supports_from_sketches(*paths)
    assert supports.keys() == wanted.layers.keys()
    for name, s in supports.items():
        held = wanted.layers[name]
        assert overlap(s.basis, held.basis) >= 1 - 1e-5 and s.order == held.order
        assert s.energy == pytest.approx(held.energy, abs=1e-4)
        np.testing.assert_allclose(s.values, held.values, rtol=2e-3, atol=1e-3 * held.values[0])
    # A box without the model writes the supports, and they fit the model.
    loft_rs.save_supports(tmp_path / "supports.safetensors", supports)
    fresh = build(support=support, **options)
    loft_rs.set_support(fresh, loft_rs.load_supports(tmp_path / "supports.safetensors"))
    fresh.train()(**batches[0]).loss.backward()
    alone = loft_rs.supports_from_sketches(paths[0])
    assert overlap(alone[name].basis, wanted.layers[name].basis) < 1


def test_a_train_step_saves_the_sketch_that_a_dataloader_saves(tmp_path):
    batches = token_batches(2)
    model = build(support="skewgrad")
    calibrate(build(support="skewgrad"), batches, passes=1, save_sketches=tmp_path / "a.safetensors")
    calibrate(
        model,
        train_step=lambda: [model(**batch).loss.backward() for batch in batches],  # without a loss scale
        passes=1,
        save_sketches=tmp_path / "b.safetensors",
    )
    one, two = (loft_rs.supports_from_sketches(tmp_path / f"{name}.safetensors") for name in "ab")
    for name in one:
        np.testing.assert_allclose(one[name].values, two[name].values, rtol=1e-3, atol=1e-4 * one[name].values[0])


def test_sketches_that_do_not_belong_together_are_refused(tmp_path):
    def saved(name, **options):
        path = tmp_path / f"{name}.safetensors"
        calibrate(build(**{"support": "skewgrad"} | options), token_batches(1), passes=1, save_sketches=path)
        return path

    one = saved("one")
    for name, options, message in (
        ("seed", {"seed": 1}, r"seed\.safetensors: seed of .* is 1, but 0 in"),
        ("rank", {"r": 4}, "rank of .* is 4, but 6 in"),
        ("method", {"support": "gradsvd"}, "method of .* is 'gradsvd', but 'skewgrad' in"),
        ("side", {"side": "output"}, "side of .* is 'output', but 'input' in"),
        ("modules", {"target_modules": ["q_proj"]}, "holds other modules than"),
    ):
        with pytest.raises(ValueError, match=message):
            loft_rs.supports_from_sketches(one, saved(name, **options))
    with pytest.raises(ValueError, match="names a file twice"):
        loft_rs.supports_from_sketches(one, one)
    with pytest.raises(ValueError, match="paths is empty"):
        loft_rs.supports_from_sketches()
    with pytest.raises(FileNotFoundError):
        loft_rs.supports_from_sketches(tmp_path / "none.safetensors")
    loft_rs.save_supports(tmp_path / "supports.safetensors", loft_rs.supports_from_sketches(one))
    with pytest.raises(ValueError, match=r"not a file that calibrate\(\.\.\., save_sketches=path\) wrote"):
        loft_rs.supports_from_sketches(tmp_path / "supports.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(one.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        loft_rs.supports_from_sketches(cut)


def test_a_sketch_that_cannot_be_written_leaves_the_model_as_it_was(tmp_path):
    model = build(support="skewgrad")
    before = state_of(model)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        calibrate(model, token_batches(1), passes=1, save_sketches=tmp_path / "none" / "s.safetensors")
    (tmp_path / "file").write_text("x")
    assert unchanged(model, before) and [p.name for p in tmp_path.iterdir()] == ["file"]


# -- budget ------------------------------------------------------------------------------------------------------------------


def trained(model):
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "loft_theta" in n)


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"transform": "free"}, {"side": "output"}], ids=str)
@pytest.mark.parametrize("share_by", ["energy", "reproducible"])
def test_a_budget_is_kept_trained_saved_and_loaded(options, share_by, tmp_path):
    batches = token_batches(4)
    model = build(support="skewgrad", **options)
    budget = Budget(params=400, transform=options.get("transform", "cayley"))
    report = calibrate(model, batches, budget=budget, share_by=share_by)
    ranks = {name: s.rank for name, s in report.layers.items()}
    assert len(set(ranks.values())) > 1 and all(rank % 2 == 0 and rank >= 2 for rank in ranks.values())
    assert trained(model) == sum(map(budget.parameters, ranks.values())) <= 400
    assert {
        name: layer.adapters["default"].rank for name, layer in adapted_layers(model)[1].items() if name in ranks
    } == ranks
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(2):
        model(**batches[0]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    again = peft.PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    wanted, found = (m.eval()(**batches[1]).logits for m in (model, again))
    torch.testing.assert_close(found, wanted, atol=0, rtol=0)
    assert not torch.equal(wanted, make_llama().eval()(**batches[1]).logits)


def test_a_budget_captures_more_than_even_ranks_of_as_many_parameters():
    batches = token_batches(4)
    even, shared = build(support="skewgrad", r=6), build(support="skewgrad", r=6)
    calibrate(even, batches)
    report = calibrate(shared, batches, budget=Budget(params=trained(even)))
    weights, gradients, *_ = dense_gradients(batches)
    captured = [
        sum(
            span_energy(layer.adapters["default"].support.double(), skew_of(weights[n], gradients[n], "input"))
            for n, layer in adapted_layers(model)[1].items()
        )
        for model in (even, shared)
    ]
    assert captured[1] > 1.02 * captured[0] and trained(shared) <= trained(even)
    assert max(s.rank for s in report.layers.values()) <= 12  # twice the even share


def test_a_budget_names_modules_whose_names_end_alike(tmp_path):
    model = peft.get_peft_model(
        torch.nn.Sequential(
            torch.nn.Linear(8, 12), torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Linear(10, 8))
        ),
        loft_rs.LoftConfig(r=4, target_modules=["0", "1.0", "1.1"], support="activation"),
    )
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    calibrate(model, [(x,)], budget=Budget(params=22, cap={"0": 2, "1.0": 6, "1.1": 4}))
    ranks = {name: layer.adapters["default"].rank for name, layer in adapted_layers(model)[1].items()}
    assert ranks["0"] == 2 and ranks["1.0"] > 2
    model.save_pretrained(tmp_path)
    base = torch.nn.Sequential(
        torch.nn.Linear(8, 12), torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Linear(10, 8))
    )
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert {name: layer.adapters["default"].rank for name, layer in adapted_layers(again)[1].items()} == ranks


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({}, {"passes": 3}, ValueError, "passes must be 1 or 2, got 3"),
        ({}, {"passes": True}, ValueError, "passes must be 1 or 2"),
        ({}, {"oversampling": 3}, ValueError, "oversampling must be None or an even number of at least 2, got 3"),
        ({}, {"tol": 2}, ValueError, "tol must be None or a number between 0 and 1, got 2"),
        ({}, {"share_by": "luck"}, ValueError, "share_by must be one of"),
        ({}, {"share_by": "reproducible"}, ValueError, "needs a budget"),
        ({}, {"budget": 400}, TypeError, "budget must be a loft_rs.Budget, got int"),
        ({}, {"budget": Budget(params=400, transform="free")}, ValueError, "the adapter's transform is cayley"),
        ({}, {"budget": Budget(params=400, floor=0)}, ValueError, "a floor of at least 2"),
        ({}, {"budget": Budget(params=10)}, ValueError, "the floors alone take 14"),
        ({}, {"save_sketches": "s.safetensors"}, ValueError, "save_sketches needs passes=1"),
        (
            {"support": "principal"},
            {"budget": Budget(params=400)},
            ValueError,
            "budget needs a support that data chooses",
        ),
        ({"support": "principal"}, {"tol": 0.1}, ValueError, "tol needs a support that data chooses"),
        ({}, {"budget": Budget(params=400), "share_by": "reproducible"}, ValueError, "two batches or more"),
    ],
)
def test_what_does_not_fit_together_is_named_and_changes_nothing(options, arguments, error, message):
    model = build(**{"support": "skewgrad"} | options)
    before, pattern = state_of(model), dict(model.peft_config["default"].rank_pattern)
    with pytest.raises(error, match=message):
        calibrate(model, token_batches(1), **arguments)
    assert unchanged(model, before) and model.peft_config["default"].rank_pattern == pattern


def test_a_budget_that_no_batch_reaches_leaves_the_ranks_as_they_were():
    model = build(make_bert().bert, support="skewgrad", target_modules=["query", "dense"])
    batch = {k: v for k, v in token_batches(1)[0].items() if k != "labels"}
    before = state_of(model)
    with pytest.raises(ValueError, match=r"budget: no calibration batch reached pooler\.dense; exclude"):
        calibrate(
            model,
            train_step=lambda: model(**batch).last_hidden_state.square().mean().backward(),
            budget=Budget(params=400),
        )
    assert unchanged(model, before)


def test_tol_needs_a_dataloader():
    with pytest.raises(ValueError, match="tol needs a dataloader"):
        calibrate(build(support="skewgrad"), train_step=lambda: None, tol=0.1)
