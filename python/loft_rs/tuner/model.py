"""`LoftModel`: puts LOFT layers into a model for PEFT, and checks every adapter that is loaded into one."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from ..base import feature_sizes
from ..factor import LowRank
from ..kinds import Householder
from ..siblings import SHARED_INPUT, Siblings, named_groups
from ..transform import DeltaGroup
from .config import LoftConfig, full_name
from .layer import Linear, LoftLayer
from .selection import choose_supports, load_named_supports, match_supports

__all__ = [
    "LoftModel",
    "adapted_layers",
    "all_or_nothing",
    "note_frozen_ranks",
    "note_sides",
    "orthogonality_error",
    "owners",
    "require_plain",
    "require_supports",
    "require_untrained",
    "set_ranks",
]


class LoftModel(BaseTuner):
    """The tuner PEFT builds for a `LoftConfig`. Linear layers and transformers' Conv1D become `tuner.layer.Linear`."""

    prefix = "loft_"
    tuner_layer_cls = LoftLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, with supports that need no data chosen at the end. A failure leaves `model` as it was."""
        config = self.peft_config[adapter_name]
        if not isinstance(config, LoftConfig):
            raise TypeError(f"peft_config must be a LoftConfig, got {type(config).__name__}")
        self._lowered: dict[str, tuple[int, int]] = {}
        self._in_file = _supports_in_file(config)
        trainable = [(p, p.requires_grad) for p in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if not any(m.has_adapter(adapter_name) for m in model.modules() if isinstance(m, Linear)):
                # PEFT 0.20 lets a second adapter match nothing.
                raise ValueError(f"Target modules {config.target_modules} not found in the base model")
            _introduce_siblings(model, config, adapter_name)
            if self._in_file is not None:
                note_sides({k: m for k, m in model.named_modules() if isinstance(m, Linear)}, adapter_name)
            if config.has_support and not config.needs_calibration and not config.supports_from_checkpoint:
                _choose_for_model(model, config, adapter_name)
        except BaseException:
            _withdraw(model, adapter_name)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            raise
        if self._lowered:
            listed = ", ".join(
                f"{key} ({wanted} -> {fitted})" for key, (wanted, fitted) in sorted(self._lowered.items())
            )
            what = "lowered to the largest even rank" if config.has_support else "changed to the nearest"
            warnings.warn(f"r was {what} that fits in: {listed}", stacklevel=2)
        if not getattr(model, "_loft_checks_loading", False):
            model.register_load_state_dict_pre_hook(check_state)
            model._loft_checks_loading = True

    def _create_and_replace(
        self,
        peft_config: LoftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        side, rank = self._side_and_rank(peft_config, current_key, target)
        layer = target if isinstance(target, Linear) else Linear(target, adapter_name)
        layer.add_factor(
            adapter_name,
            rank,
            self._group(peft_config.transform_name),
            side,
            kind=peft_config.kind,
            output_scale=peft_config.output_scale,
            movable=peft_config.mixed_sides,
            # Layers of one shape must not start at the same random numbers.
            seed=peft_config.seed + zlib.crc32(current_key.encode()),
            identity=peft_config.init_weights,
        )
        # A loader that fills the tensors one by one finds only those that are there.
        if current_key in peft_config.frozen_ranks and peft_config.has_support:
            layer.set_frozen(adapter_name, _unset_factor(layer, adapter_name, peft_config.frozen_ranks[current_key]))
        layer.loft_config[adapter_name] = peft_config
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        else:
            layer.set_adapter(layer.active_adapters)

    def _side_and_rank(self, config: LoftConfig, key: str, target: nn.Module) -> tuple[str, int]:
        side = config.side_of(key)
        if self._in_file is not None:
            name = self._named_in_file(config, key)
            held = match_supports({k: v for k, v in self._in_file.items() if _same_module(k, name)}, [name])[name]
            if side not in (held.side, "auto"):
                raise ValueError(
                    f"side of {key} is {side!r}, but {config.support} holds a support of side {held.side!r}"
                )
            # A layer that a pilot did not reach has a random one; custom ones are the user's own.
            if config.halves and held.method not in ("pilot", "random", "custom"):
                raise ValueError(
                    f"halves needs supports of a pilot in halves, but {config.support} holds {held.method} ones"
                )
            if held.rank != config.r:
                config.rank_pattern[key] = held.rank
            return held.side, held.rank
        side = "input" if side == "auto" else side
        wanted = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key), config.r)
        base = target.get_base_layer() if isinstance(target, Linear) else target
        own, other = feature_sizes(base)[:: 1 if side == "input" else -1]
        try:
            fitted = config.kind.fit(wanted, own, other)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        if fitted != wanted:
            self._lowered[key] = (wanted, fitted)
        return side, fitted

    def _named_in_file(self, config: LoftConfig, key: str) -> str:
        """The module whose support in the file is this one's: of tied modules only the first has one there."""
        parent, dot, child = key.rpartition(".")
        names = [n for group in tied_names(config) if child in group for n in group]
        keys = [key, *(f"{parent}{dot}{name}" for name in names)]
        return next((k for k in keys if any(_same_module(held, k) for held in self._in_file)), key)

    def _group(self, transform: str | None) -> DeltaGroup | None:
        if transform is None:
            return None
        for module in self.model.modules():
            if isinstance(module, Linear):
                for group in module.loft_group.values():
                    if group.transform.name == transform:
                        return group
        return DeltaGroup(transform)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing to cast: trained parameters are float32 from the start, and P keeps the base's half precision."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, but every layer is checked before the first is changed."""
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merge(self, adapter_names: list[str] | None, safe: bool) -> None:
        for key, layer in [(k, m) for k, m in self.model.named_modules() if isinstance(m, Linear)]:
            names = [n for n in adapter_names or layer.active_adapters if layer.has_adapter(n)]
            for name in names:
                require_supports({key: layer}, name, "merging")
            new = [name for name in names if name not in layer.merged_adapters]
            if new:
                with onload_layer(layer):
                    layer.dense_or_raise("merging")
                    if safe:
                        layer.rotated_weight(new, safe=True)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoftConfig, adapter_name: str, state_dict: dict
    ):
        """As PEFT's, which since 0.21 knows only names that the model has already; room for a frozen factor is made by `check_state`."""
        mapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        new = (".loft_frozen_basis", ".loft_frozen_delta")
        return {f"{k}.{adapter_name}" if k.endswith(new) else k: value for k, value in mapped.items()}

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any):
        # A tuner without this method has its adapter_names dropped silently by PEFT.
        if adapter_names is not None:
            raise ValueError(
                "adapter_names (mixed batches) is not supported by LOFT yet; use set_adapter and one adapter a batch"
            )
        yield


