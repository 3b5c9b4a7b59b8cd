"""One run: a model with a method's adapter, trained for a fixed number of steps, then scored.

Head alone first (HEAD_STEPS, the same for every method), then head and adapter together: AdamW
without decay, a linear warm-up over a tenth of the steps and linear decay, the head always at
HEAD_RATE. Data, batch order, schedule and step count live on the device, so a step takes no
argument and can be replayed as a CUDA graph; several runs of a process replay theirs on streams of
their own.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from methods import METHODS, Method, Setup, shapes_of, targets
from protocol import Spec
from tasks import TASKS, Task, base_model, evaluate, exact_match, rows, split
from torch import Tensor, nn

import loft_rs

HEAD_STEPS, HEAD_RATE = 50, 1e-3
WARM_UP = 0.1
EAGER = 3  # steps before a capture: what is made once must not be made in the graph


def order_of(task: Task, count: int, steps: int, seed: int) -> Tensor:
    """Row numbers (steps, batch): epochs in random order, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(count, generator=generator) for _ in range(-(-steps * task.batch // count))]
    return torch.cat(epochs)[: steps * task.batch].view(steps, task.batch)


def schedule(steps: int) -> Tensor:
    """The factor of the learning rates at every step."""
    warm = max(1, round(WARM_UP * steps))
    step = torch.arange(steps, dtype=torch.float32)
    return torch.minimum((step + 1) / warm, (steps - step) / max(1, steps - warm))


def take(data: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    return {key: value.index_select(0, index) for key, value in data.items()}


@functools.cache
def warm_head(packed: Path, task: Task, seed: int, device: str) -> dict[str, Tensor]:
    """The state of a head that was trained alone on the frozen model."""
    model, data = base_model(packed, task, seed, device), split(packed, task, "train", device)
    head = model.get_submodule(task.head).requires_grad_(True)
    optimiser = torch.optim.AdamW(head.parameters(), lr=HEAD_RATE, weight_decay=0.0)
    for index in order_of(task, rows(data), HEAD_STEPS, seed + 10_000).to(device):
        model(**take(data, index)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return {name: value.detach().clone() for name, value in head.state_dict().items()}


class Run:
    """A run in progress; `step()` until `finished`, then `result()`."""

    def __init__(self, spec: Spec, packed: Path, device: str, capture: bool = True):
        self.spec, self.packed, self.device = spec, packed, device
        self.task, self.method = TASKS[spec.task], METHODS[spec.method]
        self.cuda = device == "cuda"
        self.capture = capture and self.cuda and self.method.captured
        self.stream = torch.cuda.Stream() if self.cuda else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.done = self.eager = self.captures = 0
        self.refresh_seconds = 0.0
        self.trace: list[dict[str, float]] = []
        torch.manual_seed(spec.seed)
        data = self._split("train")
        base = base_model(packed, self.task, spec.seed, device)
        if self.task.head:
            base.get_submodule(self.task.head).load_state_dict(warm_head(packed, self.task, spec.seed, device))
        names = targets(self.task, base)
        shapes = shapes_of(base, names)
        self.rank, self.steps = self.method.rank_at(shapes), spec.steps + self.method.extra
        self.data, self.order = data, order_of(self.task, rows(data), self.steps, spec.seed).to(device)
        begun = time.perf_counter()
        self.model = self._adapted(self.method, base, names)
        if self.cuda:
            torch.cuda.synchronize()
        self.prepared = time.perf_counter() - begun
        self.model.train()
        head = [p for n, p in self.model.named_parameters() if p.requires_grad and self._of_head(n)]
        body = [p for n, p in self.model.named_parameters() if p.requires_grad and not self._of_head(n)]
        self.trained, self.trained_head = sum(p.numel() for p in body), sum(p.numel() for p in head)
        if not body:  # the head alone is what the method trains
            body, head = head, []
        self.schedule = schedule(self.steps).to(device)
        self.peaks = [torch.tensor(rate, device=device) for rate in (spec.rate, HEAD_RATE)]
        groups = [{"params": p, "lr": torch.tensor(0.0, device=device)} for p in (body, head) if p]
        self.tilts = self._tilted(body) if self.method.tilt else []
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.0, fused=True, capturable=self.cuda)
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.losses = torch.zeros(self.steps, device=device)
        if self.cuda:  # all of the above ran on the default stream
            torch.cuda.synchronize()
        self.begun = time.perf_counter()

    def _of_head(self, name: str) -> bool:
        return self.task.head is not None and f".{self.task.head}." in f".{name}"

    def _adapted(self, method: Method, base: nn.Module, names: list[str]) -> nn.Module:
        setup = Setup(self.task, names, self._calibration(0), self.spec.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return method.adapt(base, self.rank, setup)

    def _calibration(self, start: int) -> list[dict[str, Tensor]]:
        """The batches that training takes next, or its last ones."""
        start = min(start, max(0, len(self.order) - self.method.batches))
        return [take(self.data, index) for index in self.order[start : start + self.method.batches]]

    def _tilted(self, body: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(skew parameter, the factor of each entry's steps) of every layer."""
        found, hooks = {}, []

        def watch(layer: nn.Module, arguments: tuple[Tensor]) -> None:
            z = arguments[0].detach().flatten(0, -2).float() @ layer.loft_support["default"].float()
            found[layer] = found.get(layer, 0) + z.square().mean(0)

        for layer in loft_rs.tuner.adapters.adapted_layers(self.model)[1].values():
            hooks.append(layer.register_forward_pre_hook(watch))
        with torch.no_grad():
            for batch in self._calibration(0):
                self.model(**batch)
        for hook in hooks:
            hook.remove()
        tilts = []
        for layer, energy in found.items():
            log = energy.log()
            i, j = torch.tril_indices(len(log), len(log), -1, device=log.device)
            factors = (self.method.tilt * (log[i] + log[j] - 2 * log.mean())).exp()
            tilts.append((layer.loft_theta["default"], factors))
        return tilts

    @property
    def finished(self) -> bool:
        return self.done == self.steps

    def _step(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        factor = self.schedule.index_select(0, self.count)[0]
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=False):
            group["lr"].copy_(factor * peak)
        index = self.order.index_select(0, self.count)[0]
        loss = self.model(**take(self.data, index)).loss
        loss.backward()
        before = [parameter.detach().clone() for parameter, _ in self.tilts]
        self.optimiser.step()
        with torch.no_grad():
            for (parameter, factors), start in zip(self.tilts, before, strict=True):
                parameter.copy_(start + factors * (parameter - start))
        self.losses.index_copy_(0, self.count, loss.detach().float().view(1))
        self.count += 1

    def step(self) -> None:
        if self.stream is None:
            self._advance()
            return
        with torch.cuda.stream(self.stream):
            self._advance()

    def _advance(self) -> None:
        every = self.steps // (self.method.refreshes + 1)
        if self.method.refreshes and self.done and self.done % every == 0:
            self._refresh()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()
            self.eager += 1
            if self.capture and self.eager >= EAGER and self.done + 1 < self.steps:
                self._capture()
        self.done += 1
        if self.spec.phase == "score" and self.task.traces and self.done % (self.steps // self.task.traces) == 0:
            self._trace()

    def _trace(self) -> None:
        nll = {name: evaluate(self.model, self.task, self._split(name))["nll"] for name in ("tune", "outside")}
        self.trace.append({"step": self.done} | nll)
        self.model.train()

    def _split(self, name: str) -> dict[str, Tensor]:
        return split(self.packed, self.task, name, self.device)

    def _refresh(self) -> None:
        self.graph, self.eager = None, 0
        begun = time.perf_counter()
        self.optimiser.zero_grad(set_to_none=True)
        loft_rs.refresh(
            self.model,
            self._calibration(self.done),
            max_batches=self.method.batches,
            optimizer=self.optimiser,
            progress=False,
        )
        self.model.train()
        self.refresh_seconds += time.perf_counter() - begun

    def _capture(self) -> None:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self._step()
        except RuntimeError as error:  # a step that waits for the device: go on eagerly, and say so in the line
            self.capture, self.not_captured = False, str(error).splitlines()[0][:200]
            return
        self.graph = graph
        self.captures += 1

    not_captured: str | None = None

    def result(self) -> dict[str, Any]:
        """What the run's line holds beside its spec. A run whose loss is not finite has no
        score.
        """
        if self.cuda:
            self.stream.synchronize()
        seconds, self.graph = time.perf_counter() - self.begun, None
        losses = self.losses.tolist()
        found: dict[str, Any] = {"score": None, "nll": None}
        finite = all(map(math.isfinite, losses))
        if finite:
            names = ("test", "tune") if self.spec.phase == "score" else ("tune",)
            for name in names:
                measured = evaluate(self.model, self.task, self._split(name))
                if name == names[0]:
                    found = measured
                else:
                    found |= {f"{name}_{key}": value for key, value in measured.items()}
            if self.spec.phase == "score" and self.task.answer and self.spec.seed < self.task.answer_seeds:
                found["exact"] = exact_match(self.model, self.packed, self.task, self._split("test"))
        tail = losses[-min(50, len(losses)) :]
        error = None
        if finite and hasattr(self.model, "peft_config") and self.spec.method.startswith("LOFT"):
            with torch.no_grad():
                names = self.model.active_adapters
                error = max(float(loft_rs.orthogonality_error(self.model, name)) for name in names)
        return found | {
            "diverged": not finite,
            "family": self.task.family,
            "metric": self.task.metric,
            "batch": self.task.batch,
            "rank": self.rank,
            "extra": self.method.extra,
            "trained": self.trained,
            "trained_head": self.trained_head,
            "first_loss": sum(losses[:10]) / len(losses[:10]),
            "last_loss": sum(tail) / len(tail),
            "orthogonality_error": error,
            "prepare_seconds": self.prepared,
            "refresh_seconds": self.refresh_seconds,
            "train_seconds": seconds,  # beside the other runs of the card
            "trace": self.trace,
            "captured": bool(self.captures),
            "not_captured": self.not_captured,
        }
