"""One adapter of a model: its layers, what it must be for what is asked of it, and what its config
notes of it.
"""

from __future__ import annotations

import torch
from torch import nn

from ..factor.low_rank import LowRank
from ..layer import AdaptedLinear
from ..layer.merging import factor_of
from .config import LoftConfig, full_name
from .layer import Linear

__all__ = [
    "adapted_layers",
    "base_changed",
    "configs_of",
    "note_frozen_ranks",
    "note_sides",
    "orthogonality_error",
    "owners",
    "require_plain",
    "require_supports",
    "require_untrained",
    "set_ranks",
    "unset_factor",
]


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> tuple[str, dict[str, Linear]]:
    """(adapter, {module name: layer}) of one LOFT adapter of a model, named as in the base model.

    adapter_name None: the active adapter. ValueError where there is none, several are active, or
    the name is unknown.
    """
    root = getattr(getattr(model, "base_model", None), "model", model) if hasattr(model, "peft_config") else model
    layers = {name: module for name, module in root.named_modules() if isinstance(module, Linear)}
    if not layers:
        raise ValueError("model has no LOFT layers: build it with peft.get_peft_model(model, LoftConfig(...))")
    if adapter_name is None:
        active = {name for layer in layers.values() for name in layer.active_adapters if layer.has_adapter(name)}
        if len(active) != 1:
            raise ValueError(f"adapter_name must be given: the active LOFT adapters are {sorted(active)}")
        adapter_name = active.pop()
    layers = {name: layer for name, layer in layers.items() if layer.has_adapter(adapter_name)}
    if not layers:
        raise ValueError(f"adapter_name {adapter_name!r} is not an adapter of this model")
    for layer in layers.values():
        layer.settle()
    return adapter_name, layers


def owners(layers: dict[str, Linear], adapter: str) -> dict[str, Linear]:
    """Those of `layers` that hold their support and transform themselves: of tied ones the
    first.
    """
    return {name: layer for name, layer in layers.items() if layer.adapters[adapter].owner.layer is layer}


def require_supports(layers: dict[str, Linear], adapter: str, caller: str) -> None:
    """ValueError where an adapter has no support yet: it is the identity, which is not what anyone
    means to merge or export.
    """
    unset = [name for name, layer in layers.items() if not layer.ensure_support(adapter)]
    if unset:
        raise ValueError(
            f"{caller} needs supports, but adapter {adapter!r} has none yet in {unset[0]}: call loft_rs.calibrate(model, dataloader) "
            "and train it first"
        )


def require_plain(model: nn.Module, caller: str) -> None:
    """ValueError for a model whose wrapper, or whose partitioned weights, would not let a tap see
    its layers.
    """
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if "DistributedDataParallel" in kinds or "DataParallel" in kinds:
        raise ValueError(
            f"{caller} needs the model itself, not {type(model).__name__}: pass model.module (accelerate: "
            "accelerator.unwrap_model(model)) in every process, or call this before wrapping it"
        )
    if hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError(
            f"{caller} needs an eager model: call it before torch.compile, or pass the model that was compiled (model._orig_mod)"
        )
    if any("FullyShardedDataParallel" in {kind.__name__ for kind in type(m).__mro__} for m in model.modules()):
        raise ValueError(
            f"{caller} cannot see into FSDP1's flat parameters: call it before wrapping, or use fully_shard"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"{caller} cannot read weights that DeepSpeed ZeRO-3 has partitioned: call it before deepspeed.initialize or "
            "accelerator.prepare, or choose the supports in a run without ZeRO-3 (loft_rs.save_supports(path, report.supports)) and build "
            "the adapter with LoftConfig(support=path)"
        )


def require_untrained(layers: dict[str, Linear], adapter: str, caller: str) -> None:
    """ValueError where a transform has left the identity: a new support would change the function
    it was trained for.
    """
    if not all(layer.adapters[adapter].kind.has_support for layer in layers.values()):
        raise ValueError(
            f"{caller} chooses supports, but adapter {adapter!r} is of a kind that has none (OFT, BOFT, HRA)"
        )
    moved = [name for name, layer in layers.items() if bool(layer.adapters[adapter].theta.detach().any())]
    if moved:
        raise ValueError(
            f"{caller} needs an untrained adapter, but {adapter!r} has trained transforms in {moved[0]} and {len(moved) - 1} more "
            "modules; choose supports before training, on a new adapter"
        )
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"{caller} needs an unmerged model: call unmerge_adapter() first")