def _supports_in_file(config: LoftConfig) -> dict[str, Any] | None:
    if not config.support_file or config.supports_from_checkpoint:
        return None
    return load_named_supports(config.support_file)


def _choose_for_model(model: nn.Module, config: LoftConfig, adapter: str) -> None:
    layers = {k: m for k, m in model.named_modules() if isinstance(m, Linear) and m.has_adapter(adapter)}
    meta = [k for k, m in layers.items() if m.support(adapter).is_meta]
    if meta:
        raise ValueError(
            f"the base weights of {meta[0]} and {len(meta) - 1} more modules are on the meta device, so support={config.support!r} "
            "cannot be chosen; load the weights first, or use a support that loft_rs.calibrate chooses"
        )
    choose_supports(owners(layers, adapter), config, adapter)


def tied_names(config: LoftConfig) -> tuple[tuple[str, ...], ...]:
    """Groups of names of one parent's modules that the config ties."""
    return SHARED_INPUT if config.tied is True else tuple(map(tuple, config.tied or ()))


def _introduce_siblings(model: nn.Module, config: LoftConfig, adapter: str) -> None:
    """Tell layers that read one input of each other, and tie them where the config asks for it."""
    tied = tied_names(config)
    found = set()
    for parent in model.modules():
        for names in named_groups(parent, Linear, (*SHARED_INPUT, *tied)):
            layers = [getattr(parent, name) for name in names]
            if any(layer.siblings is None for layer in layers):
                siblings = Siblings(layers)
                for layer in layers:
                    layer.siblings = siblings
        for names in named_groups(parent, Linear, tied):
            layers = [layer for layer in (getattr(parent, name) for name in names) if layer.has_adapter(adapter)]
            if len(layers) > 1:
                if any(adapter in layer.loft_tied for layer in layers):
                    raise ValueError(f"tied names {names} in more than one group")
                if len({layer.rank(adapter) for layer in layers}) > 1:
                    raise ValueError(
                        f"tied modules must have one rank, but {names} have {[x.rank(adapter) for x in layers]}"
                    )
                if any(layer.loft_side[adapter] != "input" for layer in layers):
                    raise ValueError(
                        f"tied modules must be on the input side, but side_pattern puts one of {names} on the other"
                    )
                layers[0].tie(adapter, layers[1:])
                found.add(tuple(names))
    if config.tied and not found:
        raise ValueError(
            f"tied={config.tied!r} matches no two adapted modules of one parent with one input width; name them as in "
            "tied=[['q_proj', 'k_proj', 'v_proj']], or leave tied out"
        )


