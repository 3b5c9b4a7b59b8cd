"""narrow: training goes on at a lower rank in the planes turned the most, the same function, in
every part of the package.
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
from hypothesis import given
from hypothesis import strategies as st
from narrowed import layers_of
from reference import adam, basis_of, exact_transform, logits, make_llama, token_batches, train
from refreshed import apart, build, quantise, same, snapshot

import loft_rs
from loft_rs import LoftConfig, NarrowReport, NonFiniteError, narrow, refresh
from loft_rs.layer.merging import factor_of
from loft_rs.refreshing import freeze
from loft_rs.refreshing import narrow as module

EPS = torch.finfo(torch.float32).eps


def owned(model):
    """name -> layer of those that hold their own support."""
    return {name: layer for name, layer in layers_of(model).items() if layer.adapters["default"].owner.layer is layer}


def transform_of(layer):
    """T (r x r) in float64, from the definition."""
    name = layer.adapters["default"].transform.name
    return exact_transform(name, layer.adapters["default"].theta.detach().double(), layer.adapters["default"].rank)


def dense(layer):
    """R (n x n), or what acts on the output, in float64 from the tensors that are stored."""
    p, factor = layer.adapters["default"].support.double(), layer.adapters["default"].frozen_factor
    eye = torch.eye(len(p), dtype=torch.float64)
    own = eye + p @ (transform_of(layer) - torch.eye(p.shape[1], dtype=torch.float64)) @ p.mT
    held = eye if factor is None else eye + factor.basis.double() @ factor.delta.double() @ factor.basis.double().mT
    return held @ own if layer.adapters["default"].side == "input" else own @ held


def parameters(r, transform="cayley"):
    return r * r if transform == "free" else r * (r - 1) // 2


class One(torch.nn.Module):
    """A model of one layer, n inputs and m outputs."""

    def __init__(self, n, m, dtype):
        super().__init__()
        self.layer = torch.nn.Linear(n, m, bias=False, dtype=dtype)

    def forward(self, x):
        return self.layer(x)


def one(n, m, r, *, seed=0, scale=0.3, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    config = LoftConfig(target_modules=["layer"], r=r, support="random", **options)
    model = peft.get_peft_model(One(n, m, dtype), config)
    (layer,) = layers_of(model).values()
    layer.adapters["default"].set_basis(basis_of(len(layer.adapters["default"].support), r, seed % 1000))
    with torch.no_grad():
        layer.adapters["default"].theta.copy_(
            scale * torch.randn(layer.adapters["default"].theta.shape, dtype=torch.float64)
        )
    return model, layer


# -- the function --------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "tied"), [("input", False), ("input", True), ("output", False)])
@pytest.mark.parametrize("transform", ["cayley", "exp", "free"])
def test_the_rotation_is_what_it_was_and_training_goes_on(transform, side, tied):
    model = build(make_llama(torch.float64), r=8, transform=transform, side=side, support="random", tied=tied)
    optimiser = train(model)
    for rank in (4, 2):
        before, held = logits(model), {name: dense(layer) for name, layer in layers_of(model).items()}
        report = narrow(model, rank, optimizer=optimiser)
        layers = owned(model)
        assert report.rank == rank and report.kept.keys() == layers.keys()
        for name, layer in layers_of(model).items():
            torch.testing.assert_close(dense(layer), held[name], atol=1e-13, rtol=0)
            assert layer.adapters["default"].rank == rank and np.isnan(layer.adapters["default"].energy)
        assert apart(logits(model), before) <= 1e-12
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == len(layers) * parameters(rank, transform)
        assert {id(p) for group in optimiser.param_groups for p in group["params"]} == {id(p) for p in trained}
        assert not any(p.any() for p in trained)
        train(model, optimiser)
        assert all(p.any() for p in trained) and apart(logits(model), before) > 1e-4
        if transform != "free":
            assert loft_rs.orthogonality_error(model) <= 20 * EPS  # supports are chosen in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["input", "output"])
def test_the_function_is_unchanged_to_rounding(dtype, side):
    model = build(make_llama(dtype), r=8, side=side)
    optimiser = train(model)
    refresh(model, token_batches(2), optimizer=optimiser)
    train(model, optimiser)
    for rank in (6, 2):
        before = logits(model)
        narrow(model, rank, optimizer=optimiser)
        # bf16: the products are summed in another order, each activation is rounded to 2^-8
        assert apart(logits(model), before) <= (5e-6 if dtype == torch.float32 else 0.05)
        assert loft_rs.orthogonality_error(model) <= 20 * EPS
        train(model, optimiser)
        assert apart(logits(model), before) > 1e-4
    refresh(model, token_batches(2, seed=3), optimizer=optimiser)
    assert {layer.adapters["default"].rank for layer in layers_of(model).values()} == {2}


@pytest.mark.filterwarnings("ignore:.* is odd")
@pytest.mark.filterwarnings("ignore:r was lowered")
@given(
    n=st.integers(4, 12),
    m=st.integers(4, 12),
    r=st.integers(3, 12),
    ranks=st.permutations([2, 4, 6]),
    transform=st.sampled_from(["cayley", "exp"]),
    side=st.sampled_from(["input", "output"]),
    scale=st.sampled_from([0.0, 1e-6, 0.3, 3.0, 100.0]),
    single=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_what_is_narrowed_stays_orthogonal(n, m, r, ranks, transform, side, scale, single, seed):
    dtype = torch.float32 if single else torch.float64
    r = min(r, n, m)
    model, layer = one(n, m, r, seed=seed, scale=scale, transform=transform, side=side, dtype=dtype)
    limit = 50 * torch.finfo(dtype).eps * max(1, scale)  # what the reference's exponential of a large matrix loses
    for rank in [rank for rank in sorted(ranks, reverse=True) if rank < r]:
        held = dense(layer)
        report = narrow(model, rank)
        torch.testing.assert_close(dense(layer), held, atol=limit, rtol=0)
        factor, p = factor_of(layer.adapters["default"]), layer.adapters["default"].support.double()
        rotation = torch.eye(len(p)) + factor.basis.double() @ factor.delta.detach().double() @ factor.basis.double().mT
        assert float((rotation.mT @ rotation - torch.eye(len(p))).abs().max()) <= limit
        assert float((p.mT @ p - torch.eye(rank)).abs().max()) <= limit
        (kept,) = report.kept.values()
        assert np.isnan(kept) if not scale else 0 < kept <= 1 + 1e-12
        with torch.no_grad():
            layer.adapters["default"].theta.copy_(scale * torch.randn(parameters(rank)))


# -- the planes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["cayley", "exp", "free"])
@pytest.mark.parametrize("r", [7, 8])
@pytest.mark.filterwarnings("ignore:.* is odd")
def test_the_planes_are_the_strongest(transform, r):
    model, layer = one(12, 10, r, transform=transform)
    old, t = layer.adapters["default"].support.clone(), transform_of(layer)
    s = (t - t.mT) / 2
    strengths = torch.linalg.svdvals(s)
    assert strengths[4] < 0.99 * strengths[3]  # or the four would not be determined
    report = narrow(model, 4)
    v = old.mT @ layer.adapters["default"].support
    torch.testing.assert_close(old @ v, layer.adapters["default"].support, atol=1e-13, rtol=0)
    torch.testing.assert_close(torch.linalg.svdvals(s @ v), strengths[:4], atol=1e-12, rtol=0)
    small = v.mT @ s @ v
    torch.testing.assert_close(small[[0, 2], [1, 3]], strengths[[0, 2]], atol=1e-12, rtol=0)  # strongest first
    share = float(strengths[:4].square().sum() / strengths.square().sum())
    assert list(report.kept.values()) == [pytest.approx(share, abs=1e-12)]
    lines = str(report).splitlines()
    assert lines[0] == "1 layers narrowed to rank 4" and lines[-1].split() == ["layer", f"{share:.4f}"]


def test_what_was_never_turned_keeps_its_first_columns():
    model = build(r=8)
    before, layers = logits(model), layers_of(model)
    held = {name: layer.adapters["default"].support.clone() for name, layer in layers.items()}
    report = narrow(model, 4)
    assert all(torch.equal(layer.adapters["default"].support, held[name][:, :4]) for name, layer in layers.items())
    assert all(np.isnan(kept) for kept in report.kept.values())
    assert torch.equal(logits(model), before) and not model.peft_config["default"].frozen_ranks
    train(model)


def test_layers_of_that_rank_or_less_are_left_alone():
    model = build(r=8, rank_pattern={"q_proj": 4, "o_proj": 2})
    optimiser = train(model)
    model(**token_batches(1)[0]).loss.backward()
    left = {name: layer for name, layer in layers_of(model).items() if name.endswith(("q_proj", "o_proj"))}
    tensors = {
        name: (layer.adapters["default"].theta, layer.adapters["default"].support) for name, layer in left.items()
    }
    values = copy.deepcopy({name: (*pair, pair[0].grad) for name, pair in tensors.items()})
    states = {name: copy.deepcopy(optimiser.state[theta]) for name, (theta, _) in tensors.items()}
    report = narrow(model, 4, optimizer=optimiser)
    assert len(report.kept) == 10 and not report.kept.keys() & left.keys()
    for name, layer in left.items():
        theta, basis = layer.adapters["default"].theta, layer.adapters["default"].support
        assert theta is tensors[name][0] and basis is tensors[name][1] and not layer.adapters["default"].frozen_rank
        assert same((theta, basis, theta.grad), values[name]) and same(optimiser.state[theta], states[name])
    ranks = {name: layer.adapters["default"].rank for name, layer in layers_of(model).items()}
    assert {rank for name, rank in ranks.items() if "o_proj" not in name} == {4}
    train(model, optimiser)


# -- the optimiser -------------------------------------------------------------------------------


OPTIMISERS = {
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, amsgrad=True),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "plain": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, centered=True, momentum=0.5),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.01),
}


@pytest.mark.parametrize("transform", ["cayley", "free"])
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_moments_are_those_of_the_ambient_matrix(kind, transform):
    model, layer = one(9, 7, 6, transform=transform)
    optimiser = OPTIMISERS[kind]([layer.adapters["default"].theta])
    x, free = torch.randn(5, 9, dtype=torch.float64), transform == "free"
    for _ in range(3):
        model(x).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    theta, p1 = layer.adapters["default"].theta, layer.adapters["default"].support.clone()
    held = copy.deepcopy(dict(optimiser.state[theta]))
    narrow(model, 4, optimizer=optimiser)
    state, p2 = optimiser.state[layer.adapters["default"].theta], layer.adapters["default"].support
    assert theta not in optimiser.state and state.keys() == held.keys()
    assert [p is layer.adapters["default"].theta for p in optimiser.param_groups[0]["params"]] == [True]
    places, new = ([(i, j) for i in range(r) for j in range(r) if free or i > j] for r in (6, 4))
    for key, value in held.items():
        if not isinstance(value, torch.Tensor) or not value.dim():  # a step count; momentum there is none of
            assert same(state[key], value)
            continue

        def ambient(v, i, j):
            """The gradient's matrix (n x n) with v at (i, j) in the basis P1."""
            matrix = torch.outer(p1[:, i], p1[:, j])
            return v * (matrix if free else matrix - matrix.mT)

        flat = value.flatten()
        if key in ("exp_avg", "momentum_buffer", "grad_avg"):
            whole = p2.mT @ sum(ambient(v, i, j) for v, (i, j) in zip(flat, places, strict=True)) @ p2
            wanted = torch.stack([whole[k, h] for k, h in new])
        else:  # each of independent coordinates, its variance with the square of the weight
            whole = sum(v * (p2.mT @ ambient(1.0, i, j) @ p2).square() for v, (i, j) in zip(flat, places, strict=True))
            wanted = torch.stack([whole[k, h] for k, h in new])
        assert state[key].is_contiguous()
        torch.testing.assert_close(state[key].flatten(), wanted, atol=1e-13, rtol=1e-10)


