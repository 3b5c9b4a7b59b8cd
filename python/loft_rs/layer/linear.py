"""Layers: a frozen linear layer and its rotations, y = x (W0 R)^T + b or y = x (R W0)^T + b, in
LOFT's own case R = I + P E P^T.

`AdaptedLinear` holds its adapters' tensors; the PEFT tuner (`tuner/layer.py`) and the plain-PyTorch
`nn.LoftLinear` are both it, so there is one path to every result. `adapter.py` says what an adapter
is, `placement.py` how the output is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._format import SLOTS, UNKNOWN_ENERGY
from .._torch import HALF
from ..support.methods import SIDES
from ..transform.transforms import Transform
from . import placement
from .adapter import AdapterHolder, LayerAdapter
from .base_layer import feature_sizes, innermost
from .containers import BufferSlot, ParameterSlot
from .kinds import Kind, SubspaceKind

__all__ = ["AdaptedLinear"]


_SUPPORTED = SubspaceKind()


class AdaptedLinear(AdapterHolder):
    """A frozen linear layer and its LOFT adapters, by name.

    State: the tensors of `SLOTS`, each in a container `loft_<slot>` by adapter name. Everything
    else is derived from these and the base weight.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.in_features, self.out_features = feature_sizes(innermost(base_layer))
        self.base_layer = base_layer
        for slot in SLOTS:
            self.add_module(slot.key, ParameterSlot() if slot.trained else BufferSlot())
        self.adapters = {}
        self.original = None
        self.tap = self.placement = self.root = None
        self.replica_of = None
        self.register_load_state_dict_post_hook(_settle)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"root": None}

    def _replicate_for_data_parallel(self) -> AdaptedLinear:
        replica = super()._replicate_for_data_parallel()
        replica.replica_of, replica.adapters = self, {}
        for name, adapter in self.adapters.items():
            twin = replica.adapters[name] = LayerAdapter.__new__(LayerAdapter)
            twin.__dict__.update(adapter.__getstate__() | {"layer": replica})
            twin.members = [twin if member is adapter else member for member in adapter.members]
        return replica

    # -- adapters ---------------------------------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        rank: int,
        transform: Transform | None,
        side: str = "input",
        *,
        kind: Kind = _SUPPORTED,
        output_scale: bool = False,
        movable: bool = False,
        seed: int = 0,
        identity: bool = True,
    ) -> LayerAdapter:
        """Add an adapter at the identity (or, for tests, at a small random rotation), its support,
        if it has one, unset.

        transform: None for a kind without one. output_scale: with a trained factor for every
        output, W = diag(1 + s) W0 R. movable: `set_side` may change the side, so the state holds
        it. seed: of what starts at random.
        """
        if side not in SIDES:
            raise ValueError(f"side must be 'input' or 'output', got {side!r}")
        own, other = self.support_width(side), self.support_width("output" if side == "input" else "input")
        if rank < 1 or (fitted := kind.fit(rank, own, other)) != rank:
            nearest = "it must be at least 1" if rank < 1 else f"the nearest that does is {fitted}"
            raise ValueError(f"rank {rank} does not fit this layer of {own} by {other} features: {nearest}")
        device, dtype = self.support_device_dtype()
        trained = torch.float64 if dtype == torch.float64 else torch.float32
        theta = kind.theta(transform, own, rank, seed, identity)
        tensors: dict[str, Tensor] = {"theta": theta.to(device, trained)}
        if output_scale:
            tensors["scale"] = torch.zeros(self.out_features, dtype=trained, device=device)
        if kind.has_support:
            tensors["support"] = torch.zeros(own, rank, dtype=dtype, device=device)
            tensors["energy"] = torch.full((), UNKNOWN_ENERGY, dtype=torch.float32, device=device)
        if movable:
            tensors["output_side"] = torch.tensor(float(side == "output"), device=device)
        adapter = LayerAdapter(self, name, kind, transform, side)
        for slot in SLOTS:
            if slot.name in tensors:
                tensor = tensors[slot.name]
                adapter.container(slot)[name] = nn.Parameter(tensor) if slot.trained else tensor
        self.adapters[name] = adapter
        return adapter

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter and its tensors."""
        for slot in SLOTS:
            container = getattr(self, slot.key)
            if name in container:
                del container[name]
        self.adapters.pop(name, None)

    def has_adapter(self, name: str) -> bool:
        return name in self.adapters

    @property
    def loft_device(self) -> torch.device:
        return self.support_device_dtype()[0]

    def support_device_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where a new support of this layer lives, and in which dtype."""
        base = self.get_base_layer()
        weight = getattr(base, "weight", None)
        weight = next(base.parameters()) if weight is None else weight
        dtype = getattr(base, "compute_dtype", None) or weight.dtype
        return weight.device, dtype if dtype in (*HALF, torch.float64) else torch.float32

    def at_identity(self, x: Tensor, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """The layer with the transform at the identity, as `calibrate` sees it: the base layer, and
        what `refresh` has frozen.
        """
        adapter = self.adapters[name]
        return placement.apply(self, [adapter] if adapter.frozen_rank else [], x, *args, **kwargs)

    # -- state ------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLinear:
        super()._apply(fn, recurse)
        for adapter in self.adapters.values():
            adapter.moved_elsewhere()
        return self

    def train(self, mode: bool = True) -> AdaptedLinear:
        for adapter in self.adapters.values():
            adapter.forget_products()
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for key in self.loft_energy.keys():  # as files of earlier versions hold it
            held = state_dict.get(f"{prefix}loft_energy.{key}")
            if held is not None and not held.is_meta and bool(held.isnan()):
                state_dict[f"{prefix}loft_energy.{key}"] = torch.full_like(held, UNKNOWN_ENERGY)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def settle(self) -> None:
        """Read from the supports themselves which adapters have one. Needed where a loader fills
        the tensors one by one and runs no load_state_dict hook, as transformers' own does."""
        for adapter in self.adapters.values():
            if adapter.owner is adapter:
                adapter.settle()


def _settle(module: AdaptedLinear, incompatible_keys: Any) -> None:
    module.settle()
