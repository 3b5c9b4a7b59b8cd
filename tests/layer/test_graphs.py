"""Graphs of plain operations: what is traced or exported runs without loft_rs, and what is
differentiated again is right.

The references are the eager model, and central differences of its first derivatives in float64.
"""

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from exact import KINDS, Block, build, error, exact_twin, layers_of, net, trained
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap

import loft_rs
from loft_rs.layer.forward_pass import current

# Tracing warns of every size that becomes a number of Python; those here are of parameters, which
# no input changes.
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

PLACEMENTS = ("add", "rotate")
# A kind without a support turns its activations whatever its placement is.
CASES = [
    (kind, placement)
    for kind in KINDS
    for placement in PLACEMENTS
    if placement == "add" or kind not in ("oft", "boft", "hra")
]
WAYS = ("trace", "export", "strict export")
TRACED = ["cayley", "exp", "output", "magnitudes", "oft", "boft", "hra", "psoft", "tied"]
# Both sides are float32 arithmetic on a few products of at most 48 terms.
ROUNDING = 4e-6
# Central differences with step h are off by h^2 of a third derivative and by 2^-53 / h: about 1e-10
# at 1e-5, times what the layers in a row make of it.
STEP, DIFFERENCES = 1e-5, 1e-6


@pytest.fixture(autouse=True)
def _no_pass_is_left():
    yield
    assert current() is None


def small(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A PEFT model on one block with two layers of one input, one in each placement."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Block().to(dtype), KINDS[kind](target_modules=["q", "k"], init_weights=False))
    for layer, placement in zip(layers_of(model), PLACEMENTS, strict=True):
        layer.placement = placement
        for adapter in layer.adapters.values():
            if adapter.scale is not None:
                nn.init.normal_(adapter.scale, std=0.1)
    return model.eval()


def inputs(rows: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows), dtype=torch.float64).to(dtype)


# -- traced and exported -------------------------------------------------------------------------

RELOADED = """
import sys
sys.modules["loft_rs"] = None  # an import of it fails
import torch
folder = sys.argv[1]
inputs, found = torch.load(f"{folder}/inputs.pt"), {}
for name in sys.argv[2:]:
    file = f"{folder}/{name}.pt"
    run = torch.jit.load(file) if name.startswith("trace") else torch.export.load(file).module()
    with torch.no_grad():
        found[name] = [run(x) for x in inputs]
assert sys.modules["loft_rs"] is None
torch.save(found, f"{folder}/found.pt")
"""
BATCHES = (5, 2, 9)


