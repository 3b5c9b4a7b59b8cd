"""`Pilot(halves=True)`: partners against dense float64, the order inside each half, what is
trained, saved and refused.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from calibrated import Perceptron, X
from hypothesis import given
from hypothesis import strategies as st
from memory import LiveBytes, frozen_peak
from piloted import changes, learnt_change, linear, perceptron
from reference import basis_of, logits, make_llama, token_batches, train, unchanged
from refreshed import trainer
from torch import nn

import loft_rs
from loft_rs import LoftConfig, LoftNarrowCallback, LoftRefreshCallback, Pilot, calibrate
from loft_rs.calibration.pilot import LowRankChange, changes_for, partners
from loft_rs.inspection import inspect_adapter
from loft_rs.layer.merging import factor_of
from loft_rs.tuner.adapters import adapted_layers, owners

HALVES, SHORT = Pilot(halves=True), Pilot(steps=3, halves=True)
OUTPUT = {"gate_proj": "output", "up_proj": "output"}


def build(base=None, **options):
    options = {"target_modules": "all-linear", "r": 6, "support": SHORT} | options
    return peft.get_peft_model(base or make_llama(), LoftConfig(**options))


def calibrated(base=None, **options):
    model = build(base, **options)
    return model, calibrate(model, token_batches(2))


def dense_partners(weight, images):
    """(W^T W + ||W||_F^2 / (100 n) I)^{-1} W^T U, from the singular values of W, and the most that
    could be.
    """
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    c = s.square().sum() / 100 / weight.shape[1]
    gains = torch.where(s > 0, s / (s.square() + c), 0.0)
    return vt.mT @ (gains.unsqueeze(1) * (u.mT @ images.double())), float(gains.max() * images.double().norm())


# -- partners ------------------------------------------------------------------------------------


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    k=st.integers(1, 4),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e6]),
    rank=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_partners_are_the_damped_preimages(m, n, k, scale, rank, seed):
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*shape, generator=draw) for shape in ((m, rank), (rank, n)))
    weight, images = scale * (left @ right).double(), torch.randn(m, k, generator=draw).double()
    found, (wanted, most) = partners(weight, images), dense_partners(weight, images)
    # The Gram matrix's condition is at most 1 + 100 n; where U is nearly orthogonal to W little is
    # left of what is rounded.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11 * max(most, 1e-300))


@changes
def test_a_half_reads_the_change_and_the_other_is_its_partners(n, heights, rank, side, seed):
    heights = heights[:1] if side == "output" else heights
    r = min(rank, n, *heights)
    change, dense = learnt_change(n, heights, rank, side, seed, "cayley+halves")
    p, h = change.support(5), r - r // 2
    assert p.basis.shape == (n if side == "input" else heights[0], r) and p.values.shape == (r,)
    np.testing.assert_array_equal(p.values[h:], p.values[: r // 2])
    gram = p.basis.T.astype(np.float64) @ p.basis
    assert np.linalg.norm(gram - np.eye(r), 2) <= 8 * np.finfo(np.float32).eps * r**0.5
    weight = torch.cat([layer.base_layer.weight.detach() for layer in change.layers]).double()
    weight = weight if side == "input" else weight.mT
    u, s, vt = torch.linalg.svd(dense)
    reads, writes = p.basis[:, :h].astype(np.float64), p.basis[:, h:].astype(np.float64)
    strong = len(s) == h or bool(s[h - 1] - s[h] > 1e-3 * s[0])
    if strong:  # where the span is one
        assert np.linalg.norm(vt[:h].numpy() @ reads) ** 2 >= h - 1e-6
    assert p.energy == pytest.approx(float(s[:h].square().sum() / s.square().sum()), abs=1e-10)
    if strong and r // 2 and (r // 2 == h or bool(s[h - 2] - s[h - 1] > 1e-3 * s[0])):
        y = dense_partners(weight, u[:, : r // 2])[0].numpy()
        outside = y - reads @ (reads.T @ y)
        q, triangle = np.linalg.qr(outside / np.linalg.norm(y, axis=0))
        if np.abs(np.diag(triangle)).min() > 1e-2:  # where the partners' span is one
            assert np.linalg.norm(q.T @ writes) ** 2 >= r // 2 - 1e-4


def test_a_half_turn_makes_the_change_to_first_order():
    # W0 is orthogonal, so partners are exact: W0 Y spans the u_i but for what lies in W0 V.
    change, dense = learnt_change(24, [24], 8, transform="cayley+halves")
    layer = change.layers[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.from_numpy(basis_of(24, 24)))
    p = torch.from_numpy(change.support(0).basis).double()
    v, y, weight = p[:, :4], p[:, 4:], layer.base_layer.weight.detach().double()
    # What is left of D V is W0 times something in V's own span.
    rest = dense @ v - weight @ y @ (y.mT @ weight.mT @ dense @ v)
    inside = weight @ v @ (v.mT @ weight.mT @ rest)
    assert float((rest - inside).norm()) <= 1e-5 * float(dense.norm())
    one = LowRankChange(layer, "default", 4, torch.Generator().manual_seed(1), torch.device("cpu"))
    assert one.support(0) is None  # nothing learnt


def test_a_rank_one_change_and_a_zero_weight_still_give_an_orthonormal_support():
    for zero in (False, True):
        layer = linear(10, 12, 6, transform="cayley+halves")
        with torch.no_grad():
            layer.base_layer.weight.mul_(0.0 if zero else 1.0)
        change = LowRankChange(layer, "default", None, torch.Generator().manual_seed(0), torch.device("cpu"))
        with torch.no_grad():
            change.learnt[0][:, 0] = 1e-3
        basis = change.support(0).basis.astype(np.float64)
        assert np.isfinite(basis).all() and np.linalg.norm(basis.T @ basis - np.eye(6), 2) <= 1e-5


# -- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"side_pattern": OUTPUT}, {"tied": True}, {"r": 7}, {"transform": "exp"}])
@pytest.mark.filterwarnings("ignore:r = 7 is odd")
def test_each_half_has_its_own_order_and_what_lies_between_is_trained(options):
    batches, start = token_batches(2), logits(make_llama())
    model = build(**options)
    ordered = calibrate(model, batches)
    natural = calibrate(build(**options, order="natural"), batches)
    assert (ordered.order, natural.order) == ("input_pca", "natural")
    r = options.get("r", 6)
    for name, support in ordered.supports.items():
        other = natural.supports[name]
        for part in (slice(r - r // 2), slice(r - r // 2, None)):
            one, two = (each.basis[:, part].astype(np.float64) for each in (support, other))
            assert np.linalg.norm(one.T @ two) ** 2 >= one.shape[1] - 1e-5
        assert not np.allclose(support.basis, other.basis, atol=1e-3)
        np.testing.assert_array_equal(support.values, other.values)
    thetas = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.shape == (r // 2, r - r // 2) for p in thetas.values())
    assert torch.equal(logits(model), start)
    train(model)
    assert not torch.equal(logits(model), start) and loft_rs.orthogonality_error(model) <= 1e-5


def test_the_moments_of_each_half_descend():
    model, _ = calibrated(target_modules=["q_proj"])
    layer, seen = next(iter(adapted_layers(model)[1].values())), []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in token_batches(2):
            model(**batch)
    hook.remove()
    z = torch.cat(seen).double() @ layer.adapters["default"].support.double()
    moment = z.mT @ z
    for part in (slice(3), slice(3, None)):
        block, scale = moment[part, part], float(moment.diagonal().max())
        assert float((block - torch.diag(block.diagonal())).abs().max()) <= 1e-4 * scale
        assert (block.diagonal().diff() <= 1e-6 * scale).all()


@pytest.mark.parametrize(
    "options", [{}, {"side_pattern": OUTPUT}, {"tied": True}, {"r": 7}, {"transform": "exp", "side": "output"}]
)
@pytest.mark.filterwarnings("ignore:r = 7 is odd")
def test_saved_loaded_merged_and_exported(tmp_path, options):
    model, report = calibrated(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "loft")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(make_llama(), tmp_path / "loft")), wanted)
    for module in inspect_adapter(tmp_path / "loft"):
        assert module.rank == options.get("r", 6) and module.transform == f"{options.get('transform', 'cayley')}+halves"
        assert module.orthogonality_error <= 1e-5 and len(module.angles) <= 3
    loft_rs.export_lora(model, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(make_llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), wanted, rtol=1e-4, atol=1e-5)
    loft_rs.save_supports(tmp_path / "supports.safetensors", report.supports)
    again = build(support=str(tmp_path / "supports.safetensors"), **options)
    for name, layer in owners(adapted_layers(again)[1], "default").items():
        np.testing.assert_allclose(layer.adapters["default"].support.numpy(), report.supports[name].basis, atol=1e-6)
    # Its order alone: from data, and inside each half too.
    calibrate(again, token_batches(2))
    for name, layer in owners(adapted_layers(again)[1], "default").items():
        found = layer.adapters["default"].support.numpy()
        np.testing.assert_allclose(np.abs(np.sum(found * report.supports[name].basis, 0)), 1.0, atol=1e-3)
    torch.testing.assert_close(logits(model.merge_and_unload()), wanted, rtol=1e-4, atol=1e-5)


def test_a_support_set_by_hand_is_read_in_halves():
    model = build(target_modules=["q_proj"])
    loft_rs.set_support(model, {name: basis_of(32, 6) for name in adapted_layers(model)[1]})
    train(model)
    layer = next(iter(adapted_layers(model)[1].values()))
    b = layer.adapters["default"].theta.detach().double()
    a = torch.zeros(6, 6, dtype=torch.float64)
    a[3:, :3], a[:3, 3:] = b, -b.mT
    eye = torch.eye(6, dtype=torch.float64)
    wanted = torch.linalg.solve(eye + a, eye - a, left=False) - eye
    torch.testing.assert_close(factor_of(layer.adapters["default"]).delta.detach().double(), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same_halves(dtype, side):
    # As of a plain pilot, which has the same bound.
    wanted = calibrate(perceptron(Perceptron(loss_factor=2e-4), side=side, support=HALVES), [{"x": X}])
    model = perceptron(Perceptron(loss_factor=2e-4).to(dtype), side=side, support=HALVES)
    report = calibrate(model, [{"x": X.to(dtype)}])
    for part in (slice(2), slice(2, None)):
        shares = [
            np.linalg.norm(s.basis[:, part].T @ report.supports[name].basis[:, part]) ** 2 / 2
            for name, s in wanted.supports.items()
        ]
        assert np.mean(shares) >= 0.98
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_pilot_of_half_the_rank_is_enough():
    layers = adapted_layers(build(r=8))[1]
    assert all(each.learnt[0].shape[1] == 4 for each in changes_for(layers, "default", Pilot(rank=4), 0).values())
    with pytest.raises(ValueError, match="rank of at least half the adapter's, which is 4, got 3"):
        changes_for(layers, "default", Pilot(rank=3), 0)


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"side": "output"}])
@pytest.mark.parametrize(("size", "length"), [(8, 32), (1, 4)])
def test_the_memory_known_beforehand_is_enough(size, length, options):
    sizes = {"hidden_size": 128, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2}
    batch = token_batches(1, size=size, length=length)[0]

    def made():
        config = {"r": 8, "support": Pilot(steps=3, rank=8, halves=True), **options}
        return build(make_llama(**sizes), target_modules=["gate_proj", "up_proj", "down_proj"], **config)

    wanted, base, model = calibrate(made(), [batch]).memory, frozen_peak(made(), batch), made()
    with LiveBytes(model) as live:
        calibrate(model, [batch])
    assert live.peak - base <= wanted.total


def test_a_float64_base_is_calibrated_and_trains():
    model, report = calibrated(make_llama(torch.float64))
    start = logits(make_llama(torch.float64))
    torch.testing.assert_close(logits(model), start, rtol=0, atol=0)
    train(model)
    assert all(p.dtype == torch.float64 for p in model.parameters() if p.requires_grad)
    assert loft_rs.orthogonality_error(model) <= 1e-5 and all(s.method == "pilot" for s in report.supports.values())


def test_adapters_with_and_without_halves_beside_one_another():
    model, _ = calibrated()
    for name, options in (("full", {"r": 6}), ("free", {"r": 3, "transform": "free"})):  # 3 x 3, as the halves of 6
        model.add_adapter(name, LoftConfig(target_modules="all-linear", **options))
    found = {}
    for name, count in (("default", 9), ("full", 15), ("free", 9)):
        model.set_adapter(name)
        train(model)
        layer = next(iter(adapted_layers(model, name)[1].values()))
        assert layer.adapters[name].theta.numel() == count and (layer.adapters[name].first_half == 3) == (
            name == "default"
        )
        found[name] = logits(model)
    for name, wanted in found.items():
        model.set_adapter(name)
        assert torch.equal(logits(model), wanted)


class Narrow(nn.Module):
    """y = c(b(a(x))), b one wide; `unused` is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.unused = nn.Linear(8, 9), nn.Linear(9, 1), nn.Linear(1, 5), nn.Linear(6, 7)

    def forward(self, x):
        return SimpleNamespace(loss=self.c(self.b(self.a(x))).square().sum())


