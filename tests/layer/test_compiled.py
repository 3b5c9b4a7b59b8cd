"""torch.compile: what a compiled model computes is what the eager one does, whatever becomes of its
tensors, at one solve a step.
"""

import copy

import pytest
import torch
from layers import NAMES, PLACEMENTS, SIDES, make_layer
from one_input import build
from reference import basis_of
from torch import nn
from torch.utils.checkpoint import checkpoint
from transforms import NAMES as TRANSFORMS

from loft_rs import LoftConfig
from loft_rs.nn import LoftLinear
from loft_rs.transform.transforms import Cayley, get_transform


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
    # Not to the bit, as it is without a compiler: the graph is that of any theta.
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(run(x), layer.base_layer(x), atol=4 * eps, rtol=4 * eps)
    assert all(bool(g.any()) for g in results(run, layer, x))


def test_a_rank_without_parameters():
    assert_alike(make_layer(20, 12, r=1, dtype=torch.float32, placement="add"), torch.randn(5, 20))


def test_conv1d():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = LoftLinear(Conv1D(24, 16), basis_of(16, 4))
    layer.placement = "add"
    nn.init.normal_(layer.adapters["default"].theta)
    assert_alike(layer, torch.randn(2, 5, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype):
    layer = make_layer(20, 12, dtype=dtype, placement="add")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(5, 20)).dtype == torch.bfloat16
        assert_alike(layer, torch.randn(5, 20))


@pytest.mark.parametrize("checkpointing", [None, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_step_is_one_solve(placement, checkpointing, monkeypatch):
    model = build(checkpointing, torch.float32)
    for layer in model.modules():
        if hasattr(layer, "placement"):
            layer.placement = placement
    x = torch.randn(5, 24)
    run = assert_alike(model, x)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    solves, delta = [], Cayley.delta
    # What the operator calls when it runs; the compiler never looks into it, and a look at theta
    # would break the graph.
    monkeypatch.setattr(
        Cayley, "delta", lambda self, theta, r, **given: solves.append(len(theta)) or delta(self, theta, r, **given)
    )
    for _ in range(3):
        optimiser.step()
        solves.clear()
        results(run, model, x)
        assert solves == [8]
    assert_alike(model, x, run)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            run(x)
            solves.clear()
            y = run(x)
            assert solves == [8]
            torch.testing.assert_close(y, model(x))


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
    layer.adapters["default"].theta.data = torch.randn(6)
    assert_alike(layer, x, run)
    layer.base_layer.weight.data = torch.randn(12, 20)
    assert_alike(layer, x, run)
    layer.base_layer.bias.data = torch.randn(12)
    assert_alike(layer, x, run)
    layer.base_layer.weight = nn.Parameter(torch.randn(12, 20), requires_grad=False)
    layer.adapters["default"].set_basis(basis_of(20, 4, seed=3))
    assert_alike(layer, x, run)
    twin = copy.deepcopy(layer)
    nn.init.normal_(twin.adapters["default"].theta)
    assert_alike(twin, x)
    del layer, run
    assert_alike(copy.deepcopy(twin), x)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_are_no_layers_own(dtype, side):
    layer = make_layer(20, 12, side=side, dtype=dtype, placement="add")
    x, names = torch.randn(5, 20, dtype=dtype), ("loft_theta.default", "base_layer.weight", "base_layer.bias")
    expected = results(layer, layer, x)
    own = {name: nn.Parameter(layer.get_parameter(name).detach().clone(), "theta" in name) for name in names}
    x, theta = x.requires_grad_(), own["loft_theta.default"]
    nn.init.normal_(layer.adapters["default"].theta)  # not these
    run = compile_(lambda given, x: torch.func.functional_call(layer, given, (x,)))
    for given in (own, {"loft_theta.default": theta}):
        x.grad = theta.grad = None
        y = run(given, x)
        y.float().square().sum().backward()
        torch.testing.assert_close([y, x.grad, theta.grad], expected)


@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("stacked", [(), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_operator_is_what_it_claims(name, dtype, stacked, folded, half):
    shape = get_transform(name).parameter_shape(4)
    thetas = 0.1 * torch.randn(2, *stacked, *shape, dtype=torch.float32)
    roots = torch.randn(2, 4, 4) if folded and not stacked else None
    torch.library.opcheck(
        torch.ops.loft_rs.solve.default,
        (thetas.to(dtype), roots, name, half),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_checkpointed_part_inside_a_compiled_layer():
    layer = make_layer(20, 20, dtype=torch.float32, placement="add")
    whole = nn.Sequential(layer)
    assert_alike(whole, torch.randn(5, 20), compile_(lambda x: checkpoint(whole, x, use_reentrant=False)))
