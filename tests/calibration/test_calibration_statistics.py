"""SplitHalf, a single pass and budgets: against float64 truth, against each other, saved and
refused.
"""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
from calibrated import build, dense_gradients, skew_of, span_energy, with_options
from hypothesis import given
from hypothesis import strategies as st
from reference import basis_of, make_bert, make_llama, token_batches, untouched
from sketched import SUPPORTS, state_of

import loft_rs
from loft_rs import Budget, GradSVD, LoftConfig, SkewGrad, SplitHalf, calibrate
from loft_rs.sketch.small import left_vectors, nystroem, skew_core
from loft_rs.sketch.split_half import overlap, split_half_of
from loft_rs.tuner.adapters import adapted_layers


def unchanged(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k].nan_to_num(), before[k].nan_to_num()) for k in before)


# -- evidence ------------------------------------------------------------------------------------


def noisy_sketches(batches, *, noise, n=60, r=6, k=30, seed=0, draws=0):
    """(sketches of two halves of `batches` matrices, signal plus independent noise, the signal's
    planes).
    """
    draw = np.random.default_rng(seed + draws)
    u, v = basis_of(n, r, seed), basis_of(n, r, seed + 1)
    signal = u @ np.diag(np.linspace(3, 2, r)) @ v.T
    omega, halves = draw.standard_normal((n, k)), np.zeros((2, n, k))
    for i in range(batches):
        halves[i % 2] += (signal + noise * draw.standard_normal((n, n)) / np.sqrt(n)) @ omega
    counts = np.array([(batches + 1) // 2, batches // 2], float)
    return halves, counts, u


def told(halves, counts, r=6):
    return split_half_of(halves, counts, r, lambda y: left_vectors(y, r), pairs=False)


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
    # With as many batches as most of them ask for, the supports agree as asked: with others, and so
    # with the truth.
    count = int(np.median(needed))
    reached = [
        overlap(left_vectors(h.sum(0), 6), u) for h, _, u in (noisy_sketches(count, noise=4, seed=s) for s in range(6))
    ]
    assert np.mean(reached) >= 0.87


@pytest.mark.parametrize(("noise", "batches"), [(2, 4), (4, 8), (8, 8)])
def test_what_a_half_reproduces_is_unbiased_whatever_its_basis_was_fitted_to(noise, batches):
    """E <P_h^T Y_0, P_h^T Y_1> = E <P_h^T Y_h, P_h^T Y> with Y the truth, in units of E ||P_h^T
    Y_h||^2: within 4 standard errors of it.
    """
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
    build_ = {"evidence": {"q": ruled, "k": alike}, "supports": {}}
    assert "in 1 layer one half" in str(loft_rs.CalibrationReport("skewgrad", "natural", 2, 8, 0, 1.0, **build_))


@given(squares=st.lists(st.floats(0, 1e6), min_size=2, max_size=12), seed=st.integers(0, 99))
def test_reproduced_squares_descend_and_never_exceed(squares, seed):
    squares = np.sort(squares)[::-1]
    snr = np.random.default_rng(seed).exponential(1, len(squares))
    e = SplitHalf(0.5, 0.5, np.zeros(1), 0.5, snr, 4, 0.1, 0.5)
    kept = e.reproduced(squares)
    assert kept.shape == squares.shape and (np.diff(kept) <= 1e-9 * squares[0]).all() and (kept >= 0).all()
    assert kept.sum() == pytest.approx(np.sum(squares * snr / (1 + snr)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("support", SUPPORTS)
def test_calibrate_reports_evidence_and_one_batch_gives_nan(support):
    report = calibrate(build(support=support), token_batches(4))
    assert report.evidence.keys() == report.supports.keys() and "agreement" in str(report)
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


# -- one pass, two passes ------------------------------------------------------------------------


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
    report = calibrate(build(support=with_options(support, passes=1), side=side), batches)
    weights, gradients, inputs, outputs = dense_gradients(batches)
    assert report.passes == 1 and {s.passes for s in report.supports.values()} == {1}
    for name, s in report.supports.items():
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
        # The sketch of a gradsvd moment has as many columns as that of G, fewer here than the layer
        # has inputs.
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
        make_llama(**base),
        LoftConfig(
            r=8,
            target_modules=["q_proj", "down_proj"],
            support=with_options(support, passes=passes, oversampling=24),
        ),
    )
    report = calibrate(model, batches)
    assert report.passes == passes
    plain = make_llama(**base).double()
    for batch in batches:
        plain(**batch).loss.backward()
    for name, s in report.supports.items():
        w, g = plain.get_submodule(name).weight.detach(), plain.get_submodule(name).weight.grad
        p = torch.from_numpy(s.basis).double()
        matrix = skew_of(w, g, "input") if support == "skewgrad" else g
        squares = torch.linalg.svdvals(matrix) ** 2
        captured = span_energy(p, matrix) if support == "skewgrad" else float((matrix @ p).square().sum())
        assert captured >= (0.97 if passes == 2 else 0.4) * float(squares[:8].sum())
        assert abs(s.energy - captured / float(squares.sum())) <= 0.01 + 5 * s.energy_stderr


def test_half_precision_calibrates_in_one_pass():
    report = calibrate(build(make_llama(torch.bfloat16), support=SkewGrad(passes=1)), token_batches(2))
    assert all(0 < s.energy <= 1 and np.isfinite(s.values).all() for s in report.supports.values())


# -- budget --------------------------------------------------------------------------------------


def trained(model):
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "loft_theta" in n)


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"transform": "free"}, {"side": "output"}], ids=str)
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_budget_is_kept_trained_saved_and_loaded(options, support, tmp_path):
    batches = token_batches(4)
    model = build(support=support, r=Budget(params=400), **options)
    budget = Budget(params=400, transform=options.get("transform", "cayley"))  # which the config sets
    config = model.peft_config["default"]
    assert config.r == budget and config.rank == 2 and not config.rank_pattern
    assert {layer.adapters["default"].rank for layer in adapted_layers(model)[1].values()} == {2}
    report = calibrate(model, batches)
    assert config.r == budget
    ranks = {name: s.rank for name, s in report.supports.items()}
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
    wanted = model.eval()(**batches[1]).logits
    assert not torch.equal(wanted, make_llama().eval()(**batches[1]).logits)
    for trainable in (False, True):
        again = peft.PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=trainable).eval()
        assert same_adapter(again, model) and torch.equal(again(**batches[1]).logits, wanted)
    again.save_pretrained(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    with pytest.raises(ValueError, match="calibrate needs an untrained adapter"):
        calibrate(again, batches)


def same_adapter(one, other):
    configs = [model.peft_config["default"] for model in (one, other)]
    ranks = [{n: layer.adapters["default"].rank for n, layer in adapted_layers(m)[1].items()} for m in (one, other)]
    assert ranks[0] == ranks[1] and configs[0].rank_pattern == configs[1].rank_pattern
    return configs[0].r == configs[1].r and configs[0].support == configs[1].support


@pytest.mark.parametrize("support", ["skewgrad", GradSVD(passes=1, oversampling=64)], ids=["name", "object"])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.filterwarnings("ignore:saved without a support")
def test_a_budget_saved_before_it_is_shared_out_is_shared_out_after(support, mapped, tmp_path):
    options = {"support": support, "target_modules": ["q_proj", "down_proj"]}
    names, budget = adapted_layers(build(**options))[1], Budget(params=60)
    if mapped:
        budget = Budget(params=90, floor=dict.fromkeys(names, 4), cap=dict.fromkeys(names, 8) | {next(iter(names)): 4})
    model = build(r=budget, **options)
    with pytest.warns(UserWarning, match="saved without a support in"):
        model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    assert same_adapter(again, model) and again.peft_config["default"].r == budget
    assert again.peft_config["default"].support == support and trained(again) == trained(model) == len(names)
    reports = [calibrate(each, token_batches(2)) for each in (model, again)]
    assert same_adapter(again, model) and trained(model) <= budget.params
    for name, s in reports[0].supports.items():
        np.testing.assert_array_equal(reports[1].supports[name].basis, s.basis)
        assert s.rank in budget.allowed({n: 32 for n in names})[name]
    model.save_pretrained(tmp_path / "calibrated")
    assert same_adapter(peft.PeftModel.from_pretrained(make_llama(), tmp_path / "calibrated"), model)


def test_a_state_of_shared_ranks_is_loaded_into_a_model_that_has_shared_none():
    options = {"support": "skewgrad", "r": Budget(params=400)}
    model, fresh = build(**options), build(**options)
    calibrate(model, token_batches(2))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()(**token_batches(1)[0]).loss.backward()
    optimiser.step()
    fresh.load_state_dict(model.state_dict())
    assert same_adapter(fresh, model)
    batch = token_batches(1, seed=3)[0]
    assert torch.equal(fresh.eval()(**batch).logits, model.eval()(**batch).logits)


def test_a_budget_captures_more_than_even_ranks_of_as_many_parameters():
    batches = token_batches(4)
    even = build(support="skewgrad", r=6)
    calibrate(even, batches)
    shared = build(support="skewgrad", r=Budget(params=trained(even)))
    report = calibrate(shared, batches)
    weights, gradients, *_ = dense_gradients(batches)
    captured = [
        sum(
            span_energy(layer.adapters["default"].support.double(), skew_of(weights[n], gradients[n], "input"))
            for n, layer in adapted_layers(model)[1].items()
        )
        for model in (even, shared)
    ]
    assert captured[1] > 1.02 * captured[0] and trained(shared) <= trained(even)
    assert max(s.rank for s in report.supports.values()) <= 12  # twice the even share


def test_a_budget_names_modules_whose_names_end_alike(tmp_path):
    model = peft.get_peft_model(
        torch.nn.Sequential(
            torch.nn.Linear(8, 12), torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Linear(10, 8))
        ),
        LoftConfig(
            r=Budget(params=22, cap={"0": 2, "1.0": 6, "1.1": 4}),
            target_modules=["0", "1.0", "1.1"],
            support="activation",
        ),
    )
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    calibrate(model, [(x,)])
    ranks = {name: layer.adapters["default"].rank for name, layer in adapted_layers(model)[1].items()}
    assert ranks["0"] == 2 and ranks["1.0"] > 2
    model.save_pretrained(tmp_path)
    base = torch.nn.Sequential(
        torch.nn.Linear(8, 12), torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Linear(10, 8))
    )
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert {name: layer.adapters["default"].rank for name, layer in adapted_layers(again)[1].items()} == ranks