def test_layers_one_wide_and_layers_that_no_batch_reaches():
    model = build(Narrow(), target_modules=["a", "b", "c", "unused"], r=4)
    with pytest.warns(UserWarning, match="unused: a random support was put there"):
        report = calibrate(model, [{"x": torch.randn(12, 8)}])
    layers = adapted_layers(model)[1]
    assert {name: tuple(layer.adapters["default"].theta.shape) for name, layer in layers.items()} == {
        "a": (2, 2),
        "b": (0, 1),
        "c": (0, 1),
        "unused": (2, 2),
    }
    assert report.supports["unused"].method == "random" and report.supports["b"].method == "pilot"
    model(x=torch.randn(12, 8)).loss.backward()
    assert layers["a"].adapters["default"].theta.grad.any()


# -- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"support": "principal", "transform": "cayley+halves"},
            r"halves needs support=Pilot\(halves=True\).* got 'principal'",
        ),
        ({"support": "blocks", "transform": "cayley+halves"}, r"halves needs support=Pilot\(halves=True\)"),
        ({"transform": "free"}, "halves needs the transform 'cayley' or 'exp' without magnitudes, got 'free'"),
        ({"transform": "cayley+magnitudes"}, r"halves needs .* got 'cayley\+magnitudes'"),
        ({"transform": "cayley_neumann:2"}, "halves needs .* got 'cayley_neumann:2'"),
    ],
)
def test_what_has_no_halves_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoftConfig(**{"support": HALVES} | options)