def test_the_optimiser_goes_on_as_one_made_for_the_new_parameters():
    model = build(r=8)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if n in names[:5]], "lr": 0.05},
            {"params": [p for n, p in model.named_parameters() if n in names[5:]], "lr": 0.02},
        ]
    )
    train(model, optimiser)
    narrow(model, 4, optimizer=optimiser)
    assert len(optimiser.state) == 14
    twin = copy.deepcopy(model)
    found = dict(twin.named_parameters())
    fresh = torch.optim.AdamW([{"params": [found[n] for n in part], "lr": 1.0} for part in (names[:5], names[5:])])
    fresh.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    train(model, optimiser)
    train(twin, fresh)
    assert [group["lr"] for group in fresh.param_groups] == [0.05, 0.02]
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in found.items())
    steps = {float(state["step"]) for state in optimiser.state.values()}
    assert steps == {6.0}


def test_an_optimiser_that_has_not_stepped_trains_the_new_parameters():
    model = build(r=8)
    optimiser = adam(model)
    narrow(model, 4, optimizer=optimiser)
    assert not optimiser.state
    train(model, optimiser)
    assert all(layer.adapters["default"].theta.any() for layer in layers_of(model).values())


def test_the_gradient_is_that_of_the_composed_weight():
    for side in ("input", "output"):
        model, layer = one(9, 7, 6, side=side)
        held = dense(layer)
        narrow(model, 4)
        x, p, weight = (
            torch.randn(5, 9, dtype=torch.float64),
            layer.adapters["default"].support,
            layer.base_layer.weight,
        )
        with torch.no_grad():
            layer.adapters["default"].theta.copy_(0.2 * torch.randn(6, dtype=torch.float64))
        theta = layer.adapters["default"].theta.detach().clone().requires_grad_()
        turn = torch.eye(len(p)) + p @ (exact_transform("cayley", theta, 4) - torch.eye(4)) @ p.mT
        whole = weight.detach() @ held @ turn if side == "input" else turn @ held @ weight.detach()
        (x @ whole.mT).square().sum().backward()
        model(x).square().sum().backward()
        torch.testing.assert_close(layer.adapters["default"].theta.grad, theta.grad, atol=1e-11, rtol=1e-10)