def _withdraw(model: nn.Module, adapter: str) -> None:
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, Linear)]:
        if layer.has_adapter(adapter):
            for held in (
                getattr(layer, attribute) for attribute in layer.adapter_layer_names + layer.other_param_names
            ):
                if adapter in held:
                    del held[adapter]
        if not layer.loft_side:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    for name, wrapper in [(n, m) for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]:
        if adapter not in wrapper._get_available_adapters():
            continue
        wrapper.delete_adapter(adapter, [active for active in wrapper.active_adapters if active != adapter])
        if not wrapper._get_available_adapters():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, wrapper.original_module)


def _same_module(key: str, name: str) -> bool:
    return f".{name}".endswith(f".{key}") or f".{key}".endswith(f".{name}")


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> tuple[str, dict[str, Linear]]:
    """(adapter, {module name: layer}) of one LOFT adapter of a model, named as in the base model.

    adapter_name None: the active adapter. ValueError where there is none, several are active, or the name is unknown.
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
        layer.refresh_ready()
    return adapter_name, layers


def owners(layers: dict[str, Linear], adapter: str) -> dict[str, Linear]:
    """Those of `layers` that hold their support and transform themselves: of tied ones the first."""
    return {name: layer for name, layer in layers.items() if layer.owner(adapter) is layer}


def require_supports(layers: dict[str, Linear], adapter: str, caller: str) -> None:
    """ValueError where an adapter has no support yet: it is the identity, which is not what anyone means to merge or export."""
    unset = [name for name, layer in layers.items() if not layer.ensure_support(adapter)]
    if unset:
        raise ValueError(
            f"{caller} needs supports, but adapter {adapter!r} has none yet in {unset[0]}: call loft_rs.calibrate(model, dataloader) "
            "and train it first"
        )


def require_plain(model: nn.Module, caller: str) -> None:
    """ValueError for a model whose wrapper, or whose partitioned weights, would not let a tap see its layers."""
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
            "accelerator.prepare, or choose the supports in a run without ZeRO-3 (loft_rs.save_supports(path, report.layers)) and build "
            "the adapter with LoftConfig(support=path)"
        )


def require_untrained(layers: dict[str, Linear], adapter: str, caller: str) -> None:
    """ValueError where a transform has left the identity: a new support would change the function it was trained for."""
    if not all(layer.loft_kind[adapter].has_support for layer in layers.values()):
        raise ValueError(
            f"{caller} chooses supports, but adapter {adapter!r} is of a kind that has none (OFT, BOFT, HRA)"
        )
    moved = [name for name, layer in layers.items() if bool(layer.theta(adapter).detach().any())]
    if moved:
        raise ValueError(
            f"{caller} needs an untrained adapter, but {adapter!r} has trained transforms in {moved[0]} and {len(moved) - 1} more "
            "modules; choose supports before training, on a new adapter"
        )
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"{caller} needs an unmerged model: call unmerge_adapter() first")


def set_ranks(layers: dict[str, Linear], adapter: str, ranks: dict[str, int]) -> None:
    """Give the owners among `layers` these ranks, and write them into the config, which is saved with the adapter."""
    for name, rank in ranks.items():
        if layers[name].rank(adapter) != rank:
            layers[name].resize(adapter, rank)
    held = {name: layer.rank(adapter) for name, layer in layers.items()}
    for layer in layers.values():
        config = layer.loft_config[adapter]
        config.rank_pattern = {full_name(name): rank for name, rank in held.items() if rank != config.r}


def _configs(layers: dict[str, Linear], adapter: str) -> list[LoftConfig]:
    """The configs that these layers hold of an adapter, each once."""
    held = (layer.loft_config[adapter] for layer in layers.values() if layer.has_adapter(adapter))
    return list({id(config): config for config in held}.values())


def note_sides(layers: dict[str, Linear], adapter: str) -> None:
    """Write the sides of an adapter whose supports are all there into its config, which is saved with it, where it does not say so yet."""
    held = {name: layer.loft_side[adapter] for name, layer in layers.items() if layer.has_adapter(adapter)}
    for config in _configs(layers, adapter):
        if any(config.side_of(name) != side for name, side in held.items()):
            config.side_pattern = {full_name(name): side for name, side in held.items()}


@contextmanager
def all_or_nothing(layers: dict[str, Linear], adapter: str) -> Iterator[None]:
    """Where this fails on its way, the tensors that it replaced in `layers`, and what it noted in the config, are put back."""
    parts = ("theta", "support", "output_side", "frozen_basis", "frozen_delta", "side", "ready")
    places = [getattr(layer, f"loft_{part}") for layer in layers.values() for part in parts]
    held = [(place, place[adapter] if adapter in place else None) for place in places]
    noted = [(c, c.rank_pattern, c.side_pattern) for c in (layer.loft_config[adapter] for layer in layers.values())]
    try:
        yield
    except BaseException:
        for place, value in held:
            if value is not None:
                place[adapter] = value
            elif adapter in place:
                del place[adapter]
        for config, ranks, sides in noted:
            config.rank_pattern, config.side_pattern = ranks, sides
        raise


def orthogonality_error(model: nn.Module, adapter_name: str | None = None) -> float:
    """Largest ||R^T R - I||_2 over the adapted modules, in float64 from the stored P and the current E. No units."""
    adapter, layers = adapted_layers(model, adapter_name)
    with torch.no_grad():
        return max(layer.factor(adapter).orthogonality_error() for layer in layers.values())


def check_state(model: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
    """Refuse, before anything is copied, an adapter state that does not fit the model (PEFT itself would only warn).

    Every tensor of each adapter that the state names must be there, with its shape, finite, and P orthonormal to half precision or
    all zero (not yet calibrated); an adapter that waits for its checkpoint must be named. ValueError lists the first problems.
    What `refresh` has frozen has the size that the state gives it, or is not there: room for it is made, or taken back, at the end. So is
    a rank among the layer's `loft_loadable_ranks`.
    """
    expected: dict[str, dict[str, torch.Tensor]] = {}
    refreshed: dict[str, tuple[str, str]] = {}
    vectors: set[str] = set()
    waiting: set[str] = set()
    brought: dict[str, dict[str, int]] = {}  # adapter -> layer -> rank
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            module.refresh_ready()
            waiting |= {a for a, c in module.loft_config.items() if c.supports_from_checkpoint and not module.ready(a)}
            for kind in ("loft_theta", "loft_scale", "loft_support", "loft_energy", "loft_output_side"):
                held = getattr(module, kind)
                for adapter in held.keys():
                    expected.setdefault(adapter, {})[f"{prefix}{name}.{kind}.{adapter}"] = held[adapter]
            vectors |= {
                f"{prefix}{name}.loft_theta.{a}" for a, k in module.loft_kind.items() if isinstance(k, Householder)
            }
            for adapter in module.loft_support.keys():
                places = (f"{prefix}{name}.loft_frozen_{part}.{adapter}" for part in ("basis", "delta"))
                theta, support = (f"{prefix}{name}.loft_{kind}.{adapter}" for kind in ("theta", "support"))
                refreshed[theta] = tuple(places)
                basis = state_dict.get(support)
                rank = basis.shape[1] if basis is not None and basis.dim() == 2 else None
                if rank != module.rank(adapter) and rank in module.loft_loadable_ranks.get(adapter, ()):
                    brought.setdefault(adapter, {})[name] = rank
                    expected[adapter][theta], expected[adapter][support] = module.of_rank(adapter, rank)
                width = module.support_width(_stated_side(state_dict, prefix, name, module, adapter))
                held = expected[adapter][support]
                expected[adapter][support] = held.new_empty(width, held.shape[1], device="meta")
    given = {key for key in state_dict if ".loft_" in key and key.startswith(prefix)}
    problems = [] if given else [f"it holds no tensor of adapter {adapter!r}" for adapter in sorted(waiting)]
    for tensors in expected.values():
        if not given & tensors.keys():
            continue
        problems += [f"{key} is missing" for key in tensors if key not in given]
        problems += [p for key in tensors if key in given for p in _tensor_problems(key, state_dict[key], tensors[key])]
    problems += [f"{key} holds a zero vector" for key in sorted(vectors & given) if not _columns_set(state_dict[key])]
    known = {key for tensors in expected.values() for key in tensors}
    for key, places in refreshed.items():
        if key in given:
            known.update(places)
            width = expected[key.rpartition(".")[2]][key.replace(".loft_theta.", ".loft_support.")].shape[0]
            problems += _frozen_problems(places, [state_dict.get(place) for place in places], width)
    problems += [f"{key} belongs to no adapted module" for key in sorted(given - known)] if expected else []
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        more += _other_ranks(expected, state_dict)
        if any(".loft_output_side." in problem for problem in problems):
            more += ". One of the two was made with side='auto' or a side_pattern, the other without: build the model with the saved config"
        raise ValueError("the adapter does not fit this model: " + "; ".join(problems[:8]) + more)
    for adapter, ranks in brought.items():
        layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear) and m.has_adapter(adapter)}
        set_ranks(layers, adapter, ranks)
    _make_room(model, state_dict, prefix)


def _stated_side(state_dict: dict, prefix: str, name: str, layer: Linear, adapter: str) -> str:
    """The side that a state says a layer is on; the layer's own where it does not say."""
    stated = state_dict.get(f"{prefix}{name}.loft_output_side.{adapter}")
    if stated is None or stated.is_meta or stated.numel() != 1:
        return layer.loft_side[adapter]
    return "output" if bool(stated) else "input"


