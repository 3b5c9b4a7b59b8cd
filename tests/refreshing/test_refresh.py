"""refreshing.py, LoftRefreshCallback: a new support in mid-training, the same function, in every
part of the package.
"""

from __future__ import annotations

import copy
import itertools
import os
from datetime import timedelta

import numpy as np
import peft
import pytest
import torch
from calibrated import skew_of, span_energy
from hypothesis import given
from hypothesis import strategies as st
from reference import adam, basis_of, exact_transform, logits, make_llama, own, token_batches, train
from refreshed import EPS, apart, build, quantise, refreshed, same, snapshot, trainer

import loft_rs
from loft_rs import Budget, LoftConfig, NonFiniteError, SkewGrad, refresh
from loft_rs.factor.low_rank import Frozen, LowRank
from loft_rs.layer.merging import factor_of, original_weight, rotated_weight
from loft_rs.refreshing import freeze
from loft_rs.refreshing.optimizer_state import transported
from loft_rs.tuner.adapters import adapted_layers


@pytest.mark.parametrize("support", ["skewgrad", "gradsvd", "principal"])
def test_a_refresh_in_groups_is_the_same(support):
    found = []
    for options in ({}, {"offload": True}, {"memory": 0.9}):
        torch.manual_seed(0)
        model = build(support=support)
        train(model)
        if "memory" in options:
            options = {"memory": int(0.9 * found[0][0].memory.total)}
        report = refresh(model, token_batches(2, seed=5), **options)
        found.append((report, [own(layer).support.clone() for layer in adapted_layers(model)[1].values()]))
    assert found[2][0].memory.groups > 1 and found[1][0].memory.sketches == 0
    for _, supports in found[1:]:
        assert same(supports, found[0][1])


def test_a_refresh_in_one_pass():
    model = build(support=SkewGrad(passes=1))
    train(model)
    before = logits(model)
    assert refresh(model, token_batches(2, seed=5)).passes == 1
    assert apart(logits(model), before) < 64 * EPS


RETIRED = {"pilot": loft_rs.Pilot(), "passes": 1, "oversampling": 64, "moments": "restart", "fold": False}


@pytest.mark.parametrize("wrong", [{"memory": 1000}, {"memory": "many"}, *({key: RETIRED[key]} for key in RETIRED)])
def test_a_refresh_with_a_wrong_option_changes_nothing(wrong):
    model = build()
    optimiser = train(model)
    before = snapshot(model, optimiser)
    (name,) = wrong
    error, message = (TypeError, rf"refresh\(\) no longer takes {name}: ") if name in RETIRED else (ValueError, name)
    with pytest.raises(error, match=message):
        refresh(model, token_batches(2, seed=5), optimizer=optimiser, **wrong)
    assert same(snapshot(model, optimiser), before)


# -- the function --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("support", ["skewgrad", "gradsvd", "principal"])
def test_the_function_is_unchanged_and_training_goes_on(dtype, side, support):
    model = build(make_llama(dtype), side=side, support=support)
    base = logits(make_llama(dtype))
    optimiser = train(model)
    for round_ in range(3):
        before = logits(model)
        report = refresh(model, token_batches(2, seed=round_), optimizer=optimiser)
        assert report.method == support and len(report.supports) == 14
        # bf16: the products are summed in another order, each activation is rounded to 2^-8
        assert apart(logits(model), before) <= (5e-6 if dtype == torch.float32 else 0.05)
        assert apart(before, base) > (1e-3 if dtype == torch.float32 else 0.02)
        assert not any(own(layer).theta.any() for layer in adapted_layers(model)[1].values())
        assert loft_rs.orthogonality_error(model) <= 20 * EPS
        train(model, optimiser, seed=round_)
        assert apart(logits(model), before) > 1e-4