# -- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["planes", "ranks", "frozen", "basis", "moments"])
def test_a_failed_call_changes_nothing(how, tied, monkeypatch):
    model = build(r=8, tied=tied, rank_pattern={"down_proj": 6})
    optimiser = train(model)
    refresh(model, token_batches(2, seed=3), optimizer=optimiser)
    train(model, optimiser)
    model(**token_batches(1)[0]).loss.backward()
    before, wanted, config = snapshot(model, optimiser), logits(model), copy.deepcopy(model.peft_config["default"])
    held = [id(p) for p in model.parameters()]
    last = list(owned(model).values())[-1].adapters["default"]
    place, call = {
        "planes": ((module, "_strongest"), 3),
        "ranks": ((last, "resize"), 1),
        "frozen": ((last, "set_frozen"), 1),
        "basis": ((last, "set_basis"), 1),
        "moments": ((freeze, "transported"), 5),
    }[how]
    kept, calls = getattr(*place), itertools.count(1)

    def interrupted(*args):
        if next(calls) == call:
            raise KeyboardInterrupt
        return kept(*args)

    with monkeypatch.context() as patch:
        patch.setattr(*place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            narrow(model, 4, optimizer=optimiser)
    assert same(snapshot(model, optimiser), before) and torch.equal(logits(model), wanted)
    assert [id(p) for p in model.parameters()] == held and model.peft_config["default"] == config
    narrow(model, 4, optimizer=optimiser)
    assert apart(logits(model), wanted) <= 5e-6
    train(model, optimiser)


def test_what_cannot_be_narrowed_is_said():
    model = build(r=8)
    optimiser = train(model)
    before = snapshot(model, optimiser)
    for rank in (0, 1, 3, -2, 8, 10, 4.0, True, None, "4"):
        wanted = (
            r"rank must be an even integer of at least 2 and less than 8, the largest rank of adapter 'default', got"
        )
        with pytest.raises(ValueError, match=wanted):
            narrow(model, rank, optimizer=optimiser)
    with pytest.raises(TypeError, match=r"narrow\(\) no longer takes moments: "):
        narrow(model, 4, moments="restart")
    with pytest.raises(ValueError, match="optimizer does not train adapter 'default'"):
        narrow(model, 4, optimizer=adam(build(r=8)))
    rprop = torch.optim.Rprop([p for p in model.parameters() if p.requires_grad], lr=1e-12)
    for layer in layers_of(model).values():
        rprop.state[layer.adapters["default"].theta]["prev"] = torch.zeros_like(layer.adapters["default"].theta)
    with pytest.raises(ValueError, match="Rprop has 'prev'; give None, and make the optimiser anew"):
        narrow(model, 4, optimizer=rprop)
    with pytest.raises(ValueError, match="narrow needs an eager model"):
        narrow(torch.compile(model, backend="eager"), 4)
    with pytest.raises(ValueError, match="narrow needs a support.* has none yet in .*call loft_rs.calibrate first"):
        narrow(build(calibrated=False, r=8), 4)
    with pytest.raises(ValueError, match="narrow does not support magnitudes"):
        narrow(build(support="principal", transform="cayley+magnitudes"), 2)
    with pytest.raises(ValueError, match="narrow needs a support.* of a kind that has none"):
        narrow(peft.get_peft_model(make_llama(), LoftConfig.hra(4, target_modules=["q_proj"])), 2)
    model.merge_adapter()
    with pytest.raises(ValueError, match="narrow needs an unmerged model"):
        narrow(model, 4)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="narrow needs 'default' to be the only active"):
        narrow(model, 4)
    assert same(snapshot(model, optimiser), before)
    with torch.no_grad():
        layers_of(model)["model.layers.1.mlp.up_proj"].adapters["default"].theta[1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"transform of layer model\.layers\.1\.mlp\.up_proj holds NaN"):
        narrow(model, 4)
    narrow(build(r=8), np.int64(4))