def _other_ranks(expected: dict[str, dict[str, torch.Tensor]], state_dict: dict) -> str:
    """What to do where the supports of a checkpoint are all well but for their rank, as after `narrow`."""
    for tensors in expected.values():
        for key, held in tensors.items():
            given = state_dict.get(key) if ".loft_support." in key else None
            if given is not None and given.dim() == 2 and len(given) == len(held) and given.shape != held.shape:
                return (
                    f". Its rank is {given.shape[1]} there, not {held.shape[1]}, as after loft_rs.narrow: build the model with "
                    "peft.PeftModel.from_pretrained(base, checkpoint, is_trainable=True), or give the Trainer its "
                    "LoftNarrowCallback when it is made (callbacks=[...])"
                )
    return ""


def _make_room(model: nn.Module, state_dict: dict, prefix: str) -> None:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    loaded, unset = set(), set()
    for name, layer in layers.items():
        for adapter in layer.loft_output_side.keys():
            if f"{prefix}{name}.loft_theta.{adapter}" in state_dict:
                layer.set_side(adapter, _stated_side(state_dict, prefix, name, layer, adapter))
                if not bool(state_dict[f"{prefix}{name}.loft_support.{adapter}"].any()):
                    unset.add(adapter)
        for adapter in layer.loft_support.keys():
            if f"{prefix}{name}.loft_theta.{adapter}" in state_dict:
                loaded.add(adapter)
                basis = state_dict.get(f"{prefix}{name}.loft_frozen_basis.{adapter}")
                if (0 if basis is None else basis.shape[1]) != layer.frozen_rank(adapter):
                    layer.set_frozen(adapter, None if basis is None else _unset_factor(layer, adapter, basis.shape[1]))
    for adapter in loaded:
        note_frozen_ranks(layers, adapter)
    for adapter in loaded - unset:
        note_sides(layers, adapter)
    for adapter in loaded & unset:  # open again, with what `note_sides` wrote
        noted = {full_name(name) for name, layer in layers.items() if layer.has_adapter(adapter)}
        for config in _configs(layers, adapter):
            if config.side_pattern.keys() == noted:
                config.side_pattern = {}


