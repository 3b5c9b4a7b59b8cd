"""The float64 twin of an adapted model: every weight is recomputed from the raw tensors, in every
pass, with nothing kept.

`Block` and `Net` are the small models that the tests of a pass share: layers of one input, a layer
that may be skipped, checkpointing.
"""

from __future__ import annotations

import copy

import peft
import torch
from reference import exact_transform
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loft_rs import LoftConfig
from loft_rs.layer import AdaptedLinear
from loft_rs.layer.forward_pass import unwatch

WIDTH = 16


class Block(nn.Module):
    """q, k, v read one input; `wide` and `back` may be skipped, as an expert is that gets no
    token.
    """

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, w) for w in (WIDTH, 8, 8, WIDTH))
        self.wide, self.back = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.q(x) * torch.cat([self.k(x), self.v(x)], -1))
        return x if self.skip else x + self.back(torch.tanh(self.wide(x)))


class Net(nn.Module):
    """checkpointing: None, or `use_reentrant`."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.checkpointing: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.checkpointing is None or not torch.is_grad_enabled():
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)
        return x


LINEARS = ["q", "k", "v", "o", "wide", "back"]
SUPPORTED = {"r": 4, "support": "random"}
KINDS = {
    "cayley": lambda **o: LoftConfig(**SUPPORTED | o),
    "exp": lambda **o: LoftConfig(transform="exp", **SUPPORTED | o),
    "free": lambda **o: LoftConfig(transform="free", **SUPPORTED | o),
    "output": lambda **o: LoftConfig(side="output", **SUPPORTED | o),
    "tied": lambda **o: LoftConfig(tied=[["q", "k", "v"]], **SUPPORTED | o),
    "magnitudes": lambda **o: LoftConfig(transform="cayley+magnitudes", **SUPPORTED | o),
    "ranks": lambda **o: LoftConfig(rank_pattern={"k": 2, "wide": 6}, **SUPPORTED | o),
    "oft": lambda **o: LoftConfig.oft(4, **o),
    "boft": lambda **o: LoftConfig.boft(4, 2, **o),  # with a scale of every output
    "hra": lambda **o: LoftConfig.hra(4, **o),
    "psoft": lambda **o: LoftConfig.psoft(4, **o),
}


def build(kind: str = "cayley", *, dtype: torch.dtype = torch.float32, placement: str | None = None, **options):
    """A PEFT model on a `Net` whose adapter is away from the identity."""
    torch.manual_seed(0)
    config = KINDS[kind](target_modules=LINEARS, init_weights=False, **options)
    model = peft.get_peft_model(Net().to(dtype), config)
    for layer in layers_of(model):
        layer.placement = placement
        for adapter in layer.adapters.values():
            if adapter.scale is not None:
                nn.init.normal_(adapter.scale, std=0.1)
    return model


def layers_of(model: nn.Module) -> list[AdaptedLinear]:
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def net(model: nn.Module) -> Net:
    return model.base_model.model


class ExactLinear(nn.Module):
    """What a layer computes, from the definitions, in float64; differentiable in the layer's own
    parameters.
    """

    def __init__(self, layer: AdaptedLinear):
        super().__init__()
        self.layers = [layer]  # no child: the twin has no parameters of its own

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self.layers
        base = layer.get_base_layer()
        weight = (base.weight if layer.original is None else layer.original).double()
        for adapter in layer.applied() or [layer.adapters[name] for name in getattr(layer, "merged_adapters", [])]:
            weight = rotated(weight, adapter)
        return nn.functional.linear(x, weight, None if base.bias is None else base.bias.double())


def rotated(weight: Tensor, adapter) -> Tensor:
    """W0 R or R W0, of a refreshed adapter W0 R_f R or R R_f W0, with the scale of every output."""
    theta = adapter.theta.double()
    delta = basis = None
    if adapter.kind.has_support:
        basis = adapter.support.double()
        values, vectors = torch.linalg.eigh(basis.mT @ basis)
        root = (vectors * values.rsqrt()) @ vectors.mT
        r = basis.shape[1]
        delta = root @ (exact_transform(adapter.transform.name, theta, r) - torch.eye(r, dtype=torch.float64)) @ root
    elif adapter.transform is not None:
        b = adapter.transform.rank(theta.shape)
        flat = theta.reshape(-1, *adapter.transform.parameter_shape(b))
        exact = torch.stack([exact_transform(adapter.transform.name, each, b) for each in flat])
        delta = (exact - torch.eye(b, dtype=torch.float64)).reshape(*theta.shape[:2], b, b)
    factor = adapter.kind.factor(theta, basis, delta, adapter.width)
    factors = [factor] if adapter.frozen_factor is None else [adapter.frozen_factor, factor]
    for each in factors:
        if hasattr(each, "basis"):
            p, e = each.basis.double(), each.delta.double()
            turned = (weight @ p) @ e @ p.mT if adapter.side == "input" else p @ e @ (p.mT @ weight)
            weight = weight + turned
        else:
            weight = each.adjoint(weight)
    return weight if adapter.scale is None else weight * (1 + adapter.scale.double()).unsqueeze(1)


def exact_twin(model: nn.Module) -> nn.Module:
    """The float64 twin of an adapted model or module; it reads the model's tensors as they are when
    it is called.
    """
    layers = {id(layer): layer for layer in layers_of(model)}
    twin = copy.deepcopy(model, {key: ExactLinear(layer) for key, layer in layers.items()})
    for module in twin.modules():
        unwatch(module)
        if isinstance(module, Net):
            module.checkpointing = None
    for module in twin.modules():  # what has nothing to do with the adapter computes in float64
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_floating_point():
                    held[name] = type(tensor)(tensor.double())
    return twin


def error(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted||."""
    got, wanted = got.detach(), wanted.detach()
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def results(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and the gradients of what is trained: None where a layer was not called."""
    for p in model.parameters():
        p.grad = None
    y = model(x.detach().requires_grad_())  # which a reentrant checkpoint needs
    y.square().sum().backward()
    return y.detach(), [None if p.grad is None else p.grad.clone() for p in trained(model)]


def assert_exact(model: nn.Module, x: Tensor, tolerance: float, twin: nn.Module | None = None) -> None:
    """A pass with and one without gradients, and all gradients, are what the twin computes."""
    twin = exact_twin(model) if twin is None else twin
    y, grads = results(model, x)
    parameters = trained(model)
    wanted = twin(x.detach().double().requires_grad_())
    exact = torch.autograd.grad(wanted.square().sum(), parameters, allow_unused=True)
    with torch.no_grad():
        quiet = model(x)
    assert error(y, wanted.detach()) <= tolerance
    assert error(quiet, wanted.detach()) <= tolerance
    scale = max(float(g.norm()) for g in exact if g is not None)
    for got, want in zip(grads, exact, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert float((got.double() - want.double()).norm()) <= tolerance * max(float(want.norm()), 0.1 * scale)
