"""side="auto": what is refused, and what leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from calibrated import with_options
from reference import logits, make_llama, token_batches, train, unchanged
from sided import BATCHES, SIDES, OneSided, build, one_sided, saved, sides, trained_from
from torch import nn

import loft_rs
from loft_rs import Budget, LoftConfig, NonFiniteError, Pilot, Reflections, calibrate
from loft_rs.layer import LayerAdapter
from loft_rs.layer.base_layer import dense_weight
from loft_rs.tuner.adapters import adapted_layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"support": "principal"}, "side='auto' is decided by what the gradient shows.* got 'principal'"),
        ({"support": "activation"}, "side='auto' is decided by what the gradient shows.* got 'activation'"),
        ({"support": "blocks", "r": 4}, "needs side='input', no side_pattern and tied=False"),
        ({"support": Reflections(), "side": "input", "side_pattern": {"q": "output"}}, "no side_pat"),
        ({"support": Pilot()}, "side='auto' is decided by what the gradient shows.* got 'pilot'"),
        ({"tied": True}, "tied needs side='input'"),
        ({"side": "left"}, r"side must be one of \['auto', 'input', 'output'\], got 'left'"),
        (
            {"side_pattern": {"q_proj": "auto"}},
            r"side_pattern\['q_proj'\] must be one of \['input', 'output'\], got 'auto'",
        ),
        ({"side_pattern": {"q_proj": None}}, r"side_pattern\['q_proj'\] must be one of"),
        ({"side_pattern": ["q_proj"]}, "side_pattern must be a dict"),
        ({"side_pattern": {"q_proj(": "input"}}, r"side_pattern\['q_proj\('\] must be a name or a regular expression"),
        ({"side_pattern": {1: "input"}}, r"side_pattern\[1\] must be a name or a regular expression"),
    ],
)
def test_bad_configs_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LoftConfig(**{"side": "auto", "support": "skewgrad", "r": 4} | options)


def test_tied_modules_are_on_the_input_side():
    base = make_llama()
    before = saved(base)
    with pytest.raises(ValueError, match="tied modules must be on the input side"):
        build(base, side="input", tied=True, side_pattern={"k_proj": "output"})
    unchanged(base, before)
    model = build(base, side="input", tied=True, side_pattern={"down_proj": "output"})
    calibrate(model, token_batches(2))
    state = trained_from(model).state_dict()
    fresh = build(side="input", tied=True, side_pattern={"down_proj": "output"})
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh), logits(model))


def test_what_cannot_be_decided_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "s"
    for support, call, message in (
        ("skewgrad", lambda m: loft_rs.save_sketches(m, token_batches(2), path), "save_sketches needs the side"),
        ("gradsvd", lambda m: loft_rs.save_sketches(m, token_batches(2), path), "save_sketches needs the side"),
        ("gradsvd", lambda m: calibrate(m, token_batches(2)), "needs two passes"),
    ):
        model = build(support=with_options(support, passes=1))
        before = saved(model)
        with pytest.raises(ValueError, match=message):
            call(model)
        unchanged(model, before)
    assert not (tmp_path / "s").exists()


class Opaque(nn.Module):
    """A linear layer whose weight is not dense, as a quantised one's."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.linear = linear.in_features, linear.out_features, linear

    @property
    def weight(self):
        return self.linear.weight

    def forward(self, x):
        return self.linear(x)


def opaque(**options):
    model = one_sided(**options)
    for layer in adapted_layers(model)[1].values():
        layer.base_layer = Opaque(nn.Linear(layer.in_features, layer.out_features, bias=False).double())
        layer.base_layer.linear.weight.data.copy_(
            OneSided().a.weight if layer.in_features == 8 else OneSided().b.weight
        )
        assert dense_weight(layer.base_layer) is None
    return model


def test_weights_that_are_not_dense():
    model = opaque()
    calibrate(model, BATCHES)
    assert sides(model) == {"a": "output", "b": "input"}
    with pytest.raises(TypeError, match="needs dense weights, to compare the sides, but a is a Opaque"):
        calibrate(opaque(support="gradsvd"), BATCHES)


@pytest.mark.parametrize(
    ("options", "arguments"), [({}, {}), ({"r": Budget(params=14 * 15)}, {}), ({}, {"memory": "150KiB"})], ids=str
)
def test_a_batch_that_fails_leaves_the_model_as_it_was(options, arguments):
    model, batches = build(**options), token_batches(3)
    before, pattern = saved(model), dict(model.peft_config["default"].side_pattern)
    calls = []

    def fail(module, *_):
        calls.append(module)
        if len(calls) == 5:  # in the second pass, or a later group
            raise OSError("stop")

    hook = model.base_model.model.model.norm.register_forward_hook(fail)
    with pytest.raises(OSError, match="stop"):
        calibrate(model, batches, **arguments)
    hook.remove()
    broken = [*batches[:2], {**batches[2], "labels": None}]
    with pytest.raises(ValueError, match="gave no loss"):
        calibrate(model, broken, **arguments)
    for name, layer in adapted_layers(model)[1].items():
        if name.endswith("0.mlp.down_proj"):
            layer.base_layer.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="loss that is nan"):
        calibrate(model, batches, **arguments)
    for key in before:
        if key.endswith("0.mlp.down_proj.base_layer.weight"):
            model.get_parameter(key).data.copy_(before[key])
    unchanged(model, before)
    assert set(sides(model).values()) == {"input"} and model.peft_config["default"].side_pattern == pattern
    assert all(layer.tap is None and not layer.adapters["default"].ready for layer in adapted_layers(model)[1].values())
    calibrate(model, batches, **arguments)
    assert set(sides(model).values()) == set(SIDES)


@pytest.mark.parametrize("call", ["calibrate", "budget", "set_support"])
def test_no_memory_for_the_other_side_leaves_the_model_as_it_was(call, monkeypatch):
    options = {"r": Budget(params=14 * 15)} if call == "budget" else {}
    report = calibrate(build(**options), token_batches(2))
    model = build(**options)
    before, config = saved(model), dict(model.peft_config["default"].to_dict())
    thetas = [layer.adapters["default"].theta for layer in adapted_layers(model)[1].values()]
    moves, move = [], LayerAdapter.set_side

    def fail(adapter, side):
        moves.extend([side] * (side != adapter.side))
        if len(moves) == 3:
            raise MemoryError("full")
        move(adapter, side)

    monkeypatch.setattr(LayerAdapter, "set_side", fail)
    with pytest.raises(MemoryError, match="full"):
        if call == "set_support":
            loft_rs.set_support(model, report.supports)
        else:
            calibrate(model, token_batches(2))
    unchanged(model, before)
    assert set(sides(model).values()) == {"input"} and model.peft_config["default"].to_dict() == config
    layers = adapted_layers(model)[1].values()
    assert all(layer.adapters["default"].theta is theta for layer, theta in zip(layers, thetas, strict=True))
    monkeypatch.undo()
    calibrate(model, token_batches(2))
    assert sides(model) == {name: support.side for name, support in report.supports.items()}
    train(model, steps=1)
