"""pilot.py: supports from what a short low-rank training changes, against dense float64; what is
left as it was, and what is refused.
"""

from __future__ import annotations

import os
from datetime import timedelta

import numpy as np
import peft
import pytest
import torch
from calibrated import Perceptron, X, overlap
from memory import LiveBytes, frozen_peak
from piloted import SHORT, build, changes, learnt_change, linear, perceptron
from reference import make_bert, make_llama, token_batches
from torch import nn

import loft_rs
from loft_rs import Budget, LoftConfig, NonFiniteError, Pilot, calibrate, refresh
from loft_rs.calibration.pilot import LowRankChange, changes_for
from loft_rs.layer import AdaptedLinear
from loft_rs.tuner.adapters import adapted_layers


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model, before):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True, atol=0, rtol=0)
    assert all(layer.tap is None for layer in adapted_layers(model)[1].values())
    assert all(p.grad is None for p in model.parameters())


# -- the support of a change ---------------------------------------------------------------------


@changes
def test_the_support_is_that_of_a_dense_svd_of_the_change(n, heights, rank, side, seed):
    heights = heights[:1] if side == "output" else heights
    r = min(rank, n, *heights)
    change, dense = learnt_change(n, heights, rank, side, seed)
    found = change.support(5)
    assert all(learnt.shape[1] == min(max(r, rank), n, m) for learnt, m in zip(change.learnt, heights, strict=True))
    _, values, v = torch.linalg.svd(dense)
    np.testing.assert_allclose(found.values, values[:r], rtol=1e-10, atol=1e-10 * float(values[0]))
    captured = float((dense @ torch.from_numpy(found.basis).double()).square().sum() / dense.square().sum())
    best = float(values[:r].square().sum() / values.square().sum())
    # P is rounded to float32; what it then loses is of second order, what rounding adds is not.
    assert abs(captured - best) <= 1e-6 and abs(found.energy - best) <= 1e-10
    assert (found.method, found.side, found.seed, found.energy_stderr) == ("pilot", side, 5, 0.0)
    eps = torch.finfo(torch.float32).eps
    assert np.linalg.norm(found.basis.T.astype(np.float64) @ found.basis - np.eye(r), 2) <= 8 * eps * r**0.5
    if r < min(dense.shape) and values[r - 1] - values[r] > 1e-3 * values[0]:  # where the span is one
        inside = np.linalg.norm(v[:r].numpy() @ found.basis) ** 2
        assert inside >= r - 1e-4


