"""compiled.py: what a compiled model computes is what the eager one does, whatever becomes of its tensors, at one solve a step."""

import copy

import pytest
import torch
from reference import basis_of
from test_layer import NAMES, PLACEMENTS, SIDES, make_layer
from test_siblings import build
from torch import nn
from torch.utils.checkpoint import checkpoint

from loft_rs import LoftConfig, compiled
from loft_rs.nn import LoftLinear
from loft_rs.transform import DeltaGroup


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def compile_(module):
    return torch.compile(module, backend="aot_eager", fullgraph=True)


def results(run, module, x):
    """The output and the gradients of x and of what is trained."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.float().square().sum().backward()
    return [y, x.grad, *[p.grad.clone() for p in module.parameters() if p.grad is not None]]


def assert_alike(module, x, run=None, **tolerances):
    run = compile_(module) if run is None else run
    torch.testing.assert_close(results(run, module, x), results(module, module, x), **tolerances)
    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("transform", NAMES)
def test_gradients_are_the_eager_ones(transform, side, dtype):
    layer = make_layer(20, 12, side=side, transform=transform, bias=side == "input", dtype=dtype, placement="add")
    assert_alike(layer, torch.randn(2, 3, 20, dtype=dtype))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_untrained_it_is_the_base_layer(placement):
    layer = make_layer(20, 12, dtype=torch.float32, norm=0.0, placement=placement)
    x = torch.randn(5, 20)
    run = compile_(layer)
    assert torch.equal(run(x), layer.base_layer(x))
    assert all(bool(g.any()) for g in results(run, layer, x))


def test_a_rank_without_parameters():
    assert_alike(make_layer(20, 12, r=1, dtype=torch.float32, placement="add"), torch.randn(5, 20))


def test_conv1d():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = LoftLinear(Conv1D(24, 16), basis_of(16, 4))
    layer.placement = "add"
    nn.init.normal_(layer.theta("default"))
    assert_alike(layer, torch.randn(2, 5, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype):
    layer = make_layer(20, 12, dtype=dtype, placement="add")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(5, 20)).dtype == torch.bfloat16
        assert_alike(layer, torch.randn(5, 20))


class Counted(DeltaGroup):
    """Counts solves and comparisons."""

    solves = compared = 0

    def solve(self, thetas, folds):
        Counted.solves += 1
        return super().solve(thetas, folds)

    def _unchanged(self, members):
        Counted.compared += 1
        return DeltaGroup._unchanged(members)


@pytest.mark.parametrize("checkpointing", [None, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_step_is_one_solve_and_looks_at_no_theta(placement, checkpointing):
    model = build(checkpointing, torch.float32)
    group = Counted("cayley")
    for layer in model.modules():
        if hasattr(layer, "placement"):
            layer.placement, layer.loft_group["default"] = placement, group
    x = torch.randn(5, 24)
    run = assert_alike(model, x)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimiser.step()
        Counted.solves = Counted.compared = 0
        results(run, model, x)
        assert (Counted.solves, Counted.compared) == (1, 0)
    assert_alike(model, x, run)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            run(x)
            Counted.solves = Counted.compared = 0
            torch.testing.assert_close(run(x), model(x))
        assert Counted.solves == 0 and Counted.compared > 0


def test_two_adapters_take_turns():
    model = build(dtype=torch.float32)
    model.add_adapter("other", LoftConfig(r=4, target_modules=["q", "k"], support="random", init_weights=False))
    for layer in model.modules():
        if hasattr(layer, "placement"):
            layer.placement = "add"
    x, run = torch.randn(5, 24), compile_(model)
    outputs = []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert_alike(model, x, run)
        outputs.append(run(x))
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])
    model.base_model.set_adapter(["default", "other"])
    assert_alike(model, x, run)
    model.delete_adapter("other")
    assert_alike(model, x, run)


def test_tensors_may_be_replaced_and_layers_copied():
    layer = make_layer(20, 12, dtype=torch.float32, placement="add")
    x = torch.randn(5, 20)
    run = assert_alike(layer, x)
    layer.theta("default").data = torch.randn(6)
    assert_alike(layer, x, run)
    layer.base_layer.weight.data = torch.randn(12, 20)
    assert_alike(layer, x, run)
    layer.base_layer.bias.data = torch.randn(12)
    assert_alike(layer, x, run)
    layer.base_layer.weight = nn.Parameter(torch.randn(12, 20), requires_grad=False)
    layer.set_basis("default", basis_of(20, 4, seed=3))
    assert_alike(layer, x, run)
    twin = copy.deepcopy(layer)
    nn.init.normal_(twin.theta("default"))
    assert_alike(twin, x)
    del layer, run
    assert_alike(copy.deepcopy(twin), x)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_are_no_layers_own(dtype, side):
    layer = make_layer(20, 12, side=side, dtype=dtype, placement="add")
    own = layer.theta("default"), layer.base_layer.weight, layer.base_layer.bias, layer.support("default")
    x = torch.randn(5, 20, dtype=dtype)
    expected = results(layer, layer, x)
    theta, weight, bias, basis = (t.detach().clone() for t in own)
    x, theta = x.requires_grad_(), theta.requires_grad_()
    for given in ((theta, weight, bias, basis), (theta, own[1], own[2], own[3])):
        x.grad = theta.grad = None
        y = compiled.add_low_rank(x, *given, "cayley", side)
        y.float().square().sum().backward()
        torch.testing.assert_close([y, x.grad, theta.grad], expected)
    if side == "input":
        theta.grad = None
        e = compiled.delta(theta, basis, "cayley")
        torch.testing.assert_close(e, layer.factor("default").delta)
        e.square().sum().backward()
        got = theta.grad
        layer.zero_grad()
        layer.factor("default").delta.square().sum().backward()
        torch.testing.assert_close(got, layer.theta("default").grad)


@pytest.mark.parametrize("transform", NAMES)
def test_operators_are_what_they_claim(transform):
    layer = make_layer(20, 12, transform=transform, placement="add")
    theta, p = layer.theta("default").detach(), layer.support("default")
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    x, names = torch.randn(2, 3, 20, dtype=torch.float64), (transform, "input")
    g, e = torch.randn(2, 3, 12, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    ops = torch.ops.loft_rs
    _, z = ops.add_low_rank(x, theta, weight, bias, p, *names, True)
    for op, arguments in (
        (ops.add_low_rank, (x, theta, weight, bias, p, *names, True)),
        (ops.add_low_rank_backward, (g, z, theta, weight, p, *names, True)),
        (ops.add_low_rank_backward, (g, z, theta, weight, p, *names, False)),
        (ops.delta, (theta, p, transform, True)),
        (ops.delta_backward, (e, theta, p, transform)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_checkpointed_part_inside_a_compiled_layer():
    layer = make_layer(20, 20, dtype=torch.float32, placement="add")
    whole = nn.Sequential(layer)
    assert_alike(whole, torch.randn(5, 20), compile_(lambda x: checkpoint(whole, x, use_reentrant=False)))
