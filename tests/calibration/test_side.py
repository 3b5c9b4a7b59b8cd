"""sides.py and what depends on it: the side of each module by its captured energy, by hand, and as
it is saved and loaded.
"""

from __future__ import annotations

import itertools
import json
import os
from datetime import timedelta

import numpy as np
import peft
import pytest
import torch
from calibrated import dense_gradients, skew_of, span_energy, with_options
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from reference import basis_of, logits, make_llama, token_batches, train, unchanged
from sided import BATCHES, SIDES, OneSided, build, one_sided, saved, sides, trained_from

import loft_rs
from loft_rs import Budget, LoftConfig, calibrate
from loft_rs.inspection import inspect_adapter
from loft_rs.layer import LayerAdapter
from loft_rs.layer.merging import factor_of
from loft_rs.tuner.adapters import adapted_layers

# -- before the decision --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_open_side_is_the_identity_and_waits_for_calibration(dtype, tmp_path):
    base = make_llama(dtype)
    wanted = logits(base)
    model = build(base)
    assert torch.equal(logits(model), wanted) and set(sides(model).values()) == {"input"}
    assert model.peft_config["default"].needs_calibration
    with pytest.raises(RuntimeError, match="call loft_rs.calibrate"):
        model.train()(**token_batches(1)[0])
    report = calibrate(model, token_batches(2))
    assert torch.equal(logits(model), wanted) and set(sides(model).values()) == set(SIDES)
    assert {name: s.side for name, s in report.supports.items()} == sides(model)
    train(model, steps=1)
    assert not torch.equal(logits(model), wanted)


@pytest.mark.filterwarnings("ignore:saved without a support")
def test_a_model_saved_before_the_decision_is_still_open(tmp_path):
    with pytest.warns(UserWarning, match="saved without a support in"):
        build().save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    assert not model.peft_config["default"].side_pattern and set(sides(model).values()) == {"input"}
    report = calibrate(model, token_batches(2))
    assert len(report.sides) == len(sides(model)) and set(sides(model).values()) == set(SIDES)


# -- the decision --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"support": "gradsvd"}, {"r": 3}, {"transform": "exp", "order": "natural"}])
@pytest.mark.parametrize(
    ("arguments", "passes"),
    [({}, 2), ({}, 1), ({"offload": True, "memory": "40KiB"}, 2)],
    ids=["", "one pass", "memory"],
)
@pytest.mark.parametrize("sizes", [None, {"a": (10, 10), "b": (9, 9)}])
@pytest.mark.filterwarnings("ignore:r = 3 is odd")
def test_a_gradient_on_one_side_decides_for_it(options, arguments, passes, sizes):
    method = options.get("support", "skewgrad")
    model = one_sided(sizes, **options | {"support": with_options(method, passes=passes)})
    if passes == 1 and method == "gradsvd":
        with pytest.raises(ValueError, match=r"needs two passes, not GradSVD\(passes=1\)"):
            calibrate(model, BATCHES, **arguments)
        return
    report = calibrate(model, BATCHES, **arguments)
    assert sides(model) == {"a": "output", "b": "input"}
    assert model.peft_config["default"].side_pattern == {"^a": "output", "^b": "input"}
    for name, other in (("a", "input"), ("b", "output")):
        layer = adapted_layers(model)[1][name]
        weight, gradient, side = layer.base_layer.weight.data, 4 * layer_gradient(model, name), sides(model)[name]
        p = layer.adapters["default"].support.double()
        captured = span_energy(p[:, : len(p.mT) - len(p.mT) % 2], skew_of(weight, gradient, side))
        if options.get("r") != 3:  # of an odd rank the order mixes the column that counts for nothing with the others
            assert report.sides[name][side] == pytest.approx(captured, rel=0.05)
        # The other's S is rounding: of float64 sums, or of a P stored in float32.
        assert report.sides[name][other] <= 1e-10 * captured
    assert "on output" in report.table() and " output " in report.table()
    assert "sides that were chosen: 1 input, 1 output" in str(report)


def layer_gradient(model, name):
    return model.base_model.model.gradients[name]


