"""PEFT's OFT, BOFT, HRA and PSOFT checkpoints as LOFT adapters that compute the same function, and back.

Every method is W = W0 R (BOFT: diag(s) W0 R). With Cayley(A) = (I - A)(I + A)^{-1}, theta the strict lower triangle of A row by row, and
Q the skew matrix whose strict upper triangle v PEFT stores:

    OFT     x -> x O in every block, R = O^T.  O = Cayley(Q):              A = -Q, theta_ij =  v_ji
                                               O = I + 2Q + 2Q^2 + ...:    A =  Q, theta_ij = -v_ji
    BOFT    x -> x M_{m-1} ... M_0, M_i = P_i diag(Cayley(S)) P_i^T, S = (B - B^T)/2 of the stored B, y scaled by s before the bias;
            R = M_0^T M_1^T ...:               A = -S, theta_ij = (B_ji - B_ij)/2;  loft_scale = s - 1
    HRA     R = H_0 H_1 ... of the columns of U:  theta = U as it is
    PSOFT   T = diag(b) Cayley(-Q) diag(a), series or not:  A = -Q, theta_ij = v_ji, then a - 1, then b - 1

PEFT's series of t terms is (I - A) sum_{k <= K} (-A)^k with K = t - 2. PSOFT's checkpoint holds no P: PEFT takes the SVD of W0 again at
every load, and so does the conversion, once. On the way back P must span PEFT's basis, P = P' V, and the generator becomes V A V^T.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ._io import check_writable, whole_directory
from .inspection import CONFIG_FILE, WEIGHTS_FILE, read_config
from .tuner.config import LoftConfig

__all__ = ["convert_adapter"]

_ROOT = "base_model.model."
_PREFIXES = {"OFT": "oft_", "BOFT": "boft_", "HRA": "hra_", "PSOFT": "psoft_", "LOFT": "loft_"}
# What is known of every config, and of each method's; a field that is neither, and set, may change the function.
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
_ONCE = "is applied once, to the stored values; further training is not constrained"
# ||W0 P - U S|| / ||U S|| up to which PSOFT's update is W0 R in float32, and ||P - P' V||_2 that is not worth a warning.
_ROUNDING = 1e-5
_BASIS = 1e-3  # ||P - P' V||_2 from which on a basis is not the one that PSOFT would compute

Progress = Callable[[str, int, int], None]


def convert_adapter(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    base_model: nn.Module | str | os.PathLike | None = None,
    *,
    progress: Progress | None = None,
) -> str:
    """Write a PEFT OFT, BOFT, HRA or PSOFT adapter as a LOFT adapter with the same function; or such a LOFT adapter as the method's own.

    src: folder with `adapter_config.json` and `adapter_model.safetensors`. dst: the folder to write, whole or not at all; in an existing
    one the two files are replaced. base_model: the model the adapter was trained on, or its folder; None: the folder that the
    config names. Only PSOFT needs it (its checkpoint holds no basis; on the device of `base_model`, where PEFT would compute it), and a
    LOFT adapter on its way to PSOFT or, without an output scale, to BOFT. progress: called with (module, done, total) for every SVD.

    Returns `dst`. Tensors of `modules_to_save` and resized embeddings are carried over. Dropout and constraints of the training itself
    have no part in the function and are left out with a warning. Everything is checked before anything is written: ValueError for
    what is no rotation (`pissa_init`), no linear layer, trained biases, unknown or missing tensors, NaN or Inf, a base that does
    not fit, and forms the other side cannot hold; FileNotFoundError for a missing file.
    """
    checkpoint = _read(Path(src))
    _check_target(checkpoint, Path(dst))
    base = _Base(checkpoint, base_model)
    readers: dict[str, Callable[[_Checkpoint, _Base, Progress | None], _Converted]] = {
        "OFT": _from_oft,
        "BOFT": _from_boft,
        "HRA": _from_hra,
        "PSOFT": _from_psoft,
        "LOFT": _from_loft,
    }
    converted = readers[checkpoint.kind](checkpoint, base, progress)
    _check_replaced(Path(dst), str(converted.config.peft_type.value))
    tensors = {
        f"{_ROOT}{name}.{part}": value.detach().cpu().contiguous()
        for name, parts in converted.modules.items()
        for part, value in parts.items()
    }
    for each in (*checkpoint.notes, *converted.notes):
        warnings.warn(each, stacklevel=2)
    with whole_directory(dst) as folder:
        save_file(tensors | checkpoint.carried, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        for name in ("target_modules", "exclude_modules"):  # a set has no order, and the file should have one
            if isinstance(getattr(converted.config, name), set):
                setattr(converted.config, name, sorted(getattr(converted.config, name)))
        converted.config.save_pretrained(os.fspath(folder))
    return os.fspath(dst)


# -- what is read, and what is written ---------------------------------------------------------------------------------


@dataclass
class _Checkpoint:
    """A saved adapter: its tensors by module and part, such as `oft_R.weight`, and those that are none of the method's."""

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
        """The config's fields that every method has. by_name: target the modules that are there by their full names."""
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
class _Converted:
    config: Any
    modules: dict[str, dict[str, Tensor]]
    notes: list[str] = field(default_factory=list)


