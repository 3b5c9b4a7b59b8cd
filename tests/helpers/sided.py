"""Models that tell their sides apart."""

from __future__ import annotations

import peft
import torch
from reference import make_llama, train
from torch import nn

from loft_rs import LoftConfig
from loft_rs.tuner.adapters import adapted_layers

SIDES = ("input", "output")


def build(base=None, **options):
    options = {"target_modules": "all-linear", "r": 4, "support": "skewgrad", "side": "auto"} | options
    return peft.get_peft_model(base or make_llama(), LoftConfig(**options))


def trained_from(model):
    train(model)
    return model


def sides(model):
    return {name: layer.adapters["default"].side for name, layer in adapted_layers(model)[1].items()}


def saved(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


class OneSided(nn.Module):
    """Two layers whose G is given: W0^T G of `a` is symmetric, so that only its output can be
    turned, and G W0^T of `b`, only its input.
    """

    def __init__(self, a=(12, 8), b=(8, 12)):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.a, self.b = nn.Linear(a[1], a[0]), nn.Linear(b[1], b[0], bias=False)
        self.gradients = {}
        for name, layer in (("a", self.a), ("b", self.b)):
            w = layer.weight.data = draw(*layer.weight.shape) / 3
            flat = w if name == "a" else w.mT  # more rows than columns, or square
            symmetric = draw(flat.shape[1], flat.shape[1])
            outside = draw(*flat.shape)
            outside -= flat @ torch.linalg.lstsq(flat, outside).solution
            g = torch.linalg.pinv(flat).mT @ (symmetric + symmetric.mT) + outside  # flat^T g is symmetric
            self.gradients[name] = g if name == "a" else g.mT
        self.double()

    def forward(self, scale):
        total = 0
        for name, gradient in self.gradients.items():
            layer = getattr(self, name)
            x = torch.eye(gradient.shape[1], dtype=gradient.dtype)
            total = total + (layer(x) * gradient.mT.to(x)).sum()
        return {"loss": total * scale.mean()}


BATCHES = [{"scale": torch.ones(1)}, {"scale": torch.full((1,), 3.0)}]


def one_sided(sizes=None, **options):
    return build(OneSided(**sizes or {}), **{"target_modules": ["a", "b"]} | options)