# -- saving, merging, exporting ------------------------------------------------------------------


def narrowed(base=None, **options):
    model = build(base, **{"r": 8} | options)
    optimiser = train(model)
    assert isinstance(narrow(model, 4, optimizer=optimiser), NarrowReport)
    train(model, optimiser, seed=1)
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"side": "output"}, {"tied": True}, {"rank_pattern": {"k_proj": 2}}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_are_exact(tmp_path, options, dtype):
    model = narrowed(make_llama(dtype), **options)
    model.save_pretrained(tmp_path / "a")
    for how in ({}, {"low_cpu_mem_usage": True}):
        loaded = peft.PeftModel.from_pretrained(make_llama(dtype), str(tmp_path / "a"), is_trainable=True, **how)
        assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    optimiser = train(loaded)
    narrow(loaded, 2, optimizer=optimiser)
    train(loaded, optimiser)


def test_supports_from_a_file_are_narrowed(tmp_path):
    model = build(r=8)
    report = loft_rs.calibrate(model, token_batches(2))
    loft_rs.save_supports(tmp_path / "supports.safetensors", report.supports)
    config = LoftConfig(target_modules="all-linear", support=str(tmp_path / "supports.safetensors"))
    model = peft.get_peft_model(make_llama(), config)
    optimiser = train(model)
    before = logits(model)
    narrow(model, 4, optimizer=optimiser)
    assert apart(logits(model), before) <= 5e-6
    train(model, optimiser)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("side", ["input", "output"])