def _read(folder: Path) -> _Checkpoint:
    config = _config(folder)
    prefix = _PREFIXES[config["peft_type"]]
    saved = config.get("modules_to_save") or []
    modules: dict[str, dict[str, Tensor]] = {}
    carried = {}
    for key, value in _tensors(folder).items():
        unknown = key.endswith(".loft_energy")  # NaN where nobody measured it
        if value.is_floating_point() and not unknown and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{folder / WEIGHTS_FILE}: tensor {key!r} holds NaN or Inf")
        name, dot, part = key.removeprefix(_ROOT).rpartition(f".{prefix}")
        if dot and key.startswith(_ROOT):
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
    checkpoint = _Checkpoint(folder, config, modules, carried)
    _check_fields(checkpoint)
    return checkpoint


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not folder.is_dir():
        raise FileNotFoundError(f"src: {folder} is not a folder on this machine")
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG_FILE} in it; a folder written by save_pretrained is expected")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind not in _PREFIXES:
        raise ValueError(f"{file}: peft_type is {kind!r}; one of {', '.join(_PREFIXES)} is expected")
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


def _check_fields(checkpoint: _Checkpoint) -> None:
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


def _check_target(checkpoint: _Checkpoint, dst: Path) -> None:
    """Refuse a folder to write that could not be written, or is the source."""
    check_writable(dst, folder=True)
    if dst.resolve() == checkpoint.folder.resolve():
        raise ValueError(f"dst: {dst} is src itself; give another folder")


def _check_replaced(dst: Path, kind: str) -> None:
    """Refuse to replace an adapter of another method, or a file that is not known to be one of this."""
    file = dst / CONFIG_FILE
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8")).get("peft_type")
        except (ValueError, AttributeError):
            found = None
        if found != kind:
            raise ValueError(f"dst: {dst} holds an adapter with peft_type {found!r}, not {kind!r}; give another folder")


def _parts(checkpoint: _Checkpoint, wanted: Mapping[str, int | tuple[int, ...]]) -> None:
    """Refuse modules whose tensors are not exactly `wanted`, part -> its numbers of dimensions."""
    for name, parts in checkpoint.modules.items():
        if odd := sorted(set(parts) ^ set(wanted)):
            what = "lacks" if odd[0] in wanted else "has the unknown tensor"
            raise checkpoint.refuse(f"module {name!r} {what} {odd[0]}")
        for part, value in parts.items():
            allowed = wanted[part]
            if value.dim() not in ((allowed,) if isinstance(allowed, int) else allowed):
                raise checkpoint.refuse(f"module {name!r} has {part} of the unexpected shape {tuple(value.shape)}")


def _ranks(sizes: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """(r, rank_pattern): the most frequent size, and by name those of the modules that have another."""
    common = Counter(sizes.values()).most_common(1)[0][0]
    pattern = {name: size for name, size in sorted(sizes.items()) if size != common}
    # PEFT takes the first pattern, in the alphabetical order of the file, that matches the end of a name: "a.q" would be "b.a.q" too.
    if any(pattern.get(get_pattern_key(list(pattern), name), common) != size for name, size in sizes.items()):
        pattern = {f"^{re.escape(name)}": size for name, size in pattern.items()}
    return common, pattern


class _Base:
    """The base model, loaded when a layer of it is first asked for."""

    def __init__(self, checkpoint: _Checkpoint, given: nn.Module | str | os.PathLike | None):
        self._checkpoint, self._model = checkpoint, None
        self._path: Path | None = None
        if isinstance(given, nn.Module):
            if hasattr(given, "peft_config"):
                raise ValueError("base_model must be the plain base model, without adapters")
            self._model = given
        elif isinstance(given, (str, os.PathLike)):
            self._path = Path(given)
            if not self._path.is_dir():
                raise FileNotFoundError(f"base_model: {given} is not a folder on this machine")
        elif given is not None:
            raise TypeError(f"base_model must be a torch.nn.Module, a folder or None, got {type(given).__name__}")

    @property
    def at_hand(self) -> bool:
        """Whether a model was given, so that looking at it costs nothing."""
        return self._model is not None

    def layer(self, name: str, reason: str) -> nn.Linear:
        """A linear layer of it. reason: what it is needed for, when there is none."""
        if self._model is None:
            self._model = self._load(reason)
        try:
            found = self._model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"base_model has no module {name!r}, which {self._checkpoint.folder} adapts") from None
        if not isinstance(found, nn.Linear):
            raise ValueError(
                f"module {name!r} of base_model is a {type(found).__name__}; only linear layers can be converted"
            )
        return found

    def check(self, widths: Mapping[str, int | None]) -> None:
        """Where a model was given: every module is a linear layer of it, with this many inputs (None: any)."""
        if not self.at_hand:
            return
        for name, width in widths.items():
            found = self.layer(name, "").in_features
            if width not in (None, found):
                raise ValueError(
                    f"module {name!r} of base_model has {found} inputs, but {self._checkpoint.folder} was trained with {width}"
                )

    def _load(self, reason: str) -> nn.Module:
        path = self._path
        if path is None:
            named = self._checkpoint.config.get("base_model_name_or_path")
            if not named or not Path(named).is_dir():
                where = (
                    f"its config names {named!r}, which is not a folder on this machine"
                    if named
                    else "its config names none"
                )
                raise ValueError(f"{self._checkpoint.folder}: {reason}, and {where}; give base_model")
            path = Path(named)
        return base_class(self._checkpoint.folder, self._checkpoint.config).from_pretrained(path)


