"""`save_sketches` and `supports_from_sketches`: what they add up to, what they leave alone, what is
refused.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from calibrated import build, with_options
from reference import make_bert, make_llama, token_batches, untouched
from safetensors import safe_open
from sketched import SUPPORTS, state_of

import loft_rs
from loft_rs import Budget, SkewGrad, calibrate
from loft_rs.sketch.split_half import overlap
from loft_rs.tuner.adapters import adapted_layers


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"side": "output"}], ids=["plain", "tied", "output"])
@pytest.mark.parametrize("support", SUPPORTS)
def test_saved_sketches_add_up_to_one_calibration(support, options, tmp_path):
    batches = token_batches(4)
    wanted = calibrate(build(support=with_options(support, passes=1), **options), batches)
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path, some in zip(paths, (batches[:2], batches[2:]), strict=True):
        loft_rs.save_sketches(build(support=support, **options), some, path)
    supports = loft_rs.supports_from_sketches(*paths)
    assert supports.keys() == wanted.supports.keys()
    for name, s in supports.items():
        held = wanted.supports[name]
        assert overlap(s.basis, held.basis) >= 1 - 1e-5 and s.order == held.order
        assert s.energy == pytest.approx(held.energy, abs=1e-4)
        np.testing.assert_allclose(s.values, held.values, rtol=2e-3, atol=1e-3 * held.values[0])
    # A box without the model writes the supports, and they fit the model.
    loft_rs.save_supports(tmp_path / "supports.safetensors", supports)
    fresh = build(support=support, **options)
    loft_rs.set_support(fresh, loft_rs.load_supports(tmp_path / "supports.safetensors"))
    fresh.train()(**batches[0]).loss.backward()
    alone = loft_rs.supports_from_sketches(paths[0])
    assert overlap(alone[name].basis, wanted.supports[name].basis) < 1


def test_a_train_step_saves_the_sketch_that_a_dataloader_saves(tmp_path):
    batches = token_batches(2)
    model = build(support="skewgrad")
    loft_rs.save_sketches(build(support="skewgrad"), batches, tmp_path / "a.safetensors")
    loft_rs.save_sketches(
        model,
        None,
        tmp_path / "b.safetensors",
        train_step=lambda: [model(**batch).loss.backward() for batch in batches],  # without a loss scale
    )
    one, two = (loft_rs.supports_from_sketches(tmp_path / f"{name}.safetensors") for name in "ab")
    for name in one:
        np.testing.assert_allclose(one[name].values, two[name].values, rtol=1e-3, atol=1e-4 * one[name].values[0])


def test_sketches_that_do_not_belong_together_are_refused(tmp_path):
    def saved(name, **options):
        path = tmp_path / f"{name}.safetensors"
        loft_rs.save_sketches(build(**{"support": "skewgrad"} | options), token_batches(1), path)
        return path

    one = saved("one")
    for name, options, message in (
        ("seed", {"seed": 1}, r"seed\.safetensors: seed of .* is 1, but 0 in"),
        ("rank", {"r": 4}, "rank of .* is 4, but 6 in"),
        ("budget", {"r": Budget(params=400)}, "rank of .* is 16, but 6 in"),
        ("width", {"support": SkewGrad(oversampling=8)}, "columns of .* is 14, but 80 in"),
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
    with pytest.raises(ValueError, match=r"not a file that loft_rs\.save_sketches wrote"):
        loft_rs.supports_from_sketches(tmp_path / "supports.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(one.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        loft_rs.supports_from_sketches(cut)


def facts_of(model):
    """What `save_sketches` must leave alone, beside the state."""
    parameters = {name: (p, p.grad, p.requires_grad) for name, p in model.named_parameters()}
    config = model.peft_config["default"]
    return parameters, [module.training for module in model.modules()], config, dict(config.to_dict())


@pytest.mark.parametrize("options", [{}, {"r": Budget(params=400)}, {"tied": True}], ids=["rank", "budget", "tied"])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("how", ["dataloader", "train_step", "train_step fails"])
def test_saving_sketches_leaves_the_model_as_it_was(support, options, how, tmp_path):
    model = build(support=support, **options)
    model.train()
    model.base_model.model.model.layers[1].eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 3.0)
    before, (parameters, training, config, fields) = state_of(model), facts_of(model)
    path, steps = tmp_path / "s.safetensors", []

    def step():
        steps.append(None)
        model(**token_batches(1)[0]).loss.backward()
        if how == "train_step fails":
            raise OSError("disk")

    if how == "dataloader":
        assert loft_rs.save_sketches(model, token_batches(2), path) is None
    elif how == "train_step":
        loft_rs.save_sketches(model, None, path, train_step=step)
    else:
        with pytest.raises(OSError, match="disk"):
            loft_rs.save_sketches(model, None, path, train_step=step)
    assert len(steps) == (how != "dataloader") and path.exists() == (how != "train_step fails")
    untouched(model, before)
    held, modes, now, shown = facts_of(model)
    assert modes == training and now is config and shown == fields
    for name, (parameter, gradient, trained_) in parameters.items():
        p, grad, requires_grad = held[name]
        assert p is parameter and grad is gradient and requires_grad == trained_
        assert grad is None or bool((grad == 3).all())
    assert not any(layer.adapters["default"].ready for layer in adapted_layers(model)[1].values())
    calibrate(model, token_batches(1))


def test_a_fresh_head_is_not_warmed_up_for_saved_sketches(tmp_path):
    model = build(make_bert(), support="skewgrad", target_modules=["query"], task_type="SEQ_CLS")
    before, batches = state_of(model), token_batches(2, classes=True)
    loft_rs.save_sketches(model, batches, tmp_path / "s.safetensors")
    untouched(model, before)
    report = calibrate(
        build(make_bert(), support=SkewGrad(passes=1), target_modules=["query"], task_type="SEQ_CLS"),
        batches,
        head_steps=0,
    )
    for name, s in loft_rs.supports_from_sketches(tmp_path / "s.safetensors").items():
        np.testing.assert_allclose(s.basis, report.supports[name].basis, atol=1e-6, rtol=0)


@pytest.mark.parametrize("support", SUPPORTS)
def test_saved_sketches_are_as_wide_as_the_support_says(support, tmp_path):
    base = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1}
    batches, options = token_batches(2), {"r": 8, "target_modules": ["q_proj", "down_proj"]}
    for passes in (1, 2):  # it is one pass whatever the config asks of `calibrate`
        chosen = with_options(support, passes=passes, oversampling=24)
        loft_rs.save_sketches(
            build(make_llama(**base), support=chosen, **options), batches, tmp_path / f"{passes}.safetensors"
        )
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    chosen = with_options(support, passes=1, oversampling=24)
    report = calibrate(build(make_llama(**base), support=chosen, **options), batches)
    supports = loft_rs.supports_from_sketches(tmp_path / "1.safetensors")
    with safe_open(tmp_path / "1.safetensors", "np") as file:
        plans = json.loads(file.metadata()["loft_rs.sketches"])["sketches"]
    assert supports.keys() == report.supports.keys() == plans.keys()
    assert {plan["columns"] for plan in plans.values()} == {32}
    for name, s in supports.items():
        np.testing.assert_allclose(s.basis, report.supports[name].basis, atol=1e-6, rtol=0)
        assert s.energy == pytest.approx(report.supports[name].energy, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({"support": "principal"}, {}, ValueError, "needs support='skewgrad', .* but support is 'principal'"),
        ({"support": "random"}, {}, ValueError, "needs support='skewgrad', .* but support is 'random'"),
        ({"support": loft_rs.Pilot()}, {}, ValueError, "needs support='skewgrad', .* but support is 'pilot'"),
        ({"support": loft_rs.Blocks(), "r": 4}, {}, ValueError, "save_sketches chooses supports, but .* none"),
        ({"support": loft_rs.Reflections()}, {}, ValueError, "save_sketches chooses supports, but .* none"),
        ({"side": "auto"}, {}, ValueError, "save_sketches needs the side of every module beforehand"),
        ({}, {"train_step": lambda: None}, ValueError, "exactly one of dataloader and train_step"),
        ({}, {"max_batches": 0}, ValueError, "max_batches must be an integer of at least 1, got 0"),
        ({}, {"adapter_name": "other"}, ValueError, "adapter_name 'other' is not an adapter"),
        ({}, {"memory": "2k"}, ValueError, "memory must be None"),
        ({}, {"memory": 1000}, ValueError, "memory=1000 bytes is too little for layer"),
        ({"r": Budget(params=10)}, {}, ValueError, "the floors alone take 14"),
        ({}, {"head_steps": 2}, TypeError, "head_steps"),
    ],
)
def test_sketches_that_cannot_be_saved_are_named_before_any_work(options, arguments, error, message, tmp_path):
    model = build(**{"support": "skewgrad"} | options)
    before = state_of(model)
    with_backward(model)
    with pytest.raises(error, match=message):
        loft_rs.save_sketches(model, token_batches(1), tmp_path / "s.safetensors", **arguments)
    untouched(model, before)
    assert not list(tmp_path.iterdir())


def with_backward(model):
    """Makes a backward pass through the model an error."""

    def fail(*_):
        raise AssertionError("a pass was begun")

    next(iter(adapted_layers(model)[1].values())).register_full_backward_hook(fail)


def test_a_sketch_that_cannot_be_written_leaves_the_model_as_it_was(tmp_path):
    model = build(support="skewgrad")
    before = state_of(model)
    (tmp_path / "folder").mkdir()
    for path, error, message in (
        (tmp_path / "none" / "s.safetensors", FileNotFoundError, "does not exist"),
        (tmp_path / "folder", ValueError, "exists and is not a file"),
    ):
        with pytest.raises(error, match=message):
            loft_rs.save_sketches(model, None, path, train_step=pytest.fail)
    untouched(model, before)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"] and not list((tmp_path / "folder").iterdir())


def test_a_trained_adapter_has_no_sketches_to_save(tmp_path):
    model = build(support="skewgrad")
    calibrate(model, token_batches(1))
    loft_rs.save_sketches(model, token_batches(1), tmp_path / "again.safetensors")  # its support is no reason
    with torch.no_grad():
        next(iter(adapted_layers(model)[1].values())).loft_theta["default"].fill_(0.1)
    before = state_of(model)
    with pytest.raises(ValueError, match="save_sketches needs an untrained adapter"):
        loft_rs.save_sketches(model, token_batches(1), tmp_path / "s.safetensors")
    untouched(model, before)
    assert not (tmp_path / "s.safetensors").exists()
