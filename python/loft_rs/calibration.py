"""Calibration: supports from a task's own batches, without one weight gradient (loft.md, "Weight-gradient-free calibration").

With X a layer's input, dX its own input gradient, Y0 its output without bias and dY that output's gradient,

    skewgrad    S = Skew(W0^T G) = (dX^T X - X^T dX) / 2        output side  S = (dY^T Y0 - Y0^T dY) / 2
    gradsvd     G = dY^T X                                       output side  G^T
    activation  X^T X                                            output side  Y0^T Y0

Each is seen only through skinny products, summed over the batches (`sketch.py`). Pass 1 accumulates a random sketch (n x k); its
orthonormal basis Q is held for pass 2, which accumulates the compressed problem and the moment (XQ)^T (XQ). The small problem is
finished in Rust, and the moment turns P into input-PCA order without another pass. A support that needs no data takes one forward
pass, for its order alone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .linalg import NonFiniteError
from .sketch import LayerTap, Sketch, sketch_for
from .support import Support, blind_support
from .tuner.config import CALIBRATED_SUPPORTS, LoftConfig
from .tuner.layer import Linear
from .tuner.model import adapted_layers, require_untrained

__all__ = ["CalibrationReport", "calibrate"]

HEAD_STEPS = 20
HEAD_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` did. `layers`: module name -> the `Support` stored there (energy with its standard error, values, order)."""

    method: str
    order: str
    passes: int
    batches: int | None
    head_steps: int
    seconds: float
    layers: dict[str, Support] = field(repr=False)

    def __str__(self) -> str:
        batches = f", {self.batches} batches" if self.batches is not None else ""
        head = f", head warmed up for {self.head_steps} steps" if self.head_steps else ""
        lines = [
            f"{self.method}, {self.order} order: {len(self.layers)} layers, {self.passes} passes{batches}{head}, {self.seconds:.1f} s",
            f"{'layer':<48} {'rank':>5} {'energy':>8} {'+-':>7}",
        ]
        for name, s in self.layers.items():
            lines.append(f"{name[-48:]:<48} {s.rank:>5} {s.energy:>8.4f} {s.energy_stderr:>7.4f}")
        return "\n".join(lines)


def calibrate(
    model: nn.Module,
    dataloader: Iterable | None = None,
    *,
    train_step: Callable[[], Any] | None = None,
    max_batches: int = 8,
    adapter_name: str | None = None,
    head_steps: int | None = None,
    progress: bool | None = None,
) -> CalibrationReport:
    """Choose and store the supports of an untrained LOFT adapter from a task's batches, then order them (`LoftConfig.order`).

    Args:
        model: a PEFT model with a LOFT adapter, on any device, not wrapped in DDP and not compiled.
        dataloader: batches as the model takes them: a mapping gives `model(**batch)`, a sequence `model(*batch)`. Gradient supports need
            `.loss` in the output, so the batches must carry labels. The first `max_batches` are kept and used in every pass.
        train_step: instead of a dataloader, a function of no arguments called once a pass (and once a head step) that runs
            forward and `backward()` over the calibration batches, the same ones each time; no optimiser step.
        max_batches: how many batches of the dataloader to use.
        adapter_name: default: the active one.
        head_steps: optimiser steps that warm up the `modules_to_save` of a fresh head first, and are kept, since step-0 gradients
            through a random head say little. None: 20 for a gradient support where the adapter has such modules, else 0.
        progress: show a progress bar; None: on a terminal only.

    Dropout is off, gradients of parameters are left as they were, no base parameter is ever asked for one. ValueError for a bad
    argument, a trained adapter or batches without loss or gradient; `loft_rs.NonFiniteError` names the layer that saw NaN or Inf.
    The adapter is changed only once everything has succeeded.
    """
    started = time.perf_counter()
    adapter, layers = adapted_layers(model, adapter_name)
    require_untrained(layers, adapter, "calibrate")
    config = next(iter(layers.values())).loft_config[adapter]
    method, order = config.support, "natural" if config.order == "natural" else "input_pca"
    needs_gradient = method in ("skewgrad", "gradsvd")
    if (dataloader is None) == (train_step is None):
        raise ValueError("give exactly one of dataloader and train_step")
    if max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches}")
    if method not in CALIBRATED_SUPPORTS and order == "natural":
        raise ValueError(
            f"support={method!r} with order='natural' takes nothing from data; there is nothing to calibrate"
        )
    batches = None if dataloader is None else list(islice(dataloader, max_batches))
    if batches is not None and not batches:
        raise ValueError("dataloader gave no batch")
    head = _head_parameters(model)
    if head_steps is None:
        head_steps = HEAD_STEPS if needs_gradient and head else 0
    if head_steps and not head:
        raise ValueError("head_steps needs modules_to_save in the LoftConfig: there is no head to warm up")

    run = _Runner(model, batches, train_step, _progress_bar(progress))
    with _calibrating(model, layers):
        if head_steps:
            run.warm_up(head, head_steps)
        sketches = {name: sketch_for(method, layer, adapter, config.seed) for name, layer in layers.items()}
        passes = 0
        while live := {name: sketch for name, sketch in sketches.items() if not sketch.finished}:
            passes += 1
            run.one_pass(live, layers, backward=needs_gradient, label=f"calibration pass {passes}")
            for name, sketch in live.items():
                sketch.end_pass(name)
        supports = {
            name: sketch.support(order, passes, config) for name, sketch in sketches.items() if not sketch.silent
        }
        supports |= _fallbacks(
            {name: layers[name] for name, sketch in sketches.items() if sketch.silent}, config, adapter
        )
    for name, layer in layers.items():
        layer.set_basis(adapter, supports[name].basis, supports[name].energy)
    return CalibrationReport(
        method,
        order,
        passes,
        None if batches is None else len(batches),
        head_steps,
        time.perf_counter() - started,
        {name: supports[name] for name in layers},
    )


