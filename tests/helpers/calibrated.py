"""Small models, dense float64 gradients and spans, that the tests of calibration share."""

from __future__ import annotations

import numpy as np
import peft
import torch
from reference import make_llama

from loft_rs import LoftConfig
from loft_rs.support.methods import OPTIONS


def build(base=None, **options):
    return peft.get_peft_model(base or make_llama(), LoftConfig(**{"target_modules": "all-linear", "r": 6} | options))


def with_options(support, **options):
    """The support of that name, with `passes` and `oversampling`."""
    return OPTIONS[support](**options)


def dense_gradients(batches):
    """(weights, gradients, inputs) of every linear layer in float64, over all batches, through
    ordinary weight gradients.
    """
    model = make_llama().double()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    inputs, outputs = {n: [] for n in layers}, {n: [] for n in layers}

    def keep(name, x, y):
        inputs[name].append(x.detach().flatten(0, -2))
        outputs[name].append(y.detach().flatten(0, -2))

    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, x, y, name=name: keep(name, x[0], y))
    for batch in batches:
        model(**batch).loss.backward()
    return (
        {n: m.weight.detach() for n, m in layers.items()},
        {n: m.weight.grad for n, m in layers.items()},
        {n: torch.cat(v) for n, v in inputs.items()},
        {n: torch.cat(v) for n, v in outputs.items()},
    )


def skew_of(weight, gradient, side):
    product = weight.mT @ gradient if side == "input" else gradient @ weight.mT
    return (product - product.mT) / 2


def span_energy(basis, matrix):
    return float(torch.linalg.norm(basis.mT @ matrix @ basis) ** 2)


def overlap(one, other):
    """The mean over the layers of ||P^T P'||_F^2 / r: 1 where the spans are equal."""
    spans = [(one.supports[name].basis, other.supports[name].basis) for name in one.supports]
    return np.mean([np.linalg.norm(p.T @ q) ** 2 / p.shape[1] for p, q in spans])


class Perceptron(torch.nn.Module):
    """Two layers around a ReLU that may work in place, a mean loss, and a layer that is never
    run.
    """

    def __init__(self, inplace=False, loss_factor=1.0, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.unused = (torch.nn.Linear(n, m) for n, m in ((24, 32), (32, 24), (8, 8)))
        self.relu, self.dropout, self.loss_factor = torch.nn.ReLU(inplace), torch.nn.Dropout(dropout), loss_factor

    def forward(self, x):
        y = self.b(self.relu(self.a(self.dropout(x))))
        return {"loss": (y.float() - 1).square().mean() * self.loss_factor}


X = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))


def perceptron(*targets, base=None, **options):
    return build(base or Perceptron(), target_modules=list(targets) or ["a", "b"], r=4, **options)
