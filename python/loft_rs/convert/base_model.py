"""The base model of an adapter: found when a layer of it is first asked for; and the basis that
PSOFT takes from its weights.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._format import CONFIG_FILE
from .checkpoint import Checkpoint

__all__ = ["Base", "base_class", "psoft_basis", "psoft_weight"]


class Base:
    """The base model, loaded when a layer of it is first asked for."""

    def __init__(self, checkpoint: Checkpoint, given: nn.Module | str | os.PathLike | None):
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
            _check_plain(self._path)
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
        """Where a model was given: every module is a linear layer of it, with this many inputs
        (None: any).
        """
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
            _check_plain(path)
        return base_class(self._checkpoint.folder, self._checkpoint.config).from_pretrained(path)


def _check_plain(folder: Path) -> None:
    """Refuse a folder with an adapter in it, which transformers would load as well."""
    if (folder / CONFIG_FILE).is_file():
        raise ValueError(f"base_model: {folder} holds an adapter; give the folder of the plain base model")


def base_class(folder: str | os.PathLike, config: Mapping[str, Any]) -> Any:
    """The transformers class of an adapter's base model, by its auto_mapping or task_type;
    ValueError where neither names one.
    """
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


def psoft_weight(checkpoint: Checkpoint, base: Base, name: str, r: int) -> Tensor:
    layer = base.layer(name, "PSOFT's basis is the SVD of the base model's weights, which is not in its checkpoint")
    weight = layer.weight.detach()
    if weight.is_meta or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"module {name!r} of base_model must hold float32 or half-precision weights, got {weight.dtype}"
        )
    if r > min(weight.shape):
        raise checkpoint.refuse(f"r={r} is above what module {name!r} of base_model has, {min(weight.shape)}")
    return weight


def psoft_basis(w: Tensor, r: int, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(V, U S) of PEFT's own SVD of W0 (m x n, float32): P = V."""
    if config.get("psoft_svd", "full") == "full":
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        return vh[:r].mT, u[:, :r] * s[:r]
    forked = {"devices": []} if w.device.type == "cpu" else {"devices": [w.device], "device_type": w.device.type}
    with torch.random.fork_rng(**forked):
        torch.manual_seed(config["random_seed"])
        u, s, v = torch.svd_lowrank(w, q=r, niter=config.get("psoft_svd_lowrank_niter", 10))
    return v, u * s
