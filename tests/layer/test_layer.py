"""factor.py, layer/, nn.py: the function, its gradients against float64 autograd, what is saved,
merge, LoRA form.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import NAMES, PLACEMENTS, SIDES, make_layer
from reference import basis_of, exact_transform
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import loft_rs
from loft_rs._format import ORTHONORMAL
from loft_rs.factor.low_rank import LowRank, gram_root
from loft_rs.layer.merging import factor_of, lora_factors, merge, rotated_weight
from loft_rs.layer.placement import choose_placement
from loft_rs.nn import LoftLinear
from loft_rs.support.custom import custom_basis
from loft_rs.transform.transforms import get_transform


def rotation(layer: LoftLinear, theta: torch.Tensor) -> torch.Tensor:
    """R from the definition, in float64, differentiable in theta, with P orthonormalised by its
    Gram root.
    """
    p = layer.loft_support["default"].double()
    c = gram_root(layer.loft_support["default"])
    p = p if c is None else p @ c.double()
    t = exact_transform(layer.adapters["default"].transform.name, theta, p.shape[1])
    return torch.eye(len(p), dtype=torch.float64) + p @ (t - torch.eye(len(t), dtype=torch.float64)) @ p.mT


def reference(layer: LoftLinear, x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    w, r = layer.base_layer.weight.detach().double(), rotation(layer, theta)
    b = layer.base_layer.bias
    w = w @ r if layer.adapters["default"].side == "input" else r @ w
    return F.linear(x, w, None if b is None else b.detach().double())


@given(
    n=st.integers(2, 40),
    m=st.integers(2, 40),
    side=st.sampled_from(SIDES),
    placement=st.sampled_from(PLACEMENTS),
    transform=st.sampled_from(NAMES),
    bias=st.booleans(),
    batch=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    data=st.data(),
)
def test_output_and_gradients_against_float64_autograd(n, m, side, placement, transform, bias, batch, data):
    r = data.draw(st.integers(1, min(n, m)))
    layer = make_layer(n, m, r, side=side, transform=transform, bias=bias, placement=placement)
    x = torch.randn(*batch, n, dtype=torch.float64, requires_grad=True)
    theta = layer.loft_theta["default"].detach().clone().requires_grad_()
    y, weight = layer(x), torch.randn(*batch, m, dtype=torch.float64)
    expected = reference(layer, x, theta)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-9)
    wanted = torch.autograd.grad((expected * weight).sum(), (x, theta), allow_unused=True)
    (y * weight).sum().backward()
    torch.testing.assert_close(x.grad, wanted[0], atol=1e-12, rtol=1e-9)
    if theta.numel():
        torch.testing.assert_close(layer.loft_theta["default"].grad, wanted[1], atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(24, 12), (12, 24), (16, 16), (12, 40)])
@pytest.mark.parametrize("bias", [True, False])
def test_step_zero_is_the_base_layer_bit_for_bit(dtype, side, shape, bias):
    layer = make_layer(*shape, side=side, bias=bias, dtype=dtype, norm=0.0)
    x = torch.randn(7, shape[0]).to(dtype)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("side", SIDES)
def test_half_precision_gradients_against_float64(side, placement):
    layer = make_layer(48, 32, 8, side=side, dtype=torch.bfloat16, norm=0.1, placement=placement)
    x = torch.randn(64, 48).bfloat16()
    theta = layer.loft_theta["default"].detach().double().requires_grad_()
    weight = torch.randn(64, 32).bfloat16()
    y, expected = layer(x), reference(layer, x.double(), theta)
    (wanted,) = torch.autograd.grad((expected * weight.double()).sum(), theta)
    (y * weight).sum().backward()
    grad = layer.loft_theta["default"].grad
    assert grad.dtype == torch.float32 and layer.loft_support["default"].dtype == torch.bfloat16
    # bf16 carries 2^-9 relative rounding in each of z, E, dY Q and the output; a norm-wise 2 %
    # leaves room for their sum.
    assert torch.linalg.norm(y.double() - expected) <= 1e-2 * torch.linalg.norm(expected)
    assert torch.linalg.norm(grad.double() - wanted) <= 2e-2 * torch.linalg.norm(wanted)


def test_a_small_rotation_survives_bfloat16():
    """Laid down before the base product accumulates on it, a small term keeps its signal; added to
    a rounded Y, most is lost.
    """
    kept = {}
    for placement in PLACEMENTS:
        layer = make_layer(256, 256, 16, dtype=torch.bfloat16, bias=False, norm=3e-4, placement=placement)
        x = torch.randn(2048, 256).bfloat16()
        with torch.no_grad():
            base = layer.base_layer(x).double()
            term = reference(layer, x.double(), layer.loft_theta["default"].double()) - F.linear(
                x.double(), layer.base_layer.weight.double()
            )
            change = layer(x).double() - base
        kept[placement] = float((change * term).sum() / (term * term).sum())
    assert 0.8 <= kept["add"] <= 1.2
    assert choose_placement(256, 256, "input", torch.bfloat16) == "add"
    assert choose_placement(64, 1024, "input", torch.bfloat16) == "add"


def saved_by(layer, x):
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        y = layer(x)
    owned = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    return y, [t for t in held if t.data_ptr() not in owned]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_x_is_saved(side, placement, dtype):
    tokens, n, m, r = 512, 64, 48, 4
    layer = make_layer(n, m, r, side=side, placement=placement, dtype=dtype)
    x = torch.randn(tokens, n).to(dtype).requires_grad_()
    _, held = saved_by(layer, x)
    assert sorted(t.numel() for t in held if t.numel() >= tokens) == [tokens * r]
    assert x.data_ptr() not in {t.data_ptr() for t in held}


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("transform", NAMES)
def test_checkpointing_and_accumulation_give_the_plain_gradient(use_reentrant, transform):
    layers = torch.nn.Sequential(*(make_layer(16, 16, 4, transform=transform) for _ in range(3)))
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)

    def run(model, twice):
        for _ in range(1 + twice):
            h = x
            for layer in model:
                h = torch.tanh(layer(h) if use_reentrant is None else checkpoint(layer, h, use_reentrant=use_reentrant))
            h.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = copy.deepcopy(layers)
    wanted = []
    h = x
    for layer in plain:
        h = torch.tanh(reference(layer, h, layer.loft_theta["default"]))
    h.square().sum().backward()
    wanted = [p.grad.clone() for p in plain.parameters() if p.grad is not None]
    assert len(wanted) == 3
    for got, want in zip(run(layers, True), wanted, strict=True):
        torch.testing.assert_close(got, 2 * want, atol=1e-12, rtol=1e-9)


def test_in_place_update_between_forward_and_backward_keeps_the_gradient_of_the_forward():
    layer = make_layer()
    x = torch.randn(5, 20, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    twin(x).square().sum().backward()
    y = layer(x).square().sum()
    with torch.no_grad():
        layer.loft_theta["default"].mul_(3)
    y.backward()
    torch.testing.assert_close(layer.loft_theta["default"].grad, twin.loft_theta["default"].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(n=st.integers(8, 96), r=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_the_gram_root_makes_a_half_precision_support_orthogonal_again(dtype, n, r, seed):
    exact = torch.from_numpy(basis_of(n, r, seed))
    a = torch.randn(r, r, dtype=torch.float64)
    d = torch.linalg.matrix_exp(a - a.mT) - torch.eye(r, dtype=torch.float64)
    for p in (
        exact.to(dtype),
        exact.to(dtype).float(),
        exact.to(dtype).double(),
    ):  # the last two were rounded all the same
        c = gram_root(p)
        e = d if c is None else c.double() @ d @ c.double()
        # C is float32, or float64 with P: relative rounding eps of each entry, against an exactly
        # orthogonal T. Without C, R^T R - I = P (E^T (P^T P - I) E) P^T, and ||E|| <= 2.
        limit = (
            4 * ORTHONORMAL * 1.001 if c is None else 8 * torch.finfo(c.dtype).eps * r**0.5 + 1e-13
        )  # T's own, in float64
        assert LowRank(p, e).orthogonality_error() <= limit
    assert gram_root(exact.float()) is None and gram_root(torch.eye(n, r, dtype=dtype)) is None


@pytest.mark.parametrize("side", SIDES)
def test_apply_and_adjoint_are_transposes(side):
    factor = factor_of(make_layer(side=side).adapters["default"])
    x, y = (
        torch.randn(3, len(factor.basis), dtype=torch.float64),
        torch.randn(3, len(factor.basis), dtype=torch.float64),
    )
    torch.testing.assert_close((factor.apply(x) * y).sum(), (x * factor.adjoint(y)).sum())
    torch.testing.assert_close(factor.adjoint(factor.apply(x)), x)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_and_lora_form_are_the_layer(side, dtype):
    layer = make_layer(side=side, dtype=dtype)
    x = torch.randn(9, 20, dtype=dtype)
    y = layer(x)
    a, b = lora_factors(layer.adapters["default"])
    tolerance = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer.base_layer(x) + x @ a.mT @ b.mT, y, atol=tolerance, rtol=tolerance)
    before = layer.base_layer.weight.detach().clone()
    merged = layer.merge()
    torch.testing.assert_close(merged(x), y, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(layer(x), merged(x))
    torch.testing.assert_close(layer.merge()(x), y, atol=tolerance, rtol=tolerance)  # a second time changes nothing
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_a_thousand_merges_in_bfloat16_restore_the_weight_bit_for_bit():
    layer = make_layer(dtype=torch.bfloat16)
    before = layer.base_layer.weight.detach().clone()
    for _ in range(1000):
        layer.merge()
        assert not torch.equal(layer.base_layer.weight, before)
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_merging_nan_is_refused_when_safe_and_changes_nothing():
    layer = make_layer()
    with torch.no_grad():
        layer.loft_theta["default"].fill_(float("nan"))
    before = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="would write NaN or Inf"):
        merge(layer, [layer.adapters["default"]], safe=True)
    assert torch.equal(layer.base_layer.weight, before)


def test_a_rotation_keeps_the_norm_of_the_weight():
    layer = make_layer(norm=5.0)
    rotated, weight = rotated_weight(layer, layer.applied()), layer.base_layer.weight
    torch.testing.assert_close(torch.linalg.svdvals(rotated), torch.linalg.svdvals(weight))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_follows_nn_linear(side, placement, bias, dtype, x_dtype, inside):
    layer = make_layer(48, 32, 8, dtype=dtype, side=side, bias=bias, placement=placement, norm=0.1)
    x, weight = torch.randn(64, 48).to(x_dtype).requires_grad_(), torch.randn(64, 32).bfloat16()
    theta = layer.loft_theta["default"].detach().double().requires_grad_()
    expected = reference(layer, x.double(), theta)
    wanted = torch.autograd.grad((expected * weight.double()).sum(), (x, theta))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer.base_layer(x).dtype == torch.bfloat16
        if inside:
            y.backward(weight)
    if not inside:
        y.backward(weight)
    got = x.grad, layer.loft_theta["default"].grad
    assert got[0].dtype == x_dtype and got[1].dtype == torch.float32
    # As in half precision: 2^-9 relative rounding in each of z, E, dY Q and the output.
    for value, want in zip((y, *got), (expected, *wanted), strict=True):
        assert torch.linalg.norm(value.double() - want.double()) <= 2e-2 * torch.linalg.norm(want.double())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("side", SIDES)
def test_step_zero_under_autocast_is_the_base_layer_bit_for_bit(side, placement):
    layer = make_layer(48, 32, 8, dtype=torch.float32, side=side, bias=side == "input", placement=placement, norm=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        for x in (torch.randn(7, 48), torch.randn(7, 48).bfloat16()):
            assert torch.equal(layer(x), layer.base_layer(x))


def test_merging_and_the_lora_form_are_full_precision_under_autocast():
    layer = make_layer(dtype=torch.float32)
    adapter = layer.adapters["default"]
    wanted = rotated_weight(layer, [adapter]), *lora_factors(adapter)
    with torch.autocast("cpu", torch.bfloat16):
        for got, want in zip((rotated_weight(layer, [adapter]), *lora_factors(adapter)), wanted, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(20,), (5, 20), (2, 5, 20), (0, 5, 20)])
def test_the_output_may_be_changed_in_place(side, placement, bias, shape):
    layer, twin = (make_layer(side=side, placement=placement, bias=bias) for _ in range(2))
    x = torch.randn(shape, dtype=torch.float64)
    torch.relu_(layer(x)).sum().backward()
    torch.relu(twin(x)).sum().backward()
    assert torch.equal(layer.loft_theta["default"].grad, twin.loft_theta["default"].grad)


@pytest.mark.parametrize("transform", NAMES)
def test_a_layer_cast_to_half_precision_still_trains(transform):
    layer = make_layer(dtype=torch.float32, transform=transform).bfloat16()
    x = torch.randn(64, 20).bfloat16()
    theta = layer.loft_theta["default"].detach().double().requires_grad_()
    expected = reference(layer, x.double(), theta)
    (wanted,) = torch.autograd.grad(expected.sum(), theta)
    y = layer(x)
    y.sum().backward()
    grad = layer.loft_theta["default"].grad
    assert y.dtype == grad.dtype == torch.bfloat16
    assert torch.linalg.norm(y.double() - expected) <= 2e-2 * torch.linalg.norm(expected)
    assert torch.linalg.norm(grad.double() - wanted) <= 2e-2 * torch.linalg.norm(wanted)
    if get_transform(transform).orthogonal:
        # E is float32: its rounding is all there is.
        assert factor_of(layer.adapters["default"]).orthogonality_error() <= 1e-6


def test_a_base_that_trains_or_is_hooked_keeps_its_own_forward():
    layer = make_layer(placement="add")
    x = torch.randn(4, 20, dtype=torch.float64)
    y = layer(x)
    calls = []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(layer(x), y)
    assert calls
    layer.base_layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.base_layer.weight.grad is not None


def test_a_state_dict_round_trip_is_exact():
    layer, other = make_layer(), make_layer(norm=0.0)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 20, dtype=torch.float64)
    assert torch.equal(layer(x), other(x))


def test_deepcopy_is_independent():
    layer = make_layer()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.loft_theta["default"].zero_()
    x = torch.randn(4, 20, dtype=torch.float64)
    torch.testing.assert_close(twin(x), layer.base_layer(x))
    assert not torch.allclose(layer(x), twin(x))


def test_conv1d_is_a_linear_layer():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = Conv1D(24, 16).double()
    layer = LoftLinear(conv, basis_of(16, 4))
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert torch.equal(layer(x), conv(x))
    with torch.no_grad():
        layer.loft_theta["default"].normal_()
    y = layer(x)
    torch.testing.assert_close(layer.merge()(x), y)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_compiled_layers_give_the_eager_result_within_the_recompile_limit(placement):
    layers = torch.nn.Sequential(*(make_layer(20, 20, dtype=torch.float32, placement=placement) for _ in range(10)))
    x = torch.randn(4, 20)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        y = torch.compile(layers, backend="aot_eager")(x)
    torch.testing.assert_close(y, layers(x))
    y.sum().backward()
    got = [layer.loft_theta["default"].grad.clone() for layer in layers]
    layers.zero_grad()
    layers(x).sum().backward()
    for gradient, layer in zip(got, layers, strict=True):
        torch.testing.assert_close(gradient, layer.loft_theta["default"].grad)


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (np.zeros((20, 2)), "column 0 is zero"),
        (np.ones((20, 2)), "linearly independent"),
        (np.full((20, 2), np.nan), "must be finite"),
        (np.ones((2, 20)), r"must be \(n, r\) with 1 <= r <= n"),
        (basis_of(19, 2), "support has 19 rows, but the input side of this layer has 20 features"),
    ],
)
def test_a_bad_support_is_named(support, message):
    with pytest.raises(ValueError, match=message):
        LoftLinear(torch.nn.Linear(20, 12), support)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="transform must be one of"):
        LoftLinear(torch.nn.Linear(20, 12), basis_of(20, 2), "rotation")
    with pytest.raises(ValueError, match="side must be 'input' or 'output'"):
        LoftLinear(torch.nn.Linear(20, 12), basis_of(20, 2), side="left")
    with pytest.raises(TypeError, match="base_layer must be a linear layer"):
        LoftLinear(torch.nn.LayerNorm(20), basis_of(20, 2))
    support = loft_rs.select_support(np.random.default_rng(0).standard_normal((20, 20)), 2, side="output")
    assert LoftLinear(torch.nn.Linear(20, 20), support).adapters["default"].side == "output"
    with pytest.raises(ValueError, match="side is 'input', but the support was chosen for the output side"):
        LoftLinear(torch.nn.Linear(20, 20), support, side="input")
    with pytest.raises(
        ValueError, match="rank 14 does not fit this layer of 20 by 12 features: the nearest that does is 12"
    ):
        LoftLinear(torch.nn.Linear(20, 12), basis_of(20, 14))


def test_custom_columns_are_orthonormalised_in_order_with_a_warning():
    with pytest.warns(UserWarning, match="not orthonormal"):
        p = custom_basis(np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]))
    np.testing.assert_allclose(p, [[1, 0], [0, 1], [0, 0]], atol=1e-7)