@pytest.mark.parametrize("transform", ["cayley", "exp", "free"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_in_float64_it_is_unchanged_to_float64(transform, side):
    model = build(make_llama(torch.float64), transform=transform, side=side, support="random")
    train(model)
    train_again = adam(model)
    for _ in range(3):
        before = logits(model)
        refresh(model)
        assert apart(logits(model), before) <= 1e-12
        train(model, train_again)
    _, layers = adapted_layers(model)
    assert all(own(layer).frozen_rank > 4 for layer in layers.values())


@given(
    n=st.integers(4, 12),
    ranks=st.lists(st.integers(2, 4), min_size=1, max_size=5),
    side=st.sampled_from(["input", "output"]),
    overlap=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_repeated_products_are_one_factor_no_wider_than_the_layer(n, ranks, side, overlap, seed):
    generator = torch.Generator().manual_seed(seed)
    whole, held = torch.eye(n, dtype=torch.float64), None
    for i, r in enumerate(ranks):
        basis = torch.from_numpy(basis_of(n, 4, 0)[:, :r] if overlap else basis_of(n, r, seed % 1000 + i))
        theta = torch.randn(r * (r - 1) // 2, generator=generator, dtype=torch.float64)
        delta = exact_transform("cayley", theta, r) - torch.eye(r, dtype=torch.float64)
        own = LowRank(basis, delta)
        turn = torch.eye(n, dtype=torch.float64) + basis @ delta @ basis.mT
        whole = whole @ turn if side == "input" else turn @ whole
        if held is not None:
            both = Frozen.of(held, basis, side)
            own = LowRank(both.basis, both.times(delta))
        held = own.reduced(1e-14)
        assert held.rank <= min(n, sum(ranks[: i + 1])) and (not overlap or held.rank <= 4)
        eye = torch.eye(held.rank, dtype=torch.float64)
        torch.testing.assert_close(held.basis.mT @ held.basis, eye, atol=1e-13, rtol=0)
        rotation = torch.eye(n, dtype=torch.float64) + held.basis @ held.delta @ held.basis.mT
        torch.testing.assert_close(rotation, whole, atol=1e-12, rtol=0)
        assert held.orthogonality_error() <= 1e-12


def test_directions_that_are_not_turned_are_dropped():
    model = build(support="random", r=6)
    before = logits(model)
    refresh(model)
    _, layers = adapted_layers(model)
    assert all(own(layer).frozen_rank == 0 for layer in layers.values()) and torch.equal(logits(model), before)
    with torch.no_grad():
        for layer in layers.values():
            own(layer).theta[0] = 0.3  # one plane
    before = logits(model)
    refresh(model)
    assert all(own(layer).frozen_rank == 2 for layer in layers.values())
    with torch.no_grad():
        for layer in layers.values():
            own(layer).set_basis(torch.nn.functional.pad(layer.loft_frozen_basis["default"], (0, 4)))
            plane = layer.loft_frozen_basis["default"].mT @ own(layer).support
            sign = torch.linalg.det(plane[:, :2]).sign() * (1 if layer.loft_frozen_delta["default"][1, 0] < 0 else -1)
            own(layer).theta[0] = -0.3 * sign  # and back
            layer.loft_support["default"][:, 2:] = 0
    delta = factor_of(next(iter(layers.values())).adapters["default"]).reduced(1e-6)
    assert delta.rank == 0


# -- the support ---------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_the_support_is_that_of_the_current_weight(side, checkpointing):
    batches = token_batches(2)
    model = build(side=side, r=16, order="natural")
    train(model)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    merged = copy.deepcopy(model).merge_and_unload().double()
    refresh(model, batches)
    weights, gradients = {}, {}
    merged.requires_grad_(True)
    for batch in batches:
        merged(**batch).loss.backward()
    for name, module in merged.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weights[name], gradients[name] = module.weight.detach(), module.weight.grad
    for name, layer in adapted_layers(model)[1].items():
        s = skew_of(weights[name], gradients[name], side)
        best = float((torch.linalg.svdvals(s)[:16] ** 2).sum())
        # a sketch as wide as the layer is the dense problem
        assert span_energy(own(layer).support.double(), s) >= (0.999 if len(s) <= 32 else 0.7) * best


def test_a_principal_support_is_that_of_the_current_weight_and_a_random_one_is_new():
    model = build(support="principal", order="natural")
    train(model)
    name, layer = next(iter(adapted_layers(model)[1].items()))
    weight = rotated_weight(layer, layer.applied())
    report = refresh(model)
    wanted = loft_rs.select_support(None, 4, weights=weight, method="principal").basis
    np.testing.assert_allclose(np.abs(wanted.T @ own(layer).support.numpy()), np.eye(4), atol=1e-3)
    assert report.passes == 0 and report.supports[name].method == "principal"
    model = build(support="random")
    layer = next(iter(adapted_layers(model)[1].values()))
    seen = [own(layer).support.clone()]
    for _ in range(2):
        refresh(model)
        assert all(not torch.equal(own(layer).support, old) for old in seen)
        seen.append(own(layer).support.clone())


# -- the optimiser -------------------------------------------------------------------------------


@given(n=st.integers(4, 9), r=st.integers(2, 4), r2=st.integers(2, 4), seed=st.integers(0, 2**31), free=st.booleans())
def test_moments_are_transported_as_those_of_independent_coordinates(n, r, r2, seed, free):
    p1, p2 = (torch.from_numpy(basis_of(n, rank, seed % 1000 + i)) for i, rank in enumerate((r, r2)))
    turn = p2.mT @ p1
    generator = torch.Generator().manual_seed(seed)
    places, new = ([(i, j) for i in range(k) for j in range(k) if free or i > j] for k in (r, r2))
    shape = (r, r) if free else (len(places),)
    m = torch.randn(shape, generator=generator, dtype=torch.float64)
    v = torch.rand(shape, generator=generator, dtype=torch.float64)
    c = torch.tensor(
        [
            [float(turn[k, i] * turn[h, j] - (0 if free else turn[k, j] * turn[h, i])) for i, j in places]
            for k, h in new
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(transported("exp_avg", m, turn).flatten(), c @ m.flatten())
    wanted = c.square() @ v.flatten() + (1 - c.square().sum(1)) * v.mean()
    torch.testing.assert_close(transported("exp_avg_sq", v, turn).flatten(), wanted)
    eye = torch.eye(r, dtype=torch.float64)
    assert torch.equal(transported("exp_avg", m, eye), m)
    torch.testing.assert_close(transported("exp_avg_sq", v, eye), v)


def test_moments_are_transported():
    model = build()
    optimiser = train(model)
    theta = next(p for p in model.parameters() if p.requires_grad)
    kept = {k: v.clone() for k, v in optimiser.state[theta].items()}
    layer = next(iter(adapted_layers(model)[1].values()))
    old = own(layer).support.double()
    refresh(model, token_batches(2, seed=1), optimizer=optimiser)
    turn = own(layer).support.double().mT @ old
    state = optimiser.state[theta]
    assert torch.equal(state["step"], kept["step"])
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[key], transported(key, kept[key], turn), atol=1e-9, rtol=1e-4)
        assert not torch.equal(state[key], kept[key])
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    train(model, sgd)
    refresh(model, token_batches(2), optimizer=sgd)
    refresh(model, token_batches(2), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    rprop = torch.optim.Rprop([p for p in model.parameters() if p.requires_grad])
    train(model, rprop)
    with pytest.raises(ValueError, match="Rprop has 'prev'; give None, and make the optimiser anew"):
        refresh(model, token_batches(2), optimizer=rprop)
    refresh(model, token_batches(2))
    assert any(rprop.state[p]["prev"].any() for p in rprop.state)  # an optimiser that was not given is left as it is


# -- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["raise", "interrupt", "nan", "no gradient", "late"])
def test_a_failed_refresh_changes_nothing(how, monkeypatch):
    model = build()
    optimiser = train(model)
    refresh(model, token_batches(2, seed=3), optimizer=optimiser)
    train(model, optimiser)
    model(**token_batches(1)[0]).loss.backward()
    before, wanted = snapshot(model, optimiser), logits(model)
    batches = token_batches(2)

    def step():
        model(**batches[0]).loss.backward()
        if how == "raise":
            raise OSError("disk")
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "nan":
            (model(**batches[1]).loss * float("nan")).backward()

    errors = {"raise": OSError, "interrupt": KeyboardInterrupt, "nan": NonFiniteError, "late": MemoryError}
    options = {"train_step": (lambda: None) if how == "no gradient" else step}
    if how == "late":  # the last moments, when all the rest is done
        kept, calls = freeze.transported, itertools.count(1)

        def fail(*args):
            if next(calls) == 2 * 14:
                raise MemoryError
            return kept(*args)

        monkeypatch.setattr(freeze, "transported", fail)
        options = {"dataloader": batches}
    with pytest.raises(errors.get(how, ValueError)):
        refresh(model, optimizer=optimiser, **options)
    assert how != "late" or next(calls) == 2 * 14 + 1
    assert same(snapshot(model, optimiser), before) and torch.equal(logits(model), wanted)


def test_a_nan_transform_and_a_nan_batch_are_named():
    model = build()
    layer = adapted_layers(model)[1]["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        own(layer).theta[1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"transform of layer model\.layers\.1\.mlp\.up_proj holds NaN"):
        refresh(model, token_batches(1))


def test_what_cannot_be_refreshed_is_said():
    for config in (LoftConfig.oft(8), LoftConfig.boft(4), LoftConfig.hra(4)):
        config.target_modules = {"q_proj"}
        with pytest.raises(ValueError, match="of a kind that has none"):
            refresh(peft.get_peft_model(make_llama(), config), token_batches(1))
    with pytest.raises(ValueError, match="does not support magnitudes"):
        refresh(build(support="principal", transform="cayley+magnitudes"))
    with pytest.raises(
        ValueError, match="refresh keeps the rank of every layer, but r of adapter 'default' is a Budget"
    ):
        refresh(build(r=Budget(params=200)), token_batches(1))
    with pytest.raises(ValueError, match=r"has none yet in .*call loft_rs\.calibrate first"):
        refresh(build(calibrated=False), token_batches(1))
    model = build()
    with pytest.raises(ValueError, match="give refresh a dataloader or a train_step"):
        refresh(model)
    with pytest.raises(ValueError, match="optimizer does not train adapter 'default'"):
        refresh(model, token_batches(1), optimizer=torch.optim.SGD(make_llama().parameters(), lr=1.0))
    model.merge_adapter()
    with pytest.raises(ValueError, match="refresh needs an unmerged model"):
        refresh(model, token_batches(1))
    model.unmerge_adapter()
    model.add_adapter("second", LoftConfig(target_modules="all-linear", r=4))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="needs 'default' to be the only active adapter"):
        refresh(model, token_batches(1), adapter_name="default")


# -- other ways to run ---------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, [["q_proj", "k_proj", "v_proj"]]])
def test_tied_layers(tmp_path, tied):
    model = build(tied=tied)
    optimiser = train(model)
    for i in range(2):
        before = logits(model)
        report = refresh(model, token_batches(2, seed=i), optimizer=optimiser)
        assert not any("k_proj" in name for name in report.supports)
        assert apart(logits(model), before) <= 5e-6
        train(model, optimiser)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("placement", ["add", "rotate", "opaque", "reentrant", "checkpointed"])
def test_every_way_has_the_gradient_of_the_composed_weight(side, placement):
    model = refreshed(make_llama(torch.float64), side=side)
    _, layers = adapted_layers(model)
    batch = token_batches(1, seed=5)[0]
    name, layer = next((n, each) for n, each in layers.items() if n.endswith("0.self_attn.o_proj"))
    theta = own(layer).theta
    # The reference: G of the merged weight, through W = W0 R_f R(theta) or R(theta) R_f W0 from the
    # definitions.
    twin = copy.deepcopy(model).merge_and_unload()
    merged = twin.get_submodule(name).weight.requires_grad_(True)
    twin(**batch).loss.backward()
    free = theta.detach().clone().requires_grad_()
    eye, frozen, p = (
        torch.eye(32, dtype=torch.float64),
        own(layer).frozen_factor,
        own(layer).support,
    )
    turn = eye + p @ (exact_transform("cayley", free, 4) - torch.eye(4)) @ p.mT
    held = eye + frozen.basis @ frozen.delta @ frozen.basis.mT
    weight = original_weight(layer, "a test").detach()
    weight = weight @ held @ turn if side == "input" else turn @ held @ weight
    torch.testing.assert_close(weight, merged, atol=1e-10, rtol=0)
    (weight * merged.grad).sum().backward()
    if placement == "opaque":
        quantise(model)
    elif placement in ("add", "rotate"):
        for each in layers.values():
            each.placement = placement
    else:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": placement == "reentrant"})
    model.train()
    theta.grad = None
    model(**batch).loss.backward()
    torch.testing.assert_close(theta.grad, free.grad, atol=1e-7, rtol=1e-4)  # transformers' norms and loss are float32


def test_a_base_that_only_runs():
    model = quantise(build(make_llama(torch.bfloat16)))
    optimiser = train(model)
    before = logits(model)
    refresh(model, token_batches(2), optimizer=optimiser)
    assert apart(logits(model), before) <= 0.05
    train(model, optimiser)


def test_other_adapters_stay():
    model = build()
    model.add_adapter("second", LoftConfig(target_modules="all-linear", r=6, support="random"))
    train(model)
    model.set_adapter("second")
    train(model)
    second = logits(model)
    model.set_adapter("default")
    first = logits(model)
    refresh(model, token_batches(2))
    assert apart(logits(model), first) <= 5e-6
    train(model)
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.base_model.merge_adapter(["default", "second"])
    assert apart(logits(model), both) <= 1e-5
    model.base_model.unmerge_adapter()
    model.delete_adapter("default")
    assert not any("frozen" in key for key in model.state_dict())
    model.set_adapter("second")
    assert torch.equal(logits(model), second)


def test_a_compiled_model_falls_back():
    model = refreshed(target_modules=["q_proj", "o_proj"])
    wanted = logits(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert apart(logits(compiled), wanted) <= 1e-5
    model.train()
    compiled(**token_batches(1)[0]).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    torch.compiler.reset()


def test_a_model_that_was_compiled_before_sees_the_refresh():
    model = build(target_modules=["q_proj", "o_proj"])
    train(model)
    compiled = torch.compile(model, backend="aot_eager")
    for i in range(2):
        wanted = logits(model)
        assert apart(logits(compiled), wanted) <= 1e-5
        refresh(model, token_batches(2, seed=i))
        assert apart(logits(compiled), wanted) <= 1e-5
        train(model, seed=i)
    assert apart(logits(compiled), logits(model)) <= 1e-5
    torch.compiler.reset()


# -- the callback --------------------------------------------------------------------------------


def test_the_callback_refreshes_and_resumes_to_the_same_weights(tmp_path):
    straight, callback, run = trainer(tmp_path / "a")
    run.train()
    assert [step for step, _ in callback.reports] == [2, 4, 6, 8]
    resumed, callback, run = trainer(tmp_path / "b")
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert [step for step, _ in callback.reports] == [6, 8]
    a, b = straight.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and sum("frozen_basis" in key for key in a) == 14
    assert apart(logits(resumed), logits(straight)) <= 1e-4


def test_the_callback_takes_options():
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got 0"):
        loft_rs.LoftRefreshCallback(every=0)
    with pytest.raises(ValueError, match="batches must be an integer of at least 1"):
        loft_rs.LoftRefreshCallback(every=5, batches=True)
    with pytest.raises(ValueError, match="memory"):
        loft_rs.LoftRefreshCallback(every=5, memory="many")
    with pytest.raises(ValueError, match="at most one of dataloader and train_step"):
        loft_rs.LoftRefreshCallback(every=5, dataloader=[], train_step=print)
    for retired, value in RETIRED.items():
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{retired}'"):
            loft_rs.LoftRefreshCallback(5, **{retired: value})


def test_the_callback_refuses_what_cannot_be_refreshed_before_the_first_step(tmp_path):
    report = loft_rs.calibrate(build(calibrated=False, target_modules=["q_proj"]), token_batches(1))
    loft_rs.save_supports(tmp_path / "supports.safetensors", report.supports)
    for config, message in (
        (LoftConfig.psoft(4, target_modules=["q_proj"]), "LoftRefreshCallback does not support magnitudes"),
        (LoftConfig(target_modules=["q_proj"], support=str(tmp_path / "supports.safetensors")), "come from the file"),
        (LoftConfig(target_modules=["q_proj"], support="gradsvd", r=Budget(params=40)), "is a Budget"),
    ):
        _, callback, run = trainer(tmp_path, model=peft.get_peft_model(make_llama(), config))
        with pytest.raises(ValueError, match=message):
            run.train()
        assert run.state.global_step == 0 and not callback.reports


# -- several processes ---------------------------------------------------------------------------


def refresh_on_rank(rank, folder):
    """One of two processes: a refresh over a share of the batches, and one that only rank 1
    fails.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    model = build(make_llama(torch.float64), calibrated=False)
    loft_rs.calibrate(model, token_batches(2))
    optimiser = train(model)  # both alike
    before = logits(model)
    report = refresh(model, token_batches(4)[2 * rank : 2 * rank + 2], optimizer=optimiser)
    found = {"batches": report.batches, "apart": apart(logits(model), before), "state": model.state_dict()}
    found["optimiser"] = optimiser.state_dict()["state"]
    train(model, optimiser)
    kept = snapshot(model, optimiser)
    try:
        refresh(model, token_batches(2) if rank == 0 else [], optimizer=optimiser)
    except Exception as error:
        found["error"] = type(error).__name__
    found["unchanged"] = same(snapshot(model, optimiser), kept)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort a closing interpreter


def test_two_processes_refresh_alike(tmp_path):
    torch.multiprocessing.spawn(refresh_on_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert first["batches"] == second["batches"] == 4 and first["apart"] <= 1e-12
    assert same(first["state"], second["state"]) and same(first["optimiser"], second["optimiser"])
    assert (first["error"], second["error"]) == ("RuntimeError", "ValueError")
    assert first["unchanged"] and second["unchanged"]