@pytest.mark.parametrize("kind", SUPPORTS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 3}, "passes must be 1 or 2, got 3"),
        ({"passes": 0}, "passes must be 1 or 2, got 0"),
        ({"passes": True}, "passes must be 1 or 2, got True"),
        ({"oversampling": 3}, "oversampling must be None or an even number of at least 2, got 3"),
        ({"oversampling": 0}, "oversampling must be None or an even number of at least 2, got 0"),
        ({"oversampling": 2.0}, "oversampling must be None or an even number of at least 2, got 2.0"),
    ],
)
def test_bad_options_of_a_sketch_are_named_when_it_is_made(kind, options, message):
    with pytest.raises(ValueError, match=message):
        with_options(kind, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": Budget(params=400, floor=0)}, "a floor of at least 2"),
        ({"r": Budget(params=400, floor={"a": 2, "b": 0})}, "a floor of at least 2"),
        ({"support": "principal"}, "it needs support='skewgrad', 'gradsvd' or 'activation', got 'principal'"),
        ({"support": "random"}, "it needs support='skewgrad', .* got 'random'"),
        ({"support": "pilot"}, "it needs support='skewgrad', .* got 'pilot'"),
        ({"support": loft_rs.Pilot(halves=True)}, "it needs support='skewgrad', .* got 'pilot'"),
        ({"support": loft_rs.Blocks()}, "it needs support='skewgrad', .* got 'blocks'"),
        ({"support": loft_rs.Reflections()}, "it needs support='skewgrad', .* got 'reflections'"),
        ({"support": "some.safetensors"}, "it needs support='skewgrad', .* got 'some.safetensors'"),
        ({"transform": "cayley+magnitudes"}, "cannot count the parameters of the transform 'cayley.magnitudes'"),
        ({"transform": "cayley_neumann:5"}, "cannot count the parameters of the transform 'cayley_neumann:5'"),
        ({"r": Budget(params=1), "transform": "free"}, "params is 1, but the smallest rank, 2, takes 4 with 'free'"),
    ],
)
def test_a_budget_that_cannot_be_is_named_by_the_config(options, message):
    with pytest.raises(ValueError, match=message):
        LoftConfig(**{"r": Budget(params=400), "support": "skewgrad"} | options)


