"""`calibrate`: supports against dense gradients, order, what is left untouched, refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import peft
import pytest
import torch
from calibrated import Perceptron, X, build, dense_gradients, overlap, perceptron, skew_of, span_energy
from hypothesis import given
from hypothesis import strategies as st
from reference import basis_of, make_bert, make_llama, token_batches

import loft_rs
from loft_rs import LoftConfig, NonFiniteError, calibrate
from loft_rs.sketch.plan import OVERSAMPLING
from loft_rs.tuner.adapters import adapted_layers


@given(n=st.integers(1, 12), m=st.integers(1, 12), tokens=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_the_skew_matrix_needs_no_weight_gradient(n, m, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    w, x, dy = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((m, n), (tokens, n), (tokens, m)))
    dx, y0 = dy @ w, x @ w.mT
    torch.testing.assert_close(skew_of(w, dy.mT @ x, "input"), (dx.mT @ x - x.mT @ dx) / 2)
    torch.testing.assert_close(skew_of(w, dy.mT @ x, "output"), (dy.mT @ y0 - y0.mT @ dy) / 2)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("support", ["skewgrad", "gradsvd", "activation"])
def test_calibrated_supports_capture_what_dense_gradients_would(side, support):
    batches, rank = token_batches(3), 16
    model = build(support=support, side=side, r=rank)
    report = calibrate(model, batches)
    weights, gradients, inputs, outputs = dense_gradients(batches)
    lost = []  # by the layers wider than the sketch, as a fraction of the tail
    assert report.passes == 2 and report.batches == 3 and len(report.supports) == 14
    for name, layer in adapted_layers(model)[1].items():
        p = layer.loft_support["default"].double()
        eps = torch.finfo(torch.float32).eps
        assert torch.linalg.matrix_norm(p.mT @ p - torch.eye(rank), 2) <= 50 * eps
        if support == "skewgrad":
            s = skew_of(weights[name], gradients[name], side)
            values = torch.linalg.svdvals(s) ** 2
            captured, total = span_energy(p, s), float(values.sum())
        else:
            matrix = gradients[name] if side == "input" else gradients[name].mT
            if support == "activation":
                matrix = inputs[name] if side == "input" else outputs[name]
            values = torch.linalg.svdvals(matrix) ** 2
            captured, total = float(torch.linalg.norm(matrix @ p) ** 2), float(values.sum())
        head, tail = float(values[:rank].sum()), float(values[rank:].sum())
        if len(p) <= rank + OVERSAMPLING:  # a sketch as wide as the layer is the dense problem
            assert captured >= 0.9999 * head
        else:
            lost.append((head - captured) / tail)
        reported = report.supports[name]
        assert abs(reported.energy - captured / total) <= 1e-4 + 5 * reported.energy_stderr
    # Gu (2015): p columns more than the rank lose at most r / (p - 1) of the tail in expectation;
    # on both sides of S, twice that.
    sides = 2 if support == "skewgrad" else 1
    assert len(lost) >= 2 and np.mean(lost) <= sides * rank / (OVERSAMPLING - 1)


@pytest.mark.parametrize("support", ["principal", "random", "skewgrad"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_input_pca_order_decorrelates_the_coordinates_in_descending_order(support, side):
    batches = token_batches(3)
    model = build(support=support, side=side)
    before = {n: layer.loft_support["default"].clone() for n, layer in adapted_layers(model)[1].items()}
    report = calibrate(model, batches)
    _, _, inputs, outputs = dense_gradients(batches)
    assert report.passes == (2 if support == "skewgrad" else 1) and report.order == "input_pca"
    for name, layer in adapted_layers(model)[1].items():
        p = layer.loft_support["default"]
        z = (inputs if side == "input" else outputs)[name] @ p.double()
        moment = z.mT @ z
        diagonal = moment.diagonal()
        # Of skewgrad the moment outside of span(Q) is Nystroem's: an error of the square of what of
        # P lies there.
        least = 0.02 if support == "skewgrad" else 1e-4
        assert (moment - torch.diag(diagonal)).abs().max() <= least * diagonal[0]
        assert (diagonal[1:] <= diagonal[:-1] + least * diagonal[0]).all()
        if support != "skewgrad":  # the span is the one it was
            torch.testing.assert_close(p @ (p.mT @ before[name]), before[name], atol=1e-5, rtol=0)


def test_natural_order_keeps_the_planes_together():
    model = build(support="skewgrad", order="natural")
    report = calibrate(model, token_batches(2))
    weights, gradients, *_ = dense_gradients(token_batches(2))
    name = next(iter(report.supports))
    p = torch.from_numpy(report.supports[name].basis).double()
    compressed = p.mT @ skew_of(weights[name], gradients[name], "input") @ p
    planes = torch.block_diag(*[torch.ones(2, 2)] * 3)
    assert float((compressed * (1 - planes)).abs().max()) <= 0.02 * float(compressed.abs().max())
    assert np.allclose(report.supports[name].values[::2], report.supports[name].values[1::2])


def test_a_train_step_gives_what_a_dataloader_gives():
    batches = token_batches(3)
    first, second = build(support="gradsvd"), build(support="gradsvd")
    calibrate(first, batches)

    def step():
        for batch in batches:
            second(**batch).loss.backward()

    report = calibrate(second, train_step=step)
    assert report.batches is None
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        if "loft_support" in name:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_forward_only_supports_take_a_train_step_that_calls_backward():
    batches = token_batches(2)
    model, twin = build(support="activation"), build(support="activation")
    calibrate(model, train_step=lambda: [model(**batch).loss.backward() for batch in batches])
    calibrate(twin, batches)
    for name, layer in adapted_layers(model)[1].items():
        torch.testing.assert_close(layer.loft_support["default"], adapted_layers(twin)[1][name].loft_support["default"])


def test_calibration_leaves_everything_else_alone():
    model = build(make_bert(), support="skewgrad", target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
    model.train()
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    some = next(p for p in model.parameters() if p.requires_grad)
    some.grad = torch.ones_like(some)
    calibrate(model, token_batches(2, classes=True), head_steps=0)
    assert all(m.training for m in model.modules())
    assert torch.equal(some.grad, torch.ones_like(some))
    assert all(torch.equal(p, kept[n]) and (p is some or p.grad is None) for n, p in model.named_parameters())
    assert all(layer.tap is None for layer in adapted_layers(model)[1].values())


def test_a_fresh_head_is_warmed_up_kept_and_named_in_the_report():
    model = build(make_bert(), support="skewgrad", target_modules=["query", "value"], task_type="SEQ_CLS")
    head = next(p for n, p in model.named_parameters() if "classifier.modules_to_save" in n)
    before = head.detach().clone()
    report = calibrate(model, token_batches(2, classes=True))
    assert report.head_steps == 20 and "head warmed up for 20 steps" in str(report)
    assert not torch.equal(head, before) and head.grad is None


def test_checkpointing_models_that_run_twice_and_in_place_activations():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)

        def forward(self, x):
            h = torch.relu_(self.a(x))
            return (self.b(torch.relu_(self.a(h))) ** 2).mean()

    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    model = peft.get_peft_model(
        Twice(), LoftConfig(r=4, target_modules=["a", "b"], support="skewgrad", order="natural")
    )
    calibrate(model, train_step=lambda: model(x).backward())
    plain = Twice().double()
    plain(x.double()).backward()
    s = skew_of(plain.a.weight.detach(), plain.a.weight.grad, "input")
    p = adapted_layers(model)[1]["a"].loft_support["default"].double()
    assert span_energy(p, s) >= 0.999 * float((torch.linalg.svdvals(s)[:4] ** 2).sum())


def test_an_unreached_layer_gets_a_random_support_and_a_warning():
    model = build(make_bert().bert, support="skewgrad", target_modules=["query", "dense"])
    batch = {k: v for k, v in token_batches(1)[0].items() if k != "labels"}

    def step():
        model(**batch).last_hidden_state.square().mean().backward()

    with pytest.warns(UserWarning, match=r"no calibration batch .* pooler\.dense: a random support"):
        report = calibrate(model, train_step=step)
    assert report.supports["pooler.dense"].method == "random"
    model.train()
    model(**batch)


def trained_with_callback(model, folder, **options):
    from transformers import Trainer, TrainingArguments

    callback = loft_rs.LoftCalibrationCallback(max_batches=2)
    options |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    data = [{"input_ids": b["input_ids"][0], "labels": b["labels"][0]} for b in token_batches(16)]
    arguments = TrainingArguments(output_dir=str(folder), max_steps=2, learning_rate=0.01, **options)
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    assert any(layer.loft_theta["default"].any() for layer in adapted_layers(model)[1].values())
    return callback.report


@pytest.mark.parametrize("bf16", [False, True])
def test_the_callback_calibrates_once_before_training(tmp_path, bf16):
    report = trained_with_callback(build(support="gradsvd"), tmp_path, bf16=bf16)
    assert report.method == "gradsvd" and report.batches == 2


def test_the_callback_leaves_supports_that_are_set(tmp_path):
    model = build(support="skewgrad", target_modules=["q_proj"])
    loft_rs.set_support(model, {name: basis_of(32, 6) for name in adapted_layers(model)[1]})
    held = [layer.loft_support["default"].clone() for layer in adapted_layers(model)[1].values()]
    assert trained_with_callback(model, tmp_path) is None
    for layer, support in zip(adapted_layers(model)[1].values(), held, strict=True):
        assert torch.equal(layer.loft_support["default"], support)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_models_calibrate(dtype):
    model = build(make_llama(dtype), support="skewgrad")
    report = calibrate(model, token_batches(2))
    assert all(0 < s.energy <= 1 for s in report.supports.values())
    assert next(iter(adapted_layers(model)[1].values())).loft_support["default"].dtype == dtype


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("support", ["skewgrad", "gradsvd", "activation", "principal"])
def test_autocast_gives_the_supports_of_float32(support, side):
    plain, mixed = (perceptron(support=support, side=side) for _ in range(2))
    wanted = calibrate(plain, [{"x": X}])

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed(X)["loss"].backward()  # the tap's own backward runs under autocast too

    report = calibrate(mixed, train_step=step)
    if support == "principal":
        assert overlap(wanted, report) >= 1 - 1e-5
    if support == "activation" and side == "input":  # the first layer reads X itself, which nothing may round
        np.testing.assert_array_equal(report.supports["a"].basis, wanted.supports["a"].basis)
    # bf16 carries 2^-9: directions of equal strength may turn into each other, the captured energy
    # may not change more than that.
    base = Perceptron().double()
    inputs = {}
    for name in ("a", "b"):
        layer = getattr(base, name)
        layer.register_forward_hook(lambda layer, x, y, name=name: inputs.update({name: (x[0], y - layer.bias)}))
    base(X.double())["loss"].backward()
    for name in ("a", "b"):
        w, g = getattr(base, name).weight.detach(), getattr(base, name).weight.grad
        x = inputs[name][side == "output"].detach()
        matrix = {"skewgrad": skew_of(w, g, side), "gradsvd": g if side == "input" else g.mT}.get(support, x)
        bases = [torch.from_numpy(r.supports[name].basis).double() for r in (wanted, report)]
        if support == "skewgrad":
            best, captured = (span_energy(p, matrix) for p in bases)
        else:
            best, captured = (float((matrix @ p).square().sum()) for p in bases)
        assert abs(captured - best) <= 0.01 * best
        if support != "principal":
            assert abs(report.supports[name].energy - wanted.supports[name].energy) <= 0.01


@pytest.mark.parametrize("support", ["skewgrad", "gradsvd"])
def test_float16_gradients_do_not_vanish_and_values_know_no_loss_scale(support):
    # Gradients near 4e-7, of which float16 keeps the first bit or two: its smallest number is 6e-8.
    wanted = calibrate(perceptron(support=support, base=Perceptron(loss_factor=2e-4)), [{"x": X}])
    half = perceptron(support=support, base=Perceptron(loss_factor=2e-4).half())
    report = calibrate(half, [{"x": X.half()}])
    assert overlap(wanted, report) >= 0.999
    for name, s in report.supports.items():
        assert np.allclose(s.values, wanted.supports[name].values, rtol=0.03)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("support", ["skewgrad", "gradsvd", "activation"])
def test_a_layer_whose_output_is_changed_in_place_calibrates(support, side):
    changed, plain = (perceptron(support=support, side=side, base=Perceptron(inplace)) for inplace in (True, False))
    report, wanted = (
        calibrate(model, train_step=lambda m=model: m(X)["loss"].backward()) for model in (changed, plain)
    )
    for name, s in report.supports.items():
        np.testing.assert_array_equal(s.basis, wanted.supports[name].basis)


def test_a_train_step_that_calls_train_changes_nothing():
    plain, restless = (perceptron(support="skewgrad", base=Perceptron(dropout=0.5)) for _ in range(2))

    def step():
        restless.train()
        restless(X)["loss"].backward()

    wanted, report = calibrate(plain, [{"x": X}]), calibrate(restless, train_step=step)
    assert overlap(wanted, report) >= 1 - 1e-5
    model = build(make_bert(), support="skewgrad", target_modules=["query"], task_type="SEQ_CLS")
    batch = token_batches(1, classes=True)[0]
    # In training mode a layer without a support refuses to run, also while the head is warmed up.
    assert calibrate(model, train_step=lambda: model.train()(**batch).loss.backward()).head_steps == 20


@pytest.mark.parametrize("rank", [1, 5])
def test_half_a_plane_counts_nothing(rank):
    model = build(support="skewgrad", r=rank, order="natural", transform="free")
    even = calibrate(build(support="skewgrad", r=rank + 1, order="natural"), token_batches(2))
    report = calibrate(model, token_batches(2))
    weights, gradients, *_ = dense_gradients(token_batches(2))
    for name, s in report.supports.items():
        skew, p = skew_of(weights[name], gradients[name], "input"), torch.from_numpy(s.basis).double()
        captured, total = span_energy(p, skew), float(skew.square().sum())
        assert abs(s.energy - captured / total) <= 1e-4 + 5 * s.energy_stderr
        assert s.values[-1] == 0 and np.allclose(s.values[:-1], even.supports[name].values[: rank - 1], rtol=1e-3)
        assert np.isnan(s.gap) if rank == 1 else s.gap > 0


def test_a_support_that_was_never_loaded_is_chosen_first_and_then_ordered():
    model, reference = build(), build()
    config = dataclasses.replace(adapted_layers(model)[1]["model.layers.0.mlp.up_proj"].adapters["default"].config)
    again = peft.get_peft_model(make_llama(), config)
    for layer in adapted_layers(model)[1].values():  # as a config from a checkpoint leaves it
        layer.loft_support["default"].zero_()
        layer.adapters["default"].has_own_support = False
    wanted = calibrate(reference, token_batches(2))
    for each in (model, again):
        report = calibrate(each, token_batches(2))
        for name, s in report.supports.items():
            assert s.method == "principal"
            np.testing.assert_allclose(s.basis, wanted.supports[name].basis, atol=1e-5)


def test_a_support_from_a_file_is_ordered_and_saved_again(tmp_path):
    path = str(tmp_path / "s.safetensors")
    loft_rs.save_supports(path, calibrate(build(), token_batches(1)).supports)
    report = calibrate(build(support=path), token_batches(1))
    loft_rs.save_supports(tmp_path / "again.safetensors", report.supports)
    assert {s.method for s in loft_rs.load_supports(tmp_path / "again.safetensors").values()} == {"custom"}


@pytest.mark.parametrize("support", ["principal", "skewgrad"])
def test_an_unreached_layer_keeps_the_support_it_has(support):
    model = perceptron("a", "b", "unused", support=support)
    if support == "skewgrad":
        loft_rs.set_support(model, {n: basis_of(w, 4) for n, w in (("a", 24), ("b", 32), ("unused", 8))})
    held = adapted_layers(model)[1]["unused"].loft_support["default"].clone()
    with pytest.warns(UserWarning, match="to unused: their supports are left as they were"):
        report = calibrate(model, [{"x": X}])
    assert torch.equal(adapted_layers(model)[1]["unused"].loft_support["default"], held)
    assert report.supports["unused"].method == ("principal" if support == "principal" else "custom")


def test_a_failure_after_the_warm_up_restores_the_head_and_every_gradient():
    model = build(make_bert(), support="skewgrad", target_modules=["query"], task_type="SEQ_CLS")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    head = next(p for n, p in model.named_parameters() if "classifier.modules_to_save" in n)
    head.grad = torch.ones_like(head)
    calls = []

    def step():
        calls.append(not torch.equal(head, before[next(n for n, p in model.named_parameters() if p is head)]))
        (model(**token_batches(1, classes=True)[0]).loss * (float("nan") if len(calls) > 20 else 1)).backward()

    with pytest.raises(NonFiniteError, match="nothing was changed"):
        calibrate(model, train_step=step)
    assert len(calls) == 21 and calls[-1]  # the head had moved
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    calibrate(model, token_batches(1, classes=True), head_steps=0)  # its backward reaches the head
    assert torch.equal(head.grad, torch.ones_like(head))


def test_a_half_precision_head_warms_up_in_float32():
    batches = token_batches(2, classes=True)
    options = {"support": "skewgrad", "target_modules": ["query"], "task_type": "SEQ_CLS"}
    plain, half = build(make_bert(), **options), build(make_bert().half(), **options)
    heads = []
    for model in (plain, half):
        calibrate(model, batches)
        heads.append(next(p for n, p in model.named_parameters() if "classifier.modules_to_save" in n).detach().float())
    # Adam moves an entry by 1e-3 a step at most, and the sign of a gradient near zero is rounding.
    assert (heads[0] - heads[1]).abs().median() <= 1e-3


UNLABELLED = [{"input_ids": torch.zeros(1, 3, dtype=torch.long)}]


def nan_batch():
    class Broken:
        def __iter__(self):
            yield token_batches(1)[0]
            yield {"inputs_embeds": torch.full((1, 3, 32), float("nan")), "labels": torch.zeros(1, 3, dtype=torch.long)}

    return Broken()


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({"support": "skewgrad"}, {}, ValueError, "exactly one of dataloader and train_step"),
        ({"support": "skewgrad"}, {"dataloader": []}, ValueError, "dataloader gave no batch"),
        (
            {"support": "skewgrad"},
            {"dataloader": token_batches(1), "max_batches": 0},
            ValueError,
            "max_batches must be an integer of at least 1, got 0",
        ),
        (
            {"support": "skewgrad"},
            {"dataloader": token_batches(1), "max_batches": 1.5},
            ValueError,
            "max_batches must be an integer of at least 1, got 1.5",
        ),
        ({"support": "skewgrad"}, {"dataloader": token_batches(1)[0]}, TypeError, "put a single batch in a list"),
        ({"support": "skewgrad"}, {"dataloader": 3}, TypeError, "dataloader must give batches one by one, got one int"),
        (
            {"support": "skewgrad"},
            {"dataloader": [X]},
            TypeError,
            "dataloader must give batches that are .* got Tensor",
        ),
        ({"support": "skewgrad"}, {"train_step": 3}, TypeError, "train_step must be a function of no arguments"),
        (
            {"support": "skewgrad"},
            {"dataloader": token_batches(1), "head_steps": -1},
            ValueError,
            "head_steps must be None or an integer of at least 0, got -1",
        ),
        (
            {"support": "skewgrad"},
            {"dataloader": UNLABELLED},
            ValueError,
            "gave no loss: add labels",
        ),
        ({"support": "skewgrad"}, {"train_step": lambda: None}, ValueError, r"train_step must call backward\(\)"),
        (
            {"support": "skewgrad"},
            {"dataloader": nan_batch()},
            NonFiniteError,
            "batch 1 .* loss that is nan; nothing was changed",
        ),
        ({"order": "natural"}, {"dataloader": token_batches(1)}, ValueError, "nothing to calibrate"),
        (
            {"support": "skewgrad"},
            {"dataloader": token_batches(1), "head_steps": 3},
            ValueError,
            "head_steps needs modules_to_save",
        ),
    ],
)
def test_bad_calibrations_are_named_and_change_nothing(options, arguments, error, message):
    model = build(**options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=message):
        calibrate(model, **arguments)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], equal_nan=True, atol=0, rtol=0)
    assert all(layer.tap is None for layer in adapted_layers(model)[1].values())


def test_an_exception_in_train_step_and_a_nan_activation_leave_the_model_as_it_was():
    model = build(support="activation")
    model.train()

    def explode():
        model(**token_batches(1)[0])
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        calibrate(model, train_step=explode)
    assert model.training and all(layer.tap is None for layer in adapted_layers(model)[1].values())
    embeds = torch.full((1, 3, 32), float("nan"))
    with pytest.raises(NonFiniteError, match=r"layer model\.layers\.0\.\S+ saw NaN or Inf"):
        calibrate(model, [{"inputs_embeds": embeds}])
    assert not any(layer.adapters["default"].has_own_support for layer in adapted_layers(model)[1].values())


def test_a_trained_adapter_is_not_calibrated_again():
    model = build()
    with torch.no_grad():
        for layer in adapted_layers(model)[1].values():
            layer.loft_theta["default"].fill_(0.1)
    with pytest.raises(ValueError, match="calibrate needs an untrained adapter"):
        calibrate(model, token_batches(1))
    with pytest.raises(ValueError, match="model has no LOFT layers"):
        calibrate(make_llama(), token_batches(1))


def test_activation_supports_need_no_autograd_at_all():
    (batch,) = token_batches(1)
    first, second = build(support="activation"), build(support="activation")

    def step():
        with torch.inference_mode():
            first(**batch)

    calibrate(first, train_step=step)
    calibrate(second, [batch])
    for name, value in second.state_dict().items():
        torch.testing.assert_close(first.state_dict()[name], value, equal_nan=True)


@pytest.mark.parametrize(
    "row", [{"input_ids": [3, 4, 5], "labels": 1}, {"text": "one row", "label": 0}, ([1, 2], [3, 4])]
)
def test_rows_in_place_of_batches_are_refused_before_any_work(row):
    with pytest.raises(TypeError, match=r"batches that hold tensors.* give a DataLoader with your collator"):
        loft_rs.calibrate(build(make_llama(), support="gradsvd"), [row, row])
