"""The methods, by name: what each makes of a base model, its rank at a parameter budget, and the
learning rates it is tried at.

The budget is LoRA r=1's, the sum of inputs and outputs over the adapted layers; a matched method
takes the largest (even) rank within it. A name that ends in a rank, `r46`, has that instead, in
`tenth` a tenth of LoRA r=8's parameters as its budget. LOFT and PSOFT rates are `lr * r`, the
others' plain; Adam.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from tasks import LLAMA, MINILM, MPNET, Task
from torch import Tensor, nn

import loft_rs
from loft_rs import Budget, LoftConfig, Pilot

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


Adapt = Callable[[nn.Module, int, Setup], nn.Module]


@dataclass(frozen=True)
class Method:
    """`adapt` makes the model that is trained, given the rank; `size` counts the parameters a rank
    trains in the adapted layers.

    `share`: of that budget. `times_rank`: the rates are lr * r. `captured`: a training step can be
    a CUDA graph. `refreshes`: how often the support is chosen anew during the run. `extra`: steps
    beyond the task's. `rate_of`: trained at that method's rate, without trials.
    `batches`: to calibrate with. `tilt`: entry (i, j) of the skew parameter is trained at its rate
    times (l_i l_j)^tilt, l the input energy of the support's coordinates, over their geometric
    mean.
    """

    name: str
    adapt: Adapt
    middle: float
    size: Callable[[int, Shapes], int] | None = None
    rank: int | None = None
    step: int = 2
    share: float = 1.0
    times_rank: bool = False
    captured: bool = True
    refreshes: int = 0
    extra: int = 0
    rate_of: str | None = None
    batches: int = 8
    tilt: float = 0.0

    def rank_at(self, shapes: Shapes) -> int:
        """The rank given, or the largest within the budget, no wider than the narrowest layer."""
        if self.rank is not None:
            return self.rank
        budget = self.share * sum(n + m for n, m in shapes)
        fitting = [r for r in range(self.step, min(map(min, shapes)) + 1, self.step) if self.size(r, shapes) <= budget]
        if not fitting:
            raise ValueError(f"{self.name}: no rank trains at most {budget:.0f} parameters")
        return fitting[-1]

    def rate(self, middle: float, shapes: Shapes) -> float:
        return middle / self.rank_at(shapes) if self.times_rank else middle


def targets(task: Task, model: nn.Module) -> list[str]:
    """Full names of the adapted layers: every linear one of the blocks."""
    ends = {"minilm": MINILM, "mpnet": MPNET, "smollm2": LLAMA, "gemma": LLAMA, "vit": ("",)}[task.model]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != task.head and "lm_head" not in name and name.endswith(ends)
    ]


def shapes_of(model: nn.Module, names: list[str]) -> list[tuple[int, int]]:
    layers = [model.get_submodule(name) for name in names]
    return [(layer.in_features, layer.out_features) for layer in layers]


# -- how each is built ---------------------------------------------------------------------------


def _peft(config: type, rank_name: str, **options: Any) -> Adapt:
    def adapt(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
        given = {key: value(rank) if callable(value) else value for key, value in options.items()}
        made = config(**{rank_name: rank}, **given, target_modules=setup.targets, modules_to_save=_heads(setup.task))
        return peft.get_peft_model(model, made)

    return adapt


def _heads(task: Task) -> list[str] | None:
    return [task.head] if task.head else None


def _config(rank: int | Budget, setup: Setup, **options: Any) -> LoftConfig:
    ties = setup.task.tied
    if options.get("tied"):
        options["tied"] = ties if ties is True else [list(tie) for tie in ties]
    heads = _heads(setup.task)
    return LoftConfig(r=rank, target_modules=setup.targets, modules_to_save=heads, seed=setup.seed, **options)


def _calibrate(model: nn.Module, setup: Setup, **options: Any) -> None:
    loft_rs.calibrate(model, setup.batches, max_batches=len(setup.batches), head_steps=0, progress=False, **options)


def _loft(support: str | Pilot, halved: bool = False, **options: Any) -> Adapt:
    """halved: calibrated on batches of half the rows, twice as many."""

    def adapt(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
        if halved:
            halves = [{key: x[i::2] for key, x in each.items()} for each in setup.batches for i in (0, 1)]
            setup = replace(setup, batches=halves)
        config = _config(rank, setup, support=support, **options)
        model = peft.get_peft_model(model, config)
        if config.needs_calibration or config.order != "natural":
            _calibrate(model, setup)
        return model

    return adapt


def _two_sides(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
    """One rotation of the inputs and one of the outputs, of the same rank."""
    model = peft.get_peft_model(model, _config(rank, setup, support="gradsvd"))
    model.add_adapter("outputs", _config(rank, setup, support="gradsvd", side="output"))
    for name in ("default", "outputs"):
        model.base_model.set_adapter(name)
        _calibrate(model, setup, adapter_name=name)
    model.base_model.set_adapter(["default", "outputs"])
    return model


def _shared_ranks(support: str) -> Adapt:
    """Ranks shared out over the layers by captured energy a parameter, as many parameters as `rank`
    everywhere.
    """

    def adapt(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
        budget = Budget(params=len(setup.targets) * rank * (rank - 1) // 2)
        model = peft.get_peft_model(model, _config(budget, setup, support=support))
        _calibrate(model, setup)
        return model

    return adapt


class _Turned(nn.Module):
    """x Q, Q (n, n) orthogonal."""

    def __init__(self, q: Tensor):
        super().__init__()
        self.register_buffer("q", q)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.q


def _moments(model: nn.Module, setup: Setup, bases: dict[str, Tensor]) -> dict[str, Tensor]:
    """sum z z^T over the calibration batches by layer, float64, of z = x, or x P where there is a
    basis P.
    """
    sums: dict[str, Tensor] = {}

    def see(name: str, _: nn.Module, arguments: tuple[Tensor]) -> None:
        z = arguments[0].flatten(0, -2).float()
        z = z @ bases[name] if name in bases else z
        sums[name] = sums.get(name, 0) + z.mT @ z

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(functools.partial(see, name)) for name in setup.targets
    ]
    with torch.no_grad():
        for batch in setup.batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: each.double() for name, each in sums.items()}


def _turned_blocks(strided: bool) -> Adapt:
    """OFT in the layer's input-PCA coordinates, y = (x Q)(W Q)^T. A block holds neighbours of that
    order, or strided ones: one coordinate of each quarter, say. W Q is rounded to W's dtype, so the
    start is the base only to rounding."""

    def adapt(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
        moments = _moments(model, setup, {})
        for name in setup.targets:
            layer = model.get_submodule(name)
            q = torch.linalg.eigh(moments[name])[1].flip(1)
            if strided:
                q = q[:, torch.arange(len(q), device=q.device).view(rank, -1).mT.flatten()]
            with torch.no_grad():
                layer.weight.copy_(layer.weight.double() @ q)
            model.set_submodule(name, nn.Sequential(_Turned(q.to(layer.weight.dtype)), layer))
        names = [f"{name}.1" for name in setup.targets]
        config = LoftConfig.oft(rank, target_modules=names, modules_to_save=_heads(setup.task), seed=setup.seed)
        return peft.get_peft_model(model, config)

    return adapt


def _recovered(make: Callable[..., LoftConfig]) -> Adapt:
    def adapt(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
        return peft.get_peft_model(
            model, make(rank, target_modules=setup.targets, modules_to_save=_heads(setup.task), seed=setup.seed)
        )

    return adapt


class TwoBases(nn.Module):
    """LoRA-XS (arXiv 2405.17604): y = W0 x + U R V^T x, `up` U (m x r) and `down` V^T (r x n)
    fixed, R trained from zero.
    """

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor):
        super().__init__()
        self.base = base
        self.register_buffer("down", down.float().contiguous())
        self.register_buffer("up", up.float().contiguous())
        self.core = nn.Parameter(torch.zeros(len(down), len(down), device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + (x.float() @ self.down.mT @ self.core.mT @ self.up.mT).to(y.dtype)


def _two_bases(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
    """W0 = U S V^T cut to rank r; `up` is U S."""
    for name in setup.targets:
        layer = model.get_submodule(name)
        u, s, vt = torch.linalg.svd(layer.weight.detach().float(), full_matrices=False)
        model.set_submodule(name, TwoBases(layer, vt[:rank], u[:, :rank] * s[:rank]))
    return _with_head(model, rank, setup)


def _two_piloted_bases(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
    """Those of a short run, as LOFT's pilot takes its one: W - W0 = BA = U S V^T after a step of
    LoRA r=64 a batch, A from zero.

    V in input-PCA order, `up` U times ||W0||_F / sqrt(inputs), so that the core's rates are a
    rotation's.
    """
    trained = peft.get_peft_model(model, peft.LoraConfig(r=64, lora_alpha=64, target_modules=setup.targets)).eval()
    layers = {name: trained.base_model.model.get_submodule(name) for name in setup.targets}
    draw = torch.Generator().manual_seed(setup.seed)
    for layer in layers.values():
        a, b = (each["default"].weight for each in (layer.lora_A, layer.lora_B))
        with torch.no_grad():
            a.zero_()
            b.copy_(torch.randn(b.shape, generator=draw) / 8)
    optimiser = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], 1e-3)
    for batch in setup.batches:
        trained(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    left, right = {}, {}
    for name, layer in layers.items():
        a, b = (each["default"].weight.detach().double() for each in (layer.lora_A, layer.lora_B))
        (qb, rb), (qa, ra) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
        u, _, vt = torch.linalg.svd(rb @ ra.mT)
        left[name], right[name] = (qb @ u)[:, :rank], (qa @ vt.mT)[:, :rank].float()
    model = trained.unload()
    for name, moment in _moments(model, setup, right).items():
        layer = model.get_submodule(name)
        weight = layer.weight.double()
        v = right[name].double() @ torch.linalg.eigh(moment)[1].flip(1)
        model.set_submodule(name, TwoBases(layer, v.mT, left[name] * weight.norm() / weight.shape[1] ** 0.5))
    return _with_head(model, rank, setup)


def _with_head(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
    if setup.task.head:
        model.get_submodule(setup.task.head).requires_grad_(True)
    return model


def _everything(model: nn.Module, rank: int, setup: Setup) -> nn.Module:
    return model.float().requires_grad_(True)  # in bf16 a small step would be rounded away


# -- sizes ---------------------------------------------------------------------------------------


def _planes(r: int, shapes: Shapes) -> int:
    return len(shapes) * r * (r - 1) // 2


def _squares(r: int, shapes: Shapes) -> int:
    return len(shapes) * r * r


def _between(r: int, shapes: Shapes) -> int:
    return len(shapes) * (r // 2) * (r - r // 2)


def _tied(r: int, shapes: Shapes) -> int:
    """q, k and v of a block as one (MiniLM and the ViT: 4 rotations for 6 layers; SmolLM2, gate and
    up too: 4 for 7).
    """
    return 4 * (len(shapes) // (7 if len(shapes) % 7 == 0 else 6)) * r * (r - 1) // 2


def _psoft_size(r: int, shapes: Shapes) -> int:
    return len(shapes) * (r * (r - 1) // 2 + 2 * r)


def _inputs(r: int, shapes: Shapes) -> int:
    return r * sum(n for n, _ in shapes)


SUPPORTS = ("principal", "gradsvd", "skewgrad", "activation", "random", "coordinate")
LORA = _peft(peft.LoraConfig, "r", lora_alpha=lambda r: 2 * r)
LOFT = {"size": _planes, "middle": 0.06, "times_rank": True}
PILOT = LOFT | {"batches": 32}  # one a step
COUNTED = PILOT | {"extra": -32}
TWICE = {"batches": 64}
# what names no module of a model has no effect
OUTPUTS = {"side_pattern": {"gate_proj": "output", "up_proj": "output"}}
RANKS = {"q_proj": 20, "k_proj": 20, "down_proj": 80}  # with 42 elsewhere .96 of the parameters of 46 everywhere
METHODS = {
    method.name: method
    for method in (
        Method("head only", _with_head, 1e-2, rank=0),
        Method("full fine-tuning", _everything, 1e-4, rank=0),
        Method("LoRA r1", LORA, 2.5e-3, rank=1),
        # as many steps as with a pilot of 64
        Method("LoRA r1 longer", LORA, 2.5e-3, rank=1, extra=64, rate_of="LoRA r1"),
        Method("LoRA r8", LORA, 1.5e-3, rank=8),
        *(Method(f"LOFT {support}", _loft(support), **LOFT) for support in SUPPORTS),
        *(Method(f"LOFT {support} r16", _loft(support), rank=16, **LOFT) for support in SUPPORTS),
        *(Method(f"LOFT principal r{rank}", _loft("principal"), rank=rank, **LOFT) for rank in (32, 64, 128)),
        *(Method(f"LOFT {support} natural", _loft(support, order="natural"), **LOFT) for support in SUPPORTS[:3]),
        *(Method(f"LOFT {support} r46", _loft(support), rank=46, **LOFT) for support in SUPPORTS[:4]),
        Method("LOFT pilot", _loft("pilot"), **PILOT),
        Method("LOFT pilot r46", _loft("pilot"), rank=46, **PILOT),
        Method("LOFT pilot tied r60", _loft("pilot", tied=True), rank=60, rate_of="LOFT pilot r46", **PILOT),
        Method("LOFT principal tenth", _loft("principal"), share=0.8, rate_of="LOFT principal", **LOFT),
        *(
            Method(f"LOFT pilot {name}{at}", _loft("pilot"), rank=rank, tilt=tilt, **PILOT)
            for name, tilt in (("quiet", -0.125), ("quieter", -0.25))
            for at, rank in (("", None), (" r46", 46))
        ),
        *(
            Method(f"LOFT pilot {name} r{rank}", adapt, rank=rank, rate_of="LOFT pilot r46", **PILOT | options)
            for name, rank, adapt, options in (
                ("ranks", 42, _loft("pilot", rank_pattern=RANKS), {}),
                ("64", 46, _loft(Pilot(steps=64)), TWICE),
                ("64 ranks", 42, _loft(Pilot(steps=64), rank_pattern=RANKS), TWICE),
                ("64 ranks quieter", 42, _loft(Pilot(steps=64), rank_pattern=RANKS), TWICE | {"tilt": -0.25}),
                ("64 halved ranks", 42, _loft(Pilot(steps=64), halved=True, rank_pattern=RANKS), {}),
            )
        ),
        Method("LOFT halves", _loft(Pilot(halves=True), **OUTPUTS), **PILOT | {"size": _between, "middle": 0.12}),
        Method("LOFT halves r64", _loft(Pilot(halves=True), **OUTPUTS), rank=64, **PILOT | {"middle": 0.2112}),
        *(
            Method(f"LOFT halves {name} r64", adapt, rank=64, rate_of="LOFT halves r64", **PILOT | options)
            for name, adapt, options in (
                ("64", _loft(Pilot(steps=64, halves=True), **OUTPUTS), TWICE),
                ("in", _loft(Pilot(halves=True)), {}),
            )
        ),
        # the pilot's 32 steps counted among the task's; kept: training starts where the pilot ended
        *(
            Method(f"LOFT {name} r{rank}", adapt, rank=rank, **COUNTED | {"middle": middle})
            for name, rank, middle, adapt in (
                ("pilot counted", 46, 0.06, _loft("pilot")),
                ("halves counted", 64, 0.2112, _loft(Pilot(halves=True), **OUTPUTS)),
                ("kept pilot", 46, 0.06, _loft(Pilot(keep=True))),
                *(("kept halves", r, 0.2112, _loft(Pilot(halves=True, keep=True), **OUTPUTS)) for r in (64, 128, 192)),
            )
        ),
        *(
            Method(f"LOFT {name}", _loft(pilot), **COUNTED | {"size": _between, "middle": 0.12})
            for name, pilot in (("halves counted", Pilot(halves=True)), ("kept halves", Pilot(halves=True, keep=True)))
        ),
        Method("LOFT gradsvd both sides r32", _two_sides, rank=32, rate_of="LOFT gradsvd r46", **LOFT),
        *(
            Method(f"LOFT {name} budget r46", _shared_ranks(name), rank=46, rate_of=f"LOFT {name} r46", **LOFT)
            for name in ("gradsvd", "skewgrad")
        ),
        Method("OFT pca b4", _turned_blocks(strided=False), 6e-3, rank=4, rate_of="OFT b4"),
        Method("OFT pca strided b4", _turned_blocks(strided=True), 6e-3, rank=4, rate_of="OFT b4"),
        Method("LOFT gradsvd tied", _loft("gradsvd", tied=True), **LOFT | {"size": _tied}),
        Method("LOFT gradsvd free", _loft("gradsvd", transform="free"), **LOFT | {"size": _squares}),
        Method("LOFT gradsvd refresh", _loft("gradsvd"), refreshes=2, rate_of="LOFT gradsvd", **LOFT),
        Method("LOFT principal refresh", _loft("principal"), refreshes=2, rate_of="LOFT principal", **LOFT),
        Method("LOFT skewgrad refresh", _loft("skewgrad"), refreshes=2, rate_of="LOFT skewgrad", **LOFT),
        Method("LoRA-XS", _two_bases, 6e-3, _squares),
        Method("LoRA-XS pilot r32", _two_piloted_bases, 8e-3, rank=32, batches=32),
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
