"""The memory of calibration, known beforehand and bounded: groups of layers, offloading, limits."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from calibrated import build, with_options
from memory import LiveBytes, assert_same, frozen_peak
from reference import make_llama, token_batches, untouched
from torch import nn

import loft_rs
from loft_rs import LoftConfig, calibrate
from loft_rs.calibration.memory import byte_count
from loft_rs.sketch.base import PROBES
from loft_rs.sketch.plan import plan_for, sketch_for
from loft_rs.sketch.tap import LayerTap
from loft_rs.tuner.adapters import adapted_layers

SUPPORTS = ["skewgrad", "gradsvd", "activation", "principal"]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("support", SUPPORTS)
def test_groups_and_offloading_change_nothing(support, side):
    batches = token_batches(2)
    whole = calibrate(build(support=support, side=side), batches)
    assert whole.memory.groups == 1
    limit = whole.memory.total * 9 // 10
    grouped = calibrate(build(support=support, side=side), batches, memory=limit)
    assert grouped.memory.groups > 1 and grouped.memory.total <= limit
    assert_same(grouped, whole)
    apart = calibrate(build(support=support, side=side), batches, offload=True)
    assert apart.memory.sketches == 0
    assert_same(apart, whole)


@pytest.mark.parametrize("support", SUPPORTS[:3])
def test_groups_give_the_same_statistics_budgets_and_files(support, tmp_path):
    batches = token_batches(4)
    for passes in (1, 2):
        for options in ({}, {"r": loft_rs.Budget(params=400)}):
            options |= {"support": with_options(support, passes=passes)}
            whole = calibrate(build(**options), batches)
            limit = whole.memory.total * 3 // 4
            grouped = calibrate(build(**options), batches, memory=limit, offload="r" in options)
            assert grouped.memory.groups > 1 or "r" in options
            assert_same(grouped, whole)
            assert {n: s.rank for n, s in grouped.supports.items()} == {n: s.rank for n, s in whole.supports.items()}
            assert grouped.passes == whole.passes == passes and grouped.evidence.keys() == whole.supports.keys()
            assert all(grouped.evidence[n].agreement == e.agreement for n, e in whole.evidence.items())
    single = with_options(support, passes=1)
    limit = calibrate(build(support=single), batches).memory.total * 3 // 4
    report = calibrate(build(support=single), batches, memory=limit)
    assert report.memory.groups > 1
    for offload in (False, True):
        path = tmp_path / f"{offload}.safetensors"
        loft_rs.save_sketches(build(support=support), batches, path, memory=limit, offload=offload)
        supports = loft_rs.supports_from_sketches(path)
        assert supports.keys() == report.supports.keys()
        for name, found in supports.items():
            np.testing.assert_allclose(found.basis, report.supports[name].basis, atol=1e-6, rtol=0)


def test_groups_with_a_train_step_count_the_sketches_alone():
    batches = token_batches(2)

    def run(**options):
        model = build(support="gradsvd")
        return calibrate(model, train_step=lambda: [model(**batch).loss.backward() for batch in batches], **options)

    whole = run()
    assert whole.memory.activations is whole.memory.workspace is None
    grouped = run(memory=whole.memory.sketches // 3)
    assert grouped.memory.groups >= 3 and grouped.memory.total <= whole.memory.sketches // 3
    assert_same(grouped, whole)


@pytest.mark.parametrize("train_step", [False, True])
def test_a_group_that_nothing_reaches_is_no_error(train_step):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.c, self.a, self.b = (nn.Linear(24, 24) for _ in range(3))

        def forward(self, x):
            with torch.no_grad():
                self.c(x)
            return {"loss": self.b(self.a(x).relu()).square().mean()}

    x = torch.randn(30, 24, generator=torch.Generator().manual_seed(0))

    def run(**options):
        model = peft.get_peft_model(Model(), LoftConfig(r=4, target_modules=["a", "b", "c"], support="skewgrad"))
        data = {"train_step": lambda: model(x)["loss"].backward()} if train_step else {"dataloader": [{"x": x}]}
        with pytest.warns(UserWarning, match="to c: a random support was put there"):
            return calibrate(model, **data, **options)

    whole = run()
    grouped = run(memory=whole.memory.total * (65 if train_step else 80) // 100)
    assert grouped.memory.groups == 3
    assert_same(grouped, whole)


@pytest.mark.parametrize(
    ("support", "side", "dtype", "checkpointing"),
    [
        ("skewgrad", "input", torch.float32, None),
        ("skewgrad", "input", torch.bfloat16, None),
        ("skewgrad", "output", torch.float32, None),
        ("gradsvd", "input", torch.float32, None),
        ("gradsvd", "output", torch.bfloat16, None),
        ("skewgrad", "input", torch.float32, False),
        ("skewgrad", "input", torch.float32, True),
    ],
)
def test_the_memory_known_beforehand_is_what_it_takes(support, side, dtype, checkpointing):
    """The sketches to the byte, what the taps keep to the byte, the peak from above and not by
    much.
    """
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
    batch = token_batches(1, size=8, length=32)[0]

    def made():
        model = build(make_llama(dtype, **sizes), support=support, side=side, r=16)
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        return model.train()

    model = made()
    wanted = calibrate(made(), [batch]).memory
    adapter, layers = adapted_layers(model)
    plans = {n: plan_for(support, layer, adapter, order="input_pca", seed=0) for n, layer in layers.items()}
    sketches = {name: sketch_for(plans[name], layer, adapter) for name, layer in layers.items()}
    if support == "skewgrad":  # pass 2 takes most there, pass 1 elsewhere
        for sketch in sketches.values():
            sketch.start_second_pass(torch.eye(sketch.plan.width, sketch.columns))
    held = {
        id(t): t.nbytes for s in sketches.values() for t in (*s.pending.values(), s.omega, s.basis) if t is not None
    }
    assert sum(held.values()) == wanted.sketches
    kept: dict[int, int] = {}
    alive = []
    for name, layer in layers.items():
        layer.tap = LayerTap(sketches[name], adapter)
        keep = sketches[name].on_forward

        def watched(x, y0, keep=keep):
            value = keep(x, y0)
            kept[value.untyped_storage().data_ptr()] = value.nbytes
            alive.append(value)
            return value

        sketches[name].on_forward = watched
    model.eval()
    model(**batch)
    blocks = 1 if checkpointing is None else 2  # alike: what one of them keeps
    assert sum(kept.values()) == wanted.activations * blocks
    alive.clear()
    base = frozen_peak(made(), batch)
    model = made()
    with LiveBytes(model) as live:
        calibrate(model, [batch])
    extra = live.peak - base
    assert 0.4 * wanted.total <= extra <= wanted.total, (extra / wanted.total, wanted)


def test_layers_of_one_width_hold_one_omega():
    _, layers = adapted_layers(build(support="skewgrad"))
    plans = [plan_for("skewgrad", layer, "default", order="natural", seed=3) for layer in layers.values()]
    sketches = [sketch_for(plan, layer, "default") for plan, layer in zip(plans, layers.values(), strict=True)]
    widths = {plan.width for plan in plans}
    assert len({id(sketch.omega) for sketch in sketches}) == len(widths) == 2
    assert all(sketch.omega.shape == (sketch.plan.width, sketch.columns + PROBES) for sketch in sketches)


def test_memory_is_logged_before_the_first_pass(caplog):
    model = build(support="skewgrad")
    with caplog.at_level("INFO", "loft_rs.calibration"), pytest.raises(OSError, match="disk"):

        def step():
            raise OSError(f"disk, after {len(caplog.records)} lines")

        calibrate(model, train_step=step)
    assert "above the frozen step (sketches" in caplog.records[0].getMessage()
    assert "memory: " in str(calibrate(model, token_batches(1)))


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (None, None),
        (7, 7),
        ("64MiB", 2**26),
        ("1.5 GB", 1_500_000_000),
        ("100", 100),
        ("2k", None),
        ("-1", None),
        (0, None),
        (1.5, None),
    ],
)
def test_sizes(given, size):
    if size is None and given is not None:
        with pytest.raises(
            ValueError, match="memory must be None, a positive number of bytes or a string such as '512MiB'"
        ):
            byte_count(given)
    else:
        assert byte_count(given) == size


def test_a_limit_below_one_layer_says_what_is_needed_and_changes_nothing():
    model = build(support="skewgrad")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"memory=1000 bytes is too little for layer model\.\S+ alone: .* give \d+ bytes"
    ):
        calibrate(model, token_batches(1), memory=1000)
    untouched(model, before)
