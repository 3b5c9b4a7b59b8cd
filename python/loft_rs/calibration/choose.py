"""From sketches to supports: ranks under a budget, and layers that no batch reached."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from ..linalg import orthonormalize
from ..sketch.base import Sketch
from ..support.blind import blind_support
from ..support.budget import Budget
from ..support.support import Support
from ..tuner.config import DATA_FREE_SUPPORTS, LoftConfig
from ..tuner.layer import Linear
from .sides import Place, by_module, share_both

__all__ = []


def shared_ranks(
    sketches: Mapping[Place, Sketch],
    layers: Mapping[str, Linear],
    budget: Budget,
    share_by: str,
    energy: Callable[[Place, Sketch, int], float],
) -> dict[Place, int]:
    """The place and the rank of every layer, from the spectra that the sketches have found."""
    reached = by_module(sketches)
    if silent := [name for name in layers if name not in reached]:
        raise ValueError(
            f"budget: no calibration batch reached {', '.join(silent)}; exclude these modules in the LoftConfig"
        )
    spectra = {place: sketch.spectrum() for place, sketch in sketches.items()}
    if share_by == "reproducible":
        spectra = {place: sketch.evidence.reproduced(spectra[place]) for place, sketch in sketches.items()}
        if any(not np.isfinite(each).all() for each in spectra.values()):
            raise ValueError("share_by='reproducible' needs two batches or more that reach every layer")
    trial = {place.module: sketch.rank for place, sketch in sketches.items()}
    return share_both(spectra, budget, trial, lambda place, rank: energy(place, sketches[place], rank))


def unreached_supports(layers: Mapping[str, Linear], config: LoftConfig, adapter: str) -> dict[str, Support]:
    """Supports for layers that no calibration batch reached: the one a layer has, or a random one, so that training can go on."""
    supports = {}
    for name, layer in layers.items():
        side = layer.adapters[adapter].side
        supports[name] = blind_support(
            layer.support_width(side), layer.adapters[adapter].rank, method="random", side=side, seed=config.seed
        )
        if layer.adapters[adapter].ready:
            held = layer.adapters[adapter].support.double().cpu().numpy()
            supports[name] = replace(
                supports[name],
                basis=orthonormalize(held).astype("float32"),
                energy=layer.adapters[adapter].energy,
                method=config.support if config.support in DATA_FREE_SUPPORTS else "custom",
            )
    for what, ready in (("their supports are left as they were", True), ("a random support was put there", False)):
        names = [name for name, layer in layers.items() if layer.adapters[adapter].ready is ready]
        if names:
            warnings.warn(
                f"no calibration batch gave a gradient or an activation to {', '.join(names)}: {what}; exclude these modules "
                "from target_modules if they are never used",
                stacklevel=3,
            )
    return supports