def test_merge_unmerge_and_lora(tmp_path, side):
    model = narrowed(side=side)
    wanted = logits(model)
    model.merge_adapter()
    assert apart(logits(model), wanted) <= 1e-5
    model.unmerge_adapter()
    # The support lies in what was turned before.
    assert {a.shape[0] for a, _ in loft_rs.lora_factors(model).values()} == {8}
    errors = loft_rs.export_lora(model, tmp_path)
    assert not any(errors.values())
    lora = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path))
    assert apart(logits(lora), wanted) <= 1e-5
    assert apart(logits(model.merge_and_unload()), wanted) <= 1e-5


# -- other ways to run ---------------------------------------------------------------------------


def test_other_adapters_stay():
    model = build(r=8)
    model.add_adapter("second", LoftConfig(target_modules="all-linear", r=6, support="random"))
    optimiser = train(model)
    model.set_adapter("second")
    second = logits(model)
    model.set_adapter("default")
    narrow(model, 4, optimizer=optimiser)
    train(model, optimiser)
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    assert {layer.adapters["second"].rank for layer in layers_of(model, "second").values()} == {6}


def test_a_base_that_only_runs():
    model = quantise(build(make_llama(), r=8))
    optimiser = train(model)
    before = logits(model)
    narrow(model, 4, optimizer=optimiser)
    assert apart(logits(model), before) <= 5e-6
    train(model, optimiser)


