"""A saved PEFT adapter: read, checked, and described for the converters.

Nothing is left aside silently: a config field that is set and not known, and a tensor that is
neither the method's nor one of `modules_to_save`, are refused by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .._format import CONFIG_FILE, WEIGHTS_FILE
from ..inspection import read_config, read_peft_config

__all__ = ["ROOT", "Checkpoint", "Converted", "Progress", "ranks_of", "read", "require_parts"]

ROOT = "base_model.model."
_PREFIXES = {"OFT": "oft_", "BOFT": "boft_", "HRA": "hra_", "PSOFT": "psoft_", "LOFT": "loft_"}
# What is known of every config, and of each method's; a field that is neither, and set, may change
# the function.
_SHARED_FIELDS = set(
    "peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode target_modules exclude_modules "
    "layers_to_transform layers_pattern modules_to_save bias fan_in_fan_out init_weights".split()
)
_SERIES_FIELDS = "use_cayley_neumann num_cayley_neumann_terms cayley_neumann_eps"
_OWN_FIELDS = {
    "OFT": f"r oft_block_size module_dropout coft eps block_share rank_pattern alpha_pattern {_SERIES_FIELDS}",
    "BOFT": "boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout",
    "HRA": "r apply_GS",
    "PSOFT": "r psoft_alpha psoft_dropout psoft_svd psoft_svd_lowrank_niter random_seed ab_svd_init psoft_orth psoft_mag_a "
    f"psoft_mag_b {_SERIES_FIELDS}",
}
_DROPOUT = {"OFT": "module_dropout", "BOFT": "boft_dropout", "PSOFT": "psoft_dropout"}
Progress = Callable[[str, int, int], None]


@dataclass
class Checkpoint:
    """A saved adapter: its tensors by module and part, such as `oft_R.weight`, and those that are
    none of the method's.
    """

    folder: Path
    config: dict[str, Any]
    modules: dict[str, dict[str, Tensor]]
    carried: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.config["peft_type"]

    def refuse(self, reason: str) -> ValueError:
        return ValueError(f"{self.folder}: {reason}")

    def targets(self, *, by_name: bool = False) -> dict[str, Any]:
        """The config's fields that every method has. by_name: target the modules that are there by
        their full names.
        """
        kept = ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "modules_to_save")
        fields = {name: self.config.get(name) for name in kept}
        # PEFT adds the usual heads at every load, again and again.
        fields["modules_to_save"] = list(dict.fromkeys(fields["modules_to_save"] or ())) or None
        fields["inference_mode"] = bool(self.config.get("inference_mode", False))
        target, layers = self.config.get("target_modules"), self.config.get("layers_to_transform")
        if by_name or not target or target == "all-linear" or (isinstance(target, str) and layers is not None):
            return fields | {"target_modules": sorted(self.modules)}
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
            fields[name] = self.config.get(name)
        return fields


@dataclass
class Converted:
    config: Any
    modules: dict[str, dict[str, Tensor]]
    notes: list[str] = field(default_factory=list)


def read(folder: Path) -> Checkpoint:
    config = _config(folder)
    prefix = _PREFIXES[config["peft_type"]]
    saved = config.get("modules_to_save") or []
    modules: dict[str, dict[str, Tensor]] = {}
    carried = {}
    for key, value in _tensors(folder).items():
        unknown = key.endswith(".loft_energy")  # NaN where nobody measured it
        if value.is_floating_point() and not unknown and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{folder / WEIGHTS_FILE}: tensor {key!r} holds NaN or Inf")
        name, dot, part = key.removeprefix(ROOT).rpartition(f".{prefix}")
        if dot and key.startswith(ROOT):
            if not value.is_floating_point():
                raise ValueError(
                    f"{folder / WEIGHTS_FILE}: tensor {key!r} has dtype {value.dtype}, not a floating-point one"
                )
            modules.setdefault(name, {})[prefix + part] = value
        elif any(f"{each}." in key for each in saved) or any(f".{each}." in key for each in EMBEDDING_LAYER_NAMES):
            carried[key] = value
        else:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: tensor {key!r} is neither {config['peft_type']}'s nor one of modules_to_save={saved}"
            )
    if not modules:
        raise ValueError(f"{folder / WEIGHTS_FILE}: no tensor of {config['peft_type']} in it")
    checkpoint = Checkpoint(folder, config, modules, carried)
    _check_fields(checkpoint)
    return checkpoint


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"src: {folder} is not a folder on this machine")
    config = read_peft_config(folder)
    kind = config.get("peft_type")
    if kind not in _PREFIXES:
        raise ValueError(f"{folder / CONFIG_FILE}: peft_type is {kind!r}; one of {', '.join(_PREFIXES)} is expected")
    return read_config(folder) if kind == "LOFT" else config


def _tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        advice = (
            "; adapter_model.bin is a pickle, which is not read: load and save it with PEFT again" if pickled else ""
        )
        raise FileNotFoundError(f"{folder}: no {WEIGHTS_FILE} in it{advice}")
    try:
        return load_file(file)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{file}: not a safetensors file, or a damaged one ({error})") from None


def _check_fields(checkpoint: Checkpoint) -> None:
    kind, config = checkpoint.kind, checkpoint.config
    if kind == "LOFT":
        return
    unknown = sorted(k for k, v in config.items() if v and k not in _SHARED_FIELDS | set(_OWN_FIELDS[kind].split()))
    if unknown:
        listed = ", ".join(f"{name}={config[name]!r}" for name in unknown)
        raise checkpoint.refuse(f"{CONFIG_FILE} sets {listed}, which this loft_rs does not know for {kind}")
    if config.get("bias", "none") != "none":
        raise checkpoint.refuse(
            f"bias={config['bias']!r} trains the base model's biases, which a LOFT adapter does not hold"
        )
    dropout = _DROPOUT.get(kind, "")
    if config.get(dropout):
        checkpoint.notes.append(
            f"{dropout}={config[dropout]} is left out: it changes training only, and LOFT has no such dropout"
        )


def require_parts(checkpoint: Checkpoint, wanted: Mapping[str, int | tuple[int, ...]]) -> None:
    """Refuse modules whose tensors are not exactly `wanted`, part -> its numbers of dimensions."""
    for name, parts in checkpoint.modules.items():
        if odd := sorted(set(parts) ^ set(wanted)):
            what = "lacks" if odd[0] in wanted else "has the unknown tensor"
            raise checkpoint.refuse(f"module {name!r} {what} {odd[0]}")
        for part, value in parts.items():
            allowed = wanted[part]
            if value.dim() not in ((allowed,) if isinstance(allowed, int) else allowed):
                raise checkpoint.refuse(f"module {name!r} has {part} of the unexpected shape {tuple(value.shape)}")


def ranks_of(sizes: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """(r, rank_pattern): the most frequent size, and by name those of the modules that have
    another.
    """
    common = Counter(sizes.values()).most_common(1)[0][0]
    pattern = {name: size for name, size in sorted(sizes.items()) if size != common}
    # PEFT takes the first pattern, in the alphabetical order of the file, that matches the end of a
    # name: "a.q" would be "b.a.q" too.
    if any(pattern.get(get_pattern_key(list(pattern), name), common) != size for name, size in sizes.items()):
        pattern = {f"^{re.escape(name)}": size for name, size in pattern.items()}
    return common, pattern