def _fallbacks(layers: Mapping[str, Linear], config: LoftConfig, adapter: str) -> dict[str, Support]:
    """Random supports for layers that no calibration batch reached, so that training can go on; says so once."""
    if not layers:
        return {}
    warnings.warn(
        f"no calibration batch gave a gradient or an activation to {', '.join(layers)}: a random support was put there; exclude these "
        "modules from target_modules if they are never used",
        stacklevel=3,
    )
    return {
        name: blind_support(
            layer.support_width(config.side), layer.rank(adapter), method="random", side=config.side, seed=config.seed
        )
        for name, layer in layers.items()
    }


# -- running the model -----------------------------------------------------------------------------------------------------


def _head_parameters(model: nn.Module) -> list[nn.Parameter]:
    from peft.utils.other import ModulesToSaveWrapper

    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return [p for wrapper in wrappers for p in wrapper.parameters() if p.requires_grad]


@contextmanager
def _calibrating(model: nn.Module, layers: Mapping[str, Linear]):
    """Evaluation mode (dropout off), taps removed and every parameter's gradient put back at the end, whatever happens."""
    training = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        for layer in layers.values():
            layer.tap = None
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, mode in training:
            module.training = mode


def _progress_bar(progress: bool | None):
    from tqdm.auto import tqdm

    return lambda total, label: tqdm(
        total=total, desc=label, disable=None if progress is None else not progress, leave=False
    )


class _Runner:
    """Runs forward (and backward) over the calibration batches."""

    def __init__(self, model: nn.Module, batches: list | None, train_step: Callable[[], Any] | None, bar: Callable):
        self.model, self.batches, self.train_step, self.bar = model, batches, train_step, bar
        self.device = next(model.parameters()).device

    def one_pass(
        self, sketches: Mapping[str, Sketch], layers: Mapping[str, Linear], *, backward: bool, label: str
    ) -> None:
        for name, sketch in sketches.items():
            layers[name].tap = LayerTap(sketch)
        with self.bar(1 if self.batches is None else len(self.batches), label) as bar:
            for batch in [None] if self.batches is None else self.batches:
                before = sum(sketch.seen for sketch in sketches.values())
                self._forward(batch, backward)
                if sum(sketch.seen for sketch in sketches.values()) == before:
                    what = "received a gradient" if backward else "was run"
                    how = (
                        "train_step must call backward() on a loss of this model"
                        if batch is None
                        else "check the batches"
                    )
                    raise ValueError(f"{label}: no adapted layer {what}; {how}")
                bar.update()
        for name in sketches:
            layers[name].tap = None

    def _forward(self, batch: Any, backward: bool) -> None:
        if batch is None:
            with torch.enable_grad():
                self.train_step()
        elif backward:
            with torch.enable_grad():
                self._loss(batch).backward()
        else:
            with torch.no_grad():
                self._call(batch)

    def _call(self, batch: Any) -> Any:
        batch = _to_device(batch, self.device)
        return self.model(**batch) if isinstance(batch, Mapping) else self.model(*batch)

    def _loss(self, batch: Any) -> Tensor:
        output = self._call(batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise ValueError(
                "dataloader batches gave no loss: add labels to them, or pass train_step= with your own loss"
            )
        if not bool(torch.isfinite(loss.detach())):
            raise NonFiniteError(f"dataloader gave a batch whose loss is {float(loss.detach())}; nothing was changed")
        return loss

    def warm_up(self, head: list[nn.Parameter], steps: int) -> None:
        """A few AdamW steps on the head alone; restored to where it was if one fails."""
        kept = [p.detach().clone() for p in head]
        optimiser = torch.optim.AdamW(head, lr=HEAD_LEARNING_RATE)
        try:
            with self.bar(steps, "head warm-up") as bar:
                for step in range(steps):
                    optimiser.zero_grad(set_to_none=True)
                    self._forward(
                        None if self.batches is None else self.batches[step % len(self.batches)], backward=True
                    )
                    optimiser.step()
                    bar.update()
        except BaseException:
            with torch.no_grad():
                for parameter, value in zip(head, kept, strict=True):
                    parameter.copy_(value)
            raise


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [_to_device(value, device) for value in batch]
    return batch
