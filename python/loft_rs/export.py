"""Exact LoRA form of LOFT adapters, for every server and library that knows LoRA (R = I + P E P^T).

input side   W0 R - W0 = (W0 P E) P^T        A = P^T (r x n),  B = W0 P E (m x r)
output side  R W0 - W0 = P E (P^T W0)        A = P^T W0,       B = P E
HRA          P the trained vectors, in the same way. OFT and BOFT have full rank: `merge`, or the nearest LoRA of a given rank.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ._checks import is_int
from ._files import whole_directory
from ._format import CONFIG_FILE
from .inspection import read_peft_config
from .layer import merging
from .layer.base_layer import is_conv1d
from .tuner.adapters import adapted_layers, require_supports
from .tuner.layer import Linear

__all__ = ["check_target", "export_lora", "lora_factors"]


def lora_factors(model: nn.Module, adapter_name: str | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> (A (r x n), B (m x r)), W0 + B A being the rotated weight.

    float32 (float64 for a float64 base), on the layer's device. ValueError where the adapter has no
    support yet.

    >>> model = get_peft_model(load_base(), LoftConfig(r=4, target_modules=["o_proj"]))
    >>> A, B = loft_rs.lora_factors(model)["model.layers.0.self_attn.o_proj"]
    >>> A.shape, B.shape
    (torch.Size([4, 32]), torch.Size([32, 4]))
    """
    adapter, layers = adapted_layers(model, adapter_name)
    require_supports(layers, adapter, "lora_factors")
    return {name: merging.lora_factors(layer.adapters[adapter]) for name, layer in layers.items()}


def export_lora(
    model: nn.Module,
    path: str | os.PathLike,
    adapter_name: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    drop_modules_to_save: bool = False,
    approximate_rank: int | None = None,
) -> dict[str, float]:
    """Write a LOFT adapter as a PEFT LoRA adapter folder: exact, no SVD, loadable without loft_rs.

    One rank for all layers (smaller ones are padded with zeros, since servers ignore
    `rank_pattern`), `lora_alpha == r`, scale 1. Of an adapter that `loft_rs.refresh` has refreshed,
    a layer's LoRA has the rank of all that it turns: r more for each refresh, at most. path: the
    folder to write, whole or not at all; in an existing one the two files are replaced. dtype: of
    the stored factors. approximate_rank: for an adapter of full rank (OFT, BOFT), the best LoRA of
    this rank, by a truncated SVD of its change of each weight; a warning names the largest error.
    Returns module name -> ||(W - W0) - B A||_F / ||W - W0||_F, 0.0 where the LoRA is exact.
    ValueError where the adapter has no support yet, where `path` holds a LOFT adapter, and where
    the adapter has `modules_to_save` or `trainable_token_indices`, which a LoRA server cannot load,
    unless `drop_modules_to_save`; for a full-rank adapter without `approximate_rank`.

    >>> model = get_peft_model(load_base(), LoftConfig(r=8, target_modules=["q_proj", "v_proj"]))
    >>> errors = loft_rs.export_lora(model, "adapter-lora")
    >>> set(errors.values())
    {0.0}
    """
    from peft import LoraConfig

    adapter, layers = _checked_request(model, path, adapter_name, dtype, drop_modules_to_save, approximate_rank)
    factors, errors = _lora_forms(layers, adapter, approximate_rank)
    rank = max(a.shape[0] for a, _ in factors.values())
    if rank > 16:
        warnings.warn(
            f"the LoRA has rank {rank}; vLLM accepts at most --max-lora-rank, which is 16 unless set", stacklevel=2
        )
    config = next(iter(layers.values())).adapters[adapter].config
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_target_modules(model, layers),
        fan_in_fan_out=any(is_conv1d(layer.get_base_layer()) for layer in layers.values()),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path or _base_name(model),
        inference_mode=True,
    )
    with whole_directory(path) as folder:
        tensors = _stored(factors, rank, dtype)
        save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
        lora.target_modules = _target_modules(model, layers)  # PEFT made a set of it, and the file should have an order
        lora.save_pretrained(os.fspath(folder))
    return errors


