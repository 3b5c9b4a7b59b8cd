"""Kept pilots: the start is the nearest rotation to the pilot's change, and what a model that
starts there can do.
"""

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from calibrated import X
from hypothesis import given, settings
from hypothesis import strategies as st
from piloted import build, learnt_change, perceptron
from reference import make_llama, token_batches

import loft_rs
from loft_rs import LoftConfig, Pilot, calibrate
from loft_rs.calibration.start import SCALES, start_of
from loft_rs.transform.transforms import get_transform
from loft_rs.tuner.adapters import adapted_layers

KEPT, KEPT_HALVES = Pilot(steps=6, lr=0.01, keep=True), Pilot(steps=6, lr=0.01, halves=True, keep=True)


def orthonormal(n, r, seed):
    return torch.linalg.qr(torch.randn(n, r, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


def dense(change):
    """(W0, B A) of the layers, in the side's own form."""
    pairs = zip(change.drawn, change.learnt, strict=True)
    return change.weight(), torch.cat([b.detach().double() @ a.detach().double().mT for b, a in pairs])


def rotated(weight, p, transform, theta, side):
    """W(theta) in the side's own form, from the definition."""
    d = transform.delta(theta[None], p.shape[1])[0][0]
    d = d.mT if side == "output" else d
    return weight + weight @ p @ d @ p.mT


cases = given(
    n=st.integers(4, 24),
    heights=st.lists(st.integers(12, 24), min_size=1, max_size=2),
    name=st.sampled_from(["cayley", "exp"]),
    side=st.sampled_from(["input", "output"]),
    seed=st.integers(0, 1000),
)


@settings(max_examples=40, deadline=None)
@cases
def test_in_halves_it_is_the_least_squares_solution_of_the_first_order(n, heights, name, side, seed):
    heights = heights[:1] if side == "output" else heights
    change, _ = learnt_change(n, heights, 4, side, seed)
    weight, delta = dense(change)
    r = 4 if len(weight.mT) >= 4 else 2
    p, transform = orthonormal(weight.shape[1], r, seed), get_transform(f"{name}+halves")
    found = start_of(change, p, transform)

    shape, tiny = transform.parameter_shape(r), 1e-6
    columns = []
    for k in range(shape[0] * shape[1]):
        unit = torch.zeros(shape, dtype=torch.float64)
        unit.view(-1)[k] = tiny
        columns.append(((rotated(weight, p, transform, unit, side) - weight) / tiny).flatten())
    wanted = torch.linalg.lstsq(torch.stack(columns, 1), delta.flatten()).solution.view(shape)
    assert torch.allclose(found.theta, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@settings(max_examples=40, deadline=None)
@cases
def test_a_change_that_is_a_rotation_is_made_whole(n, heights, name, side, seed):
    heights = heights[:1] if side == "output" else heights
    change, _ = learnt_change(n, heights, 4, side, seed)
    weight, _ = dense(change)
    r, transform = min(4, weight.shape[1], *heights), get_transform(name)
    p = orthonormal(weight.shape[1], r, seed)
    generator = torch.Generator().manual_seed(seed)
    wanted = 0.3 * torch.randn(transform.parameter_shape(r), dtype=torch.float64, generator=generator)
    delta = rotated(weight, p, transform, wanted, side) - weight
    with torch.no_grad():  # delta = drawn @ learnt^T
        images, k = delta @ p, change.learnt[0].shape[1]
        for learnt, drawn, part in zip(
            change.learnt, change.drawn, images.split([len(d) for d in change.drawn]), strict=True
        ):
            learnt.data = torch.nn.functional.pad(p, (0, max(0, k - r)))
            drawn.data = torch.nn.functional.pad(part, (0, max(0, k - r)))
    found = start_of(change, p, transform)
    assert found.made(found.delta(transform, 1.0, side == "output")) >= 1 - 1e-6
    assert torch.allclose(found.theta, wanted, atol=1e-4)


def test_nothing_learnt_starts_at_the_identity():
    change, _ = learnt_change(16, [16], 4)
    with torch.no_grad():
        change.learnt[0].zero_()
    for name in ("cayley", "exp", "cayley+halves"):
        found = start_of(change, orthonormal(16, 4, 0), get_transform(name))
        assert float(found.theta.abs().max()) <= 1e-12


@pytest.mark.parametrize("support", [KEPT, KEPT_HALVES], ids=["plain", "halves"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_kept_pilot_starts_below_the_base_and_says_how_much_it_makes(support, side, tmp_path):
    batches = token_batches(4)
    model = build(make_llama(torch.float64), support=support, side=side)
    with torch.no_grad(), model.disable_adapter():
        base = model(**batches[0]).logits
    report = calibrate(model, batches)
    with torch.no_grad():
        start, (before, after) = model(**batches[0]).logits, _losses(model, batches)
        assert after < before
        with model.disable_adapter():
            assert torch.equal(model(**batches[0]).logits, base)
    layers = adapted_layers(model)[1]
    assert report.start.scale in SCALES and report.start.made.keys() == layers.keys()
    assert any(bool(layer.adapters["default"].theta.any()) for layer in layers.values())
    assert max(report.start.made.values()) > 0.05

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_llama(torch.float64), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batches[0]).logits, start)
    assert again.peft_config["default"].support == support
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged(**batches[0]).logits, start, atol=1e-6)


def _losses(model, batches):
    with model.disable_adapter():
        before = sum(float(model(**batch).loss) for batch in batches)
    return before, sum(float(model(**batch).loss) for batch in batches)


def test_what_the_report_says_is_made_is_what_merging_makes():
    batches, base = token_batches(2), make_llama(torch.float64)
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = build(base, support=KEPT_HALVES)
    calls = []
    original = loft_rs.calibration.choose.starts_of

    def watched(job, run, changes, supports):
        calls.append({place.module: dense(change)[1] for place, change in changes.items()})
        return original(job, run, changes, supports)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loft_rs.calibration.choose, "starts_of", watched)
        report = calibrate(model, batches)
    merged = dict(model.merge_and_unload().named_parameters())
    for name, made in report.start.made.items():
        full = name.removeprefix("base_model.model.") + ".weight"
        change = calls[0][name]
        left = float((merged[full].detach() - weights[full] - change).square().sum() / change.square().sum())
        assert made == pytest.approx(1 - left, abs=1e-5)


def test_a_train_step_shows_no_loss_and_its_start_is_unscaled():
    model = perceptron(support=Pilot(steps=3, keep=True))
    report = calibrate(model, train_step=lambda: model(X)["loss"].backward())
    assert report.start.scale == 1.0 and report.start.made


def test_the_callback_leaves_a_kept_start_alone_and_a_second_calibration_is_refused():
    batches = token_batches(2)
    model = build(support=KEPT)
    calibrate(model, batches)
    theta = {n: p.detach().clone() for n, p in model.named_parameters() if "theta" in n}
    with pytest.raises(ValueError, match="needs an untrained adapter"):
        calibrate(model, batches)
    callback = loft_rs.LoftCalibrationCallback()
    from types import SimpleNamespace

    callback.on_train_begin(
        SimpleNamespace(learning_rate=0.01), SimpleNamespace(global_step=0), None, model=model, train_dataloader=batches
    )
    assert callback.report is None
    assert all(torch.equal(p, theta[n]) for n, p in model.named_parameters() if n in theta)


def test_it_repeats_to_the_bit_and_without_keep_nothing_starts():
    batches = token_batches(2)
    found = []
    for _ in range(2):
        model = build(support=KEPT_HALVES)
        calibrate(model, batches)
        found.append({n: p.detach().clone() for n, p in model.named_parameters() if "theta" in n})
    assert all(torch.equal(theta, found[1][n]) for n, theta in found[0].items())
    assert calibrate(build(), batches).start is None


def test_what_is_refused():
    with pytest.raises(ValueError, match="keep must be True or False, got 1"):
        Pilot(keep=1)
    for transform in ("free", "cayley_neumann:3", "cayley+magnitudes"):
        with pytest.raises(ValueError, match="keep=True. needs the transform 'cayley' or 'exp'"):
            LoftConfig(r=4, support=Pilot(keep=True), transform=transform)
    model = build(support=KEPT)
    calibrate(model, token_batches(2))
    with pytest.raises(ValueError, match="the pilot of adapter 'default' is kept"):
        loft_rs.refresh(model, token_batches(2))


def test_a_failure_leaves_the_adapter_untrained(monkeypatch):
    model, starts_of = build(support=KEPT), loft_rs.calibration.choose.starts_of

    def wrong_at_last(*arguments):
        starts = starts_of(*arguments)
        last = list(starts.thetas)[-1]
        return replace(starts, thetas=starts.thetas | {last: torch.zeros(3)})

    monkeypatch.setattr(loft_rs.calibration.choose, "starts_of", wrong_at_last)
    with pytest.raises(RuntimeError):
        calibrate(model, token_batches(3))
    layers = adapted_layers(model)[1]
    assert not any(bool(layer.adapters["default"].theta.any()) for layer in layers.values())
    assert not any(layer.adapters["default"].ready for layer in layers.values())


def test_bfloat16_starts_nearly_where_float32_does():
    batches = token_batches(2)
    starts = {}
    for dtype in (torch.float32, torch.bfloat16):
        report = calibrate(build(make_llama(dtype), support=KEPT_HALVES), batches)
        starts[dtype] = np.mean(list(report.start.made.values()))
    assert starts[torch.bfloat16] == pytest.approx(starts[torch.float32], abs=0.1)
