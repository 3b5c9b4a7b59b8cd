"""`LoftModel`: puts LOFT layers into a model for PEFT."""

from __future__ import annotations

import itertools
import warnings
import zlib
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from .._words import some
from ..layer.base_layer import feature_sizes
from ..layer.forward_pass import Root, unwatch, watch
from ..layer.merging import dense_or_raise, rotated_weight
from ..layer.placement import SHARED_INPUT, named_groups
from ..transform.transforms import get_transform
from .adapters import note_sides, owners, require_supports, unset_factor
from .checkpoint import check_state
from .checks import check
from .config import LoftConfig
from .layer import Linear, LoftLayer
from .supports import choose_supports, load_named_supports, match_supports

__all__ = ["LoftModel"]


class LoftModel(BaseTuner):
    """The tuner PEFT builds for a `LoftConfig`. Linear layers and transformers' Conv1D become
    `tuner.layer.Linear`.
    """

    prefix = "loft_"
    tuner_layer_cls = LoftLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]  # PEFT's own table

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, with supports that need no data chosen at the end. A failure leaves `model` as
        it was.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, LoftConfig):
            raise TypeError(f"peft_config must be a LoftConfig, got {type(config).__name__}")
        self._lowered: dict[str, tuple[int, int]] = {}
        self._in_file = _supports_in_file(config)
        _note_halves(config, self._in_file)
        trainable = [(p, p.requires_grad) for p in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if not any(m.has_adapter(adapter_name) for m in model.modules() if isinstance(m, Linear)):
                # PEFT 0.20 lets a second adapter match nothing.
                raise ValueError(f"Target modules {config.target_modules} not found in the base model")
            _tie(model, config, adapter_name)
            self._watch()
            if self._in_file is not None:
                note_sides({k: m for k, m in model.named_modules() if isinstance(m, Linear)}, adapter_name)
            if config.has_support and not config.needs_calibration and not config.supports_from_checkpoint:
                _choose_for_model(model, config, adapter_name)
        except BaseException:
            _withdraw(model, adapter_name)
            self._watch()
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            raise
        if self._lowered:
            listed = some([f"{key} ({wanted} -> {fitted})" for key, (wanted, fitted) in sorted(self._lowered.items())])
            what = "lowered to the largest even rank" if config.has_support else "changed to the nearest"
            warnings.warn(f"r was {what} that fits in: {listed}", stacklevel=2)
        if not getattr(model, "_loft_checks_loading", False):
            model.register_load_state_dict_pre_hook(check_state)
            model._loft_checks_loading = True  # type: ignore[assignment]  # our mark on any module

    def _create_and_replace(  # type: ignore[override]  # PEFT hands each tuner its own config
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
        transform = peft_config.transform_name
        adapter = layer.add_adapter(
            adapter_name,
            rank,
            None if transform is None else get_transform(transform),
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
            adapter.set_frozen(unset_factor(layer, adapter_name, peft_config.frozen_ranks[current_key]))
        adapter.config = peft_config
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
            if held.rank != config.rank:
                config.rank_pattern[key] = held.rank
            return held.side, held.rank
        side = "input" if side == "auto" else side
        wanted = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key), config.rank)
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
        """The module whose support in the file is this one's: of tied modules only the first has
        one there.
        """
        parent, dot, child = key.rpartition(".")
        names = [n for group in tied_names(config) if child in group for n in group]
        keys = [key, *(f"{parent}{dot}{name}" for name in names)]
        return next((k for k in keys if any(_same_module(held, k) for held in self._in_file or ())), key)

    def _watch(self) -> None:
        """Let passes begin at the model, whether it is called through PEFT or not, and at every
        module with layers of one input.
        """
        layers = [module for module in self.model.modules() if isinstance(module, Linear)]
        for parent in [self, *self.model.modules()]:
            unwatch(parent)
        if not layers:
            return
        root = Root(layers)
        for module in self.model.modules():
            groups: dict[nn.Module, list] = {}
            for names in named_groups(module, Linear, (*SHARED_INPUT, *_all_tied_names(self.peft_config))):
                members = [getattr(module, name) for name in names]
                groups |= {layer: members for layer in members if layer not in groups}
            if groups:
                own = [child for child in module.children() if isinstance(child, Linear)]
                watch(module, Root(own, whole=False, groups=groups))
        root.groups = getattr(getattr(self.model, "_loft_root", None), "groups", {})
        inside = _holder(self.model)
        for module in (self, self.model):
            watch(module, root, solves=inside is None)
        if inside is not None:
            watch(inside, root)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing to cast: trained parameters are float32 from the start, and P keeps the base's
        half precision.
        """

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, but every layer is checked before the first is changed."""
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT's returns the model too, and is annotated None
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        self._watch()
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._watch()

    def _check_merge(self, adapter_names: list[str] | None, safe: bool) -> None:
        for key, layer in [(k, m) for k, m in self.model.named_modules() if isinstance(m, Linear)]:
            names = [n for n in adapter_names or layer.active_adapters if layer.has_adapter(n)]
            for name in names:
                require_supports({key: layer}, name, "merging")
            new = [name for name in names if name not in layer.merged_adapters]
            if new:
                with onload_layer(layer):
                    dense_or_raise(layer, "merging")
                    if safe:
                        rotated_weight(layer, [layer.adapters[name] for name in new], safe=True)

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]  # PEFT hands each tuner its own config
        cls, model: nn.Module, config: LoftConfig, adapter_name: str, state_dict: dict
    ):
        """As PEFT's, which since 0.21 knows only names that the model has already; room for a
        frozen factor is made by `check_state`.
        """
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