def test_the_config_sets_what_a_budget_counts():
    for transform, other in (("cayley", "free"), ("free", "cayley"), ("exp", "cayley")):
        budget = Budget(params=400, transform=other)
        config = LoftConfig(r=budget, support="skewgrad", transform=transform)
        assert config.r == Budget(params=400, transform=transform) and budget.transform == other


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (Budget(params=10), ValueError, "the floors alone take 14"),
        (Budget(params=400, floor=40), ValueError, "floor.* is 40, but its rank can be 32 at most|floor .* is 40"),
        (Budget(params=400, floor={"q_proj": 2}), ValueError, "floor must have the names of .*; it lacks"),
        (Budget(params=400, cap={"q_proj": 2}), ValueError, "cap must have the names of .*; it lacks"),
        (Budget(params=400, floor=4, cap=2), ValueError, "floor.* is 4, above its cap of 2"),
    ],
)
def test_a_budget_that_does_not_fit_the_model_is_named_and_changes_nothing(budget, error, message):
    model = build(support="skewgrad", r=budget)
    before, fields = state_of(model), model.peft_config["default"].to_dict()
    with pytest.raises(error, match=message):
        calibrate(model, train_step=pytest.fail)
    untouched(model, before)
    assert model.peft_config["default"].to_dict() == fields


def test_a_module_too_narrow_for_an_even_rank_has_no_place_in_a_budget():
    base = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 1))
    with pytest.warns(UserWarning, match="1"):
        config = LoftConfig(r=Budget(params=40), target_modules=["0", "1"], support="activation")
        model = peft.get_peft_model(base, config)
    before = state_of(model)
    with pytest.raises(ValueError, match="gives even ranks, which these modules are too narrow for: 1"):
        calibrate(model, train_step=pytest.fail)
    assert unchanged(model, before)


def test_a_budget_that_no_batch_reaches_leaves_the_ranks_as_they_were():
    model = build(make_bert().bert, support="skewgrad", target_modules=["query", "dense"], r=Budget(params=400))
    batch = {k: v for k, v in token_batches(1)[0].items() if k != "labels"}
    before = state_of(model)
    with pytest.raises(ValueError, match=r"r=Budget\(\.\.\.\): no calibration batch reached pooler\.dense; exclude"):
        calibrate(model, train_step=lambda: model(**batch).last_hidden_state.square().mean().backward())
    assert unchanged(model, before)
