"""Calibration and refresh where the user never holds the model, as in `SFTTrainer(peft_config=LoftConfig(...))`."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

from transformers import TrainerCallback

from ._checks import is_int
from .calibration import CalibrationReport, calibrate
from .refreshing import refresh
from .tuner.model import adapted_layers

__all__ = ["LoftCalibrationCallback", "LoftRefreshCallback"]


class LoftCalibrationCallback(TrainerCallback):
    """Calibrates the active LOFT adapter at the start of training.

    Left alone are the supports of a resumed run and of a trained adapter, and those from data that are set already (`calibrate`,
    `set_support`). Keyword arguments are those of `loft_rs.calibrate`; the Trainer's own dataloader is used, of every
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


class LoftRefreshCallback(TrainerCallback):
    """Refreshes the active LOFT adapter's support (`loft_rs.refresh`) after every `every`-th optimiser step but the last.

    batches: how many of the Trainer's batches each refresh sees, a pilot in turn. They are drawn anew from the Trainer's dataset, by its
    seed and the step alone, so that its own order stays what it is and a resumed run sees the same. Keyword arguments are those of
    `loft_rs.refresh`; with `dataloader` or `train_step` the Trainer's data is not used. The Trainer's optimiser is carried over.
    `reports`: (step, report) of every refresh. ValueError where `every` or `batches` is no integer of at least 1.
    """

    def __init__(self, every: int, batches: int = 8, **options: Any):
        for name, value in (("every", every), ("batches", batches)):
            if not is_int(value) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        self.every, self.batches, self.options = every, batches, options
        self.reports: list[tuple[int, CalibrationReport]] = []

    def on_step_end(self, args, state, control, model=None, train_dataloader=None, optimizer=None, **kwargs):
        if state.global_step % self.every or state.global_step >= state.max_steps:
            return
        options = {"max_batches": self.batches, "optimizer": optimizer, **self.options}
        if not {"dataloader", "train_step"} & options.keys():
            draw = random.Random(f"{args.seed} {state.global_step} {args.process_index}")
            options["dataloader"] = _draw(train_dataloader, args.train_batch_size, self.batches, draw)
        self.reports.append((state.global_step, refresh(model, **options)))


def _draw(loader: Any, size: int, count: int, draw: random.Random) -> list:
    """`count` batches of a loader's dataset at random, of an iterable one the first; not through the loader, which is in use."""
    dataset = loader.dataset
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        rows = [dataset[i] for i in draw.sample(range(len(dataset)), min(size * count, len(dataset)))]
    else:
        rows = list(islice(dataset, size * count))
    return [loader.collate_fn(rows[start : start + size]) for start in range(0, len(rows), size)]
