"""What a state dict must hold to be loaded into a model, and the room that is made for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .._format import SLOTS
from ..layer.adapter import LayerAdapter
from ..layer.kinds import ReflectionsKind
from ..support.budget import Budget
from .adapters import configs_of, note_frozen_ranks, note_sides, set_ranks, unset_factor
from .config import full_name
from .layer import Linear

__all__ = ["check_state"]


def check_state(model: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
    """Refuse, before anything is copied, an adapter state that does not fit the model (PEFT itself
    would only warn).

    Every tensor of each adapter that the state names must be there, with its shape, finite, and P
    orthonormal to half precision or all zero (not yet calibrated); an adapter that waits for its
    checkpoint must be named. ValueError lists the first problems. What `refresh` has frozen has the
    size that the state gives it, or is not there: room for it is made, or taken back, at the end.
    So is a rank that the adapter may take (`_may_bring`): the ranks of a loaded adapter come from
    its tensors.
    """
    expected: dict[str, dict[str, torch.Tensor]] = {}
    refreshed: dict[str, tuple[str, str]] = {}
    vectors: set[str] = set()
    waiting: set[str] = set()
    brought: dict[str, dict[str, int]] = {}  # adapter -> layer -> rank
    for name, module in model.named_modules():
        if not isinstance(module, Linear):
            continue
        module.settle()
        for key, adapter in module.adapters.items():
            if adapter.config is not None and adapter.config.supports_from_checkpoint and not adapter.ready:
                waiting.add(key)
            place = {slot.name: f"{prefix}{name}.{slot.key}.{key}" for slot in SLOTS}
            own = {slot.name: tensor for slot, tensor in adapter.tensors().items() if slot.when != "refreshed"}
            expected.setdefault(key, {}).update({place[slot]: tensor for slot, tensor in own.items()})
            if isinstance(adapter.kind, ReflectionsKind):
                vectors.add(place["theta"])
            if "support" not in own:
                continue
            theta, support = place["theta"], place["support"]
            refreshed[theta] = (place["frozen_basis"], place["frozen_delta"])
            basis = state_dict.get(support)
            rank = basis.shape[1] if basis is not None and basis.dim() == 2 else None
            if rank is not None and rank != adapter.rank and _may_bring(adapter, rank):
                brought.setdefault(key, {})[name] = rank
                expected[key][theta], expected[key][support] = adapter.of_rank(rank)
            width = module.support_width(_stated_side(state_dict, prefix, name, module, key))
            held = expected[key][support]
            expected[key][support] = held.new_empty(width, held.shape[1], device="meta")
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
    for key, ranks in brought.items():
        layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear) and m.has_adapter(key)}
        set_ranks(layers, key, ranks)
    _make_room(model, state_dict, prefix)


def _may_bring(adapter: LayerAdapter, rank: int | None) -> bool:
    """Whether a checkpoint may bring this rank: one that waits for its checkpoint, or for its
    `Budget` to be shared out, takes what fits, any other what it was told."""
    if rank in adapter.loadable_ranks:
        return True
    config = adapter.config
    waits = config is not None and (config.supports_from_checkpoint or isinstance(config.r, Budget))
    return waits and not adapter.owner.ready and rank is not None and 1 <= rank <= adapter.largest_rank


def _stated_side(state_dict: dict, prefix: str, name: str, layer: Linear, adapter: str) -> str:
    """The side that a state says a layer is on; the layer's own where it does not say."""
    stated = state_dict.get(f"{prefix}{name}.loft_output_side.{adapter}")
    if stated is None or stated.is_meta or stated.numel() != 1:
        return layer.adapters[adapter].side
    return "output" if bool(stated) else "input"


def _other_ranks(expected: dict[str, dict[str, torch.Tensor]], state_dict: dict) -> str:
    """What to do where the supports of a checkpoint are all well but for their rank, as after
    `narrow`.
    """
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
                layer.adapters[adapter].set_side(_stated_side(state_dict, prefix, name, layer, adapter))
                if not bool(state_dict[f"{prefix}{name}.loft_support.{adapter}"].any()):
                    unset.add(adapter)
        for adapter in layer.loft_support.keys():
            if f"{prefix}{name}.loft_theta.{adapter}" in state_dict:
                loaded.add(adapter)
                basis = state_dict.get(f"{prefix}{name}.loft_frozen_basis.{adapter}")
                if (0 if basis is None else basis.shape[1]) != layer.adapters[adapter].frozen_rank:
                    layer.adapters[adapter].set_frozen(
                        None if basis is None else unset_factor(layer, adapter, basis.shape[1])
                    )
    for adapter in loaded:
        note_frozen_ranks(layers, adapter)
    for adapter in loaded - unset:
        note_sides(layers, adapter)
    for adapter in loaded & unset:  # open again, with what `note_sides` wrote
        noted = {full_name(name) for name, layer in layers.items() if layer.has_adapter(adapter)}
        for config in configs_of(layers, adapter):
            if config.side_pattern.keys() == noted:
                config.side_pattern = {}


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
    if basis is None or delta is None:
        return [f"{places[0 if basis is None else 1]} is missing"]
    if basis.dim() != 2 or basis.shape[0] != width or not 1 <= basis.shape[1] <= width:
        return [f"{places[0]} has shape {tuple(basis.shape)}, expected ({width}, 1 to {width})"]
    square = (basis.shape[1], basis.shape[1])
    if delta.shape != square:
        return [f"{places[1]} has shape {tuple(delta.shape)}, expected {square}"]
    problems = _tensor_problems(places[0], basis, basis) + _tensor_problems(places[1], delta, delta)
    return problems or _basis_problems(places[0], basis)


def _basis_problems(key: str, value: torch.Tensor) -> list[str]:
    if not bool(value.any()):
        return []
    p = value.double()
    error = float(torch.linalg.matrix_norm(p.mT @ p - torch.eye(p.shape[1], dtype=p.dtype, device=p.device), 2))
    # Rounding each entry of an orthonormal P by eps/2 moves P^T P by at most eps sqrt(r) in the
    # 2-norm. Its dtype now does not tell whether P was in half precision once.
    limit = torch.finfo(torch.bfloat16).eps * p.shape[1] ** 0.5
    return (
        []
        if error <= limit
        else [f"{key} is not orthonormal: ||P^T P - I||_2 = {error:.1e}, expected at most {limit:.1e}"]
    )
