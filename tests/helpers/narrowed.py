"""The layers of a narrowed adapter."""

from __future__ import annotations

from loft_rs.tuner.adapters import adapted_layers


def layers_of(model, adapter=None):
    return adapted_layers(model, adapter)[1]
