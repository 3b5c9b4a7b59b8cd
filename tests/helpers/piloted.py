"""Pilots of small models, and what they learn."""

from __future__ import annotations

import peft
import torch
from calibrated import Perceptron
from hypothesis import given
from hypothesis import strategies as st
from reference import make_llama
from torch import nn

from loft_rs import LoftConfig, Pilot
from loft_rs.calibration.pilot import LowRankChange
from loft_rs.layer import AdaptedLinear
from loft_rs.transform.transforms import get_transform

SHORT = Pilot(steps=3)


def build(base=None, **options):
    options = {"target_modules": "all-linear", "r": 6, "support": SHORT} | options
    return peft.get_peft_model(base or make_llama(), LoftConfig(**options))


def perceptron(base=None, **options):
    return build(base or Perceptron(), **{"target_modules": ["a", "b"], "r": 4} | options)


def linear(n, m, r, side="input", dtype=torch.float32, transform="free"):
    layer = AdaptedLinear(nn.Linear(n, m, dtype=dtype))
    layer.add_adapter("default", r, get_transform(transform), side)
    return layer


def learnt_change(n, heights, rank, side="input", seed=0, transform="free"):
    """(the change of layers, tied if there are several, as if it had been learnt, and B A in
    float64, dense); the pilot's rank is `rank`, the adapter's too, or the largest that fits."""
    torch.manual_seed(seed)
    layers = [linear(n, m, min(rank, n, *heights), side, transform=transform) for m in heights]
    if len(layers) > 1:
        layers[0].adapters["default"].tie([layer.adapters["default"] for layer in layers[1:]])
    draw = torch.Generator().manual_seed(seed)
    change = LowRankChange(layers[0], "default", rank, draw, torch.device("cpu"))
    with torch.no_grad():
        for learnt in change.learnt:
            learnt.normal_(std=1e-3, generator=draw)
    pairs = zip(change.learnt, change.drawn, strict=True)
    return change, torch.cat([drawn.double() @ learnt.double().mT for learnt, drawn in pairs]).detach()


changes = given(
    n=st.integers(2, 40),
    heights=st.lists(st.integers(2, 40), min_size=1, max_size=3),
    rank=st.integers(1, 12),
    side=st.sampled_from(["input", "output"]),
    seed=st.integers(0, 2**31),
)