@pytest.mark.parametrize(("support", "passes"), [("skewgrad", 1), ("skewgrad", 2), ("gradsvd", 2)])
def test_the_side_is_that_of_dense_gradients_in_float64(support, passes):
    batches, rank = token_batches(3), 16
    model = build(make_llama(torch.float64), support=with_options(support, passes=passes), r=rank)
    report = calibrate(model, batches)
    assert report.passes == passes
    weights, gradients, *_ = dense_gradients(batches)
    decided = 0
    for name, chosen in sides(model).items():
        wanted = {}
        for side in SIDES:
            s = skew_of(weights[name], gradients[name], side)
            if support == "skewgrad":
                wanted[side] = float((torch.linalg.svdvals(s)[:rank] ** 2).sum())
            else:
                u, _, vh = torch.linalg.svd(gradients[name])
                wanted[side] = span_energy(vh[:rank].mT if side == "input" else u[:, :rank], s)
        # Of layers narrower than the sketch it is exact; transformers' norms and loss are float32.
        exact = [weights[name].shape[side == "input"] <= rank + 16 or passes == 1 for side in SIDES]
        for side, off in zip(SIDES, exact, strict=True):
            assert report.sides[name][side] == pytest.approx(wanted[side], rel=1e-3 if off else 0.15)
        assert report.sides[name][chosen] == max(report.sides[name].values())
        if max(wanted.values()) > (1.01 if all(exact) else 1.35) * min(wanted.values()):
            decided += 1
            assert chosen == max(wanted, key=wanted.get)
    assert decided >= 4


@pytest.mark.parametrize(
    ("support", "arguments", "options"),
    [
        *itertools.product(["skewgrad", "gradsvd"], [{}, {"memory": "150KiB"}, {"offload": True}], [{}]),
        ("skewgrad", {}, {"passes": 1}),  # which "gradsvd" is refused with
        ("skewgrad", {}, {"oversampling": 4}),
        ("gradsvd", {}, {"oversampling": 4}),
    ],
    ids=str,
)
def test_both_sides_are_sketched_as_if_alone(support, arguments, options):
    made = with_options(support, **options)
    reports = {side: calibrate(build(support=made, side=side), token_batches(3), **arguments) for side in SIDES}
    model = build(support=made)
    report = calibrate(model, token_batches(3), **arguments)
    assert set(sides(model).values()) == set(SIDES) and report.passes == reports["input"].passes
    if "memory" in arguments:
        assert report.memory.groups > reports["input"].memory.groups
    elif "offload" not in arguments:
        alone = [each.memory.sketches for each in reports.values()]
        assert max(alone) < report.memory.sketches <= sum(alone)
    for name, side in sides(model).items():
        wanted = reports[side].supports[name]
        np.testing.assert_array_equal(report.supports[name].basis, wanted.basis)
        assert (
            report.supports[name].energy == wanted.energy
            and report.evidence[name].halves == reports[side].evidence[name].halves
        )
        if support == "skewgrad":
            assert report.sides[name][side] == pytest.approx(float(np.sum(wanted.values**2)), rel=1e-9)
    assert not reports["input"].sides and "on output" not in reports["input"].table()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_train_step_and_checkpointing_decide_alike(checkpointing):
    batches, plain, model = token_batches(3), build(), build()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    calibrate(plain, batches)
    calibrate(model, train_step=lambda: [model(**batch).loss.backward() for batch in batches])
    assert sides(model) == sides(plain)
    for name, layer in adapted_layers(model)[1].items():
        p, q = layer.adapters["default"].support, adapted_layers(plain)[1][name].adapters["default"].support
        torch.testing.assert_close(p @ (p.mT @ q), q, atol=1e-3, rtol=0)


@pytest.mark.parametrize("support", ["skewgrad", "gradsvd"])
def test_ranks_of_a_budget_are_those_of_the_chosen_sides(support, tmp_path):
    budget = Budget(params=14 * 15)
    model = build(support=support, r=budget)
    report = calibrate(model, token_batches(4))
    ranks = {name: layer.adapters["default"].rank for name, layer in adapted_layers(model)[1].items()}
    assert len(set(ranks.values())) > 1 and set(sides(model).values()) == set(SIDES)
    assert sum(budget.parameters(rank) for rank in ranks.values()) <= budget.params
    weights, gradients, *_ = dense_gradients(token_batches(4))
    for name, layer in adapted_layers(model)[1].items():
        both, side = report.sides[name], sides(model)[name]
        assert both[side] == max(both.values())
        captured = span_energy(
            layer.adapters["default"].support.double(), skew_of(weights[name], gradients[name], side)
        )
        assert both[side] == pytest.approx(captured, rel=0.02)
    train(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_llama(), tmp_path)
    assert torch.equal(logits(loaded), wanted) and sides(loaded) == sides(model)


