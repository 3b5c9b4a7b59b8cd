"""transform.py: orthogonality, the identity at the start, closed-form gradients against float64 autograd, batched values."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import exact_transform

from loft_rs.transform import TRANSFORMS, DeltaGroup, get_transform, skew

VARIANTS = [
    "cayley_neumann:1",
    "cayley_neumann:3",
    "cayley+magnitudes",
    "exp+magnitudes",
    "cayley+halves",
    "exp+halves",
    "cayley_neumann:2+magnitudes",
]
NAMES = [*sorted(TRANSFORMS), *VARIANTS]
SKEW = ["cayley", "exp"]


def theta_of_norm(r: int, norm: float, seed: int, dtype=torch.float32):
    theta = torch.randn(r * (r - 1) // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (theta * norm / torch.linalg.matrix_norm(skew(theta, r), 2)).to(dtype)


class Member:
    def __init__(self, theta, fold=None):
        self.theta, self.fold = {"a": theta}, fold

    def has_adapter(self, adapter):
        return adapter in self.theta

    def delta_source(self, adapter):
        return self.theta[adapter], self.fold


@given(st.integers(2, 96), st.floats(1e-4, 100), st.sampled_from(SKEW), st.integers(0, 2**31))
def test_orthogonality(r, norm, name, seed):
    # The fp64 solve is exact beside its one rounding to fp32, in which each entry of D changes by at most eps/2 of itself: so
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
    # fp32 solves reach 5e-7, 3e-6, 1.5e-5 at these norms (r = 64); the fp64 solve rounded once must be below all of them.
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
    value = DeltaGroup(name).value(Member(theta), "a")
    wanted = exact_transform(name, theta.detach(), r) - torch.eye(r, dtype=torch.float64)
    # A truncated series grows without bound, and its rounding with it.
    scale = max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(value.detach(), wanted, atol=1e-12 * scale, rtol=0)
    (value * weight).sum().backward()
    torch.testing.assert_close(theta.grad, reference, atol=1e-11 * scale, rtol=1e-10)


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
    whole = Member(torch.nn.Parameter(theta))
    value = DeltaGroup(name).value(whole, "a")
    (value * weight).sum().backward()
    for i in range(2):
        for j in range(3):
            single = Member(torch.nn.Parameter(theta[i, j]))
            own = DeltaGroup(name).value(single, "a")
            (own * weight[i, j]).sum().backward()
            torch.testing.assert_close(value[i, j].detach(), own.detach(), atol=1e-14, rtol=0)
            torch.testing.assert_close(whole.theta["a"].grad[i, j], single.theta["a"].grad, atol=1e-13, rtol=0)


def test_group_batches_all_members_and_never_goes_stale():
    group = DeltaGroup("cayley")
    members = [Member(torch.nn.Parameter(theta_of_norm(8, 0.5, i))) for i in range(4)]
    solves = []
    solve = group.solve
    group.solve = lambda thetas, folds: solves.append(len(thetas)) or solve(thetas, folds)
    for _ in range(3):
        for member in members:
            group.value(member, "a")
    assert solves[4:] == [4, 4]  # members join one by one in the first pass; then one solve a pass
    assert solves[:4] == [1, 1, 1, 1]
    before = group.value(members[0], "a").detach().clone()
    members[0].theta["a"].data.mul_(2)  # leaves no version behind
    after = group.value(members[0], "a").detach()
    torch.testing.assert_close(after, get_transform("cayley").delta(members[0].theta["a"].detach()[None], 8)[0][0])
    assert not torch.equal(before, after)


def test_a_raw_update_after_the_very_first_pass_is_seen():
    group = DeltaGroup("cayley")
    members = [Member(torch.nn.Parameter(theta_of_norm(8, 0.5, i))) for i in range(3)]
    for member in members:
        group.value(member, "a")
    for member in members:
        member.theta["a"].data.mul_(2)  # as a fused optimiser writes: no version left behind
    for member in members:
        torch.testing.assert_close(
            group.value(member, "a"), get_transform("cayley").delta(member.theta["a"].detach()[None], 8)[0][0]
        )


def test_group_refreshes_an_unused_value_after_an_in_place_update():
    group = DeltaGroup("cayley")
    first, second = (Member(torch.nn.Parameter(theta_of_norm(8, 0.5, i))) for i in range(2))
    for member in (first, second, first):
        group.value(member, "a")
    with torch.no_grad():
        second.theta["a"].mul_(2)
    torch.testing.assert_close(
        group.value(second, "a"), get_transform("cayley").delta(second.theta["a"].detach()[None], 8)[0][0]
    )


@pytest.mark.parametrize(
    "replaced", [theta_of_norm(6, 0.5, 9), theta_of_norm(8, 0.5, 9).double()], ids=["rank", "dtype"]
)
def test_group_sees_a_parameter_that_was_replaced(replaced):
    group = DeltaGroup("cayley")
    members = [Member(torch.nn.Parameter(theta_of_norm(8, 0.5, i))) for i in range(3)]
    for member in members:
        group.value(member, "a")
    for member in members[:2]:
        member.theta["a"] = torch.nn.Parameter(replaced.clone())
    with torch.no_grad():
        for member in members * 2:
            theta = member.theta["a"].detach()
            wanted = get_transform("cayley").delta(theta[None], get_transform("cayley").rank(theta.shape))[0][0]
            torch.testing.assert_close(group.value(member, "a"), wanted)


def test_a_fused_step_between_two_half_passes_is_seen():
    group = DeltaGroup("cayley")
    members = [Member(torch.nn.Parameter(theta_of_norm(8, 0.5, i))) for i in range(2)]
    optimiser = torch.optim.AdamW([m.theta["a"] for m in members], lr=0.1, fused=True)
    for member in (*members, members[0]):  # the second pass stops after the first member
        (group.value(member, "a") ** 2).sum().backward()
    optimiser.step()
    torch.testing.assert_close(
        group.value(members[1], "a"), get_transform("cayley").delta(members[1].theta["a"].detach()[None], 8)[0][0]
    )


@pytest.mark.parametrize("fold", [None, torch.eye(8)])
def test_without_gradients_a_value_is_solved_once_and_never_goes_stale(fold):
    group = DeltaGroup("cayley")
    members = [Member(torch.nn.Parameter(theta_of_norm(8, 0.5, i)), fold) for i in range(3)]
    for member in members:
        group.value(member, "a")
    solves, solve = [], group.solve
    group.solve = lambda thetas, folds: solves.append(len(thetas)) or solve(thetas, folds)

    def values():
        with torch.no_grad():
            return torch.stack([group.value(member, "a") for member in members])

    def exact():
        thetas = torch.stack([member.theta["a"].detach() for member in members])
        return get_transform("cayley").delta(thetas, 8)[0]

    before = values()
    assert torch.equal(values(), before) and not solves
    members[1].theta["a"].data.mul_(2)  # as an averaging scheme writes: no version left behind
    torch.testing.assert_close(values(), exact())
    assert solves == [3] and not torch.equal(values(), before)
    for member in members:
        member.fold = 2 * torch.eye(8)
    torch.testing.assert_close(values(), 4 * exact())
    for member in members:
        member.theta["a"].data = member.theta["a"].data.double()
    torch.testing.assert_close(values(), 4 * exact())


@pytest.mark.parametrize("name", NAMES)
def test_a_half_precision_theta_gives_a_float32_value_and_its_own_gradient(name):
    r, shape = 8, get_transform(name).parameter_shape(8)
    theta = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16())
    wide = torch.nn.Parameter(theta.detach().float())
    weight = torch.randn(r, r, generator=torch.Generator().manual_seed(1))
    for each in (theta, wide):
        value = DeltaGroup(name).value(Member(each), "a")
        assert value.dtype == torch.float32
        (value * weight).sum().backward()
    assert theta.grad.dtype == torch.bfloat16 and torch.equal(theta.grad, wide.grad.bfloat16())


def test_indices_made_under_a_fake_mode_are_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for _ in range(2):  # before and after real indices are kept
        with FakeTensorMode():
            assert skew(torch.zeros(1, 37 * 36 // 2), 37).shape == (1, 37, 37)
        assert skew(torch.ones(37 * 36 // 2), 37).sum() == 0


def test_values_made_in_inference_mode_serve_training():
    group, member = DeltaGroup("exp"), Member(torch.nn.Parameter(theta_of_norm(6, 0.5, 0)))
    with torch.inference_mode():
        group.value(member, "a")
    group.value(member, "a").sum().backward()
    assert member.theta["a"].grad is not None


def test_group_copies_empty():
    group, member = DeltaGroup("exp"), Member(torch.nn.Parameter(theta_of_norm(6, 0.5, 0)))
    group.value(member, "a")
    twin = copy.deepcopy(group)
    assert twin.transform is group.transform and not len(twin._members)


def test_unknown_transform_is_named():
    for name in ("caley", "cayley+halve", "free+halves", "cayley_neumann:2+halves", "cayley+halves+halves"):
        with pytest.raises(
            ValueError, match=rf"transform must be one of \['cayley', 'exp', 'free'\].*got '{re.escape(name)}'"
        ):
            get_transform(name)


def test_a_value_replaced_before_its_gradient_is_attached_keeps_it():
    group = DeltaGroup("cayley")
    members = [Member(torch.nn.Parameter(theta_of_norm(8, 0.5, i))) for i in range(2)]
    for member in members:
        group.value(member, "a")
    first = group.entry(members[0], "a")
    members[1].theta["a"] = torch.nn.Parameter(theta_of_norm(8, 0.5, 7))  # as a loader replaces a parameter
    group.value(members[1], "a")
    group.value(members[0], "a")
    group.attached(first).sum().backward()
    assert members[0].theta["a"].grad is not None
