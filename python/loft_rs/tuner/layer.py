"""The PEFT layer: `AdaptedLinear` with PEFT's bookkeeping of active, disabled and merged adapters."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..layer import AdaptedLinear
from .config import LoftConfig
from .selection import choose_supports

__all__ = ["Linear", "LoftLayer"]


class LoftLayer(BaseTunerLayer):
    """Marks a module as LOFT's and names its adapter state for PEFT."""

    adapter_layer_names = ("loft_theta", "loft_scale")
    other_param_names = (
        "loft_kind",
        "loft_support",
        "loft_energy",
        "loft_output_side",
        "loft_frozen_basis",
        "loft_frozen_delta",
        "loft_group",
        "loft_side",
        "loft_ready",
        "loft_config",
        "loft_tied",
        "loft_loadable_ranks",
    )


class Linear(AdaptedLinear, LoftLayer):
    """A linear layer with any number of LOFT adapters."""

    def __init__(self, base_layer: nn.Module, adapter_name: str):
        super().__init__(base_layer)
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.loft_config: dict[str, LoftConfig] = {}
        self.loft_loadable_ranks: dict[str, set[int]] = {}  # others than its own that a checkpoint may bring

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., n) -> (..., m), through the active adapters, the merged weight, or the base layer alone."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.adapted_forward(x, [], *args, **kwargs)
        adapters = [name for name in self.active_adapters if self.has_adapter(name)]
        for name in adapters:
            if self.tap is None and not self.ensure_support(name) and self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    f"adapter {name!r} has no support yet, so training it would do nothing: call loft_rs.calibrate(model, dataloader) "
                    "before training, add loft_rs.LoftCalibrationCallback to the Trainer, or set the supports with loft_rs.set_support"
                )
        return self.adapted_forward(x, adapters, *args, **kwargs)

    def runs_alone(self, adapter: str) -> bool:
        active = [name for name in self.active_adapters if self.has_adapter(name)]
        return active == [adapter] and not (self.disable_adapters or self.merged) and super().runs_alone(adapter)

    def ensure_support(self, name: str) -> bool:
        """Whether an adapter has its support. One that needs no data is chosen here, for a saved config that no checkpoint followed."""
        if self.owner(name) is not self:
            return self.owner(name).ensure_support(name)
        if self.loft_ready[name]:
            return True
        self.refresh_ready()
        config = self.loft_config[name]
        if not self.loft_ready[name] and not config.needs_calibration:
            if config.support_file:
                raise RuntimeError(
                    f"adapter {name!r} was built from a saved config and never loaded, so it has no support: load its checkpoint, or "
                    f"build it from a new LoftConfig(support={config.support!r})"
                )
            choose_supports({"this layer": self}, config, name)
        return self.loft_ready[name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (default: the active ones) into the base weight, rounded once; the original is kept for `unmerge`."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        if names:
            self.merge_factors(names, safe=safe_merge)
            self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original base weight back, bit for bit."""
        self.unmerge_factors()
        self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for slot in [s for s in self._derived if s[1] == adapter_name]:
            del self._derived[slot]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # The device only: trained parameters stay float32, and P keeps the dtype it was given.
        device = device or self.loft_device
        if adapter_name in self.loft_theta and not self.loft_theta[adapter_name].is_meta:
            for trained in (self.loft_theta, self.loft_scale):
                if adapter_name in trained:
                    trained[adapter_name].data = trained[adapter_name].data.to(device)
            for name in ("support", "energy", "output_side", "frozen_basis", "frozen_delta"):
                held = getattr(self, f"loft_{name}")
                if adapter_name in held:
                    held[adapter_name] = held[adapter_name].to(device)

    def __repr__(self) -> str:
        return "loft." + super().__repr__()
