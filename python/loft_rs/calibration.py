"""Calibration: supports from a task's own batches, without one weight gradient.

With X a layer's input, dX its own input gradient, Y0 its output without bias and dY that output's gradient,

    skewgrad    S = Skew(W0^T G) = (dX^T X - X^T dX) / 2        output side  S = (dY^T Y0 - Y0^T dY) / 2
    gradsvd     G = dY^T X                                       output side  G^T
    activation  X^T X                                            output side  Y0^T Y0

Each is seen only through skinny products, summed over the batches (`sketch.py`). Pass 1 accumulates a random sketch (n x k); its
orthonormal basis Q is held for pass 2, which accumulates the compressed problem and the moment (XQ)^T (XQ). The small problem is
finished in Rust, and the moment turns P into input-PCA order without another pass. A support that needs no data takes one forward
pass, for its order alone. The sums are linear in the batches: the processes of a `torch.distributed` run add theirs up after each pass.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import is_int
from .linalg import NonFiniteError, orthonormalize
from .ranks import Ranks
from .sketch import LayerTap, Sketch, sketch_for
from .support import Support, blind_support
from .tuner.config import CALIBRATED_SUPPORTS, DATA_FREE_SUPPORTS, LoftConfig
from .tuner.layer import Linear
from .tuner.model import adapted_layers, owners, require_untrained
from .tuner.selection import choose_supports

__all__ = ["CalibrationReport", "calibrate", "checked_batches"]

HEAD_STEPS = 20
HEAD_LEARNING_RATE = 1e-3
# Mean losses have gradients that float16 rounds to zero. A power of two changes nothing in the other formats.
LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` did. `layers`: module name -> the `Support` stored there (energy with its standard error, values, order)."""

    method: str
    order: str
    passes: int
    batches: int | None  # of all processes
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
        dataloader: batches as the model takes them: a mapping gives `model(**batch)`, a list or tuple `model(*batch)`. Gradient
            supports need `.loss` in the output, so the batches must carry labels. The first `max_batches` are kept and used in every
            pass. The loss is scaled, so that float16 gradients do not vanish.
        train_step: instead of a dataloader, a function of no arguments called once a pass (and once a head step) that runs
            forward and `backward()` over the calibration batches, the same ones each time; no optimiser step. Where gradients are
            float16 it should scale its loss: supports and energies do not depend on the scale, only `Support.values` do.
        max_batches: how many batches of the dataloader to use.
        adapter_name: default: the active one.
        head_steps: optimiser steps that warm up the `modules_to_save` of a fresh head first, and are kept, since step-0 gradients
            through a random head say little. None: 20 for a gradient support where the adapter has such modules, else 0.
        progress: show a progress bar; None: on a terminal only.

    In a `torch.distributed` run every process calls this with its own share of the batches, and all get the supports, and the
    warmed-up head, that one process with all the batches would get (rank 0's, bit for bit); an error in one raises in all.

    Dropout is off, gradients of parameters are left as they were, no base parameter is ever asked for one. A layer that no batch
    reaches keeps the support it has, or gets a random one, with a warning. TypeError or ValueError for a bad argument, a trained
    adapter or batches without loss or gradient; `loft_rs.NonFiniteError` names the layer that saw NaN or Inf. The adapter and the
    head are changed only once everything has succeeded.
    """
    started = time.perf_counter()
    ranks = Ranks(next(model.parameters()).device)
    with ranks.stage():
        adapter, adapted = adapted_layers(model, adapter_name)
        require_untrained(adapted, adapter, "calibrate")
        layers = owners(adapted, adapter)
        config = next(iter(layers.values())).loft_config[adapter]
        method, order = config.support, "natural" if config.order == "natural" else "input_pca"
        needs_gradient = method in ("skewgrad", "gradsvd")
        if method not in CALIBRATED_SUPPORTS and order == "natural":
            raise ValueError(
                f"support={method!r} with order='natural' takes nothing from data; there is nothing to calibrate"
            )
        batches = checked_batches(dataloader, train_step, max_batches)
        head = _head_parameters(model)
        head_steps = _head_steps(head_steps, head, needs_gradient)
        run = _Runner(model, layers, adapter, batches, train_step, ranks, progress)
        if method not in CALIBRATED_SUPPORTS and not all(layer.ready(adapter) for layer in layers.values()):
            choose_supports(layers, config, adapter)  # built to be loaded, and never was
    with _calibrating(model, adapted, head if head_steps else []):
        if head_steps:
            run.warm_up(head, head_steps)
        sketches = {
            name: sketch_for(method, layer, adapter, config.seed, run.loss_scale) for name, layer in layers.items()
        }
        passes = 0
        while live := {name: sketch for name, sketch in sketches.items() if not sketch.finished}:
            passes += 1
            run.one_pass(live, backward=needs_gradient, label=f"calibration pass {passes}")
            with ranks.stage():
                for name, sketch in live.items():
                    sketch.end_pass(name)
        with ranks.stage():
            supports = {
                name: sketch.support(order, passes, config) for name, sketch in sketches.items() if not sketch.silent
            }
            supports |= _unreached({n: layers[n] for n, sketch in sketches.items() if sketch.silent}, config, adapter)
        supports = {name: ranks.first(supports[name]) for name in layers}
        for parameter in head if head_steps else []:
            ranks.copy_first(parameter.data)
        used = None if batches is None else ranks.total(len(batches))
    for name, layer in layers.items():
        if not (sketches[name].silent and layer.ready(adapter)):
            layer.set_basis(adapter, supports[name].basis, supports[name].energy)
    return CalibrationReport(method, order, passes, used, head_steps, time.perf_counter() - started, supports)


def checked_batches(
    dataloader: Iterable | None, train_step: Callable[[], Any] | None, max_batches: int
) -> list[Mapping | list | tuple] | None:
    """The batches that every pass uses, checked; None where there is a train_step."""
    if (dataloader is None) == (train_step is None):
        raise ValueError("give exactly one of dataloader and train_step")
    if not is_int(max_batches) or max_batches < 1:
        raise ValueError(f"max_batches must be an integer of at least 1, got {max_batches!r}")
    if dataloader is None:
        if not callable(train_step):
            raise TypeError(f"train_step must be a function of no arguments, got {type(train_step).__name__}")
        return None
    if isinstance(dataloader, (Mapping, str)) or not (
        isinstance(dataloader, Iterable) or hasattr(dataloader, "__getitem__")
    ):
        raise TypeError(
            f"dataloader must give batches one by one, got one {type(dataloader).__name__}; put a single batch in a list"
        )
    batches = list(islice(dataloader, max_batches))
    if not batches:
        raise ValueError("dataloader gave no batch")
    wrong = [type(batch).__name__ for batch in batches if not isinstance(batch, (Mapping, list, tuple))]
    if wrong:
        raise TypeError(
            f"dataloader must give batches that are mappings, for model(**batch), or lists or tuples, for model(*batch), got {wrong[0]}"
        )
    return batches


def _head_steps(steps: int | None, head: list[nn.Parameter], needs_gradient: bool) -> int:
    if steps is None:
        return HEAD_STEPS if needs_gradient and head else 0
    if not is_int(steps) or steps < 0:
        raise ValueError(f"head_steps must be None or an integer of at least 0, got {steps!r}")
    if steps and not head:
        raise ValueError("head_steps needs modules_to_save in the LoftConfig: there is no head to warm up")
    return int(steps)


def _unreached(layers: Mapping[str, Linear], config: LoftConfig, adapter: str) -> dict[str, Support]:
    """Supports for layers that no calibration batch reached: the one a layer has, or a random one, so that training can go on."""
    supports = {}
    for name, layer in layers.items():
        supports[name] = blind_support(
            layer.support_width(config.side), layer.rank(adapter), method="random", side=config.side, seed=config.seed
        )
        if layer.ready(adapter):
            held = layer.support(adapter).double().cpu().numpy()
            supports[name] = replace(
                supports[name],
                basis=orthonormalize(held).astype("float32"),
                energy=layer.energy(adapter),
                method=config.support if config.support in DATA_FREE_SUPPORTS else "custom",
            )
    for what, ready in (("their supports are left as they were", True), ("a random support was put there", False)):
        names = [name for name, layer in layers.items() if layer.ready(adapter) is ready]
        if names:
            warnings.warn(
                f"no calibration batch gave a gradient or an activation to {', '.join(names)}: {what}; exclude these modules "
                "from target_modules if they are never used",
                stacklevel=3,
            )
    return supports


# -- running the model -----------------------------------------------------------------------------------------------------


def _head_parameters(model: nn.Module) -> list[nn.Parameter]:
    from peft.utils.other import ModulesToSaveWrapper

    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return [p for wrapper in wrappers for p in wrapper.parameters() if p.requires_grad]


def _evaluate(module: nn.Module, *_: Any) -> None:
    module.training = False


def _untapped(adapter: str) -> Callable[..., Tensor]:
    """The tap of a layer that has nothing to show: its adapter is at the identity."""
    return lambda layer, x, *args, **kwargs: layer.at_identity(x, adapter, *args, **kwargs)


@contextmanager
def _calibrating(model: nn.Module, layers: Mapping[str, Linear], head: list[nn.Parameter]):
    """Dropout off whatever a train_step says, no parameter with a gradient; at the end all is put back, after an error the head too."""
    training = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    weights = [p.detach().clone() for p in head]
    hooks = [module.register_forward_pre_hook(_evaluate) for module in model.modules()]
    model.eval()
    for parameter, _ in gradients:  # backward would add to it in place
        parameter.grad = None
    try:
        yield
    except BaseException:
        for parameter, weight in zip(head, weights, strict=True):
            parameter.data.copy_(weight)
        raise
    finally:
        for layer in layers.values():
            layer.tap = None
        for hook in hooks:
            hook.remove()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, mode in training:
            module.training = mode


class _Runner:
    """Runs forward (and backward) over the calibration batches of this process, and adds up what all of them saw."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Linear],
        adapter: str,
        batches: list | None,
        train_step: Callable[[], Any] | None,
        ranks: Ranks,
        progress: bool | None,
    ):
        self.model, self.adapter, self.batches, self.train_step = model, adapter, batches, train_step
        self.layers = {name: layer.tied(adapter) for name, layer in layers.items()}
        self.ranks, self.progress = ranks, progress
        self.loss_scale = 1.0 if batches is None else LOSS_SCALE

    def bar(self, total: int, label: str):
        from tqdm.auto import tqdm

        hidden = True if self.ranks.rank else None
        return tqdm(
            total=total, desc=label, disable=hidden if self.progress is None else not self.progress, leave=False
        )

    def one_pass(self, sketches: Mapping[str, Sketch], *, backward: bool, label: str) -> None:
        for name, tied in self.layers.items():
            for part, layer in enumerate(tied):
                tapped = name in sketches
                layer.tap = LayerTap(sketches[name], self.adapter, part) if tapped else _untapped(self.adapter)
        with self.ranks.stage(), self.bar(1 if self.batches is None else len(self.batches), label) as bar:
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
        for sketch in sketches.values():
            for value in sketch.pending.values():
                self.ranks.add_up(value)

    def _forward(self, batch: Any, backward: bool) -> None:
        if batch is None:
            with torch.enable_grad():
                self.train_step()
        elif backward:
            with torch.enable_grad():
                loss = self._loss(batch)
                loss.backward(torch.full_like(loss, self.loss_scale))
        else:
            with torch.no_grad():
                self._call(batch)

    def _call(self, batch: Any) -> Any:
        batch = _to_device(batch, self.ranks.device)
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
        """A few Adam steps on the head alone, in float32 or wider, on the gradient's mean over the processes."""
        for layer in chain(*self.layers.values()):
            layer.tap = _untapped(self.adapter)
        for parameter in head:
            self.ranks.copy_first(parameter.data)
        wide = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in head]
        optimiser = torch.optim.Adam(wide, lr=HEAD_LEARNING_RATE)
        with self.bar(steps, "head warm-up") as bar:
            for step in range(steps):
                with self.ranks.stage():
                    batch = None if self.batches is None else self.batches[step % len(self.batches)]
                    self._forward(batch, backward=True)
                for parameter, value in zip(head, wide, strict=True):
                    gradient = torch.zeros_like(value) if parameter.grad is None else parameter.grad.to(value.dtype)
                    self.ranks.add_up(gradient)
                    value.grad = gradient / (self.loss_scale * self.ranks.size)
                optimiser.step()
                for parameter, value in zip(head, wide, strict=True):
                    parameter.data.copy_(value)
                    parameter.grad = None
                bar.update()


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [_to_device(value, device) for value in batch]
    return batch
