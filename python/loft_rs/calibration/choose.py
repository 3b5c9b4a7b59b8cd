"""From batches to supports: groups of sketches, or a pilot, and what they give every layer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .._words import some
from ..layer.base_layer import dense_weight
from ..linalg import orthonormalize
from ..sketch.base import Plan, Sketch
from ..sketch.plan import plan_for, sketch_for
from ..sketch.split_half import SplitHalf
from ..support.blind import blind_support
from ..support.budget import Budget
from ..support.methods import DATA_FREE_SUPPORTS
from ..support.support import Support
from ..tuner.config import LoftConfig
from ..tuner.layer import Linear
from .memory import Footprint, MemorySurvey
from .options import Job
from .passes import Passes
from .pilot import LowRankChange, changes_for
from .sides import ModuleSide, by_module, share_both, stronger
from .start import Starts, starts_of

__all__ = ["Chosen", "choose", "groups_of", "plans_of", "run_groups"]

_LOG = logging.getLogger("loft_rs.calibration")


@dataclass
class Chosen:
    """What a calibration found. By place: evidence, and `energies`, ||P^T S P||_F^2, of modules
    whose side was open. unreached: the layers that no batch reached. batches: of all processes;
    None: a train_step's. starts: of kept pilots."""

    supports: dict[str, Support] = field(default_factory=dict)
    evidence: dict[ModuleSide, SplitHalf] = field(default_factory=dict)
    energies: dict[ModuleSide, float] = field(default_factory=dict)
    unreached: dict[str, Linear] = field(default_factory=dict)
    passes: int = 0
    batches: int | None = None
    memory: Footprint | None = None
    starts: Starts | None = None


def choose(job: Job) -> Chosen:
    """Run the model over the batches, and solve for the support of every layer."""
    run, processes, chosen = Passes(job), job.processes, Chosen()
    if job.head_steps:
        run.warm_up(job.head, job.head_steps)
    plans = plans_of(job, run)
    groups, chosen.memory = groups_of(job, run, plans)
    trained: dict[ModuleSide, Support] = {}
    changes: dict[ModuleSide, LowRankChange] = {}
    if job.pilot is not None:
        seed = job.config.seed
        changes = changes_for(job.homes, job.adapter, job.pilot, seed)
        trained = run.pilot(changes, job.pilot, seed)
        groups = [list(trained)]
    found: dict[ModuleSide, Support] = {}
    waiting: dict[ModuleSide, Sketch] = {}  # until the budget can be shared among them all

    def finished(sketches: dict[ModuleSide, Sketch], passes: int) -> None:
        chosen.passes = max(chosen.passes, passes)
        chosen.evidence.update({p: processes.first(s.evidence) for p, s in sketches.items() if s.evidence})
        with processes.stage():
            for place, sketch in sketches.items():
                if job.budget is None:
                    found[place] = sketch.support(passes)
                    chosen.energies[place] = _energy(job, place, sketch)
                else:
                    sketch.to_cpu()
                    waiting[place] = sketch

    run_groups(job, run, plans, groups, finished, trained)
    with processes.stage():
        if job.budget is not None:
            ranks = shared_ranks(waiting, job, job.budget)
            given = {place.module: rank for place, rank in ranks.items()}
            found = {place: waiting[place].support(chosen.passes, rank) for place, rank in ranks.items()}
            chosen.energies = {p: _energy(job, p, sketch, given[p.module]) for p, sketch in waiting.items()}
        supports = {name: found[place] for name, place in stronger(found, chosen.energies.__getitem__).items()}
        chosen.unreached = {name: layer for name, layer in job.layers.items() if name not in supports}
        supports |= unreached_supports(chosen.unreached, job.config, job.adapter)
        if job.config.named_transform.halves:
            supports = {name: replace(support, halves=True) for name, support in supports.items()}
    chosen.supports = {name: processes.first(supports[name]) for name in job.layers}
    chosen.energies = processes.first(chosen.energies)
    if job.pilot is not None and job.pilot.keep:
        reached = {place: changes[place] for place in trained}
        chosen.starts = starts_of(job, run, reached, chosen.supports)
    for parameter in job.head:
        processes.copy_first(parameter.data)
    chosen.batches = None if job.batches is None else processes.total(len(job.batches))
    return chosen


