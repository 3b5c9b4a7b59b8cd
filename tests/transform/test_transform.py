"""transform.py, batch.py: orthogonality, the identity at the start, closed-form gradients against
float64 autograd, batched values.
"""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import basis_of, exact_transform
from torch import nn
from transforms import NAMES

from loft_rs._transforms import TransformName
from loft_rs._transforms import delta as delta_in_numpy
from loft_rs.layer import values
from loft_rs.layer.forward_pass import Root, watch
from loft_rs.layer.merging import rotated_weight
from loft_rs.nn import LoftLinear
from loft_rs.transform.batch import attach, differentiable_delta, solve
from loft_rs.transform.skew import skew
from loft_rs.transform.transforms import get_transform

SKEW = ["cayley", "exp"]


@pytest.mark.parametrize("name", NAMES)
def test_the_definition_in_numpy_is_the_same(name):
    r = 6
    transform = get_transform(name)
    theta = 0.3 * torch.randn(
        transform.parameter_shape(r), dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    d = transform.delta(theta[None], r)[0][0]
    torch.testing.assert_close(
        torch.from_numpy(delta_in_numpy(TransformName.of(name), theta.numpy(), r)), d, rtol=0, atol=1e-13
    )


def theta_of_norm(r: int, norm: float, seed: int, dtype=torch.float32):
    theta = torch.randn(r * (r - 1) // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (theta * norm / torch.linalg.matrix_norm(skew(theta, r), 2)).to(dtype)


def value(name: str, theta: torch.Tensor, root: torch.Tensor | None = None) -> torch.Tensor:
    """E of one theta, with its gradient."""
    solution = solve(get_transform(name), theta.detach()[None], None if root is None else root[None])
    return attach(solution, [0], [theta])[0]


@given(st.integers(2, 96), st.floats(1e-4, 100), st.sampled_from(SKEW), st.integers(0, 2**31))
def test_orthogonality(r, norm, name, seed):
    # The fp64 solve is exact beside its one rounding to fp32, in which each entry of D changes by
    # at most eps/2 of itself: so
    # ||T^T T - I||_2 <= 2 ||dD||_F <= eps ||D||_F <= 2 eps sqrt(r).
    delta, _ = get_transform(name).delta(theta_of_norm(r, norm, seed)[None], r)
    t = torch.eye(r, dtype=torch.float64) + delta[0].double()
    error = torch.linalg.matrix_norm(t.mT @ t - torch.eye(r, dtype=torch.float64), 2)
    assert error <= 2 * torch.finfo(torch.float32).eps * r**0.5


@given(st.integers(1, 96), st.floats(1e-4, 100), st.sampled_from(SKEW), st.integers(0, 2**31))
def test_halves_are_orthogonal_and_the_transform_of_their_blocks(r, norm, name, seed):
    halves = get_transform(f"{name}+halves")
    theta = torch.randn(halves.parameter_shape(r), generator=torch.Generator().manual_seed(seed))
    theta = theta * norm / max(1.0, float(torch.linalg.matrix_norm(theta)))
    delta = halves.delta(theta[None], r)[0][0]
    t, eye = torch.eye(r, dtype=torch.float64) + delta.double(), torch.eye(r, dtype=torch.float64)
    assert torch.linalg.matrix_norm(t.mT @ t - eye, 2) <= 2 * torch.finfo(torch.float32).eps * r**0.5
    first = r - r // 2
    a = torch.zeros(r, r)
    a[first:, :first] = theta
    rows, columns = torch.tril_indices(r, r, -1)
    assert torch.equal(delta, get_transform(name).delta(a[rows, columns][None], r)[0][0])
    assert halves.orthogonal and not a[:first, :first].any() and not a[first:, first:].any()


@pytest.mark.parametrize("norm", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("r", [2, 64, 352])
@pytest.mark.parametrize("name", SKEW)
def test_orthogonality_against_the_published_figures(name, r, norm):
    delta, _ = get_transform(name).delta(theta_of_norm(r, norm, 0)[None], r)
    t = torch.eye(r, dtype=torch.float64) + delta[0].double()
    error = float(torch.linalg.matrix_norm(t.mT @ t - torch.eye(r, dtype=torch.float64), 2))
    # fp32 solves reach 5e-7, 3e-6, 1.5e-5 at these norms (r = 64); the fp64 solve rounded once must
    # be below all of them.
    assert error <= 2e-7


@pytest.mark.parametrize("name", NAMES)
def test_identity_at_the_start(name):
    transform = get_transform(name)
    delta, _ = transform.delta(torch.zeros(3, *transform.parameter_shape(6)), 6)
    assert not delta.any()


@given(st.integers(1, 12), st.sampled_from(NAMES), st.integers(0, 2**31), st.floats(1e-6, 3))
def test_value_and_gradient_against_float64_autograd(r, name, seed, norm):
    generator = torch.Generator().manual_seed(seed)
    shape = get_transform(name).parameter_shape(r)
    theta = (norm * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(r, r, generator=generator, dtype=torch.float64)
    (reference,) = (
        torch.autograd.grad((exact_transform(name, theta, r) * weight).sum(), theta)
        if theta.numel()
        else (theta.detach(),)
    )
    wanted = exact_transform(name, theta.detach(), r) - torch.eye(r, dtype=torch.float64)
    # A truncated series grows without bound, and its rounding with it.
    scale = max(1.0, float(wanted.abs().max()))
    for delta in (value(name, theta), differentiable_delta(get_transform(name), theta, None)):
        torch.testing.assert_close(delta.detach(), wanted, atol=1e-12 * scale, rtol=0)
        (gradient,) = torch.autograd.grad((delta * weight).sum(), theta)
        torch.testing.assert_close(gradient, reference, atol=1e-11 * scale, rtol=1e-10)


@pytest.mark.parametrize("name", SKEW)
def test_small_rotations_keep_their_digits(name):
    theta = theta_of_norm(16, 1e-6, 3)
    delta, _ = get_transform(name).delta(theta[None], 16)
    reference = exact_transform(name, theta.double(), 16) - torch.eye(16, dtype=torch.float64)
    assert torch.linalg.norm(delta[0].double() - reference) <= 1e-7 * torch.linalg.norm(reference)


@given(st.integers(1, 400))
def test_rank_inverts_parameter_shape(r):
    for name in NAMES:
        transform = get_transform(name)
        assert transform.rank(torch.Size(transform.parameter_shape(r))) == r


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_of_blocks_is_one_member(name):
    transform, generator = get_transform(name), torch.Generator().manual_seed(0)
    theta = torch.randn(2, 3, *transform.parameter_shape(4), generator=generator, dtype=torch.float64)
    weight = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    whole = nn.Parameter(theta)
    delta = value(name, whole)
    (delta * weight).sum().backward()
    for i in range(2):
        for j in range(3):
            single = nn.Parameter(theta[i, j])
            own = value(name, single)
            (own * weight[i, j]).sum().backward()
            torch.testing.assert_close(delta[i, j].detach(), own.detach(), atol=1e-14, rtol=0)
            torch.testing.assert_close(whole.grad[i, j], single.grad, atol=1e-13, rtol=0)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_one_solve_and_one_node_serve_all_members(name, folded):
    transform, generator = get_transform(name), torch.Generator().manual_seed(0)
    shape = transform.parameter_shape(5)
    thetas = [nn.Parameter(0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)) for _ in range(4)]
    roots = torch.randn(4, 5, 5, generator=generator, dtype=torch.float64) if folded else None
    roots = None if roots is None else roots + roots.mT
    weights = torch.randn(4, 5, 5, generator=generator, dtype=torch.float64)
    solution = solve(transform, torch.stack([theta.detach() for theta in thetas]), roots)
    # The second is in the solve and not attached, as one that does not train; the last is attached
    # and not used.
    deltas = attach(solution, [0, 2, 3], [thetas[i] for i in (0, 2, 3)])
    assert len({delta.grad_fn for delta in deltas}) == 1
    ((deltas[0] * weights[0]).sum() + (deltas[1] * weights[2]).sum()).backward()
    assert thetas[1].grad is None and thetas[3].grad is None
    for i, theta in enumerate(thetas):
        alone = nn.Parameter(theta.detach().clone())
        own = value(name, alone, None if roots is None else roots[i])
        torch.testing.assert_close(solution.deltas[i], own.detach(), atol=1e-13, rtol=1e-12)
        torch.testing.assert_close(
            differentiable_delta(transform, theta.detach(), None if roots is None else roots[i]),
            own.detach(),
            atol=1e-13,
            rtol=1e-12,
        )
        torch.testing.assert_close(solution.cast(i, torch.float32), solution.deltas[i].float(), atol=0, rtol=0)
        if theta.grad is not None:
            (own * weights[i]).sum().backward()
            torch.testing.assert_close(theta.grad, alone.grad, atol=1e-12, rtol=1e-12)


def chain(name: str = "cayley", dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Three layers whose passes begin at one root."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(LoftLinear(nn.Linear(12, 12).to(dtype), basis_of(12, 8, i), name) for i in range(3)))
    for layer in layers:
        nn.init.normal_(layer.loft_theta["default"], std=0.3)
    watch(layers, Root(layers))
    return layers


def exact_chain(layers: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        for layer in layers:
            x = nn.functional.linear(x, rotated_weight(layer, layer.applied()).to(x.dtype), layer.base_layer.bias)
    return x


@pytest.mark.parametrize(
    "replaced", [theta_of_norm(6, 0.5, 9), theta_of_norm(8, 0.5, 9).double()], ids=["rank", "dtype"]
)
def test_a_parameter_that_was_replaced_is_seen(replaced):
    layers, x = chain(), torch.randn(4, 12)
    layers(x).sum().backward()
    for grads in (False, True):
        with torch.set_grad_enabled(grads):
            before = layers(x)
        for layer in layers[:2]:
            rank = get_transform("cayley").rank(replaced.shape)
            if rank != layer.adapters["default"].rank:
                layer.adapters["default"].resize(rank)
                layer.adapters["default"].set_basis(basis_of(12, rank))
            layer.loft_theta["default"] = nn.Parameter(replaced * (2 if grads else 1))
        with torch.set_grad_enabled(grads):
            after = layers(x)
        torch.testing.assert_close(after, exact_chain(layers, x))
        assert not torch.allclose(after, before)


def test_without_gradients_a_solve_is_not_taken_for_another_gram_root(monkeypatch):
    layers, x = chain(dtype=torch.bfloat16), torch.randn(4, 12).bfloat16()
    roots = [layer.adapters["default"].gram_root() for layer in layers]
    assert all(root is not None for root in roots)
    solves, original = [], values.solve
    monkeypatch.setattr(values, "solve", lambda *given: solves.append(original(*given)) or solves[-1])
    with torch.no_grad():
        for _ in range(2):
            layers(x)
        assert len(solves) == 1
        layers[1].adapters["default"].set_basis(basis_of(12, 8, 7))
        layers(x)
        assert [len(solution.deltas) for solution in solves] == [3, 3]
        root = layers[1].adapters["default"].gram_root()
        wanted = get_transform("cayley").delta(layers[1].loft_theta["default"][None], 8)[0][0]
        torch.testing.assert_close(solves[1].deltas[1], root @ wanted @ root)


@pytest.mark.parametrize("name", NAMES)
def test_a_half_precision_theta_gives_a_float32_value_and_its_own_gradient(name):
    r, shape = 8, get_transform(name).parameter_shape(8)
    theta = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16())
    wide = nn.Parameter(theta.detach().float())
    weight = torch.randn(r, r, generator=torch.Generator().manual_seed(1))
    for each in (theta, wide):
        delta = value(name, each)
        assert delta.dtype == torch.float32
        (delta * weight).sum().backward()
    assert theta.grad.dtype == torch.bfloat16 and torch.equal(theta.grad, wide.grad.bfloat16())


def test_indices_made_under_a_fake_mode_are_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for _ in range(2):  # before and after real indices are kept
        with FakeTensorMode():
            assert skew(torch.zeros(1, 37 * 36 // 2), 37).shape == (1, 37, 37)
        assert skew(torch.ones(37 * 36 // 2), 37).sum() == 0


def test_values_made_in_inference_mode_serve_training():
    layers, x = chain("exp"), torch.randn(4, 12)
    with torch.inference_mode():
        wanted = layers(x)
    with torch.no_grad():
        torch.testing.assert_close(layers(x), wanted)  # takes the solve of the pass before
    layers(x).sum().backward()
    assert all(layer.loft_theta["default"].grad is not None for layer in layers)


def test_unknown_transform_is_named():
    for name in ("caley", "cayley+halve", "free+halves", "cayley_neumann:2+halves", "cayley+halves+halves"):
        with pytest.raises(
            ValueError, match=rf"transform must be one of \['cayley', 'exp', 'free'\].*got '{re.escape(name)}'"
        ):
            get_transform(name)