def _holder(model: nn.Module) -> nn.Module | None:
    """The innermost module below `model` that holds all its layers and can be called; None where
    that is `model` itself.

    A graph solves here: it holds the hooks of every module but the one that is compiled, which is
    most often the model.
    """
    paths = [name.split(".")[:-1] for name, module in model.named_modules() if isinstance(module, Linear)]
    shared = list(itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
    for depth in range(len(shared), 0, -1):
        module = model.get_submodule(".".join(parts[0] for parts in shared[:depth]))
        # One with layers of one input is a root of its own.
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and "_loft_root" not in module.__dict__:
            return module
    return None


def _supports_in_file(config: LoftConfig) -> dict[str, Any] | None:
    if not config.support_file or config.supports_from_checkpoint:
        return None
    return load_named_supports(config.support_file)


def _note_halves(config: LoftConfig, supports: dict[str, Any] | None) -> None:
    """Let the transform be in halves where the supports of a file are."""
    if supports is None:
        return
    halved = {name: support.halves for name, support in supports.items()}
    if any(halved.values()) and not all(halved.values()):
        odd = next(name for name, has in halved.items() if not has)
        raise ValueError(
            f"{config.support} holds supports in halves and others, such as that of {odd}: make two adapters"
        )
    if any(halved.values()):
        config.transform = str(config.named_transform._replace(halves=True))
        check(config)
    elif config.named_transform.halves:  # a file of an earlier version does not say so
        if wrong := {s.method for s in supports.values()} - {"pilot", "random", "custom"}:
            raise ValueError(
                f"halves needs supports of a pilot in halves, but {config.support} holds {', '.join(sorted(wrong))} ones"
            )


def _choose_for_model(model: nn.Module, config: LoftConfig, adapter: str) -> None:
    layers = {k: m for k, m in model.named_modules() if isinstance(m, Linear) and m.has_adapter(adapter)}
    meta = [k for k, m in layers.items() if m.adapters[adapter].support.is_meta]
    if meta:
        raise ValueError(
            f"the base weights of {meta[0]} and {len(meta) - 1} more modules are on the meta device, so support={config.support!r} "
            "cannot be chosen; load the weights first, or use a support that loft_rs.calibrate chooses"
        )
    choose_supports(owners(layers, adapter), config, adapter)


def tied_names(config: LoftConfig) -> tuple[tuple[str, ...], ...]:
    """Groups of names of one parent's modules that the config ties."""
    return SHARED_INPUT if config.tied is True else tuple(map(tuple, config.tied or ()))


def _all_tied_names(configs: Mapping[str, object]) -> tuple[tuple[str, ...], ...]:
    loft = (config for config in configs.values() if isinstance(config, LoftConfig))
    return tuple(dict.fromkeys(names for config in loft for names in tied_names(config)))


def _tie(model: nn.Module, config: LoftConfig, adapter: str) -> None:
    """Tie layers that read one input where the config asks for it."""
    tied = tied_names(config)
    found = set()
    for parent in model.modules():
        for names in named_groups(parent, Linear, tied):
            layers = [layer for layer in (getattr(parent, name) for name in names) if layer.has_adapter(adapter)]
            if len(layers) > 1:
                if any(len(layer.adapters[adapter].members) > 1 for layer in layers):
                    raise ValueError(f"tied names {names} in more than one group")
                if len({layer.adapters[adapter].rank for layer in layers}) > 1:
                    raise ValueError(
                        f"tied modules must have one rank, but {names} have {[x.adapters[adapter].rank for x in layers]}"
                    )
                if any(layer.adapters[adapter].side != "input" for layer in layers):
                    raise ValueError(
                        f"tied modules must be on the input side, but side_pattern puts one of {names} on the other"
                    )
                layers[0].adapters[adapter].tie([layer.adapters[adapter] for layer in layers[1:]])
                found.add(tuple(names))
    if config.tied and not found:
        raise ValueError(
            f"tied={config.tied!r} matches no two adapted modules of one parent with one input width; name them as in "
            "tied=[['q_proj', 'k_proj', 'v_proj']], or leave tied out"
        )


def _withdraw(model: nn.Module, adapter: str) -> None:
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, Linear)]:
        if layer.has_adapter(adapter):
            layer.remove_adapter(adapter)
        if not layer.adapters:
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
