"""The memory that calibration takes above the frozen training step: known before it starts, and
kept under a limit by groups of layers.

    sketches      the sums of a pass and the basis Q, in float32 (float64 for a float64 base), and Omega, one for all layers of a width;
                  of a pilot the factors of all layers' changes, with their gradients and Adam's
                  state
    activations   what a tap keeps from its layer's forward to its backward: X, once for all layers that read it (output side Y0; for
                  gradsvd X, in pass 2 the N x k product; a pilot both); of blocks that are
                  checkpointed only one block's
    workspace     the products of one layer at a time; of a pilot in halves what partners take, if that is more

Sizes, not estimates: sketches on the meta device are asked for the first two, with the shapes that
one forward pass over the largest batch shows. It is a bound: what the model itself keeps for its
backward, X among it perhaps, is not taken off.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .._checks import is_int
from ..layer import AdaptedLinear
from ..sketch.base import Plan, Sketch
from ..sketch.plan import sketch_for
from ..sketch.tap import output_product
from .pilot import LowRankChange
from .sides import ModuleSide

__all__ = ["Footprint", "MemorySurvey", "byte_count", "checkpointed_blocks"]

_UNITS = {"": 1, "b": 1} | {f"{p}{i}b": (1024 if i else 1000) ** n for n, p in enumerate("kmgt", 1) for i in ("i", "")}


@dataclass(frozen=True)
class Footprint:
    """Bytes on the model's device above the frozen training step, at the pass and group of layers
    that take most.

    `activations` and `workspace` are None with a `train_step`, of whose batches nothing is known
    beforehand. Every pass runs once a group.
    """

    sketches: int
    activations: int | None
    workspace: int | None
    groups: int = 1

    @property
    def total(self) -> int:
        return self.sketches + (self.activations or 0) + (self.workspace or 0)

    def __str__(self) -> str:
        parts = [("sketches", self.sketches), ("activations", self.activations), ("workspace", self.workspace)]
        known = ", ".join(f"{name} {_shown(size)}" for name, size in parts if size is not None)
        return f"{_shown(self.total)} above the frozen step ({known}), {self.groups} group{'s' * (self.groups > 1)}"


def _shown(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def byte_count(memory: int | str | None) -> int | None:
    """Bytes of an integer or of a string such as "512MiB" or "2 GB". ValueError for anything else,
    or nothing.
    """
    if memory is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", memory.strip().lower()) if isinstance(memory, str) else None
    size = int(memory) if is_int(memory) else 0
    if found and found[2] in _UNITS:
        size = int(float(found[1]) * _UNITS[found[2]])
    if size < 1:
        raise ValueError(
            f"memory must be None, a positive number of bytes or a string such as '512MiB', got {memory!r}"
        )
    return size


def checkpointed_blocks(model: nn.Module) -> list[Any]:
    """The transformers blocks for which gradient checkpointing is switched on."""
    return [
        module
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
        and any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)
    ]


class MemorySurvey:
    """What each layer will hold in each pass. `tap` is put into the layers for one forward pass,
    which shows their shapes.
    """

    def __init__(
        self,
        plans: Mapping[ModuleSide, Plan],
        model: nn.Module,
        layers: Mapping[ModuleSide, AdaptedLinear],
        adapter: str,
        offload: bool,
        changes: Mapping[ModuleSide, LowRankChange],
    ):
        self.layers, self.offload, self.seen, self.pilot = layers, offload, False, bool(changes)
        first = {name: sketch_for(plans[name], layer, adapter, "meta") for name, layer in layers.items()}
        self.passes: list[Mapping[ModuleSide, Sketch | LowRankChange]] = [changes, first] if changes else [first]
        if any(sketch.basis is None and not sketch.plan.single for sketch in first.values()):
            second = {name: sketch_for(plans[name], layer, adapter, "meta") for name, layer in layers.items()}
            for sketch in second.values():
                sketch.start_second_pass(sketch.zeros(sketch.plan.width, sketch.columns))
            self.passes.append(second)
        blocks = checkpointed_blocks(model)
        self.block = {id(module): i for i, block in enumerate(blocks) for module in block.modules()}
        # By pass: layer -> {tensor: (its block or None, bytes)}; of all passes: layer -> bytes.
        self.kept: list[dict[ModuleSide, dict[int, tuple[int | None, int]]]] = [defaultdict(dict) for _ in self.passes]
        self.workspace: dict[ModuleSide, int] = defaultdict(int)
        self.inputs = WeakIdKeyDictionary()  # each X while it lives -> its number
        self.count = 0

    def tap(self, names: list[ModuleSide], adapter: str):
        """Of the sketches of these names, all of the one layer that is tapped."""

        def run(layer: AdaptedLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = layer.at_identity(x, adapter, *args, **kwargs)
            for name in names:
                self._note(name, layer, x, y)
            return y

        return run

    def _note(self, name: ModuleSide, layer: AdaptedLinear, x: Tensor, y: Tensor) -> None:
        self.seen = True
        self.count += 1
        number = self.inputs.setdefault(x, self.count)
        shape = x.detach().to("meta")
        for sketches, kept in zip(self.passes, self.kept, strict=True):
            sketch = sketches[name]
            held = sketch.on_forward(shape, None if sketch.tap_input else output_product(layer, y.detach()).to("meta"))
            for each in held if isinstance(held, list) else [held] if held is not None else []:
                shared = each is shape or each._base is shape
                kept[name][number if shared else -self.count] = (self.block.get(id(layer)), each.nbytes)
            taken = sketch.workspace(x.shape[:-1].numel(), x.dtype, x.device.type, self.offload)
            self.workspace[name] = max(self.workspace[name], taken)

    def footprint(self, names: list[ModuleSide]) -> Footprint:
        """Of these layers together, in the pass that takes most."""
        return max((self._of_pass(i, names) for i in range(len(self.passes))), key=lambda footprint: footprint.total)

    def _of_pass(self, i: int, names: list[ModuleSide]) -> Footprint:
        sketches = [self.passes[i][name] for name in names]
        omegas = {id(drawn): drawn.nbytes for sketch in sketches for drawn in sketch.gaussians()}
        held = 0 if self.offload else sum(sketch.held() for sketch in sketches) + sum(omegas.values())
        if not self.seen:
            return Footprint(held, None, None)
        by_block: dict[int | None, int] = defaultdict(int)
        for block, size in {key: kept for name in names for key, kept in self.kept[i][name].items()}.values():
            by_block[block] += size
        activations = by_block.pop(None, 0) + max(by_block.values(), default=0)
        return Footprint(held, activations, max(self.workspace[name] for name in names))

    def groups(self, limit: int | None) -> tuple[list[list[ModuleSide]], Footprint]:
        """The layers in as few groups of neighbours as the limit allows, and what the largest
        takes. ValueError where one, or the pilot of all, is too much."""
        bound = math.inf if limit is None else limit
        whole = limit is None or self.pilot
        groups: list[list[ModuleSide]] = [list(self.layers)] if whole else []
        if self.pilot and (needed := self.footprint(groups[0])).total > bound:
            raise ValueError(
                f"memory={limit} bytes is too little for a pilot, which trains all layers at once: {needed}; give {needed.total} bytes or "
                "more, smaller batches, or a Pilot of a lower rank"
            )
        for name in () if whole else self.layers:
            if groups and self.footprint([*groups[-1], name]).total <= bound:
                groups[-1].append(name)
                continue
            alone = self.footprint([name])
            if alone.total > bound:
                raise ValueError(
                    f"memory={limit} bytes is too little for layer {name} alone: {alone}; give {alone.total} bytes or more, smaller "
                    "batches, or offload=True"
                )
            groups.append([name])
        worst = max((self.footprint(group) for group in groups), key=lambda footprint: footprint.total)
        return groups, Footprint(worst.sketches, worst.activations, worst.workspace, len(groups))
