"""Which adapters can be refreshed or narrowed."""

from __future__ import annotations

from ..support.budget import Budget
from ..support.methods import CALIBRATED_SUPPORTS, DATA_FREE_SUPPORTS
from ..tuner.config import LoftConfig
from ..tuner.layer import Linear

__all__ = ["require_choosable", "require_refreshable_kind"]


# -- what can be refreshed -----------------------------------------------------------------------


def require_refreshable_kind(adapter: str, config: LoftConfig, caller: str) -> None:
    """ValueError for a kind of adapter that is neither refreshed nor narrowed."""
    if not config.has_support:
        raise ValueError(
            f"{caller} needs a support, but adapter {adapter!r} is of a kind that has none (OFT, BOFT, HRA)"
        )
    if config.named_transform.magnitudes:
        raise ValueError(
            f"{caller} does not support magnitudes: what it freezes is a rotation, and theirs is none; use a transform without them"
        )
    if config.named_transform.halves:
        raise ValueError(
            f"{caller} does not support halves: what the optimiser holds for them has no place in other halves; use Pilot() without halves"
        )


def require_refreshable(layers: dict[str, Linear], adapter: str, config: LoftConfig, caller: str) -> None:
    require_refreshable_kind(adapter, config, caller)
    unset = [name for name, layer in layers.items() if not layer.ensure_support(adapter)]
    if unset:
        raise ValueError(
            f"{caller} needs a support, but adapter {adapter!r} has none yet in {unset[0]}: call loft_rs.calibrate first"
        )
    sharded = [name for name, layer in layers.items() if hasattr(layer.adapters[adapter].theta, "full_tensor")]
    if sharded:
        raise ValueError(
            f"{caller} cannot turn parameters that are sharded, as in {sharded[0]}: call it before fully_shard, or in a run "
            "without it"
        )
    if any(layer.merged for layer in layers.values()):
        raise ValueError(f"{caller} needs an unmerged model: call unmerge_adapter() first")
    for name, layer in layers.items():
        active = [each for each in layer.active_adapters if layer.has_adapter(each)]
        if active != [adapter] or layer.disable_adapters:
            raise ValueError(
                f"{caller} needs {adapter!r} to be the only active adapter, but in {name} the active ones are "
                f"{[] if layer.disable_adapters else active}: call set_adapter({adapter!r}) first"
            )


def require_choosable(adapter: str, config: LoftConfig) -> None:
    """ValueError for an adapter whose supports are a file's, or whose ranks a `Budget` shares out:
    `refresh` could not choose anew.
    """
    if isinstance(config.r, Budget):
        raise ValueError(
            f"refresh keeps the rank of every layer, but r of adapter {adapter!r} is a Budget, which shares them out anew"
        )
    if getattr(config.options, "keep", False):
        raise ValueError(
            f"refresh leaves the model's function what it is, but the pilot of adapter {adapter!r} is kept: use Pilot() without keep"
        )
    if config.has_support and config.method not in (*DATA_FREE_SUPPORTS, *CALIBRATED_SUPPORTS):
        raise ValueError(
            f"refresh chooses supports, but those of adapter {adapter!r} come from the file {config.support}; build it with one of "
            f"{sorted((*DATA_FREE_SUPPORTS, *CALIBRATED_SUPPORTS))}"
        )