@pytest.mark.parametrize("trained", [False, True])
def test_a_model_that_was_compiled_before_sees_it(trained):
    model = build(target_modules=["q_proj", "o_proj"], r=8)
    optimiser = train(model) if trained else adam(model)
    compiled = torch.compile(model, backend="aot_eager")
    wanted = logits(model)
    assert apart(logits(compiled), wanted) <= 1e-5
    narrow(model, 4, optimizer=optimiser)
    assert apart(logits(compiled), wanted) <= 1e-5
    train(model, optimiser)
    assert apart(logits(compiled), logits(model)) <= 1e-5
    torch.compiler.reset()


# -- several processes ---------------------------------------------------------------------------


def narrow_on_rank(rank, folder):
    """One of two processes: a call that only rank 1 fails, one that both finish, and those of a
    sharded model.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    model = build(make_llama(torch.float64), support="principal", r=8, target_modules=["q_proj", "o_proj"])
    optimiser = train(model)  # both alike
    before, wanted, found, kept = snapshot(model, optimiser), logits(model), {}, freeze.transported
    if rank == 1:
        freeze.transported = None
    try:
        narrow(model, 4, optimizer=optimiser)
    except Exception as error:
        found["error"] = type(error).__name__
    freeze.transported, resize = kept, module.set_ranks
    if rank == 1:
        module.set_ranks = None  # fails before anything is exchanged
    try:
        narrow(model, 4, optimizer=optimiser)
    except Exception as error:
        found["early"] = type(error).__name__
    module.set_ranks = resize
    found["unchanged"] = same(snapshot(model, optimiser), before)
    if rank == 1:  # all go on from what rank 0 holds
        layer = next(iter(layers_of(model).values()))
        layer.adapters["default"].theta.data.mul_(-1)
    narrow(model, 4, optimizer=optimiser)
    found |= {"apart": apart(logits(model), wanted), "state": model.state_dict()}
    found["state"] = {key: value for key, value in found["state"].items() if "energy" not in key}  # NaN now
    found["optimiser"] = optimiser.state_dict()["state"]
    torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    found["sharded"] = []
    for call in (lambda: narrow(model, 2), lambda: refresh(model)):
        with pytest.raises(ValueError, match="cannot turn parameters that are sharded, as in model.layers.0") as error:
            call()
        found["sharded"].append(str(error.value).split()[0])
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort a closing interpreter


def test_two_processes_narrow_alike(tmp_path):
    torch.multiprocessing.spawn(narrow_on_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    for when in ("error", "early"):
        assert (first[when], second[when]) == ("RuntimeError", "TypeError")
    assert first["unchanged"] and second["unchanged"] and max(first["apart"], second["apart"]) <= 1e-12
    assert first["sharded"] == second["sharded"] == ["narrow", "refresh"]
    assert same(first["state"], second["state"]) and same(first["optimiser"], second["optimiser"])