def test_an_untrained_change_has_no_support_and_starts_alike_on_every_call():
    layers = adapted_layers(build())[1]
    one, other = (changes_for(layers, "default", Pilot(), 3) for _ in range(2))
    assert all(change.support(3) is None for change in one.values())
    for name, change in one.items():
        (drawn,), (learnt,), layer = change.drawn, change.learnt, layers[name]
        k = min(64, layer.in_features, layer.out_features)
        assert learnt.shape == (layer.in_features, k) and drawn.shape == (layer.out_features, k)
        assert not learnt.any() and 0.5 < float(drawn.detach().std()) * k**0.5 < 1.5
        assert torch.equal(drawn, other[name].drawn[0])
    drawn = [change.drawn[0] for change in one.values()]
    assert not torch.equal(drawn[0], drawn[7])  # two layers of one shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_change_adds_its_product_and_has_its_gradients(side, dtype):
    layer = linear(12, 20, 4, side, dtype)
    draw = torch.Generator().manual_seed(0)
    change = LowRankChange(layer, "default", 5, draw, torch.device("cpu"))
    (learnt,), (drawn,) = change.learnt, change.drawn
    assert learnt.dtype == drawn.dtype == torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        learnt.copy_(torch.randn(learnt.shape, generator=draw))
    x = torch.randn(3, 7, 12, generator=draw).to(dtype).requires_grad_()
    y = torch.randn(3, 7, 20, generator=draw).to(dtype)
    dy = torch.randn(3, 7, 20, generator=draw).to(dtype)
    out = change.add(y, x, 0)
    out.backward(dy)
    wide = [t.detach().double().requires_grad_() for t in (x, learnt, drawn)]
    ba = wide[2] @ wide[1].mT if side == "input" else wide[1] @ wide[2].mT
    wanted = y.double() + wide[0] @ ba.mT
    wanted.backward(dy.double())
    tight = {"rtol": 1e-5, "atol": 1e-5}
    loose = tight if dtype in (torch.float32, torch.float64) else {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(out.double(), wanted, **loose)
    torch.testing.assert_close(x.grad.double(), wide[0].grad, **loose)
    for factor, reference in zip((learnt, drawn), wide[1:], strict=True):  # in float32 whatever the layer's dtype
        torch.testing.assert_close(factor.grad.double(), reference.grad, **tight)


# -- the task ------------------------------------------------------------------------------------


class Regression(nn.Module):
    """y = W x with the mean squared error to W* x, W* - W0 of a low rank."""

    def __init__(self, n, m, rank):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.inner = nn.Linear(n, m, bias=False)
        change = torch.randn(m, rank, generator=draw) @ torch.randn(rank, n, generator=draw) / n
        with torch.no_grad():
            self.inner.weight.copy_(torch.randn(m, n, generator=draw) / n**0.5)
        self.register_buffer("change", change)

    def forward(self, x):
        error = self.inner(x) - x @ (self.inner_weight + self.change).mT
        return {"loss": error.square().mean()}

    @property
    def inner_weight(self):
        base = self.inner.get_base_layer() if isinstance(self.inner, AdaptedLinear) else self.inner
        return base.weight.detach()


@pytest.mark.parametrize("side", ["input", "output"])
def test_the_support_is_where_the_task_changes_the_weight(side):
    n, m, r = 64, 48, 4
    draw = torch.Generator().manual_seed(2)
    batches = [{"x": torch.randn(256, n, generator=draw)} for _ in range(32)]
    model = build(Regression(n, m, r), target_modules=["inner"], r=r, side=side)
    change = model.base_model.model.change
    change = change if side == "input" else change.mT
    captured = {}
    for support in ("random", "pilot"):
        held = build(Regression(n, m, r), target_modules=["inner"], r=r, side=side, support=support)
        report = calibrate(held, batches, max_batches=32)
        basis = torch.from_numpy(report.supports["inner"].basis)
        captured[support] = float((change @ basis).square().sum() / change.square().sum())
    assert captured["pilot"] >= 0.95
    assert captured["random"] <= 4 * r / len(basis)


def reference(base, batches, steps, seed, r, side="input", ties=()):
    """Bases in float64 of the plain run: autograd's own products, torch's Adam, a dense SVD of what
    changed. ties: ends of names.
    """
    layers = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    first = {end: tie[0] for tie in ties for end in tie}
    owner = {n: n.rpartition(".")[0] + "." + first.get(n.rpartition(".")[2], n.rpartition(".")[2]) for n in layers}
    groups = {}
    for name in layers:
        groups.setdefault(owner[name], []).append(name)
    draw, pairs = torch.Generator().manual_seed(seed), {}
    for name in [name for names in groups.values() for name in names]:
        (m, n), k = layers[name].weight.shape, min(64, *layers[name].weight.shape)
        own, other = (n, m) if side == "input" else (m, n)
        drawn = (torch.randn(other, k, generator=draw) / k**0.5).double()
        pairs[name] = torch.zeros(own, k, dtype=torch.float64).requires_grad_(), drawn.requires_grad_()

        def hook(module, x, y, name=name):
            learnt, drawn = pairs[name]
            return y + (x[0] @ learnt @ drawn.mT if side == "input" else x[0] @ drawn @ learnt.mT)

        layers[name].register_forward_hook(hook)
    base.requires_grad_(False).eval()
    optimiser = torch.optim.Adam([factor for pair in pairs.values() for factor in pair], lr=1e-3)
    for step in range(steps):
        base(**batches[step % len(batches)]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    found = {}
    for name, names in groups.items():
        change = torch.cat([pairs[each][1] @ pairs[each][0].mT for each in names]).detach()
        _, values, v = torch.linalg.svd(change)
        found[name] = v[:r].mT.numpy(), float(values[:r].square().sum() / values.square().sum())
    return found


def assert_spans(report, wanted, least):
    assert report.supports.keys() == wanted.keys()
    for name, (basis, energy) in wanted.items():
        assert np.linalg.norm(basis.T @ report.supports[name].basis) ** 2 / basis.shape[1] >= least, name
        assert abs(report.supports[name].energy - energy) <= 1 - least


TIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@pytest.mark.parametrize(("side", "tied"), [("input", False), ("output", False), ("input", True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_pilot_is_the_plain_training_of_low_rank_changes(dtype, side, tied):
    batches, steps = token_batches(3), 5  # some are used twice
    wanted = reference(make_llama(torch.float64), batches, steps, 4, 6, side, TIES if tied else ())
    model = build(make_llama(dtype), side=side, tied=tied, seed=4, support=Pilot(steps=steps))
    report = calibrate(model, batches)
    # P is stored in float32. Where a gradient is as small as float32's rounding, Adam's first steps
    # are of its sign.
    assert_spans(report, wanted, 1 - 1e-6 if dtype == torch.float64 else 0.99)
    assert report.pilot == Pilot(steps=5) and report.batches == 3 and report.passes == 1 and not report.evidence
    assert str(report).startswith("pilot of 5 steps, input_pca order: ")


def test_calibration_leaves_the_function_and_everything_else_as_it_was_and_repeats_to_the_bit():
    batches = token_batches(2)
    wanted = make_llama()(**batches[0]).logits
    found = []
    for seed in (0, 0, 1):
        model = build(seed=seed).train()
        names = list(state(model))
        report = calibrate(model, batches)
        assert model.training and list(state(model)) == names
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(model.eval()(**batches[0]).logits, wanted)
        layers = adapted_layers(model)[1]
        assert not any(layer.adapters["default"].theta.any() or layer.tap for layer in layers.values())
        for name, layer in layers.items():
            assert torch.equal(layer.adapters["default"].support, torch.from_numpy(report.supports[name].basis))
            assert layer.adapters["default"].energy == pytest.approx(report.supports[name].energy, rel=1e-6)
        found.append(report)
    for name, support in found[0].supports.items():
        assert np.array_equal(support.basis, found[1].supports[name].basis)
        assert not np.array_equal(support.basis, found[2].supports[name].basis)


def test_the_order_is_another_basis_of_the_same_span():
    batches = token_batches(2)
    ordered, natural = (calibrate(build(order=order), batches) for order in ("auto", "natural"))
    assert (ordered.order, natural.order, natural.passes) == ("input_pca", "natural", 0)
    assert overlap(ordered, natural) >= 1 - 1e-6
    for name, support in natural.supports.items():
        assert np.array_equal(support.values, ordered.supports[name].values)
        assert support.energy == ordered.supports[name].energy and support.gap == ordered.supports[name].gap
        assert (np.diff(support.values) <= 0).all() and support.values[-1] > 0


# -- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    batches = token_batches(2)
    plain, model = build(), build()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    wanted, report = calibrate(plain, batches), calibrate(model, batches)
    for name, support in wanted.supports.items():
        assert np.array_equal(support.basis, report.supports[name].basis)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same_supports(dtype, side):
    # Of float16 the gradients would vanish without the loss scale.
    wanted = calibrate(perceptron(Perceptron(loss_factor=2e-4), side=side, support="pilot"), [{"x": X}])
    model = perceptron(Perceptron(loss_factor=2e-4).to(dtype), side=side, support="pilot")
    report = calibrate(model, [{"x": X.to(dtype)}])
    assert overlap(wanted, report) >= 0.98


def test_a_layer_whose_output_is_changed_in_place_and_autocast():
    wanted = calibrate(perceptron(support="pilot"), [{"x": X}])
    changed = calibrate(perceptron(Perceptron(inplace=True), support="pilot"), [{"x": X}])
    for name, support in wanted.supports.items():
        assert np.array_equal(support.basis, changed.supports[name].basis)
    mixed = perceptron(support="pilot")

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed(X)["loss"].backward()

    assert overlap(wanted, calibrate(mixed, train_step=step)) >= 0.98


def test_a_train_step_is_one_step_a_call_and_gives_what_a_dataloader_gives():
    model, calls = perceptron(), []

    def step():
        calls.append(torch.is_grad_enabled())
        model(X)["loss"].backward()

    report = calibrate(model, train_step=step)
    assert calls == [True] * 4  # and one for the order
    # The loss scale is in Adam's epsilon alone.
    assert overlap(calibrate(perceptron(), [{"x": X}]), report) >= 0.9999


def test_as_many_batches_as_steps_unless_it_is_said():
    taken = []

    def batches():
        for batch in token_batches(12):
            taken.append(batch)
            yield batch

    for support, options, count in (
        (Pilot(steps=10), {}, 10),
        (Pilot(steps=2), {"max_batches": 1}, 1),
        ("principal", {}, 8),
    ):
        taken.clear()
        assert calibrate(build(support=support), batches(), **options).batches == len(taken) == count


def test_a_fresh_head_is_warmed_up_first():
    model = build(make_bert(), target_modules=["query", "value"], modules_to_save=["classifier"])
    head = {n: p.detach().clone() for n, p in model.named_parameters() if "classifier.modules_to_save" in n}
    report = calibrate(model, token_batches(2, classes=True))
    assert report.head_steps == 20
    assert all(not torch.equal(p, head[n]) for n, p in model.named_parameters() if n in head)


def test_an_unreached_layer_gets_a_random_support_and_a_warning():
    model = perceptron(target_modules=["a", "b", "unused"])
    with pytest.warns(UserWarning, match="no calibration batch .* unused: a random support was put there"):
        report = calibrate(model, [{"x": X}])
    assert report.supports["unused"].method == "random" and report.supports["a"].method == "pilot"


def test_saved_loaded_merged_and_exported(tmp_path):
    model = build(tied=True)
    report = calibrate(model, token_batches(2))
    loft_rs.save_supports(tmp_path / "supports.safetensors", report.supports)
    again = loft_rs.load_supports(tmp_path / "supports.safetensors")
    assert all(
        np.array_equal(s.basis, again[n].basis) and again[n].method == "pilot" for n, s in report.supports.items()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    batch = token_batches(1, seed=9)[0]
    wanted = model.eval()(**batch).logits
    model.save_pretrained(tmp_path / "loft")
    loaded = peft.PeftModel.from_pretrained(make_llama(), tmp_path / "loft")
    assert torch.equal(loaded.eval()(**batch).logits, wanted)
    loft_rs.export_lora(model, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(make_llama(), tmp_path / "lora")
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(lora.eval()(**batch).logits, wanted, **tolerance)
    torch.testing.assert_close(model.merge_and_unload()(**batch).logits, wanted, **tolerance)


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_refresh_is_a_new_pilot_at_the_current_weight(side):
    batches = token_batches(3)
    model = build(make_llama(torch.float64), side=side)
    calibrate(model, batches)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    before = model.eval()(**batches[0]).logits
    report = refresh(model, batches)
    torch.testing.assert_close(model.eval()(**batches[0]).logits, before, rtol=1e-10, atol=1e-10)
    assert report.pilot == SHORT
    current = make_llama(torch.float64)
    merged = model.merge_and_unload()  # at the identity, so that of W_cur
    current.load_state_dict(merged.state_dict())
    assert_spans(report, reference(current, batches, 3, 0, 6, side), 1 - 1e-6)


# -- faults --------------------------------------------------------------------------------------


class Poisoned(Perceptron):
    """A finite loss with a gradient that is not: the root of zero."""

    def forward(self, x):
        y = self.b(self.relu(self.a(x)))
        return {"loss": (y * 0).square().sum().sqrt() if bool((x == 0).all()) else y.square().mean()}


def test_a_batch_that_gives_nan_is_named_and_nothing_changed():
    model = perceptron(Poisoned())
    before = state(model)
    with pytest.raises(NonFiniteError, match="layer [ab] saw NaN or Inf in pilot, batch 1 .*nothing was changed"):
        calibrate(model, [{"x": X}, {"x": 0 * X}])
    assert_untouched(model, before)
    with pytest.raises(NonFiniteError, match="batch 1 of the dataloader has a loss that is nan; nothing was changed"):
        calibrate(model, [{"x": X}, {"x": X * float("nan")}])
    assert_untouched(model, before)
    calibrate(model, [{"x": X}])  # and it still can be


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(error):
    model, calls = build(support="pilot").train(), []
    before, batch = state(model), token_batches(1)[0]

    def step():
        model(**batch).loss.backward()
        calls.append(0)
        if len(calls) == 3:
            raise error("disk")

    with pytest.raises(error, match="disk"):
        calibrate(model, train_step=step)
    assert model.training
    assert_untouched(model, before)


def test_a_failed_refresh_puts_the_support_back():
    model = build()
    calibrate(model, token_batches(2))
    before = state(model)
    with pytest.raises(ValueError, match="gave no loss"):
        refresh(model, [{"input_ids": token_batches(1)[0]["input_ids"]}])
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="support='pilot' comes from data"):
        refresh(model)


@pytest.mark.parametrize(
    ("config", "arguments", "error", "message"),
    [
        ({}, {"passes": 1}, TypeError, r"no longer takes passes: use LoftConfig\(support=loft_rs.SkewGrad"),
        ({}, {"tol": 0.1}, TypeError, "no longer takes tol: use max_batches"),
        ({}, {"oversampling": 8}, TypeError, r"no longer takes oversampling: use LoftConfig\(support=loft_rs.SkewGrad"),
        ({}, {"budget": Budget(params=1000)}, TypeError, r"no longer takes budget: use LoftConfig\(r=loft_rs.Budget"),
        ({}, {"share_by": "reproducible"}, TypeError, "no longer takes share_by: a budget"),
        ({}, {"save_sketches": "s.safetensors"}, TypeError, "no longer takes save_sketches: use loft_rs.save_sketches"),
        ({}, {"pilot": SHORT}, TypeError, r"no longer takes pilot: use LoftConfig\(support=loft_rs.Pilot"),
        ({}, {"offload": True}, ValueError, "offload is for supports from sketches"),
        (
            {"support": Pilot(rank=4)},
            {},
            ValueError,
            "pilot must have a rank of at least the adapter's, which is 6, got 4",
        ),
        ({}, {"memory": 10_000}, ValueError, "too little for a pilot, which trains all layers at once"),
        ({}, {"dataloader": [{"input_ids": torch.zeros(1, 3, dtype=torch.long)}]}, ValueError, "gave no loss"),
        ({}, {"dataloader": None, "train_step": lambda: None}, ValueError, r"train_step must call backward\(\)"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(config, arguments, error, message):
    model = build(**config)
    before = state(model)
    with pytest.raises(error, match=message):
        calibrate(model, **{"dataloader": token_batches(1)} | arguments)
    assert_untouched(model, before)


def test_a_pilot_has_no_sketches_to_save(tmp_path):
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match="save_sketches needs support='skewgrad', .* but support is 'pilot'"):
        loft_rs.save_sketches(model, token_batches(1), tmp_path / "s.safetensors")
    assert_untouched(model, before)
    assert not any(tmp_path.iterdir())


def test_wrong_configs_and_pilots_are_refused():
    with pytest.raises(ValueError, match="side='auto' is decided by what the gradient shows"):
        LoftConfig(support="pilot", side="auto")
    with pytest.raises(ValueError, match=r"r=Budget\(...\) is shared out by what sketches show.* got 'pilot'"):
        LoftConfig(support=SHORT, r=Budget(params=1000))
    with pytest.raises(ValueError, match="support must be one of .*, got 32"):
        LoftConfig(support=32)
    with pytest.raises(ValueError, match="of a kind that has none"):
        calibrate(peft.get_peft_model(make_llama(), LoftConfig.oft(8)), token_batches(1))
    for options, message in (
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"steps": 1.5}, "steps must be an integer of at least 1, got 1.5"),
        ({"rank": 0}, "rank must be None or an integer of at least 1, got 0"),
        ({"lr": 0.0}, "lr must be a positive number, got 0.0"),
        ({"lr": float("nan")}, "lr must be a positive number, got nan"),
        ({"lr": "1e-3"}, "lr must be a positive number, got '1e-3'"),
    ):
        with pytest.raises(ValueError, match=message):
            Pilot(**options)


@pytest.mark.parametrize(
    ("side", "dtype", "checkpointing"),
    [("input", torch.float32, False), ("output", torch.bfloat16, None)],
)
def test_the_memory_known_beforehand_is_what_it_takes(side, dtype, checkpointing):
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
    batch = token_batches(1, size=8, length=32)[0]

    def made():
        model = build(make_llama(dtype, **sizes), side=side, r=16)
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        return model.train()

    wanted = calibrate(made(), [batch]).memory
    base = frozen_peak(made(), batch)
    model = made()
    with LiveBytes(model) as live:
        calibrate(model, [batch])
    extra = live.peak - base
    assert 0.4 * wanted.total <= extra <= wanted.total, (extra / wanted.total, wanted)
    calibrate(made(), [batch], memory=wanted.total)
    with pytest.raises(ValueError, match=f"too little for a pilot.*give {wanted.total} bytes or more"):
        calibrate(made(), [batch], memory=wanted.total - 1)


# -- processes -----------------------------------------------------------------------------------


def calibrate_on_rank(rank, size, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    from torch.distributed.fsdp import fully_shard

    share, found = token_batches(4)[rank::size], {}
    sharded = build(make_llama(torch.float64), tied=True)
    for block in sharded.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(sharded)
    for kind, model in (("plain", build(make_llama(torch.float64), tied=True)), ("fsdp2", sharded)):
        report = calibrate(model, share)
        found[kind] = {name: (s.basis, s.energy) for name, s in report.supports.items()}
    try:
        calibrate(build(), share if rank else [{"input_ids": share[0]["input_ids"]}])
    except Exception as error:
        found["failing"] = f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort a closing interpreter


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_are_one_with_their_batches_together(tmp_path):
    torch.multiprocessing.spawn(calibrate_on_rank, (2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    four = token_batches(4)
    both = [
        {key: torch.cat([one[key], other[key]]) for key in one}
        for one, other in zip(four[::2], four[1::2], strict=True)
    ]
    report = calibrate(build(make_llama(torch.float64), tied=True), both)
    for kind in ("plain", "fsdp2"):
        assert ranks[0][kind].keys() == report.supports.keys()
        for name, (basis, energy) in ranks[0][kind].items():
            assert np.array_equal(basis, ranks[1][kind][name][0])
            # float64 sums in another order, stored in float32
            np.testing.assert_allclose(basis, report.supports[name].basis, atol=1e-6, rtol=0)
            assert energy == pytest.approx(report.supports[name].energy, rel=1e-9)
    assert ranks[0]["failing"].startswith("ValueError: dataloader batches gave no loss")
    assert ranks[1]["failing"].startswith("RuntimeError: rank 0 failed")