def note_frozen_ranks(layers: dict[str, Linear], adapter: str) -> None:
    """Write into the adapter's config, which is saved with it, what each of its layers has frozen."""
    held = {name: layer for name, layer in sorted(layers.items()) if layer.has_adapter(adapter)}
    ranks = {name: layer.frozen_rank(adapter) for name, layer in owners(held, adapter).items()}
    for layer in held.values():
        layer.loft_config[adapter].frozen_ranks = {name: rank for name, rank in ranks.items() if rank}


def _unset_factor(layer: Linear, adapter: str, rank: int) -> LowRank:
    """The identity in the shape of a frozen factor, to be filled from a file."""
    like = layer.support(adapter)  # theta may be on the meta device
    return LowRank(like.new_zeros(len(like), rank), like.new_zeros(rank, rank))


def _columns_set(u: torch.Tensor) -> bool:
    """Whether no column of U (n x r) is all zero: a reflection needs its vector."""
    return u.is_meta or u.dim() != 2 or bool(u.any(0).all())


def _tensor_problems(key: str, value: torch.Tensor, held: torch.Tensor) -> list[str]:
    if value.shape != held.shape:
        return [f"{key} has shape {tuple(value.shape)}, expected {tuple(held.shape)}"]
    if value.is_meta:
        return [f"{key} is on the meta device"]
    if ".loft_energy." in key:
        return []  # NaN: unknown
    if ".loft_output_side." in key and float(value) not in (0.0, 1.0):
        return [f"{key} is {float(value)}, expected 0 or 1"]
    if not bool(torch.isfinite(value).all()):
        return [f"{key} holds NaN or Inf"]
    return _basis_problems(key, value) if ".loft_support." in key else []