def set_ranks(layers: dict[str, Linear], adapter: str, ranks: dict[str, int]) -> None:
    """Give the owners among `layers` these ranks, and write them into the config, which is saved
    with the adapter.
    """
    for name, rank in ranks.items():
        if layers[name].adapters[adapter].rank != rank:
            layers[name].adapters[adapter].resize(rank)
    held = {name: layer.adapters[adapter].rank for name, layer in layers.items()}
    for layer in layers.values():
        config = layer.adapters[adapter].config
        config.rank_pattern = {full_name(name): rank for name, rank in held.items() if rank != config.rank}


def configs_of(layers: dict[str, Linear], adapter: str) -> list[LoftConfig]:
    """The configs that these layers hold of an adapter, each once."""
    held = (layer.adapters[adapter].config for layer in layers.values() if layer.has_adapter(adapter))
    return list({id(config): config for config in held}.values())


def note_sides(layers: dict[str, Linear], adapter: str) -> None:
    """Write the sides of an adapter whose supports are all there into its config, which is saved
    with it, where it does not say so yet.
    """
    held = {name: layer.adapters[adapter].side for name, layer in layers.items() if layer.has_adapter(adapter)}
    for config in configs_of(layers, adapter):
        if any(config.side_of(name) != side for name, side in held.items()):
            config.side_pattern = {full_name(name): side for name, side in held.items()}


def base_changed(model: nn.Module) -> None:
    """Tell LOFT that base weights or supports were written over in a way that torch does not count,
    such as `weight.data.copy_(new)`.

    Between two passes of one evaluation such a write cannot be seen, and W0 P would be the old
    weight's. Everywhere else (training, the first evaluation pass after training, `train()`,
    `eval()`, a load, the start of `generate`) the library looks for itself. model: a PEFT model, a
    model with injected adapters, or any module with LOFT layers in it. ValueError where there are
    none.

    >>> for name, weight in new_weights.items():          # doctest: +SKIP
    ...     model.get_parameter(name).data.copy_(weight)
    >>> loft_rs.base_changed(model)                       # doctest: +SKIP
    """
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    if not layers:
        raise ValueError("model has no LOFT layers: build it with peft.get_peft_model(model, LoftConfig(...))")
    for layer in layers:
        layer.settle()


def orthogonality_error(model: nn.Module, adapter_name: str | None = None) -> float:
    """Largest ||R^T R - I||_2 over the adapted modules, in float64 from the stored P and the
    current E. No units.

    >>> model = get_peft_model(load_base(), LoftConfig(r=8, target_modules=["q_proj", "v_proj"]))
    >>> loft_rs.orthogonality_error(model) < 1e-6
    True
    """
    adapter, layers = adapted_layers(model, adapter_name)
    with torch.no_grad():
        return max(factor_of(layer.adapters[adapter]).orthogonality_error() for layer in layers.values())


def note_frozen_ranks(layers: dict[str, Linear], adapter: str) -> None:
    """Write into the adapter's config, which is saved with it, what each of its layers has
    frozen.
    """
    held = {name: layer for name, layer in sorted(layers.items()) if layer.has_adapter(adapter)}
    ranks = {name: layer.adapters[adapter].frozen_rank for name, layer in owners(held, adapter).items()}
    for layer in held.values():
        layer.adapters[adapter].config.frozen_ranks = {name: rank for name, rank in ranks.items() if rank}


def unset_factor(layer: Linear, adapter: str, rank: int) -> LowRank:
    """The identity in the shape of a frozen factor, to be filled from a file."""
    like = layer.adapters[adapter].support  # theta may be on the meta device
    return LowRank(like.new_zeros(len(like), rank), like.new_zeros(rank, rank))