def _checked_request(
    model: nn.Module,
    path: str | os.PathLike,
    adapter_name: str | None,
    dtype: Any,
    drop_modules_to_save: bool,
    approximate_rank: Any,
) -> tuple[str, dict[str, Linear]]:
    """The adapter and its layers; refuses what cannot be exported, before any work."""
    check_target(path)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point torch.dtype such as torch.float16, got {dtype!r}")
    adapter, layers = adapted_layers(model, adapter_name)
    require_supports(layers, adapter, "export_lora")
    config = next(iter(layers.values())).adapters[adapter].config
    for kind in ("modules_to_save", "trainable_token_indices"):
        trained = getattr(config, kind)
        if trained and not drop_modules_to_save:
            # PEFT lists the usual heads anew at every load.
            listed = trained if isinstance(trained, dict) else sorted(set(trained))
            raise ValueError(
                f"the adapter also trains {kind}={listed}, which a LoRA server "
                "cannot load; pass drop_modules_to_save=True to export without them"
            )
    if approximate_rank is not None and (not is_int(approximate_rank) or approximate_rank < 1):
        raise ValueError(f"approximate_rank must be a positive integer or None, got {approximate_rank!r}")
    full = [name for name, layer in layers.items() if layer.adapters[adapter].full_rank]
    if full and approximate_rank is None:
        merging.lora_factors(layers[full[0]].adapters[adapter])  # raises
    if approximate_rank is not None and not full:
        raise ValueError("approximate_rank is for OFT and BOFT adapters; this one has an exact LoRA form: leave it out")
    return adapter, layers


def _lora_forms(
    layers: dict[str, Linear], adapter: str, approximate_rank: int | None
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """(A, B) of every layer, and how far B A is from its change; a warning names the furthest."""
    factors, errors = {}, dict.fromkeys(layers, 0.0)
    for name, layer in layers.items():
        if approximate_rank is not None and layer.adapters[adapter].full_rank:
            a, b, errors[name] = _nearest_lora(layer, adapter, approximate_rank)
            factors[name] = a, b
        else:
            factors[name] = merging.lora_factors(layer.adapters[adapter])
    if approximate_rank is not None:
        worst = max(errors, key=errors.__getitem__)
        warnings.warn(
            f"the LoRA of rank {approximate_rank} is approximate: relative error up to {errors[worst]:.2g}, in {worst}; merging is exact",
            stacklevel=3,
        )
    return factors, errors


def _stored(factors: dict[str, tuple[Tensor, Tensor]], rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a LoRA file, all of one rank: smaller ones are padded with zeros."""
    tensors = {}
    for name, (a, b) in factors.items():
        a, b = nn.functional.pad(a, (0, 0, 0, rank - a.shape[0])), nn.functional.pad(b, (0, rank - b.shape[1]))
        for kind, value in (("lora_A", a), ("lora_B", b)):
            tensors[f"base_model.model.{name}.{kind}.weight"] = value.to("cpu", dtype).contiguous()
    return tensors


@torch.no_grad()
def _nearest_lora(layer: Linear, adapter: str, rank: int) -> tuple[Tensor, Tensor, float]:
    """(A (k x n), B (m x k), relative error) of the best LoRA of rank k = min(rank, n, m), by the
    exact SVD.
    """
    original = merging.original_weight(layer, "the LoRA form")
    turned = merging.rotated_weight(layer, [layer.adapters[adapter]], original)
    change = turned - original.to(turned.dtype)
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    squared = s.double().square()
    error = float((squared[rank:].sum() / squared.sum().clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
    return vh[:rank], u[:, :rank] * s[:rank], error


def check_target(path: str | os.PathLike) -> None:
    """ValueError where the folder to write holds a LOFT adapter, whose files the LoRA's would
    replace.
    """
    folder = Path(path)
    if (folder / CONFIG_FILE).is_file() and read_peft_config(folder).get("peft_type") == "LOFT":
        raise ValueError(f"{path} holds a LOFT adapter, which the LoRA would overwrite; give another folder")


def _target_modules(model: nn.Module, layers: dict[str, Linear]) -> list[str]:
    """Last name components where they single out the adapted layers, as servers expect; else the
    full names.
    """
    suffixes = {name.rpartition(".")[2] for name in layers}
    root = getattr(getattr(model, "base_model", None), "model", model)
    adapted = [f"{name}." for name in layers]
    for name, _ in root.named_modules():
        inside = any(name.startswith(prefix) for prefix in adapted)
        if not inside and name not in layers and name.rpartition(".")[2] in suffixes:
            return sorted(layers)
    return sorted(suffixes)


def _base_name(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "name_or_path", None) or None