def base_class(folder: str | os.PathLike, config: Mapping[str, Any]) -> Any:
    """The transformers class of an adapter's base model, by its auto_mapping or task_type; ValueError where neither names one."""
    import peft

    named = config.get("auto_mapping") or {}
    if named.get("parent_library", "").split(".")[0] == "transformers":
        kind = getattr(importlib.import_module(named["parent_library"]), named.get("base_model_class", ""), None)
    else:
        kind = getattr(getattr(peft, _TASKS.get(config.get("task_type") or "", ""), None), "_target_class", None)
    if kind is None:
        raise ValueError(f"{folder}: neither its task_type nor its auto_mapping names a transformers model class")
    return kind


_TASKS = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


# -- triangles ---------------------------------------------------------------------------------------------------------


def _lower_from_upper(v: Tensor, b: int) -> Tensor:
    """(..., b(b - 1)/2) strict upper triangles row by row -> v_ji for i > j, row by row."""
    i, j = torch.tril_indices(b, b, -1)
    return v[..., j * (2 * b - j - 1) // 2 + i - j - 1]


def _upper_from_lower(theta: Tensor, b: int) -> Tensor:
    """The inverse of `_lower_from_upper`."""
    j, i = torch.triu_indices(b, b, 1)
    return theta[..., i * (i - 1) // 2 + j]


def _lower(a: Tensor) -> Tensor:
    i, j = torch.tril_indices(a.shape[-1], a.shape[-1], -1)
    return a[..., i, j]


def _skew(theta: Tensor, b: int) -> Tensor:
    i, j = torch.tril_indices(b, b, -1)
    a = theta.new_zeros(*theta.shape[:-1], b, b)
    a[..., i, j] = theta
    return a - a.mT


def _size_of(count: int) -> int | None:
    """b with b(b - 1)/2 = count."""
    b = (1 + math.isqrt(1 + 8 * count)) // 2
    return b if b * (b - 1) // 2 == count else None


def _projected(values: Tensor, norms: Tensor, limit: float) -> Tensor:
    """`values` scaled so that no norm is above `limit`."""
    return torch.where(norms <= limit, values, values * (limit / norms.clamp_min(torch.finfo(norms.dtype).tiny)))


def _terms(checkpoint: _Checkpoint) -> int | None:
    """K of PEFT's series, or None where it solves Cayley exactly."""
    if not checkpoint.config.get("use_cayley_neumann", checkpoint.kind == "OFT"):
        return None
    t = checkpoint.config.get("num_cayley_neumann_terms", 5)
    if t < 3:
        raise checkpoint.refuse(
            f"num_cayley_neumann_terms={t} leaves I{' + 2Q' if t == 2 else ''}, which is no rotation that trains"
        )
    return max(t - 2, 2)


# -- PEFT -> LOFT ------------------------------------------------------------------------------------------------------


def _from_oft(checkpoint: _Checkpoint, base: _Base, progress: Progress | None) -> _Converted:
    parts = {part for tensors in checkpoint.modules.values() for part in tensors}
    embeddings = [name for name, tensors in checkpoint.modules.items() if any("embedding" in part for part in tensors)]
    if embeddings:
        raise checkpoint.refuse(f"module {embeddings[0]!r} is an embedding; only linear layers can be converted")
    if "oft_r" in parts:
        return _from_oft_015(checkpoint, base)
    _parts(checkpoint, {"oft_R.weight": 2})
    config, terms = checkpoint.config, _terms(checkpoint)
    share, sign = bool(config.get("block_share")), 1 if terms is None else -1
    sizes, modules, notes, idle = {}, {}, [], []
    furthest = 0.0
    for name, tensors in checkpoint.modules.items():
        v = tensors["oft_R.weight"].float()
        b = _size_of(v.shape[1])
        if b is None or not len(v) or (share and len(v) != 1):
            raise checkpoint.refuse(f"module {name!r} has oft_R.weight of the unexpected shape {tuple(v.shape)}")
        if config.get("coft"):
            v = _projected(v, v.norm(dim=1, keepdim=True) * 2**0.5, config.get("eps", 6e-5) / len(v) ** 0.5)
        if b == 1:  # PEFT's nearest divisor of a prime width
            idle.append(name)
            continue
        if terms is not None and not _since(config, 18):
            furthest = max(furthest, float(torch.linalg.matrix_norm(_skew(v, b), 2).max()))
        sizes[name], modules[name] = b, {"loft_theta": sign * _lower_from_upper(v, b)[None]}
    if not modules:
        raise checkpoint.refuse("all its blocks have size 1, so there is nothing in it to convert")
    if idle:
        notes.append(f"blocks of size 1 turn nothing: {_listed(idle)} left out of the converted adapter")
        checkpoint.modules = {name: tensors for name, tensors in checkpoint.modules.items() if name in modules}
    if config.get("coft"):
        notes.append(f"coft's bound {_ONCE}")
    if terms is not None and furthest:
        notes.append(
            f"this adapter is of a PEFT before 0.18, whose series differs from today's by Q^{terms + 1}: the converted adapter is what "
            f"PEFT makes of it today, up to {furthest ** (terms + 1):.1e} away in a block"
        )
    widths = {name: None if share else b * modules[name]["loft_theta"].shape[1] for name, b in sizes.items()}
    base.check(widths)
    b, pattern = _ranks(sizes)
    fields = checkpoint.targets(by_name=bool(idle)) | {"rank_pattern": pattern}
    return _Converted(LoftConfig.oft(b, share=share, neumann_terms=terms, **fields), modules, notes)


def _since(config: Mapping[str, Any], minor: int) -> bool:
    """Whether a PEFT of at least 0.`minor` saved it; the field is there since 0.18."""
    found = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return found is not None and (int(found[1]), int(found[2])) >= (0, minor)


def _from_oft_015(checkpoint: _Checkpoint, base: _Base) -> _Converted:
    """PEFT 0.14 and 0.15: full blocks B, turned as BOFT's with one factor, and an output scale."""
    config = checkpoint.config
    if all(set(tensors) == {"oft_r"} for tensors in checkpoint.modules.values()):
        raise checkpoint.refuse(
            "this is an OFT of PEFT 0.13 or before, which turns a layer's outputs (in blocks that may reach past its width), while LOFT's "
            "blocks turn inputs: merge it with that PEFT instead"
        )
    _parts(checkpoint, {"oft_r": 3, "oft_s": 2})
    share, coft = bool(config.get("block_share")), bool(config.get("coft"))
    if coft and share:
        raise checkpoint.refuse(
            "coft with block_share in an OFT of PEFT 0.15 or before: its bound cannot be told from the file"
        )
    renamed = {}
    for name, tensors in checkpoint.modules.items():
        blocks, scale = tensors["oft_r"].float(), tensors["oft_s"]
        if coft:
            per = math.ceil(scale.numel() / len(blocks)) ** 2
            norms = torch.linalg.matrix_norm(blocks, keepdim=True)
            blocks = _projected(blocks, norms, config.get("eps", 6e-5) * per / len(blocks) ** 0.5)
        renamed[name] = {"boft_R": blocks[None], "boft_s": scale}
    checkpoint.modules = renamed
    converted = _from_boft(checkpoint, base, None, share=share)
    if coft:
        converted.notes.append(f"coft's bound {_ONCE}")
    return converted


def _from_boft(checkpoint: _Checkpoint, base: _Base, progress: Progress | None, *, share: bool = False) -> _Converted:
    for tensors in checkpoint.modules.values():
        tensors.pop("boft_P", None)  # a constant that PEFT 0.12 saved
    _parts(checkpoint, {"boft_R": 4, "boft_s": 2})
    sizes, modules, notes = {}, {}, []
    for name, tensors in checkpoint.modules.items():
        stored, scale = tensors["boft_R"].float(), tensors["boft_s"].float()
        if len(scale) == 1 and scale.shape[1] > 1:
            raise checkpoint.refuse(f"module {name!r} is a Conv2d; only linear layers can be converted")
        b = stored.shape[-1]
        if stored.shape[-2] != b or scale.shape[1] != 1 or not stored.numel():
            shapes = f"{tuple(stored.shape)} and {tuple(scale.shape)}"
            raise checkpoint.refuse(f"module {name!r} has blocks and scale of the unexpected shapes {shapes}")
        if b == 1:
            raise checkpoint.refuse(f"module {name!r} has blocks of size 1, which turn nothing")
        sizes[name] = b
        modules[name] = {"loft_theta": _lower(stored.mT - stored) / 2, "loft_scale": scale[:, 0] - 1}
    counts = {name: len(tensors["boft_R"][:, 0]) for name, tensors in checkpoint.modules.items()}
    if len(set(counts.values())) > 1:
        raise checkpoint.refuse(
            f"its modules have different numbers of butterfly factors: {sorted(set(counts.values()))}"
        )
    factors = next(iter(counts.values()))
    if (asked := checkpoint.config.get("boft_n_butterfly_factor", factors)) != factors:
        notes.append(
            f"boft_n_butterfly_factor is {asked} but the tensors have {factors}: PEFT runs one where its CUDA extension is missing, and "
            f"this adapter was trained with {factors}"
        )
    base.check({n: None if share else b * checkpoint.modules[n]["boft_R"].shape[1] for n, b in sizes.items()})
    b, pattern = _ranks(sizes)
    fields = checkpoint.targets() | {"rank_pattern": pattern} | ({"share": True} if share else {})
    return _Converted(LoftConfig.boft(b, factors, output_scale=True, **fields), modules, notes)


def _from_hra(checkpoint: _Checkpoint, base: _Base, progress: Progress | None) -> _Converted:
    _parts(checkpoint, {"hra_u": 2})
    sizes = {name: tensors["hra_u"].shape[1] for name, tensors in checkpoint.modules.items()}
    for name, tensors in checkpoint.modules.items():
        u = tensors["hra_u"]
        if not 1 <= u.shape[1] <= u.shape[0] - u.shape[0] % 2:
            raise checkpoint.refuse(
                f"module {name!r} has hra_u of shape {tuple(u.shape)}: more reflections than LOFT allows"
            )
        if not bool((u != 0).any(0).all()):
            raise checkpoint.refuse(f"module {name!r} has a zero column in hra_u, which is no reflection")
    base.check({name: tensors["hra_u"].shape[0] for name, tensors in checkpoint.modules.items()})
    r, pattern = _ranks(sizes)
    fields = checkpoint.targets() | {"rank_pattern": pattern}
    config = LoftConfig.hra(r, gram_schmidt=bool(checkpoint.config.get("apply_GS")), **fields)
    return _Converted(config, {n: {"loft_theta": t["hra_u"].float()} for n, t in checkpoint.modules.items()})


def _from_psoft(checkpoint: _Checkpoint, base: _Base, progress: Progress | None) -> _Converted:
    config = checkpoint.config
    r, orth = config.get("r", 32), bool(config.get("psoft_orth", True))
    if config.get("ab_svd_init", "psoft_init") != "psoft_init":
        raise checkpoint.refuse(
            f"ab_svd_init={config['ab_svd_init']!r} makes the update a similarity transform, which is no rotation of W0; merge it with PEFT"
        )
    if config.get("psoft_svd") == "lowrank" and "random_seed" not in config:
        raise checkpoint.refuse("psoft_svd='lowrank' without random_seed: its basis cannot be computed again")
    if not config.get("psoft_alpha", 32):
        raise checkpoint.refuse("psoft_alpha=0 divides by zero in PEFT")
    vectors = {f"psoft_R.vector_{which}": 1 for which in "ab" if config.get(f"psoft_mag_{which}", True)}
    _parts(checkpoint, {"psoft_R.weight": 1 if orth else 2} | vectors)
    terms = _terms(checkpoint) if orth else None
    bound = None if terms is None else config.get("cayley_neumann_eps")
    modules = {name: {"loft_theta": _psoft_theta(checkpoint, name, r, orth, bound)} for name in checkpoint.modules}
    for done, name in enumerate(modules):
        modules[name] |= _psoft_support(checkpoint, base, name, r)
        if progress is not None:
            progress(name, done + 1, len(modules))
    fields = checkpoint.targets()
    if orth:
        made = LoftConfig.psoft(r, magnitudes=bool(vectors), neumann_terms=terms, **fields)
    else:
        made = LoftConfig(r=r, support="principal", transform="free", order="natural", **fields)
    return _Converted(made, modules, [] if bound is None else [f"cayley_neumann_eps {_ONCE}"])


def _psoft_theta(checkpoint: _Checkpoint, name: str, r: int, orth: bool, bound: float | None) -> Tensor:
    tensors = checkpoint.modules[name]
    weight = tensors["psoft_R.weight"].float()
    a, b = (tensors.get(f"psoft_R.vector_{which}", torch.ones(r)).float() for which in "ab")
    shapes = [tuple(each.shape) for each in (weight, a, b)]
    if shapes != [(r * (r - 1) // 2,) if orth else (r, r), (r,), (r,)]:
        raise checkpoint.refuse(f"module {name!r} has tensors of shapes {', '.join(map(str, shapes))} at r={r}")
    if not orth:
        return b[:, None] * weight * a - torch.eye(r)
    if bound is not None:
        weight = _projected(weight, weight.norm() * 2**0.5, bound)
    theta = _lower_from_upper(weight, r)
    return torch.cat([theta, a - 1, b - 1]) if len(tensors) > 1 else theta


def _psoft_support(checkpoint: _Checkpoint, base: _Base, name: str, r: int) -> dict[str, Tensor]:
    """P (n x r) as PEFT would compute it, and its energy."""
    weight = _psoft_weight(checkpoint, base, name, r)
    w = weight.float()
    basis, image = _psoft_basis(w, r, checkpoint.config)
    kept = w @ basis
    # In its low-rank mode PEFT lays U S (T - I) P^T onto W0. For m >= n that U S is W0 P only as far as the subspace iteration got.
    apart = float((kept - image).norm() / image.norm().clamp_min(1e-30))
    if checkpoint.config.get("psoft_svd") == "lowrank" and apart > _ROUNDING:
        raise checkpoint.refuse(
            f"psoft_svd='lowrank' is not a rotation in module {name!r}: the U S of its approximate SVD is {apart:.1e} away from W0 P "
            f"({_ROUNDING:.0e} would be rounding); peft.convert_to_lora makes a LoRA of it"
        )
    half = weight.dtype in (torch.bfloat16, torch.float16)
    energy = (kept.double().norm() / w.double().norm().clamp_min(1e-300)) ** 2
    return {"loft_support": basis.to(weight.dtype if half else torch.float32), "loft_energy": energy.float()}


def _psoft_weight(checkpoint: _Checkpoint, base: _Base, name: str, r: int) -> Tensor:
    layer = base.layer(name, "PSOFT's basis is the SVD of the base model's weights, which is not in its checkpoint")
    weight = layer.weight.detach()
    if weight.is_meta or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"module {name!r} of base_model must hold float32 or half-precision weights, got {weight.dtype}"
        )
    if r > min(weight.shape):
        raise checkpoint.refuse(f"r={r} is above what module {name!r} of base_model has, {min(weight.shape)}")
    return weight


def _psoft_basis(w: Tensor, r: int, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(V, U S) of PEFT's own SVD of W0 (m x n, float32): P = V."""
    if config.get("psoft_svd", "full") == "full":
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        return vh[:r].mT, u[:, :r] * s[:r]
    forked = {"devices": []} if w.device.type == "cpu" else {"devices": [w.device], "device_type": w.device.type}
    with torch.random.fork_rng(**forked):
        torch.manual_seed(config["random_seed"])
        u, s, v = torch.svd_lowrank(w, q=r, niter=config.get("psoft_svd_lowrank_niter", 10))
    return v, u * s


# -- LOFT -> PEFT ------------------------------------------------------------------------------------------------------

_INSTEAD = "loft_rs.export_lora writes an exact LoRA of any low-rank adapter, and merging works for all"


def _from_loft(checkpoint: _Checkpoint, base: _Base, progress: Progress | None) -> _Converted:
    config = checkpoint.config
    for name, default in (("side", "input"), ("tied", False), ("trainable_token_indices", None)):
        if (config.get(name) or default) != default:
            raise checkpoint.refuse(f"no other method of PEFT's has {name}={config[name]!r}; {_INSTEAD}")
    writers = {"blocks": _to_blocks, "trained": _to_hra, "principal": _to_psoft}
    if config.get("support") not in writers:
        raise checkpoint.refuse(
            f"support={config.get('support')!r} has no counterpart in PEFT's OFT, BOFT, HRA or PSOFT; {_INSTEAD}"
        )
    return writers[config["support"]](checkpoint, base, progress)


def _generator(checkpoint: _Checkpoint) -> tuple[str, int | None]:
    """(`cayley`, `cayley_neumann` or another transform, K)."""
    name, _, terms = str(checkpoint.config.get("transform")).partition(":")
    if name != "cayley_neumann":
        return name, None
    return name, int(terms or checkpoint.config.get("neumann_terms") or 0)


def _neumann_fields(checkpoint: _Checkpoint, method: str) -> dict[str, Any]:
    name, terms = _generator(checkpoint)
    if name == "cayley":
        return {"use_cayley_neumann": False}
    if name != "cayley_neumann" or terms is None or terms < 2:
        shown = repr(name) if terms is None else f"{name!r} with neumann_terms={terms}"
        raise checkpoint.refuse(f"{method} has no transform {shown}; {_INSTEAD}")
    return {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms + 2}


def _to_blocks(checkpoint: _Checkpoint, base: _Base, progress: Progress | None) -> _Converted:
    scaled = bool(checkpoint.config.get("output_scale"))
    if (name := _generator(checkpoint)[0]) not in ("cayley", "cayley_neumann"):
        raise checkpoint.refuse(f"neither OFT nor BOFT has transform {name!r}; {_INSTEAD}")
    _parts(checkpoint, {"loft_theta": 3} | ({"loft_scale": 1} if scaled else {}))
    factors = {len(tensors["loft_theta"]) for tensors in checkpoint.modules.values()}
    if len(factors) > 1:
        raise checkpoint.refuse(f"its modules have different numbers of factors: {sorted(factors)}")
    sizes = {}
    for name, tensors in checkpoint.modules.items():
        b = _size_of(tensors["loft_theta"].shape[2])
        if b is None or not tensors["loft_theta"].numel():
            raise checkpoint.refuse(
                f"module {name!r} has loft_theta of the unexpected shape {tuple(tensors['loft_theta'].shape)}"
            )
        sizes[name] = b
    if scaled or factors != {1}:
        return _to_boft(checkpoint, base, sizes, factors.pop())
    return _to_oft(checkpoint, base, sizes)


def _to_oft(checkpoint: _Checkpoint, base: _Base, sizes: dict[str, int]) -> _Converted:
    from peft import OFTConfig

    share, method = bool(checkpoint.config.get("share")), _neumann_fields(checkpoint, "OFT")
    sign = -1 if method["use_cayley_neumann"] else 1
    modules, widths = {}, {}
    for name, tensors in checkpoint.modules.items():
        theta, b = tensors["loft_theta"][0].float(), sizes[name]
        modules[name] = {"oft_R.weight": sign * _upper_from_lower(theta, b)}
        widths[name] = None if share else b * len(theta)
    base.check(widths)
    if share and len(set(sizes.values())) > 1:
        # The widths that PEFT would adjust one block size to are not in the file.
        widths = {
            name: base.layer(name, "shared blocks of several sizes need its widths").in_features for name in sizes
        }
    made = OFTConfig(**_oft_size(checkpoint, sizes, widths), block_share=share, **method, **checkpoint.targets())
    return _Converted(made, modules)


def _oft_size(checkpoint: _Checkpoint, sizes: dict[str, int], widths: Mapping[str, int | None]) -> dict[str, Any]:
    """The one number by which PEFT finds every module's block size: it takes the nearest that divides the module's width."""
    common = set(sizes.values())
    if len(common) == 1:
        return {"r": 0, "oft_block_size": common.pop()}
    known = [(width, sizes[name]) for name, width in widths.items() if width is not None]
    for tried in range(2, max(width for width, _ in known) + 1):
        if all(_adjusted(width, tried) == b for width, b in known):
            return {"r": 0, "oft_block_size": tried}
        if all(_adjusted(width, tried) == width // b for width, b in known):
            return {"r": tried, "oft_block_size": 0}
    raise checkpoint.refuse(f"OFT has one block size for all modules, and none gives {sorted(common)} here; {_INSTEAD}")


def _adjusted(width: int, number: int) -> int:
    """PEFT's nearest divisor of a width, the smaller of two that are equally near."""
    if number >= width:
        return width
    higher = next(each for each in range(number, width + 1) if width % each == 0)
    lower = next(each for each in range(number, 0, -1) if width % each == 0)
    return lower if number - lower <= higher - number else higher


def _to_boft(checkpoint: _Checkpoint, base: _Base, sizes: dict[str, int], factors: int) -> _Converted:
    from peft import BOFTConfig

    if _generator(checkpoint)[0] != "cayley":
        raise checkpoint.refuse(f"BOFT has no transform {_generator(checkpoint)[0]!r}; {_INSTEAD}")
    if checkpoint.config.get("share"):
        raise checkpoint.refuse(f"BOFT has no shared blocks; {_INSTEAD}")
    modules, counts = {}, set()
    for name, tensors in checkpoint.modules.items():
        theta = tensors["loft_theta"].float()
        scale = tensors.get("loft_scale")
        if scale is None:
            scale = torch.zeros(base.layer(name, "BOFT has an output scale, whose size is the layer's").out_features)
        modules[name] = {"boft_R": -_skew(theta, sizes[name]), "boft_s": 1 + scale.float()[:, None]}
        counts.add(theta.shape[1])
    base.check({name: b * checkpoint.modules[name]["loft_theta"].shape[1] for name, b in sizes.items()})
    common = set(sizes.values())
    if len(common) == 1:
        size: dict[str, Any] = {"boft_block_size": common.pop(), "boft_block_num": 0}
    elif len(counts) == 1:
        size = {"boft_block_size": 0, "boft_block_num": counts.pop()}
    else:
        raise checkpoint.refuse(
            f"BOFT has one block size or number of blocks for all modules, not {sorted(common)}; {_INSTEAD}"
        )
    notes = []
    if factors > 1:
        notes.append(f"PEFT runs one butterfly factor where its CUDA extension is missing; this BOFT needs {factors}")
    return _Converted(BOFTConfig(**size, boft_n_butterfly_factor=factors, **checkpoint.targets()), modules, notes)


def _to_hra(checkpoint: _Checkpoint, base: _Base, progress: Progress | None) -> _Converted:
    from peft import HRAConfig

    _parts(checkpoint, {"loft_theta": 2})
    r = _one_rank(checkpoint, "HRA", {n: tensors["loft_theta"].shape[1] for n, tensors in checkpoint.modules.items()})
    base.check({name: tensors["loft_theta"].shape[0] for name, tensors in checkpoint.modules.items()})
    made = HRAConfig(r=r, apply_GS=_generator(checkpoint)[0] == "reflection", **checkpoint.targets())
    return _Converted(made, {n: {"hra_u": t["loft_theta"].float()} for n, t in checkpoint.modules.items()})


def _one_rank(checkpoint: _Checkpoint, method: str, ranks: Mapping[str, int]) -> int:
    if len(set(ranks.values())) > 1:
        raise checkpoint.refuse(f"{method} has one rank for all modules, not {sorted(set(ranks.values()))}; {_INSTEAD}")
    return next(iter(ranks.values()))


def _to_psoft(checkpoint: _Checkpoint, base: _Base, progress: Progress | None) -> _Converted:
    from peft import PsoftConfig

    _parts(checkpoint, {"loft_theta": (1, 2), "loft_support": 2, "loft_energy": (0, 1)})
    free, scaled = _generator(checkpoint)[0] == "free", bool(checkpoint.config.get("magnitudes"))
    method = {} if free else _neumann_fields(checkpoint, "PSOFT")
    r = _one_rank(checkpoint, "PSOFT", {n: t["loft_support"].shape[1] for n, t in checkpoint.modules.items()})
    expected = (r, r) if free else (r * (r - 1) // 2 + 2 * r * scaled,)
    modules, furthest = {}, 0.0
    for done, (name, tensors) in enumerate(checkpoint.modules.items()):
        theta = tensors["loft_theta"].double()
        if theta.shape != expected:
            raise checkpoint.refuse(f"module {name!r} has loft_theta of shape {tuple(theta.shape)}, not {expected}")
        turn, apart = _to_psofts_basis(checkpoint, base, name, tensors["loft_support"], scaled)
        furthest = max(furthest, apart)
        if free:
            modules[name] = {"psoft_R.weight": (torch.eye(r) + turn @ theta @ turn.mT).float()}
        else:
            count = r * (r - 1) // 2
            generator = turn @ _skew(theta[:count], r) @ turn.mT
            modules[name] = {"psoft_R.weight": _upper_from_lower(_lower(generator - generator.mT) / 2, r).float()}
        if scaled:
            a, b = theta[count : count + r], theta[count + r :]
            modules[name] |= {"psoft_R.vector_a": (1 + a).float(), "psoft_R.vector_b": (1 + b).float()}
        if progress is not None:
            progress(name, done + 1, len(checkpoint.modules))
    made = PsoftConfig(
        r=r, psoft_orth=not free, psoft_mag_a=scaled, psoft_mag_b=scaled, **method, **checkpoint.targets()
    )
    notes = [f"PSOFT's own basis is up to {furthest:.1e} away from this adapter's, and so is its rotation"]
    return _Converted(made, modules, notes if furthest > _ROUNDING else [])


def _to_psofts_basis(
    checkpoint: _Checkpoint, base: _Base, name: str, held: Tensor, scaled: bool
) -> tuple[Tensor, float]:
    """(V, ||P - P' V||_2) for the basis P' that PEFT will compute. V (r x r, float64) holds signs alone where magnitudes belong to the
    columns. The distance is 0 for a P in half precision that is as near as its rounding allows."""
    weight = _psoft_weight(checkpoint, base, name, held.shape[1])
    wanted = _psoft_basis(weight.float(), held.shape[1], {})[0].double().cpu()
    if wanted.shape != held.shape:
        raise checkpoint.refuse(f"module {name!r} has {len(held)} inputs, but {len(wanted)} in base_model")
    rounded = held.dtype in (torch.bfloat16, torch.float16)
    limit = 2 * torch.finfo(held.dtype).eps if rounded else _BASIS
    u, _, vh = torch.linalg.svd(held.double(), full_matrices=False)  # P (P^T P)^{-1/2}, as the layer folds the Gram in
    turn = wanted.mT @ (u @ vh)
    if scaled:
        turn = torch.diag(turn.diagonal().sign())
    apart = float(torch.linalg.matrix_norm(u @ vh - wanted @ turn, 2))
    if apart > limit:
        what = "its columns are not" if scaled else "its span is not that of"
        raise checkpoint.refuse(
            f"PSOFT takes its basis from the SVD of W0, and in module {name!r} {what} the top {held.shape[1]} singular vectors "
            f"({apart:.1e} apart, {limit:.0e} allowed); {_INSTEAD}"
        )
    return turn, 0.0 if rounded else apart


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
