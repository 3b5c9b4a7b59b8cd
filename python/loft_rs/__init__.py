"""loft_rs: low-rank orthogonal fine-tuning (LOFT, arXiv 2605.11872) with supports chosen from the
task's gradients, in Rust.

`select_support` chooses supports from arrays; `LoftConfig` and `calibrate` train LOFT adapters
through PEFT; `nn.LoftLinear` is the layer for plain PyTorch; `export_lora` writes the exact LoRA
form. Everything is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._registration import register_when_imported
from ._words import did_you_mean, how_to_install

_HOME = {
    "Activation": "support.methods",
    "Blocks": "support.methods",
    "Budget": "support.budget",
    "CalibrationReport": "calibration.report",
    "SplitHalf": "sketch.split_half",
    "GradSVD": "support.methods",
    "LoftCalibrationCallback": "callbacks",
    "LoftConfig": "tuner",
    "LoftModel": "tuner",
    "LoftNarrowCallback": "callbacks",
    "LoftRefreshCallback": "callbacks",
    "NarrowReport": "refreshing.narrow",
    "NonFiniteError": "linalg",
    "Pilot": "support.methods",
    "Reflections": "support.methods",
    "SkewGrad": "support.methods",
    "Support": "support.support",
    "base_changed": "tuner.adapters",
    "calibrate": "calibration.driver",
    "convert_adapter": "convert",
    "export_lora": "export",
    "higher_derivatives": "_torch",
    "load_supports": "support.files",
    "lora_factors": "export",
    "narrow": "refreshing.narrow",
    "orthogonality_error": "tuner.adapters",
    "refresh": "refreshing.refresh",
    "save_sketches": "calibration.driver",
    "save_supports": "support.files",
    "select_support": "support.select",
    "set_support": "tuner.assign",
    "suggest_lr": "advice",
    "supports_from_sketches": "sketch.files",
}
_MODULES = ("linalg", "nn", "transform", "factor", "layer", "calibration", "export", "tuner", "cli", "support")
# What the extra `train` brings; a missing one is named in the error.
_TRAINING = ("torch", "peft", "transformers")

__all__ = [*_HOME, *("linalg", "nn")]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("loft_rs")
    if name not in _HOME and name not in _MODULES:
        hint = "" if name.startswith("_") else did_you_mean(name, {*_HOME, *_MODULES})
        raise AttributeError(f"module 'loft_rs' has no attribute {name!r}{hint}")
    try:
        module = importlib.import_module(f".{_HOME.get(name, name)}", __name__)
    except ModuleNotFoundError as error:
        if error.name in _TRAINING:
            needs = f"loft_rs.{name} needs {error.name}: {how_to_install('train')}"
            raise ModuleNotFoundError(needs, name=error.name) from error
        raise
    value = getattr(module, name) if name in _HOME else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


register_when_imported()
