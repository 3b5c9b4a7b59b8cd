"""The runs that calibration makes of a model over its batches: passes that feed sketches, and the
short trainings of a fresh head and of a pilot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..linalg import NonFiniteError
from ..sketch.base import Sketch
from ..sketch.tap import LayerTap
from ..support.methods import Pilot
from ..support.support import Support
from ..tuner.layer import Linear
from .memory import MemorySurvey
from .options import Job
from .pilot import LowRankChange, PilotTap, some_gradient
from .sides import ModuleSide, by_module

__all__ = ["HEAD_LEARNING_RATE", "LOSS_SCALE", "Passes", "require_finite"]


HEAD_LEARNING_RATE = 1e-3
# Batches that a kept pilot's scale is looked for on.
SEARCHED = 4
# Mean losses have gradients that float16 rounds to zero. A power of two changes nothing in the
# other formats.
LOSS_SCALE = 1024.0


def _untapped(adapter: str, reach: bool = False) -> Callable[..., Tensor]:
    """The tap of a layer that has nothing to show: its adapter is at the identity. reach: its input
    gets a gradient, so that the loss has a backward pass whichever layers are tapped."""

    def run(layer: Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if reach and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        return layer.at_identity(x, adapter, *args, **kwargs)

    return run


class Passes:
    """Runs forward (and backward) over the calibration batches of this process, and adds up what
    all of them saw.
    """

    def __init__(self, job: Job):
        self.model, self.adapter, self.batches, self.train_step = job.model, job.adapter, job.batches, job.train_step
        self.layers = {name: layer.adapters[job.adapter].tied_layers for name, layer in job.layers.items()}
        self.processes, self.progress = job.processes, job.progress
        self.loss_scale = 1.0 if job.batches is None else LOSS_SCALE
        self.reached: set[int] = set()  # batches that some layer of the groups so far has seen

    def bar(self, total: int, label: str):
        from tqdm.auto import tqdm

        hidden = True if self.processes.rank else None
        return tqdm(
            total=total, desc=label, disable=hidden if self.progress is None else not self.progress, leave=False
        )

    def show(self, survey: MemorySurvey) -> None:
        """One forward pass without gradient over the largest batch, where there is one to be
        had.
        """
        with self.processes.stage():
            if self.batches is None:
                return
            for name, places in by_module(survey.layers).items():
                for layer in self.layers[name]:
                    layer.tap = survey.tap(places, self.adapter)
            self._forward(max(self.batches, key=_size), backward=False)

    def one_pass(self, sketches: Mapping[ModuleSide, Sketch], *, backward: bool, label: str, last: bool) -> None:
        """Add one pass to these sketches. last: they are those of the last group, so that a batch
        no layer has seen is an error.
        """
        tapped = by_module(sketches)
        for name, tied in self.layers.items():
            for part, layer in enumerate(tied):
                tap = None
                for place in tapped.get(name, ()):
                    tap = LayerTap(sketches[place], self.adapter, part, tap)
                layer.tap = tap or _untapped(self.adapter, reach=backward and self.batches is None)
        batches = list(enumerate([None] if self.batches is None else self.batches))
        with self.bar(len(batches), label) as bar, self.processes.stage():
            self._run(batches, sketches, backward, label, last, bar)
        for sketch in sketches.values():
            for value in sketch.pending.values():
                self.processes.add_up(value)

    def _run(
        self, batches: list, sketches: Mapping[ModuleSide, Sketch], backward: bool, label: str, last: bool, bar: Any
    ) -> None:
        again = any(sketch.sums for sketch in sketches.values())  # which this pass saw the time before
        for number, batch in batches:
            where = "train_step" if batch is None else f"batch {number}"
            if batch is not None:
                for sketch in sketches.values():
                    sketch.begin_batch((number * self.processes.size + self.processes.rank) % 2)
            before = sum(sketch.seen for sketch in sketches.values())
            self._forward(batch, backward, where)
            if sum(sketch.seen for sketch in sketches.values()) > before:
                self.reached.add(number)
            elif again or (last and number not in self.reached):
                raise self._unreached(f"{label}, {where}", "received a gradient" if backward else "was run")
            require_finite(sketches, f"{label}, {where}")
            bar.update()

    def _unreached(self, where: str, what: str) -> ValueError:
        how = "check that its loss depends on an adapted layer"
        if self.batches is None:
            how = "train_step must call backward() on a loss of this model"
        return ValueError(f"{where}: no adapted layer {what}; {how}")

    def _forward(self, batch: Any, backward: bool, where: str = "a batch") -> None:
        if self.train_step is not None:
            with torch.enable_grad():
                self.train_step()
        elif backward:
            with torch.enable_grad():
                loss = self._loss(batch, where)
                if loss.requires_grad:
                    loss.backward(torch.full_like(loss, self.loss_scale))
        else:
            with torch.no_grad():
                self._call(batch)

    def _call(self, batch: Any) -> Any:
        batch = _to_device(batch, self.processes.device)
        return self.model(**batch) if isinstance(batch, Mapping) else self.model(*batch)

    def _loss(self, batch: Any, where: str) -> Tensor:
        output = self._call(batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise ValueError(
                "dataloader batches gave no loss: add labels to them, or pass train_step= with your own loss"
            )
        if not bool(torch.isfinite(loss.detach())):
            raise NonFiniteError(
                f"{where} of the dataloader has a loss that is {float(loss.detach())}; nothing was changed"
            )
        return loss

    def warm_up(self, head: list[nn.Parameter], steps: int) -> None:
        for layer in chain(*self.layers.values()):
            layer.tap = _untapped(self.adapter)
        self._train(head, steps, HEAD_LEARNING_RATE, "head warm-up")

    def pilot(self, changes: Mapping[ModuleSide, LowRankChange], pilot: Pilot, seed: int) -> dict[ModuleSide, Support]:
        """Train these changes, of all the layers, and give rank 0's supports of those that a
        gradient reached.
        """
        for place, change in changes.items():
            for part, layer in enumerate(self.layers[place.module]):
                layer.tap = PilotTap(change, self.adapter, part)

        def check(where: str) -> None:
            if not some_gradient(changes, where):
                raise self._unreached(where, "received a gradient")

        factors = [factor for change in changes.values() for factor in change.factors]
        self._train(factors, pilot.steps, pilot.lr, "pilot", check)
        with self.processes.stage():
            found = {place: change.support(seed) for place, change in changes.items()}
        return self.processes.first({place: support for place, support in found.items() if support is not None})

    def best_scale(
        self, scales: Sequence[float], taps: Callable[[float], Mapping[Any, Callable[..., Tensor]]]
    ) -> float:
        """The scale of kept pilots at which a few batches have the lowest loss; the first with a
        train_step, whose loss nobody sees.

        scales: tried one after the other, until the loss rises. taps: what each layer runs at a
            scale.
        """
        if self.batches is None:
            return scales[0]
        best = (math.inf, scales[0])
        for scale in scales:
            total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
            with self.processes.stage(), torch.no_grad():
                for layer, tap in taps(scale).items():
                    layer.tap = tap
                for number, batch in enumerate(self.batches[:SEARCHED]):
                    total += self._loss(batch, f"pilot, batch {number}").double()
            self.processes.add_up(total)
            if float(total) >= best[0]:
                break
            best = float(total), scale
        return best[1]

    def _train(
        self,
        parameters: Sequence[Tensor],
        steps: int,
        rate: float,
        label: str,
        check: Callable[[str], None] = lambda where: None,
    ) -> None:
        """A few Adam steps on these alone, in float32 or wider, on the gradient's mean over the
        processes.

        check: looks at what the batch of a process gave them, which is named.
        """
        for parameter in parameters:
            self.processes.copy_first(parameter.data)
        # In place where they are as wide already.
        wide = [p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        optimiser = torch.optim.Adam(wide, lr=rate)
        with self.bar(steps, label) as bar:
            for step in range(steps):
                with self.processes.stage():
                    number = 0 if self.batches is None else step % len(self.batches)
                    batch = None if self.batches is None else self.batches[number]
                    where = "train_step" if batch is None else f"batch {number}"
                    self._forward(batch, backward=True, where=where)
                    check(f"{label}, {where}")
                for parameter, value in zip(parameters, wide, strict=True):
                    gradient = torch.zeros_like(value) if parameter.grad is None else parameter.grad.to(value.dtype)
                    parameter.grad = None
                    self.processes.add_up(gradient)
                    value.grad = gradient / (self.loss_scale * self.processes.size)
                optimiser.step()
                for parameter, value in zip(parameters, wide, strict=True):
                    parameter.data.copy_(value)
                bar.update()


def require_finite(sketches: Mapping[Any, Sketch], where: str) -> None:
    """NonFiniteError where a batch has brought NaN: it fills whole rows of a sum, so that one
    column tells, read at once for all layers.
    """
    columns: dict[torch.device, list[Tensor]] = {}
    for sketch in sketches.values():
        for value in sketch.pending.values():
            columns.setdefault(value.device, []).append(
                value.reshape(-1)[:: value.shape[-1] if value.dim() else 1].float()
            )
    if not all(bool(torch.isfinite(torch.cat(each)).all()) for each in columns.values()):
        for name, sketch in sketches.items():
            sketch.require_finite(name, where)


def _size(batch: Any) -> int:
    """The number of entries of a batch's tensors."""
    if isinstance(batch, Tensor):
        return batch.numel()
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return sum(map(_size, values))


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [_to_device(value, device) for value in batch]
    return batch
