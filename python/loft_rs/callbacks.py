"""Calibration, refresh and narrowing where the user never holds the model, as in
`SFTTrainer(peft_config=LoftConfig(...))`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.training_args import ParallelMode

from ._checks import is_int
from .advice import rate_of, warn_of_low_rate
from .calibration.driver import calibrate
from .calibration.memory import byte_count
from .calibration.report import CalibrationReport
from .refreshing.conditions import require_choosable, require_refreshable_kind
from .refreshing.narrow import NarrowReport, check_rank, narrow
from .refreshing.optimizer_state import replace_parameter
from .refreshing.refresh import refresh
from .support.budget import Budget
from .tuner.adapters import adapted_layers, owners
from .tuner.config import LoftConfig
from .tuner.layer import Linear

__all__ = ["LoftCalibrationCallback", "LoftNarrowCallback", "LoftRefreshCallback"]


def _check_options(max_batches: Any, memory: Any, head_steps: Any = None) -> None:
    """What can be told of them before there is a model."""
    byte_count(memory)
    for name, value, least in (("max_batches", max_batches, 1), ("head_steps", head_steps, 0)):
        if value is not None and (not is_int(value) or value < least):
            raise ValueError(f"{name} must be None or an integer of at least {least}, got {value!r}")


def _look_at_the_rate(state: Any, optimizer: Any, config: LoftConfig, theta: Tensor) -> None:
    """Warn where a training begins at a rate far too low; theta: any that the optimiser has."""
    if state.global_step == 0 and optimizer is not None:
        warn_of_low_rate(config, rate_of(optimizer, theta))


class LoftCalibrationCallback(TrainerCallback):
    """Calibrates the active LOFT adapter at the start of training (`loft_rs.calibrate`), on the
    Trainer's own batches.

    Left alone are the supports of a resumed run and of a trained adapter, and those from data that
    are set already (`calibrate`, `set_support`). Every process takes its share of the Trainer's
    dataloader. Under `r=Budget(...)` the trained parameters are replaced: the Trainer's optimiser
    goes on with the new ones. `report`: of the calibration, once it was done.

    max_batches, adapter_name, head_steps, memory, offload, progress: as of `loft_rs.calibrate`.
    ValueError for a bad one, when the callback is made; at the start of training under
    DistributedDataParallel with a `Budget`, since DDP would hold the old parameters.

    >>> from loft_rs import LoftCalibrationCallback
    >>> callback = LoftCalibrationCallback(max_batches=8, memory="1GiB")
    """

    def __init__(
        self,
        *,
        max_batches: int | None = None,
        adapter_name: str | None = None,
        head_steps: int | None = None,
        memory: int | str | None = None,
        offload: bool = False,
        progress: bool | None = None,
    ):
        _check_options(max_batches, memory, head_steps)
        self.adapter_name = adapter_name
        self.options: dict[str, Any] = {"max_batches": max_batches, "head_steps": head_steps, "memory": memory}
        self.options |= {"offload": offload, "progress": progress}
        self.report: CalibrationReport | None = None
        self._built: dict[Linear, Tensor] = {}  # with the theta that an optimiser given to the Trainer has

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if any(isinstance(module, Linear) for module in model.modules()):  # else the adapter may come later
            adapter, adapted = adapted_layers(model, self.adapter_name)
            self._built = {layer: layer.adapters[adapter].theta for layer in owners(adapted, adapter).values()}

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, optimizer=None, **kwargs):
        adapter, adapted = adapted_layers(model, self.adapter_name)
        layers = owners(adapted, adapter).values()
        before = {layer: self._built.get(layer, layer.adapters[adapter].theta) for layer in layers}
        self._built = {}
        for layer, theta in islice(before.items(), 1):
            _look_at_the_rate(state, optimizer, layer.adapters[adapter].config, theta)
        self._calibrate(args, state, adapter, list(layers), model, train_dataloader)
        for layer, theta in before.items() if optimizer is not None else ():
            if (new := layer.adapters[adapter].theta) is not theta:  # shared ranks, found here or in a checkpoint
                resumed = state.global_step > 0 and theta in optimizer.state
                replace_parameter(optimizer, theta, new, {} if resumed else None)

    def _calibrate(self, args, state, adapter: str, layers: list[Linear], model, train_dataloader) -> None:
        config = layers[0].adapters[adapter].config
        trained = any(bool(layer.adapters[adapter].theta.detach().any()) for layer in layers)
        chosen = all(config.needs_calibration and layer.adapters[adapter].ready for layer in layers)
        if state.global_step > 0 or trained or chosen:
            return
        if isinstance(config.r, Budget) and args.parallel_mode == ParallelMode.DISTRIBUTED:
            raise ValueError(
                "r=Budget(...) cannot be shared out under DistributedDataParallel, which would hold the old parameters: call "
                "loft_rs.calibrate on the model before the Trainer is made"
            )
        self.report = calibrate(model, train_dataloader, adapter_name=self.adapter_name, **self.options)


class LoftRefreshCallback(TrainerCallback):
    """Experimental: refreshes the active LOFT adapter's support (`loft_rs.refresh`) after every
    `every`-th optimiser step but the last.

    batches: how many of the Trainer's batches each refresh sees, a pilot in turn. They are drawn
    anew from the Trainer's dataset, by its seed and the step alone, so that its own order stays
    what it is and a resumed run sees the same. dataloader, train_step: in place of the Trainer's
    data. adapter_name, memory, offload, progress: as of `loft_rs.refresh`. The Trainer's optimiser
    is carried over.
    `reports`: (step, report) of every refresh. ValueError for a bad argument, when the callback is
    made, and at the start of training for a kind of adapter that cannot be refreshed, or supports
    from a file.

    >>> loft_rs.LoftRefreshCallback(every=200).every
    200
    """

    def __init__(
        self,
        every: int,
        batches: int = 8,
        *,
        dataloader: Iterable | None = None,
        train_step: Callable[[], Any] | None = None,
        adapter_name: str | None = None,
        memory: int | str | None = None,
        offload: bool = False,
        progress: bool | None = None,
    ):
        for name, value in (("every", every), ("batches", batches)):
            if not is_int(value) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        _check_options(batches, memory)
        if dataloader is not None and train_step is not None:
            raise ValueError("give at most one of dataloader and train_step")
        self.every, self.batches, self.adapter_name = every, batches, adapter_name
        self.data: dict[str, Any] = {"dataloader": dataloader, "train_step": train_step}
        self.options: dict[str, Any] = {"memory": memory, "offload": offload, "progress": progress}
        self.reports: list[tuple[int, CalibrationReport]] = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        adapter, layers = adapted_layers(model, self.adapter_name)
        first = next(iter(owners(layers, adapter).values())).adapters[adapter]
        require_choosable(adapter, first.config)
        require_refreshable_kind(adapter, first.config, "LoftRefreshCallback")
        _look_at_the_rate(state, optimizer, first.config, first.theta)

    def on_step_end(self, args, state, control, model=None, train_dataloader=None, optimizer=None, **kwargs):
        if state.global_step % self.every or state.global_step >= state.max_steps:
            return
        data = dict(self.data)
        if data["dataloader"] is None and data["train_step"] is None:
            draw = random.Random(f"{args.seed} {state.global_step} {args.process_index}")
            data["dataloader"] = _draw(train_dataloader, args.train_batch_size, self.batches, draw)
        options: dict[str, Any] = {
            "max_batches": self.batches,
            "optimizer": optimizer,
            "adapter_name": self.adapter_name,
        }
        self.reports.append((state.global_step, refresh(model, **data, **options, **self.options)))


class LoftNarrowCallback(TrainerCallback):
    """Experimental: narrows the active LOFT adapter to `rank` (`loft_rs.narrow`), once, after
    optimiser step `step`.

    The Trainer's optimiser is carried over. A run that resumes from a checkpoint builds the adapter
    as it was at first: give the Trainer this callback when it is made (`callbacks=[...]`), and a
    narrowed checkpoint makes the adapter narrow as it is loaded, one from before leaves it wide; so
    too with `load_best_model_at_end`. (Not with the Trainer's `model_init`, whose models it never
    sees before they are loaded: build the model yourself.) adapter_name: as of `loft_rs.narrow`.
    `report`: of the narrowing, once it was done here.

    ValueError for a `rank` or a `step` that is none; at the start of training for a kind of adapter
    or a `rank` that cannot be, a `step` that training does not reach or that has passed without a
    narrowing, and under DistributedDataParallel, which would hold the old parameters.

    >>> callback = loft_rs.LoftNarrowCallback(32, step=200)
    """

    def __init__(self, rank: int, step: int, *, adapter_name: str | None = None):
        if not is_int(step) or step < 1:
            raise ValueError(f"step must be an integer of at least 1, got {step!r}")
        if not is_int(rank) or rank % 2 or rank < 2:
            raise ValueError(f"rank must be an even integer of at least 2, got {rank!r}")
        self.rank, self.step, self.adapter_name = rank, step, adapter_name
        self.report: NarrowReport | None = None
        self._built: dict[Linear, Tensor] = {}  # with the theta that an optimiser given to the Trainer has

    def _layers(self, model: nn.Module) -> tuple[str, dict[str, Linear]]:
        """(adapter, its layers that hold a support of their own), ready for a checkpoint of the
        rank they have, or of `rank`.
        """
        adapter, layers = adapted_layers(model, self.adapter_name)
        layers = owners(layers, adapter)
        for layer in layers.values():
            held = layer.adapters[adapter].rank
            layer.adapters[adapter].loadable_ranks |= {held, min(held, self.rank)}
        return adapter, layers

    def on_init_end(self, args, state, control, model=None, **kwargs):
        adapter, layers = self._layers(model)
        self._built = {layer: layer.adapters[adapter].theta for layer in layers.values()}

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        adapter, layers = self._layers(model)
        require_refreshable_kind(adapter, next(iter(layers.values())).adapters[adapter].config, "LoftNarrowCallback")
        if args.parallel_mode == ParallelMode.DISTRIBUTED:
            raise ValueError(
                "LoftNarrowCallback cannot run under DistributedDataParallel, which would hold the old parameters: train to "
                f"step {self.step}, call loft_rs.narrow on the model, and train on with a new Trainer"
            )
        wide = any(layer.adapters[adapter].rank > self.rank for layer in layers.values())
        if state.global_step >= self.step and wide:
            raise ValueError(
                f"step {self.step} has passed, since the checkpoint is of step {state.global_step}, but its adapter was not narrowed "
                f"to rank {self.rank}: give a later step, or call loft_rs.narrow before training"
            )
        if state.global_step < self.step:
            if not wide:
                raise ValueError(
                    f"LoftNarrowCallback has nothing to narrow at step {self.step}: no layer of adapter {adapter!r} is wider than "
                    f"{self.rank}; leave it out, or give a lower rank"
                )
            check_rank(self.rank, layers, adapter)
            if self.step >= state.max_steps:
                raise ValueError(f"step must come before the last of {state.max_steps} steps, got {self.step}")
        for layer, theta in self._built.items() if optimizer is not None else ():
            if theta is not layer.adapters[adapter].theta:  # a checkpoint made it narrow
                replace_parameter(
                    optimizer, theta, layer.adapters[adapter].theta, {} if theta in optimizer.state else None
                )
        first = next(iter(layers.values())).adapters[adapter]
        _look_at_the_rate(state, optimizer, first.config, first.theta)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.step:
            self.report = narrow(model, self.rank, optimizer=optimizer, adapter_name=self.adapter_name)
            self._built = {}


def _draw(loader: Any, size: int, count: int, draw: random.Random) -> list:
    """`count` batches of a loader's dataset at random, of an iterable one the first; not through
    the loader, which is in use.
    """
    dataset = loader.dataset
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        rows = [dataset[i] for i in draw.sample(range(len(dataset)), min(size * count, len(dataset)))]
    else:
        rows = list(islice(dataset, size * count))
    return [loader.collate_fn(rows[start : start + size]) for start in range(0, len(rows), size)]