def test_open_sides_let_a_budget_capture_more():
    totals = {}
    for side in ("auto", *SIDES):
        report = calibrate(build(side=side, r=Budget(params=14 * 15)), token_batches(4))
        totals[side] = sum(float(np.sum(s.values**2)) for s in report.supports.values())
    assert totals["auto"] >= max(totals["input"], totals["output"])


def test_a_module_that_nothing_reaches_stays_on_the_input_side():
    class Idle(OneSided):
        def forward(self, scale):
            return {"loss": (self.a(torch.eye(8).double()) * self.gradients["a"].mT).sum() * scale.mean()}

    model = build(Idle(), target_modules=["a", "b"])
    with pytest.warns(UserWarning, match="no calibration batch gave a gradient or an activation to b"):
        report = calibrate(model, BATCHES)
    assert sides(model) == {"a": "output", "b": "input"} and report.sides["b"] == {"input": 0.0, "output": 0.0}
    assert model.peft_config["default"].side_pattern == {"^a": "output", "^b": "input"}


def test_a_decision_is_kept():
    model = one_sided()
    calibrate(model, BATCHES)
    held = adapted_layers(model)[1]["a"].adapters["default"].support.clone()
    torch.manual_seed(0)
    model.base_model.model.gradients = {"a": torch.randn(12, 8).double(), "b": torch.randn(8, 12).double()}
    report = calibrate(model, BATCHES)
    assert sides(model) == {"a": "output", "b": "input"} and not report.sides
    assert not torch.equal(adapted_layers(model)[1]["a"].adapters["default"].support, held)


# -- what a decided adapter is -------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    model = build(make_llama(torch.float64), transform="exp")
    calibrate(model, token_batches(2))
    return trained_from(model)


def test_every_way_out_is_the_forward(trained, tmp_path):
    wanted, chosen = logits(trained), sides(trained)
    dense = make_llama(torch.float64)
    for name, layer in adapted_layers(trained)[1].items():
        factor = factor_of(layer.adapters["default"])
        p, e = factor.basis.detach().double(), factor.delta.detach().double()
        turn = torch.eye(len(p), dtype=torch.float64) + p @ e @ p.mT
        weight = dense.get_submodule(name).weight.data
        weight.copy_(weight @ turn if chosen[name] == "input" else turn @ weight)
    torch.testing.assert_close(logits(dense), wanted, atol=1e-6, rtol=1e-6)  # transformers' norms are float32
    for name, (a, b) in loft_rs.lora_factors(trained).items():
        weight = adapted_layers(trained)[1][name].base_layer.weight
        torch.testing.assert_close(weight + b @ a, dense.get_submodule(name).weight, atol=1e-10, rtol=1e-9)
    loft_rs.export_lora(trained, tmp_path / "lora", dtype=torch.float64)
    lora = peft.PeftModel.from_pretrained(make_llama(torch.float64), tmp_path / "lora", autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(lora), wanted, atol=1e-6, rtol=1e-6)
    trained.save_pretrained(tmp_path / "loft")
    reports = {r.name.removeprefix("base_model.model."): r for r in inspect_adapter(tmp_path / "loft")}
    assert {name: report.side for name, report in reports.items()} == chosen
    assert all(r.orthogonality_error <= 1e-6 and r.largest_angle > 0 for r in reports.values())
    trained.merge_adapter()
    torch.testing.assert_close(logits(trained), wanted, atol=1e-6, rtol=1e-6)
    trained.unmerge_adapter()
    assert torch.equal(logits(trained), wanted)
    with pytest.raises(ValueError, match="no other method of PEFT's has side="):
        loft_rs.convert_adapter(tmp_path / "loft", tmp_path / "peft")