def _frozen_problems(places: tuple[str, str], tensors: list[torch.Tensor | None], width: int) -> list[str]:
    """Of P_f (n x r_f) and E_f (r_f x r_f): both or neither."""
    basis, delta = tensors
    if basis is None and delta is None:
        return []
    missing = [f"{place} is missing" for place, tensor in zip(places, tensors, strict=True) if tensor is None]
    if missing:
        return missing
    if basis.dim() != 2 or basis.shape[0] != width or not 1 <= basis.shape[1] <= width:
        return [f"{places[0]} has shape {tuple(basis.shape)}, expected ({width}, 1 to {width})"]
    square = (basis.shape[1], basis.shape[1])
    if delta.shape != square:
        return [f"{places[1]} has shape {tuple(delta.shape)}, expected {square}"]
    problems = [
        p for place, tensor in zip(places, tensors, strict=True) for p in _tensor_problems(place, tensor, tensor)
    ]
    return problems or _basis_problems(places[0], basis)


def _basis_problems(key: str, value: torch.Tensor) -> list[str]:
    if not bool(value.any()):
        return []
    p = value.double()
    error = float(torch.linalg.matrix_norm(p.mT @ p - torch.eye(p.shape[1], dtype=p.dtype, device=p.device), 2))
    # Rounding each entry of an orthonormal P by eps/2 moves P^T P by at most eps sqrt(r) in the 2-norm. Its dtype now does not tell
    # whether P was in half precision once.
    limit = torch.finfo(torch.bfloat16).eps * p.shape[1] ** 0.5
    return (
        []
        if error <= limit
        else [f"{key} is not orthonormal: ||P^T P - I||_2 = {error:.1e}, expected at most {limit:.1e}"]
    )