def plans_of(job: Job, run: Passes) -> dict[ModuleSide, Plan]:
    """What is sketched at every place, and how wide."""
    options: dict[str, Any] = {
        "order": job.order,
        "seed": job.config.seed,
        "oversampling": job.oversampling,
        "single": job.single,
    }
    options["loss_scale"] = run.loss_scale if job.needs_gradient else 1.0
    return {
        place: plan_for(job.method, layer, job.adapter, side=place.side, rank=job.trial.get(place.module), **options)
        for place, layer in job.homes.items()
    }


def groups_of(job: Job, run: Passes, plans: Mapping[ModuleSide, Plan]) -> tuple[list[list[ModuleSide]], Footprint]:
    """The places that are sketched together, so that none takes more than the limit, and what the
    largest group takes.
    """
    changes = {} if job.pilot is None else changes_for(job.homes, job.adapter, job.pilot, None)
    survey = MemorySurvey(plans, job.model, job.homes, job.adapter, job.offload, changes)
    run.show(survey)
    with job.processes.stage():
        groups, footprint = survey.groups(job.limit)
    groups, footprint = job.processes.first((groups, footprint))
    if job.processes.rank == 0:
        _LOG.info("calibrate: %s", footprint)
    return groups, footprint


def run_groups(
    job: Job,
    run: Passes,
    plans: Mapping[ModuleSide, Plan],
    groups: list[list[ModuleSide]],
    finished: Callable[[dict[ModuleSide, Sketch], int], None],
    trained: Mapping[ModuleSide, Support],
) -> None:
    """Sketch one group after the other. finished: given the sketches of each that saw something,
    and the passes they took.
    """
    device = torch.device("cpu") if job.offload else None
    for number, group in enumerate(groups, 1):
        sketches = {
            place: sketch_for(plans[place], job.homes[place], job.adapter, device, trained.get(place))
            for place in group
        }
        label = f", group {number} of {len(groups)}" if len(groups) > 1 else ""
        passes = 0
        while live := {place: sketch for place, sketch in sketches.items() if not sketch.finished}:
            passes += 1
            run.one_pass(
                live,
                backward=job.needs_gradient,
                label=f"calibration pass {passes}{label}",
                last=number == len(groups),
            )
            with job.processes.stage():
                for place, sketch in live.items():
                    sketch.end_pass(place.module)
        finished({place: sketch for place, sketch in sketches.items() if not sketch.unreached}, passes)


def _energy(job: Job, place: ModuleSide, sketch: Sketch, rank: int | None = None) -> float:
    """||P^T S P||_F^2, where a side is to be chosen by it."""
    if place.module not in job.undecided:
        return 0.0
    return sketch.rotation_energy(rank or sketch.rank, dense_weight(job.homes[place].get_base_layer()))


def shared_ranks(sketches: Mapping[ModuleSide, Sketch], job: Job, budget: Budget) -> dict[ModuleSide, int]:
    """The place and the rank of every layer, from the spectra that the sketches have found."""
    reached = by_module(sketches)
    if silent := [name for name in job.layers if name not in reached]:
        raise ValueError(
            f"r=Budget(...): no calibration batch reached {some(silent)}; exclude these modules in the LoftConfig"
        )
    spectra = {place: sketch.spectrum() for place, sketch in sketches.items()}
    trial = {place.module: sketch.rank for place, sketch in sketches.items()}
    return share_both(spectra, budget, trial, lambda place, rank: _energy(job, place, sketches[place], rank))


def unreached_supports(layers: Mapping[str, Linear], config: LoftConfig, adapter: str) -> dict[str, Support]:
    """Supports for layers that no calibration batch reached: the one a layer has, or a random one,
    so that training can go on.
    """
    supports = {}
    for name, layer in layers.items():
        side = layer.adapters[adapter].side
        supports[name] = blind_support(
            layer.support_width(side), layer.adapters[adapter].rank, method="random", side=side, seed=config.seed
        )
        if layer.adapters[adapter].ready:
            held = layer.adapters[adapter].support.double().cpu().numpy()
            supports[name] = replace(
                supports[name],
                basis=orthonormalize(held).astype("float32"),
                energy=layer.adapters[adapter].energy,
                method=config.method if config.method in DATA_FREE_SUPPORTS else "custom",
            )
    for what, ready in (("their supports are left as they were", True), ("a random support was put there", False)):
        names = [name for name, layer in layers.items() if layer.adapters[adapter].ready is ready]
        if names:
            warnings.warn(
                f"no calibration batch gave a gradient or an activation to {some(names)}: {what}; exclude these modules "
                "from target_modules if they are never used",
                stacklevel=3,
            )
    return supports
