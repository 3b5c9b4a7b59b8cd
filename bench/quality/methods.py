"""The methods, by name: what each makes of a base model, its rank at a parameter budget, and the learning rates it is tried at.

The budget is LoRA r=1's, the sum of inputs and outputs over the adapted layers; a matched method takes the largest (even) rank within it. A
name that ends in `r16` or `r46` has that rank instead. LOFT and PSOFT rates are `lr * r`, the others' plain; Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from tasks import LLAMA, MINILM, Task
from torch import Tensor, nn

import loft_rs
from loft_rs import LoftConfig

Shapes = Sequence[tuple[int, int]]  # (inputs, outputs) of the adapted layers
Batches = list[dict[str, Tensor]]

FACTOR = 2.5  # between neighbouring rates
TRIALS = 5


def grid(middle: float) -> tuple[float, ...]:
    """TRIALS rates around `middle`."""
    return tuple(middle * FACTOR ** (k - TRIALS // 2) for k in range(TRIALS))


@dataclass(frozen=True)
class Setup:
    """What a method is given beside the model."""

    task: Task
    targets: list[str]
    batches: Batches  # calibration
    seed: int


@dataclass(frozen=True)
class Method:
    """`adapt` makes the model that is trained, given the rank; `size` counts the parameters a rank trains in the adapted layers.

    `times_rank`: the rates are lr * r. `captured`: a training step can be a CUDA graph. `refreshes`: how often the support is chosen
    anew during the run. `rate_of`: trained at that method's rate, without trials.
    """

    name: str
    adapt: Callable[[nn.Module, int, Setup], nn.Module]
    middle: float
    size: Callable[[int, Shapes], int] | None = None
    rank: int | None = None
    step: int = 2
    times_rank: bool = False
    captured: bool = True
    refreshes: int = 0
    rate_of: str | None = None

    def rank_at(self, shapes: Shapes, budget: int | None = None) -> int:
        """The rank given, or the largest within `budget` (default: LoRA r=1's), no wider than the narrowest layer."""
        if self.rank is not None:
            return self.rank
        budget = sum(n + m for n, m in shapes) if budget is None else budget
        fitting = [r for r in range(self.step, min(map(min, shapes)) + 1, self.step) if self.size(r, shapes) <= budget]
        if not fitting:
            raise ValueError(f"{self.name}: no rank trains at most {budget} parameters")
        return fitting[-1]

    def rate(self, middle: float, shapes: Shapes) -> float:
        return middle / self.rank_at(shapes) if self.times_rank else middle


def targets(task: Task, model: nn.Module) -> list[str]:
    """Full names of the adapted layers: every linear one of the blocks."""
    ends = {"minilm": MINILM, "smollm2": LLAMA, "vit": ("",)}[task.model]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != task.head and "lm_head" not in name and name.endswith(ends)
    ]


def shapes_of(model: nn.Module, names: list[str]) -> list[tuple[int, int]]:
    layers = [model.get_submodule(name) for name in names]
    return [(layer.in_features, layer.out_features) for layer in layers]


# -- how each is built -----------------------------------------------------------------------------------------------------


