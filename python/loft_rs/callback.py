"""`LoftCalibrationCallback`: calibration where the user never holds the model, as in `SFTTrainer(peft_config=LoftConfig(...))`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .calibration import CalibrationReport, calibrate
from .tuner.model import adapted_layers

__all__ = ["LoftCalibrationCallback"]


class LoftCalibrationCallback(TrainerCallback):
    """Calibrates the active LOFT adapter at the start of training.

    Left alone are the supports of a resumed run and of a trained adapter, and gradient or activation supports that are set already
    (`calibrate`, `set_support`). Keyword arguments are those of `loft_rs.calibrate`; the Trainer's own dataloader is used, of every
    process its share. The last report is `report`.
    """

    def __init__(self, **options: Any):
        self.options = options
        self.report: CalibrationReport | None = None

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        adapter, held = adapted_layers(model, self.options.get("adapter_name"))
        layers = held.values()
        trained = any(bool(layer.theta(adapter).detach().any()) for layer in layers)
        chosen = all(layer.loft_config[adapter].needs_calibration and layer.ready(adapter) for layer in layers)
        if state.global_step == 0 and not trained and not chosen:
            self.report = calibrate(model, train_dataloader, **self.options)
