"""The PEFT layer: `AdaptedLinear` with PEFT's bookkeeping of active, disabled and merged
adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .._format import SLOTS
from ..layer import AdaptedLinear, LayerAdapter
from ..layer.merging import merge, unmerge
from ..layer.placement import run
from .supports import choose_supports

__all__ = ["Linear", "LoftLayer"]


class LoftLayer(BaseTunerLayer):
    """Marks a module as LOFT's and names its adapter state for PEFT."""

    adapter_layer_names = tuple(slot.key for slot in SLOTS if slot.trained)
    other_param_names = (*(slot.key for slot in SLOTS if not slot.trained), "adapters")


class Linear(AdaptedLinear, LoftLayer):
    """A linear layer with any number of LOFT adapters."""

    def __init__(self, base_layer: nn.Module, adapter_name: str):
        super().__init__(base_layer)
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []

    def applied(self) -> list[LayerAdapter]:
        """The active adapters that are here; none where they are disabled, merged or watched by a
        calibration.
        """
        if self.tap is not None or self._disable_adapters or self.merged_adapters:
            return []
        return [self.adapters[name] for name in self.active_adapters if name in self.adapters]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., n) -> (..., m), through the active adapters, the merged weight, or the base layer
        alone.
        """
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        adapters = self.applied()
        for adapter in adapters:
            if (
                not adapter.ready
                and not self.ensure_support(adapter.name)
                and self.training
                and torch.is_grad_enabled()
            ):
                raise RuntimeError(
                    f"adapter {adapter.name!r} has no support yet, so training it would do nothing: call loft_rs.calibrate(model, "
                    "dataloader) before training, add loft_rs.LoftCalibrationCallback to the Trainer, or set the supports with "
                    "loft_rs.set_support"
                )
        return run(self, adapters, x, *args, **kwargs)

    def ensure_support(self, name: str) -> bool:
        """Whether an adapter has its support. One that needs no data is chosen here, for a saved
        config that no checkpoint followed.
        """
        adapter = self.adapters[name].owner
        if adapter.ready:
            return True
        adapter.settle()
        config = adapter.config
        if not adapter.ready and not config.needs_calibration:
            if config.support_file:
                raise RuntimeError(
                    f"adapter {name!r} was built from a saved config and never loaded, so it has no support: load its checkpoint, or "
                    f"build it from a new LoftConfig(support={config.support!r})"
                )
            choose_supports({"this layer": adapter.layer}, config, name)
        return adapter.ready

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (default: the active ones) into the base weight, rounded once; the
        original is kept for `unmerge`.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        if names:
            merge(self, [self.adapters[name] for name in names], safe=safe_merge)
            self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original base weight back, bit for bit."""
        unmerge(self)
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # The device only: trained parameters stay float32, and P keeps the dtype it was given.
        device = device or self.loft_device
        adapter = self.adapters.get(adapter_name)
        if adapter is None or (adapter.owner is adapter and adapter.theta.is_meta):
            return
        for slot, tensor in adapter.tensors().items():
            if slot.trained:
                tensor.data = tensor.data.to(device)
            else:
                adapter.container(slot)[adapter_name] = tensor.to(device)
        adapter.moved_elsewhere()

    def __repr__(self) -> str:
        return "loft." + super().__repr__()