@pytest.mark.parametrize(
    "how", ["from_pretrained", "low_cpu_mem_usage", "load_adapter", "set_peft_state", "state_dict"]
)
def test_saved_and_loaded_without_data(trained, how, tmp_path):
    wanted, chosen = logits(trained), sides(trained)
    square = [name for name, side in chosen.items() if side == "output" and name.endswith(("q_proj", "o_proj"))]
    assert square  # where the shapes tell nothing
    trained.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["side"] == "auto" and config["side_pattern"] == {
        f"^{n}".replace(".", r"\."): s for n, s in chosen.items()
    }
    base = make_llama(torch.float64)
    if how == "from_pretrained":
        model = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    elif how == "low_cpu_mem_usage":
        model = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    else:  # into a model that was built with its sides open, as a resumed run does
        model = build(base, transform="exp")
        if how == "load_adapter":
            model.load_adapter(tmp_path, "default")
        elif how == "set_peft_state":
            set_peft_model_state_dict(model, get_peft_model_state_dict(trained))
        else:
            model.load_state_dict(trained.state_dict())
    assert sides(model) == chosen and torch.equal(logits(model), wanted)
    assert model.peft_config["default"].side_pattern == trained.peft_config["default"].side_pattern
    model.save_pretrained(tmp_path / "again")
    first, second = (folder / "adapter_model.safetensors" for folder in (tmp_path, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()
    train(model)


def test_a_trainer_resumes(tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [{k: v[0] for k, v in batch.items()} for batch in token_batches(8, size=1)]

    def run(folder, resume=None, steps=4):
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        torch.manual_seed(0)
        model = build()
        callback = loft_rs.LoftCalibrationCallback(max_batches=2)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return model, callback

    whole, _ = run(tmp_path / "whole")
    resumed, callback = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert callback.report is None and sides(resumed) == sides(whole) and set(sides(whole).values()) == set(SIDES)
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_refresh_and_narrow_stay_on_their_sides(tmp_path):
    model = build(r=6)
    calibrate(model, token_batches(2))
    chosen = sides(model)
    train(model)
    before = logits(model)
    loft_rs.refresh(model, token_batches(2))
    assert sides(model) == chosen
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    before = logits(trained_from(model))
    loft_rs.narrow(model, 4)
    assert sides(model) == chosen
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    wanted = logits(model)
    fresh = build()  # of another rank's side, with room for nothing frozen
    fresh.load_state_dict(model.state_dict())
    assert sides(fresh) == chosen and torch.equal(logits(fresh), wanted)
    assert {r.name.removeprefix("base_model.model."): r.side for r in inspect_adapter(tmp_path)} == chosen
    assert torch.equal(logits(peft.PeftModel.from_pretrained(make_llama(), tmp_path)), wanted)


@pytest.mark.parametrize("value", [0.5, float("nan"), 2.0])
def test_a_hostile_side_is_refused(trained, value):
    model = build(make_llama(torch.float64), transform="exp")
    before, state = saved(model), dict(trained.state_dict())
    key = next(key for key in state if ".loft_output_side." in key)
    state[key] = torch.tensor(value)
    with pytest.raises(ValueError, match="loft_output_side"):
        model.load_state_dict(state)
    unchanged(model, before)
    assert set(sides(model).values()) == {"input"}


@pytest.mark.parametrize("options", [{"side": "input"}, {"side": "output"}])
def test_a_state_of_open_sides_does_not_fit_a_fixed_one(trained, options):
    model = build(make_llama(torch.float64), transform="exp", **options)
    before = saved(model)
    with pytest.raises(ValueError, match="the adapter does not fit this model"):
        model.load_state_dict(trained.state_dict())
    unchanged(model, before)
    with pytest.raises(ValueError, match="loft_output_side.default is missing.*build the model with the saved config"):
        build(make_llama(torch.float64), transform="exp").load_state_dict(model.state_dict())


def test_a_state_from_before_the_decision_opens_the_sides_again():
    model, other = build(), build()
    calibrate(model, token_batches(2))
    model.load_state_dict(other.state_dict())
    assert model.peft_config["default"].side_pattern == {} and set(sides(model).values()) == {"input"}
    report, wanted = (calibrate(each, token_batches(2)) for each in (model, other))
    assert len(report.sides) == len(report.supports) and sides(model) == sides(other)
    assert {name: s.side for name, s in wanted.supports.items()} == sides(model)


# -- sides and supports by hand ------------------------------------------------------------------


@pytest.mark.parametrize("support", ["principal", "random", "coordinate", "skewgrad", "activation"])
def test_a_side_pattern_by_hand(support, tmp_path):
    pattern = {"q_proj": "output", r".*\.1\.mlp\.down_proj": "output", "nowhere": "output"}
    model = build(support=support, side="input", side_pattern=pattern)
    wanted = {n: "output" if "q_proj" in n or "1.mlp.down_proj" in n else "input" for n in sides(model)}
    assert sides(model) == wanted
    if support not in ("random", "coordinate"):
        report = calibrate(model, token_batches(2))
        assert not report.sides and sides(model) == wanted
        for name, side in wanted.items():
            whole = build(support=support, side=side)
            reference = (
                calibrate(whole, token_batches(2)).supports[name] if name.endswith("q_proj") else report.supports[name]
            )
            np.testing.assert_array_equal(report.supports[name].basis, reference.basis)
    wanted_logits = logits(trained_from(model))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_llama(), tmp_path)
    assert sides(loaded) == wanted and torch.equal(logits(loaded), wanted_logits)
    assert {r.name.removeprefix("base_model.model."): r.side for r in inspect_adapter(tmp_path)} == wanted


def test_a_full_name_comes_before_the_end_of_one():
    config = LoftConfig(side_pattern={"a.q": "output", r"^a\.q": "input", "k": "output"})
    assert [config.side_of(name) for name in ("a.q", "b.a.q", "a.k", "a.v")] == ["input", "output", "output", "input"]


def test_a_side_by_hand_is_not_asked_again():
    model = one_sided(side_pattern={"a": "input"}, r=Budget(params=12))
    report = calibrate(model, BATCHES)
    assert sides(model) == {"a": "input", "b": "input"} and list(report.sides) == ["b"]
    assert " nan" in report.table()


def test_supports_bring_their_sides(tmp_path):
    first = build(r=6)
    report = calibrate(first, token_batches(2))
    file = tmp_path / "supports.safetensors"
    loft_rs.save_supports(file, report.supports)
    second = build(support=str(file))
    third = build(r=6)
    loft_rs.set_support(third, report.supports)
    for model in (second, third):
        assert sides(model) == sides(first)
        assert model.peft_config["default"].side_pattern == first.peft_config["default"].side_pattern
        for name, layer in adapted_layers(model)[1].items():
            held = adapted_layers(first)[1][name].adapters["default"].support
            torch.testing.assert_close(layer.adapters["default"].support, held, atol=1e-6, rtol=0)
    calibrate(second, token_batches(2))  # their order alone
    assert sides(second) == sides(first)
    wanted = logits(trained_from(second))
    second.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")), wanted)
    with pytest.raises(ValueError, match="is 'input', but .* holds a support of side 'output'"):
        build(support=str(file), side="input")
    fixed = build(r=6, side="input")
    with pytest.raises(ValueError, match="expected one for the input side|expected"):
        loft_rs.set_support(fixed, report.supports)
    turned = next(name for name, s in report.supports.items() if s.side == "output")
    by_hand = build(r=6, side_pattern={turned.rpartition(".")[2]: "input"})
    before = saved(by_hand)
    with pytest.raises(ValueError, match=f"{turned}: expected"):
        loft_rs.set_support(by_hand, report.supports)
    unchanged(by_hand, before)
    arrays = {name: basis_of(layer.in_features, 4) for name, layer in adapted_layers(fixed)[1].items()}
    model = build()
    loft_rs.set_support(model, arrays)
    assert set(sides(model).values()) == {"input"} and len(model.peft_config["default"].side_pattern) == len(arrays)


# -- several processes ---------------------------------------------------------------------------


def full(*_):
    raise MemoryError("full")


def calibrate_on_rank(rank, size, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    from torch.distributed.fsdp import fully_shard

    share = token_batches(4)[rank * 4 // size : (rank + 1) * 4 // size]
    sharded = build(make_llama(torch.float64))
    for block in sharded.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(sharded)
    calibrate(sharded, share)
    model = build(make_llama(torch.float64))
    report = calibrate(model, share)
    assert sides(sharded) == sides(model)
    sharded.train()(**share[0]).loss.backward()
    assert all(bool(p.grad.full_tensor().any()) for p in sharded.parameters() if p.requires_grad)
    kept, failing, told = LayerAdapter.set_side, build(make_llama(torch.float64)), ""
    if rank == 1:
        LayerAdapter.set_side = full
    try:
        calibrate(failing, share)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    LayerAdapter.set_side = kept
    assert told.startswith("RuntimeError: rank 1 failed" if rank == 0 else "MemoryError")
    assert failing.peft_config["default"].side_pattern == {} and set(sides(failing).values()) == {"input"}
    bases = {name: layer.adapters["default"].support for name, layer in adapted_layers(model)[1].items()}
    torch.save((sides(model), report.sides, bases), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort a closing interpreter


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_processes_decide_alike(tmp_path):
    torch.multiprocessing.spawn(calibrate_on_rank, (2, str(tmp_path)), nprocs=2)
    (chosen, energies, bases), other = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    model = build(make_llama(torch.float64))
    report = calibrate(model, token_batches(4))
    assert (chosen, energies) == other[:2] and chosen == sides(model)
    for name, basis in bases.items():
        assert torch.equal(basis, other[2][name])
        assert energies[name] == pytest.approx(report.sides[name], rel=1e-6)