@pytest.mark.parametrize("value", [None, 2])
def test_halves_are_a_flag(value):
    with pytest.raises(ValueError, match=f"halves must be True or False, got {value}"):
        Pilot(halves=value)


def test_a_quantised_base_is_refused_before_anything_runs():
    model = build(target_modules=["k_proj"])
    layer = next(iter(adapted_layers(model)[1].values()))
    layer.base_layer.weight = nn.Parameter(torch.zeros(16, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"halves needs dense weights.*k_proj, a Linear, is quantised or sharded"):
        calibrate(model, token_batches(1))


def test_a_file_of_other_supports_is_refused(tmp_path):
    model = peft.get_peft_model(make_llama(), LoftConfig(target_modules=["q_proj"], r=6, support="gradsvd"))
    report = calibrate(model, token_batches(1))
    loft_rs.save_supports(tmp_path / "supports.safetensors", report.supports)
    with pytest.raises(ValueError, match=r"halves needs supports of a pilot in halves, but .* holds gradsvd ones"):
        build(target_modules=["q_proj"], support=str(tmp_path / "supports.safetensors"), transform="cayley+halves")


def test_a_file_of_halves_says_so_itself_and_an_older_one_is_told(tmp_path):
    report = calibrated(target_modules=["q_proj"])[1]
    assert all(support.halves for support in report.supports.values())
    mixed = {name: replace(support, halves=i > 0) for i, (name, support) in enumerate(report.supports.items())}
    older = {name: replace(support, halves=False) for name, support in report.supports.items()}
    for name, supports in (("new", report.supports), ("mixed", mixed), ("older", older)):
        loft_rs.save_supports(tmp_path / f"{name}.safetensors", supports)

    def read(name, **options):
        return build(target_modules=["q_proj"], support=str(tmp_path / f"{name}.safetensors"), **options)

    for held in (read("new"), read("new", transform="cayley+halves"), read("older", transform="cayley+halves")):
        assert held.peft_config["default"].transform_name == "cayley+halves"
        for name, layer in adapted_layers(held)[1].items():
            assert layer.adapters["default"].first_half == 3
            np.testing.assert_array_equal(layer.adapters["default"].support.numpy(), report.supports[name].basis)
    assert read("older").peft_config["default"].transform_name == "cayley"
    assert read("new", transform="exp").peft_config["default"].transform_name == "exp+halves"
    with pytest.raises(ValueError, match="halves needs the transform 'cayley' or 'exp'"):
        read("new", transform="free")
    with pytest.raises(ValueError, match=r"holds supports in halves and others, such as that of .*q_proj"):
        read("mixed")


@pytest.mark.parametrize("made", [lambda: LoftNarrowCallback(2, step=2), lambda: LoftRefreshCallback(2)])
def test_callbacks_refuse_them_before_the_first_step(tmp_path, made):
    model, _ = calibrated()
    _, _, run = trainer(tmp_path, steps=4, model=model, callback=made())
    with pytest.raises(ValueError, match=r"Loft(Narrow|Refresh)Callback does not support halves"):
        run.train()
    assert run.state.global_step == 0


OLD = {"loft_format_version": 1, "support": "pilot", "halves": True}


@pytest.mark.parametrize(
    "change",
    [
        {"transform": "cayley+magnitudes"},
        {"transform": "free"},
        {"support": {"name": "pilot", "halves": False}},
        OLD | {"magnitudes": True},
        OLD | {"transform": "free"},
        OLD | {"halves": False},
    ],
)
def test_a_config_that_contradicts_its_tensors_is_named(tmp_path, change):
    calibrated()[0].save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(
        ValueError,
        match=r"module .* (has a transform .*halves.*does not exist|has a theta of shape \(3, 3\); cayley at rank 6)",
    ):
        inspect_adapter(tmp_path)


def test_refresh_narrow_and_conversion_refuse_them(tmp_path):
    model, _ = calibrated()
    train(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for call in (lambda: loft_rs.refresh(model, token_batches(1)), lambda: loft_rs.narrow(model, 2)):
        with pytest.raises(ValueError, match="does not support halves"):
            call()
    unchanged(model, before)
    model.save_pretrained(tmp_path / "loft")
    with pytest.raises(ValueError, match="no counterpart in PEFT's"):
        loft_rs.convert_adapter(tmp_path / "loft", tmp_path / "psoft", make_llama())