def _peft(config: type, rank_name: str, **options: Any) -> Callable[[nn.Module, int, Setup], nn.Module]:
    def adapt(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
        given = {key: value(rank) if callable(value) else value for key, value in options.items()}
        made = config(**{rank_name: rank}, **given, target_modules=setup.targets, modules_to_save=_heads(setup.task))
        return peft.get_peft_model(model, made)

    return adapt


def _heads(task: Task) -> list[str] | None:
    return [task.head] if task.head else None


def _loft(support: str, **options: Any) -> Callable[[nn.Module, int, Setup], nn.Module]:
    def adapt(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
        ties = setup.task.tied
        given = options | (
            {"tied": ties if ties is True else [list(tie) for tie in ties]} if options.get("tied") else {}
        )
        config = LoftConfig(
            r=rank,
            support=support,
            target_modules=setup.targets,
            modules_to_save=_heads(setup.task),
            seed=setup.seed,
            **given,
        )
        model = peft.get_peft_model(model, config)
        if config.needs_calibration or config.order != "natural":
            loft_rs.calibrate(model, setup.batches, max_batches=len(setup.batches), head_steps=0, progress=False)
        return model

    return adapt


PILOT_RANK, PILOT_STEPS, PILOT_RATE = 64, 32, 1e-3


def _pilot(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
    """LOFT whose supports are the top right singular vectors of what a short LoRA run on the calibration batches changed: W - W0 = B A.

    A starts at zero and B at random, the reverse of LoRA's own start: the row space of B A is then all learnt.
    """
    config = peft.LoraConfig(r=PILOT_RANK, lora_alpha=PILOT_RANK, target_modules=setup.targets)
    pilot = peft.get_peft_model(model, config)
    layers = {name: pilot.base_model.model.get_submodule(name) for name in setup.targets}
    factors = {name: (layer.lora_B["default"].weight, layer.lora_A["default"].weight) for name, layer in layers.items()}
    draw = torch.Generator().manual_seed(setup.seed)
    with torch.no_grad():
        for b, a in factors.values():
            b.copy_(torch.randn(b.shape, generator=draw) / PILOT_RANK**0.5)
            a.zero_()
    optimiser = torch.optim.Adam([w for pair in factors.values() for w in pair], lr=PILOT_RATE)
    for step in range(PILOT_STEPS):
        pilot(**setup.batches[step % len(setup.batches)]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    bases = {}
    for name, (b, a) in factors.items():
        q, r = torch.linalg.qr(a.detach().float().mT)
        bases[name] = q @ torch.linalg.svd(b.detach().float() @ r.mT, full_matrices=False)[2].mT[:, :rank]
    model = pilot.unload().requires_grad_(False)
    config = LoftConfig(
        r=rank, support="random", target_modules=setup.targets, modules_to_save=_heads(setup.task), seed=setup.seed
    )
    model = peft.get_peft_model(model, config)
    loft_rs.set_support(model, bases)
    loft_rs.calibrate(model, setup.batches, max_batches=len(setup.batches), head_steps=0, progress=False)  # the order
    return model


def _recovered(make: Callable[..., LoftConfig]) -> Callable[[nn.Module, int, Setup], nn.Module]:
    def adapt(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
        return peft.get_peft_model(
            model, make(rank, target_modules=setup.targets, modules_to_save=_heads(setup.task), seed=setup.seed)
        )

    return adapt


class TwoBases(nn.Module):
    """LoRA-XS (arXiv 2405.17604): y = W0 x + U S R V^T x, W0 = U S V^T cut to rank r, R (r x r) trained from zero."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        u, s, vt = torch.linalg.svd(base.weight.detach().float(), full_matrices=False)
        self.base = base
        self.register_buffer("down", vt[:rank].contiguous())
        self.register_buffer("up", (u[:, :rank] * s[:rank]).contiguous())
        self.core = nn.Parameter(torch.zeros(rank, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + (x.float() @ self.down.mT @ self.core.mT @ self.up.mT).to(y.dtype)


def _two_bases(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
    for name in setup.targets:
        model.set_submodule(name, TwoBases(model.get_submodule(name), rank))
    return _with_head(model, rank, setup)


def _with_head(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
    if setup.task.head:
        model.get_submodule(setup.task.head).requires_grad_(True)
    return model


def _everything(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
    return model.requires_grad_(True)


# -- sizes -----------------------------------------------------------------------------------------------------------------


def _planes(r: int, shapes: Shapes) -> int:
    return len(shapes) * r * (r - 1) // 2


def _squares(r: int, shapes: Shapes) -> int:
    return len(shapes) * r * r


def _tied(r: int, shapes: Shapes) -> int:
    """q, k and v of a block as one (MiniLM and the ViT: 4 rotations for 6 layers; SmolLM2, gate and up too: 4 for 7)."""
    return 4 * (len(shapes) // (7 if len(shapes) % 7 == 0 else 6)) * r * (r - 1) // 2


def _psoft_size(r: int, shapes: Shapes) -> int:
    return len(shapes) * (r * (r - 1) // 2 + 2 * r)


def _inputs(r: int, shapes: Shapes) -> int:
    return r * sum(n for n, _ in shapes)


SUPPORTS = ("principal", "gradsvd", "skewgrad", "activation", "random", "coordinate")
LOFT = {"size": _planes, "middle": 0.06, "times_rank": True}
METHODS = {
    method.name: method
    for method in (
        Method("head only", _with_head, 1e-2, rank=0),
        Method("full fine-tuning", _everything, 1e-4, rank=0),
        Method("LoRA r1", _peft(peft.LoraConfig, "r", lora_alpha=lambda r: 2 * r), 2.5e-3, rank=1),
        Method("LoRA r8", _peft(peft.LoraConfig, "r", lora_alpha=lambda r: 2 * r), 1.5e-3, rank=8),
        *(Method(f"LOFT {support}", _loft(support), **LOFT) for support in SUPPORTS),
        *(Method(f"LOFT {support} r16", _loft(support), rank=16, **LOFT) for support in SUPPORTS),
        *(Method(f"LOFT {support} natural", _loft(support, order="natural"), **LOFT) for support in SUPPORTS[:3]),
        *(Method(f"LOFT {support} r46", _loft(support), rank=46, **LOFT) for support in SUPPORTS[:4]),
        Method("LOFT pilot", _pilot, **LOFT),
        Method("LOFT pilot r46", _pilot, rank=46, **LOFT),
        Method("LOFT gradsvd tied", _loft("gradsvd", tied=True), **LOFT | {"size": _tied}),
        Method("LOFT gradsvd free", _loft("gradsvd", transform="free"), **LOFT | {"size": _squares}),
        Method("LOFT gradsvd refresh", _loft("gradsvd"), refreshes=2, rate_of="LOFT gradsvd", **LOFT),
        Method("LOFT principal refresh", _loft("principal"), refreshes=2, rate_of="LOFT principal", **LOFT),
        Method("LOFT skewgrad refresh", _loft("skewgrad"), refreshes=2, rate_of="LOFT skewgrad", **LOFT),
        Method("LoRA-XS", _two_bases, 6e-3, _squares),
        Method("PSOFT", _recovered(LoftConfig.psoft), 0.06, _psoft_size, times_rank=True),
        Method("OFT b4", _recovered(LoftConfig.oft), 6e-3, rank=4),
        Method("BOFT b2 m2", _recovered(lambda b, **k: LoftConfig.boft(b, 2, **k)), 6e-3, rank=2),
        Method("HRA", _recovered(LoftConfig.hra), 6e-3, _inputs),
        Method(
            "PSOFT (PEFT's)",
            _peft(peft.PsoftConfig, "r", psoft_alpha=lambda r: r),
            0.06,
            _psoft_size,
            captured=False,
            rate_of="PSOFT",
        ),
        Method(
            "OFT b4 (PEFT's)", _peft(peft.OFTConfig, "oft_block_size"), 6e-3, rank=4, captured=False, rate_of="OFT b4"
        ),
        Method("HRA (PEFT's)", _peft(peft.HRAConfig, "r"), 6e-3, _inputs, captured=False, rate_of="HRA"),
    )
}