def saved(model: nn.Module, way: str, file: Path) -> None:
    """The base model's own forward, traced or exported with three rows."""
    x = inputs(3, torch.float32)
    if way == "trace":
        torch.jit.save(torch.jit.trace(model.base_model.model, (x,)), file)
        return
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        model.base_model.model, (x,), dynamic_shapes=({0: rows},), strict=way == "strict export"
    )
    assert "loft_rs" not in str(program.graph)
    torch.export.save(program, file)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory) -> dict[tuple[str, str], object]:
    """By kind and way what another process computes of a saved graph without loft_rs, or the
    exception that saving raised.
    """
    folder, found, names = tmp_path_factory.mktemp("graphs"), {}, {}
    for kind in TRACED:
        model = small(kind)
        for way in WAYS:
            name = f"{way} {kind}".replace(" ", "_")
            try:
                saved(model, way, folder / f"{name}.pt")
                names[name] = kind, way
            except Exception as failure:
                found[kind, way] = failure
    torch.save([inputs(rows, torch.float32) for rows in BATCHES], folder / "inputs.pt")
    subprocess.run([sys.executable, "-c", RELOADED, str(folder), *names], check=True, timeout=300)
    outputs = torch.load(folder / "found.pt")
    return found | {key: outputs[name] for name, key in names.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", TRACED)
def test_a_saved_graph_runs_where_loft_rs_is_not_and_for_any_batch(kind, way, reloaded):
    found, model = reloaded[kind, way], small(kind)
    if isinstance(found, Exception):
        raise found
    for rows, got in zip(BATCHES, found, strict=True):
        with torch.no_grad():
            assert error(got, model(inputs(rows, torch.float32)).double()) <= ROUNDING


@pytest.mark.parametrize("way", WAYS)
def test_a_graph_has_the_parameters_and_solves_for_them(way, tmp_path):
    model, x = small("cayley"), inputs(5, torch.float32)
    saved(model, way, tmp_path / "graph.pt")
    graph = torch.jit.load(tmp_path / "graph.pt") if way == "trace" else None
    graph = torch.export.load(tmp_path / "graph.pt").module() if graph is None else graph
    with torch.no_grad():
        for p in trained(model):
            p.add_(0.1)
        for name, p in graph.named_parameters():
            if "loft_theta" in name:
                p.add_(0.1)
        assert error(graph(x), model(x).double()) <= ROUNDING


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_whole_model_is_traced_with_its_gradients(placement):
    model, x = build("cayley", placement=placement), inputs(5, torch.float32)
    traced = torch.jit.trace(model, (inputs(3, torch.float32),))
    wanted = torch.autograd.grad(model(x).square().sum(), trained(model))
    found = torch.autograd.grad(traced(x).square().sum(), trained(model))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# -- torch.func ----------------------------------------------------------------------------------


class Problem:
    """A model as a function of what is trained. `at`: where; `loss(*thetas)`."""

    def __init__(self, model: nn.Module, x: torch.Tensor):
        self.model, self.x = model, x
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.at = tuple(p.detach().clone() for p in trained(model))
        self.along = tuple(
            torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype) for p in self.at
        )

    def output(self, *thetas: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        return functional_call(self.model, dict(zip(self.names, thetas, strict=True)), (self.x if x is None else x,))

    def loss(self, *thetas: torch.Tensor) -> torch.Tensor:
        return self.output(*thetas).square().sum()

    def slope(self, thetas: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """All first derivatives, by the fast path."""
        leaves = [theta.detach().requires_grad_() for theta in thetas]
        return torch.cat([g.flatten() for g in torch.autograd.grad(self.loss(*leaves), leaves)])

    def curvature(self, direction: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The Hessian times a direction, by central differences."""
        ends = [self.slope(tuple(a + s * d for a, d in zip(self.at, direction, strict=True))) for s in (STEP, -STEP)]
        return (ends[0] - ends[1]) / (2 * STEP)


def problem(kind: str, placement: str | None = None) -> Problem:
    return Problem(build(kind, dtype=torch.float64, placement=placement), inputs())


@pytest.mark.parametrize("kind, placement", CASES)
def test_func_maps_over_stacked_parameters_and_over_samples(kind, placement):
    p = problem(kind, placement)
    stacked = tuple(torch.stack([a, 1.1 * a, -a]) for a in p.at)
    for i, y in enumerate(vmap(p.output)(*stacked)):
        torch.testing.assert_close(y, p.output(*[s[i] for s in stacked]), rtol=1e-12, atol=1e-12)

    def of_one(thetas: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
        return p.output(*thetas, x=x.unsqueeze(0)).square().sum()

    each = vmap(grad(of_one), in_dims=(None, 0))(p.at, p.x)
    whole = p.slope(p.at)
    found = torch.cat([g.sum(0).flatten() for g in each])
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)
    wanted = torch.cat([d.flatten() for d in p.along]) @ whole
    torch.testing.assert_close(jvp(p.loss, p.at, p.along)[1], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_func_gives_the_hessian(kind):
    p = problem(kind)
    found = hessian(lambda theta: p.loss(theta, *p.at[1:]))(p.at[0]).reshape(p.at[0].numel(), -1)
    for i in range(min(3, len(found))):
        unit = torch.zeros_like(p.at[0])
        unit.view(-1)[i] = 1
        wanted = p.curvature((unit, *map(torch.zeros_like, p.at[1:])))[: len(found)]
        assert error(found[i], wanted) <= DIFFERENCES


# -- second derivatives --------------------------------------------------------------------------


@pytest.mark.parametrize("kind, placement", CASES)
def test_hessian_vector_products_are_right_or_refused_at_once(kind, placement):
    p = problem(kind, placement)
    wanted = p.curvature(p.along)
    with loft_rs.higher_derivatives():
        loss, products = torch.autograd.functional.hvp(p.loss, p.at, p.along)
    assert error(torch.cat([each.flatten() for each in products]), wanted) <= DIFFERENCES
    torch.testing.assert_close(loss, p.loss(*p.at), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="higher_derivatives"):
        torch.autograd.functional.hvp(p.loss, p.at, p.along)
    with pytest.raises(RuntimeError, match="higher_derivatives"):
        torch.autograd.grad(p.model(p.x).sum(), trained(p.model), create_graph=True)
    with pytest.raises(RuntimeError, match="higher_derivatives"):
        p.model(p.x.clone().requires_grad_()).sum().backward(create_graph=True)
    assert error(p.curvature(p.along), wanted) <= DIFFERENCES  # and first derivatives go on


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_checkpointed_model_all_that_computes_again_belongs_inside(kind):
    p = problem(kind)
    wanted = p.curvature(p.along)
    net(p.model).checkpointing = False
    leaves = [a.clone().requires_grad_() for a in p.at]
    with loft_rs.higher_derivatives():
        slopes = torch.autograd.grad(p.loss(*leaves), leaves, create_graph=True)
        projected = sum((slope * d).sum() for slope, d in zip(slopes, p.along, strict=True))
        products = torch.autograd.grad(projected, leaves)
    assert error(torch.cat([each.flatten() for each in products]), wanted) <= DIFFERENCES


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_alone_refuses_what_it_cannot_and_does_it_on_the_plain_path(kind):
    layer, x = net(build(kind, dtype=torch.float64)).blocks[0].wide, inputs()
    theta = layer.adapters["default"].theta
    with pytest.raises(RuntimeError, match="higher_derivatives"):
        torch.autograd.grad(layer(x).square().sum(), theta, create_graph=True)
    with loft_rs.higher_derivatives():
        (slope,) = torch.autograd.grad(layer(x).square().sum(), theta, create_graph=True)
        # The twin of a kind without a support multiplies its blocks by the library's own function.
        (wanted,) = torch.autograd.grad(exact_twin(layer)(x).square().sum(), theta, create_graph=True)
    assert error(slope, wanted) <= DIFFERENCES
    second, wanted = (torch.autograd.grad(each.square().sum(), theta)[0] for each in (slope, wanted))
    assert error(second, wanted) <= DIFFERENCES


def penalised(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A loss and the squared norm of its slope in x."""
    x = x.clone().requires_grad_()
    loss = model(x).square().mean()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + slope.square().sum()


@pytest.mark.parametrize("kind, placement", CASES)
def test_training_with_a_gradient_penalty(kind, placement):
    model, x = build(kind, dtype=torch.float64, placement=placement), inputs()
    optimiser, losses = torch.optim.AdamW(trained(model), lr=1e-2), []
    for _ in range(3):
        wanted = torch.autograd.grad(penalised(exact_twin(model), x), trained(model))
        optimiser.zero_grad()
        with loft_rs.higher_derivatives():
            loss = penalised(model, x)
        loss.backward()
        for p, want in zip(trained(model), wanted, strict=True):
            assert error(p.grad, want) <= DIFFERENCES
        optimiser.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    with pytest.raises(RuntimeError, match="higher_derivatives"):
        penalised(model, x)


@pytest.mark.parametrize("kind", ["cayley", "output", "tied", "hra"])
def test_the_plain_path_computes_what_the_fast_one_does(kind):
    model, x = build(kind), inputs(5, torch.float32)
    wanted = model(x)
    with loft_rs.higher_derivatives():
        found = model(x)
        with torch.no_grad():
            quiet = model(x)
    for got in (found, quiet, model(x)):
        assert error(got, wanted.double()) <= ROUNDING
    slopes = [torch.autograd.grad(y.square().sum(), trained(model)) for y in (found, wanted)]
    for got, want in zip(*slopes, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
