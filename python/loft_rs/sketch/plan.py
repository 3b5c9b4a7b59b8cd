"""Which sketch a layer needs, and how wide it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..support.support import Support
from .activation import ActivationSketch
from .base import Plan, Sketch
from .gradsvd import GradientSketch
from .order import MomentSketch
from .skewgrad import SkewSketch

if TYPE_CHECKING:
    from ..layer import AdaptedLinear

__all__ = ["OVERSAMPLING", "SINGLE_OVERSAMPLING", "SKETCHES", "plan_for", "sketch_for"]


OVERSAMPLING = 16
# Of a single pass. MiniLM and SmolLM2-135M want so many for 0.97 of the optimum
# (bench/calibration.py), at low ranks and high ones.
SINGLE_OVERSAMPLING = 192


def plan_for(
    method: str,
    layer: AdaptedLinear,
    adapter: str,
    *,
    order: str,
    seed: int,
    side: str | None = None,
    rank: int | None = None,
    oversampling: int | None = None,
    single: bool = False,
    loss_scale: float = 1.0,
) -> Plan:
    """The plan of one layer. side, rank: default the adapter's. oversampling: columns beyond it;
    default 16, or 192 for a single pass.
    """
    side = side or layer.adapters[adapter].side
    rank = layer.adapters[adapter].rank if rank is None else rank
    width, other = layer.support_width(side), "output" if side == "input" else "input"
    heights = tuple(each.support_width(other) for each in layer.adapters[adapter].tied_layers)
    if oversampling is None:
        oversampling = SINGLE_OVERSAMPLING if single else OVERSAMPLING
    # A single gradsvd pass samples the other side's rows: a sketch as wide as the layer leaves
    # nothing to its second pass, but not here.
    most = sum(heights) if single and method == "gradsvd" else width
    columns = min(rank + rank % 2 + oversampling, most)
    return Plan(method, side, order, seed, rank, width, heights, columns, single, loss_scale)


def sketch_for(
    plan: Plan,
    layer: AdaptedLinear,
    adapter: str,
    home: torch.device | str | None = None,
    chosen: Support | None = None,
) -> Sketch:
    """A fresh sketch of one layer for a support that sketches choose, or for the order of one that
    is chosen already.

    home: the device that holds it between batches; None: the layer's own. chosen: default the one
    the layer has.
    """
    held = layer.adapters[adapter].support
    home, dtype = torch.device(home or held.device), torch.promote_types(held.dtype, torch.float32)
    kind = SKETCHES.get(plan.method)
    if kind is None:
        basis, facts = held, {"energy": layer.adapters[adapter].energy}
        if chosen is not None:
            basis = torch.from_numpy(chosen.basis)
            facts = {name: getattr(chosen, name) for name in ("energy", "energy_stderr", "values", "gap")}
        return MomentSketch(plan, home, dtype, basis.to(home, dtype), facts, layer.adapters[adapter].first_half)
    return kind(plan, home, dtype)


SKETCHES: dict[str, type[Sketch]] = {
    "skewgrad": SkewSketch,
    "gradsvd": GradientSketch,
    "activation": ActivationSketch,
}
