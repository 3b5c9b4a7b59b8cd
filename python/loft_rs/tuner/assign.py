"""Supports that the user gives to a model that is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..support.custom import custom_basis
from .adapters import adapted_layers, note_sides, owners, require_untrained
from .supports import match_supports
from .undo import unchanged_on_failure

__all__ = ["set_support"]


def set_support(model: torch.nn.Module, supports: Mapping[str, Any], adapter_name: str | None = None) -> None:
    """Store supports in a built model whose adapter is untrained.

    supports: module name -> `Support`, or array or tensor (n, r) (custom: re-orthonormalised).
    Names are full module names or unique suffixes. Every adapted module needs one, of the rank and
    the side the adapter was built with; under `side="auto"` a `Support` brings its side, which is
    kept, to a module that has none yet. ValueError lists what is missing, ambiguous or does not
    fit, before anything is changed.

    >>> model = get_peft_model(load_base(), LoftConfig(r=4, target_modules=["o_proj"]))
    >>> gradients = {f"{i}.self_attn.o_proj": torch.randn(32, 32) for i in (0, 1)}
    >>> loft_rs.set_support(model, loft_rs.select_support(gradients, 4))
    """
    adapter, layers = adapted_layers(model, adapter_name)
    require_untrained(layers, adapter, "set_support")
    layers = owners(layers, adapter)
    matched = match_supports(supports, layers)
    bases, sides, problems = {}, {}, []
    for name, support in matched.items():
        bases[name], layer = custom_basis(support), layers[name]
        side = layer.adapters[adapter].side
        if layer.adapters[adapter].config.side_of(name) == "auto" and not layer.adapters[adapter].frozen_rank:
            side = getattr(support, "side", side)
        sides[name], expected = side, (layer.support_width(side), layer.adapters[adapter].rank)
        if bases[name].shape != expected:
            problems.append(f"{name}: expected {expected}, got {bases[name].shape}")
        elif getattr(support, "side", side) != side:
            problems.append(f"{name}: expected one for the {side} side, got one for the {support.side} side")
    if problems:
        raise ValueError("supports do not fit: " + "; ".join(problems[:20]))
    with unchanged_on_failure(layers, adapter):
        for name, side in sides.items():
            layers[name].adapters[adapter].set_side(side)
        note_sides(layers, adapter)
        for name, basis in bases.items():
            energy = float(getattr(matched[name], "energy", float("nan")))
            layers[name].adapters[adapter].set_basis(basis, energy)
