"""Supports for the layers of a model: chosen without data, read from a file, matched to modules by
name.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..layer.adapter import AdapterHolder
from ..layer.merging import dense_or_raise, rotated_weight
from ..support.blind import blind_support
from ..support.files import load_supports
from ..support.methods import SIDES
from ..support.select import select_support
from ..support.support import Support

if TYPE_CHECKING:
    from .config import LoftConfig

__all__ = ["choose_supports", "load_named_supports", "match_supports"]


def choose_supports(layers: Mapping[str, AdapterHolder], config: LoftConfig, adapter: str) -> dict[str, Support]:
    """Select `principal`, `random` or `coordinate` supports for `layers`, or read them from the
    config's file; store and return them.

    Of a refreshed adapter: those of its current weight, and a fresh draw of a random one.
    """
    if config.support_file:
        supports = match_supports(load_named_supports(config.support_file), layers)
    elif config.method == "principal":
        weights = {name: _stacked(layer.adapters[adapter].tied_layers, adapter) for name, layer in layers.items()}
        ranks = {name: layer.adapters[adapter].rank for name, layer in layers.items()}
        supports = {}
        for side in SIDES:
            if own := {name: rank for name, rank in ranks.items() if layers[name].adapters[adapter].side == side}:
                some = {name: weights[name] for name in own}
                found = select_support(None, own, method="principal", weights=some, side=side, seed=config.seed)
                assert isinstance(found, dict)
                supports |= found
    else:
        supports = {}
        for name, layer in layers.items():
            side, rank, seed = layer.adapters[adapter].side, layer.adapters[adapter].rank, _seed(layer, config, adapter)
            width = layer.support_width(side)
            supports[name] = blind_support(width, rank, method=config.method, side=side, seed=seed)
    for name, layer in layers.items():
        layer.adapters[adapter].set_basis(supports[name].basis, supports[name].energy)
    return {name: supports[name] for name in layers}


def _seed(layer: AdapterHolder, config: LoftConfig, adapter: str) -> int:
    """The config's seed; where there is a support already, one that depends on it, so that a
    resumed run draws what the run would have.
    """
    held = layer.adapters[adapter].support
    return config.seed + (zlib.crc32(held.double().cpu().numpy().tobytes()) if layer.adapters[adapter].ready else 0)


def _stacked(tied: list[AdapterHolder], adapter: str) -> torch.Tensor:
    """The weight of a layer, W0 R_f; of tied ones, which read the same input, all of theirs, one
    above the other.
    """
    weights = [dense_or_raise(layer, "support='principal'").detach() for layer in tied]
    if tied[0].adapters[adapter].frozen_rank:
        weights = [rotated_weight(layer, [layer.adapters[adapter]]) for layer in tied]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def load_named_supports(path: str) -> dict[str, Any]:
    """The supports of a file by module name; ValueError where it holds a single one, which has
    none.
    """
    supports = load_supports(path)
    if not isinstance(supports, dict):
        raise ValueError(f"{path} holds one support without a module name; save a mapping of module names to supports")
    return supports


def match_supports(supports: Mapping[str, Any], names: Mapping[str, Any] | list[str]) -> dict[str, Any]:
    """The support of every module in `names`: by its full name, or else by the one key that either
    ends with, dot by dot.

    ValueError lists the modules without a support, the ambiguous ones, and the supports that match
    no module.
    """
    matched, problems, used = {}, [], set()
    for name in names:
        keys = (
            [name]
            if name in supports
            else [k for k in supports if f".{name}".endswith(f".{k}") or f".{k}".endswith(f".{name}")]
        )
        if len(keys) == 1:
            matched[name] = supports[keys[0]]
            used.add(keys[0])
        else:
            problems.append(f"{name}: {'no support' if not keys else f'matched by {sorted(keys)}'}")
    problems += [f"{key}: no such adapted module" for key in supports if key not in used]
    if problems:
        raise ValueError("supports must name every adapted module once: " + "; ".join(problems[:20]))
    return matched
