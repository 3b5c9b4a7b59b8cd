"""Calibration: supports from a task's own batches, without one weight gradient.

With X a layer's input, dX its own input gradient, Y0 its output without bias and dY that output's gradient,

    skewgrad    S = Skew(W0^T G) = (dX^T X - X^T dX) / 2        output side  S = (dY^T Y0 - Y0^T dY) / 2
    gradsvd     G = dY^T X                                       output side  G^T
    activation  X^T X                                            output side  Y0^T Y0

Each is seen only through skinny products, summed over the batches (`sketch.py`). Pass 1 accumulates a random sketch (n x k); its
orthonormal basis Q is held for pass 2, which accumulates what S, G or X^T X makes of Q. The small problem is finished in Rust, and a
moment of the same pass turns P into input-PCA order. `passes=1` makes do with a wider sketch. A support that needs no data takes one
forward pass, for its order alone. The sums are linear in the batches: the processes of a `torch.distributed` run add theirs up after
each pass, and saved ones (`saved_sketches.py`) add up anywhere. Pass 1 keeps the even and the odd batches apart, which shows how much
of a support is theirs (`evidence.py`). With a `Budget` layers are calibrated for twice the rank of an even share, and then given theirs.
Under `side="auto"` both sides of a module are sketched, and the one that captures more is kept (`sides.py`). A pilot's
supports come from a short training in place of sums (`pilot.py`), and are then ordered as those that need no data.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from ._checks import is_int
from ._io import check_writable
from .budget import Budget
from .evidence import Evidence
from .footprint import Footprint, Survey, byte_count
from .layer.base_layer import dense_weight
from .linalg import orthonormalize
from .pilot import Pilot, changes_for, checked_pilot
from .ranks import Ranks
from .runner import Runner, calibrating
from .saved_sketches import write_sketches
from .sides import Place, by_module, open_places, share_both, stronger
from .sketch import Sketch, plan_for, sketch_for
from .support import SIDES, Support, blind_support
from .tuner.adapters import (
    adapted_layers,
    note_sides,
    owners,
    require_plain,
    require_untrained,
    set_ranks,
)
from .tuner.config import CALIBRATED_SUPPORTS, DATA_FREE_SUPPORTS, GRADIENT_SUPPORTS, LoftConfig
from .tuner.layer import Linear
from .tuner.selection import choose_supports
from .tuner.undo import unchanged_on_failure

__all__ = ["CalibrationReport", "calibrate", "checked_batches"]

_LOG = logging.getLogger(__name__)
HEAD_STEPS = 20
SHARED_BY = ("energy", "reproducible")
# Halves of batches that are alike rarely have as much: at 2, 4 and 8 batches 7, 3 and 0 % (bench/CALIBRATION.md).
DOMINATED = 0.9
BATCHES = 8
# A layer may deserve more than an even share; to how much of it its spectrum is known.
TRIAL = 2


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` did.

    layers: module name -> the `Support` stored there (energy with its standard error, values, order)
    evidence: module name -> `Evidence`, how far that support is the task's and not these batches'; of chosen supports only
    memory: the bytes it was to take above the frozen training step, as it was known before it started
    sides: of modules whose side was open (`side="auto"`), module name -> {side: ||P^T S P||_F^2}, what decided it (`sides.py`); the
        chosen one is that of the support in `layers`
    pilot: the short training that the supports come from (`support="pilot"`); its steps are not counted in `passes`
    """

    method: str
    order: str
    passes: int
    batches: int | None  # of all processes
    head_steps: int
    seconds: float
    layers: dict[str, Support] = field(repr=False)
    evidence: dict[str, Evidence] = field(default_factory=dict, repr=False)
    memory: Footprint | None = None
    sides: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)
    pilot: Pilot | None = None

    def __str__(self) -> str:
        batches = f", {self.batches} batches" if self.batches is not None else ""
        head = f", head warmed up for {self.head_steps} steps" if self.head_steps else ""
        pilot = f" of {self.pilot.steps} steps" if self.pilot else ""
        lines = [
            f"{self.method}{pilot}, {self.order} order: {len(self.layers)} layers, {self.passes} passes{batches}{head}, "
            f"{self.seconds:.1f} s",
            f"{'layer':<48} {'rank':>5} {'energy':>8} {'+-':>7}"
            + f" {'side':>7} {'on input':>9} {'on output':>9}" * bool(self.sides)
            + f" {'agreement':>10} {'reproducible':>13} {'for .9':>7}" * bool(self.evidence),
        ]
        if self.memory is not None:
            lines.insert(1, f"memory: {self.memory}")
        for name, s in self.layers.items():
            line = f"{name[-48:]:<48} {s.rank:>5} {s.energy:>8.4f} {s.energy_stderr:>7.4f}"
            if self.sides:
                both = self.sides.get(name, dict.fromkeys(SIDES, np.nan))
                line += f" {s.side:>7} {both['input']:>9.2e} {both['output']:>9.2e}"
            if e := self.evidence.get(name):
                line += f" {e.agreement:>10.3f} {e.reproducible:>13.3f} {e.batches_needed():>7.0f}"
            lines.append(line)
        if self.evidence:
            lines.append(
                "agreement: of the support with that of as many other batches; reproducible: of the captured energy; for .9: batches "
                "that an agreement of 0.9 takes"
            )
        if self.sides:
            lines.append("on input, on output: ||P^T S P||^2, of which the side has the larger")
        ruled = sum(e.dominance > DOMINATED for e in self.evidence.values())
        if ruled:
            lines.append(
                f"in {ruled} layers one half of the batches has over {DOMINATED} of the squared objective: few batches are nearly all of "
                "it, and these figures do not tell of other data"
            )
        return "\n".join(lines)


def calibrate(
    model: nn.Module,
    dataloader: Iterable | None = None,
    *,
    train_step: Callable[[], Any] | None = None,
    max_batches: int | None = None,
    pilot: Pilot | None = None,
    adapter_name: str | None = None,
    head_steps: int | None = None,
    passes: int = 2,
    oversampling: int | None = None,
    tol: float | None = None,
    budget: Budget | None = None,
    share_by: str = "energy",
    save_sketches: str | os.PathLike | None = None,
    memory: int | str | None = None,
    offload: bool = False,
    progress: bool | None = None,
) -> CalibrationReport:
    """Choose and store the supports of an untrained LOFT adapter from a task's batches, then order them (`LoftConfig.order`).

    Under `LoftConfig(side="auto")` the side of every module that has none yet is chosen too (`sides.py`) and noted in the config's
    `side_pattern`: both sides are sketched, at the memory and the products of both. gradsvd then needs two passes and dense weights.

    Args:
        model: a PEFT model with a LOFT adapter, on any device and of any base, not wrapped in DDP and not compiled; FSDP2 (`fully_shard`)
            and gradient checkpointing stay as they are.
        dataloader: batches as the model takes them: a mapping gives `model(**batch)`, a list or tuple `model(*batch)`. Gradient
            supports and pilots need `.loss` in the output, so the batches must carry labels. The first `max_batches` are kept and used
            in every pass. The loss is scaled, so that float16 gradients do not vanish.
        train_step: instead of a dataloader, a function of no arguments called once a pass (and once a head or pilot step) that runs
            forward and `backward()` over the calibration batches, the same ones each time; no optimiser step. Where gradients are
            float16 it should scale its loss: supports and energies do not depend on the scale, only `Support.values` do.
        max_batches: how many batches of the dataloader to use. None: 8, or as many as the pilot has steps, which are used in turn, and
            again where they are fewer.
        pilot: the training of a `pilot` support; None: `Pilot()`, 32 steps. It costs so many steps of LoRA training, then the order's pass;
            the report's energy is what the support, in halves its first one, captures of ||B A||_F^2, all that the pilot changed.
        adapter_name: default: the active one.
        head_steps: optimiser steps that warm up the `modules_to_save` of a fresh head first, and are kept, since step-0 gradients
            through a random head say little. None: 20 for a gradient support or a pilot where the adapter has such modules, else 0.
        passes: 2, or 1 for data that comes only once: the support is then chosen, and ordered, from a wider sketch alone.
        oversampling: columns of the sketch beyond the rank, n x 4 bytes each, twice; default 16, or 192 for a single pass. More
            capture more, up to the optimum.
        tol: stop the first pass once another batch changes the supports by less: 1 - ||P^T P'||_F^2 / r, the mean over the layers. The
            second pass uses the same batches. Needs a dataloader.
        budget: in place of the adapter's ranks: even ranks that capture the most for the parameters, none more than twice that of an
            even share, written into the config's `rank_pattern`. Call this before the optimiser is made: it replaces the parameters.
            Its transform must be the adapter's; `modules_to_save` are not counted, and every layer keeps a rank of at least 2. Open
            sides and ranks are chosen in turn, until each is the best for the other.
        share_by: what the budget maximises, the captured "energy", or the part of it that both halves of the batches show
            ("reproducible"), which takes many batches to be told apart between layers (see `Evidence`).
        save_sketches: a file for the sketches of a single pass, from which `loft_rs.supports_from_sketches` computes the same
            supports, also of several files together. With a budget they are those of the wider trial ranks.
        memory: the most bytes, or a string as "512MiB", that this may take on the model's device above the frozen training step. Layers
            are then calibrated in groups, each over the same batches again, with the same result up to what a backward pass on a GPU
            does not repeat to the bit. None: all layers at once. With a train_step only the sketches count, since nothing is known of
            its batches. What it takes is in the report (`memory`), and logged before the first pass. A pilot trains all layers at once.
        offload: hold the sketches on the CPU between batches. This and `passes`, `oversampling`, `tol`, `budget`, `share_by` and
            `save_sketches` are for supports from sketches, and refused with a pilot.
        progress: show a progress bar; None: on a terminal only.

    In a `torch.distributed` run every process calls this with its own share of the batches, and all get the supports, and the
    warmed-up head, that one process with all the batches would get (rank 0's, bit for bit); an error in one raises in all. Under FSDP2
    every process must have equally many batches. DeepSpeed ZeRO-3, FSDP1: calibrate before they take the model.

    Dropout is off, gradients of parameters are left as they were, no base parameter is ever asked for one. A layer that no batch
    reaches keeps the support it has, or gets a random one, with a warning. TypeError or ValueError for a bad argument, a trained
    adapter, batches without loss or gradient, or a layer, or a pilot, that alone needs more than `memory`; `loft_rs.NonFiniteError` names
    the batch and the layer that saw NaN or Inf. The adapter and the head are changed only once everything has succeeded.
    """
    started = time.perf_counter()
    require_plain(model, "calibrate")
    limit = byte_count(memory)
    ranks = Ranks(next(model.parameters()).device)
    with ranks.stage():
        adapter, adapted = adapted_layers(model, adapter_name)
        require_untrained(adapted, adapter, "calibrate")
        layers = owners(adapted, adapter)
        config = next(iter(layers.values())).adapters[adapter].config
        method, order = config.support, "natural" if config.order == "natural" else "input_pca"
        needs_gradient = method in GRADIENT_SUPPORTS
        pilot = checked_pilot(pilot, method)
        trial = _checked_options(
            config, layers, adapter, passes, oversampling, tol, budget, share_by, save_sketches, train_step, offload
        )
        places = open_places(layers, adapter)
        homes = {place: layers[place.module] for place in places}
        changes = {} if pilot is None else changes_for(homes, adapter, pilot, None)
        undecided = [name for name, each in by_module(places).items() if len(each) > 1]
        _require_decidable({name: layers[name] for name in undecided}, method, passes, save_sketches)
        if method not in CALIBRATED_SUPPORTS and order == "natural":
            raise ValueError(
                f"support={method!r} with order='natural' takes nothing from data; there is nothing to calibrate"
            )
        batches = checked_batches(dataloader, train_step, max_batches, pilot)
        head = _head_parameters(model)
        head_steps = _head_steps(head_steps, head, needs_gradient or pilot is not None)
        sharded = any("FSDPModule" in {kind.__name__ for kind in type(m).__mro__} for m in model.modules())
        if sharded and head_steps:
            raise ValueError(
                "head_steps cannot warm up a head that FSDP2 has sharded: calibrate before fully_shard, or give 0"
            )
        run = Runner(model, layers, adapter, batches, train_step, ranks, progress)
        if method not in CALIBRATED_SUPPORTS and not all(layer.adapters[adapter].ready for layer in layers.values()):
            choose_supports(layers, config, adapter)  # built to be loaded, and never was
    if sharded and batches is not None:
        total = ranks.total(len(batches))
        with ranks.stage():
            if total != ranks.size * len(batches):
                raise ValueError(
                    f"dataloader must give every process equally many batches under FSDP2: {total} in all, {len(batches)} here"
                )
    with calibrating(model, adapted, head if head_steps else []):
        if head_steps:
            run.warm_up(head, head_steps)
        options = {"order": order, "seed": config.seed, "oversampling": oversampling, "single": passes == 1}
        options["loss_scale"] = run.loss_scale if needs_gradient else 1.0
        plans = {
            place: plan_for(method, layer, adapter, side=place.side, rank=trial.get(place.module), **options)
            for place, layer in homes.items()
        }

        def energy(place: Place, sketch: Sketch, rank: int | None = None) -> float:
            if place.module not in undecided:
                return 0.0
            return sketch.rotation_energy(rank or sketch.rank, dense_weight(homes[place].get_base_layer()))

        survey = Survey(plans, model, homes, adapter, offload, changes)
        run.show(survey)
        with ranks.stage():
            groups, footprint = survey.groups(limit)
            if tol is not None and len(groups) > 1:
                raise ValueError(
                    "tol needs all layers at once, to stop at one batch for all: give more memory, or no tol"
                )
        groups, footprint = ranks.first((groups, footprint))
        if ranks.rank == 0:
            _LOG.info("calibrate: %s", footprint)
        chosen = {}
        if pilot is not None:
            chosen = run.pilot(changes_for(homes, adapter, pilot, config.seed), pilot, config.seed)
            groups = [list(chosen)]
        done, found, heard, evidence, energies = 0, {}, {}, {}, {}
        home = torch.device("cpu") if offload else None
        for number, group in enumerate(groups, 1):
            sketches = {
                place: sketch_for(plans[place], homes[place], adapter, home, chosen.get(place)) for place in group
            }
            turn = 0
            while live := {place: sketch for place, sketch in sketches.items() if not sketch.finished}:
                turn += 1
                of = f", group {number} of {len(groups)}" if len(groups) > 1 else ""
                run.one_pass(
                    live,
                    backward=needs_gradient,
                    label=f"calibration pass {turn}{of}",
                    last=number == len(groups),
                    tol=None if turn > 1 else tol,
                )
                with ranks.stage():
                    for place, sketch in live.items():
                        sketch.end_pass(place.module)
            done = max(done, turn)
            told = {place: sketch for place, sketch in sketches.items() if not sketch.silent}
            evidence |= {place: ranks.first(sketch.evidence) for place, sketch in told.items() if sketch.evidence}
            with ranks.stage():
                if budget is None:
                    found |= {place: sketch.support(turn) for place, sketch in told.items()}
                    energies |= {place: energy(place, sketch) for place, sketch in told.items()}
                if budget or save_sketches is not None:  # which need them all
                    for place, sketch in told.items():
                        sketch.retire()
                        heard[place] = sketch
        with ranks.stage():
            if budget:
                shared = _shared(heard, layers, budget, share_by, energy)
                found = {place: heard[place].support(done, rank) for place, rank in shared.items()}
                given = {place.module: rank for place, rank in shared.items()}
                energies = {place: energy(place, sketch, given[place.module]) for place, sketch in heard.items()}
            supports = {name: found[place] for name, place in stronger(found, energies.__getitem__).items()}
            silent = {name: layer for name, layer in layers.items() if name not in supports}
            supports |= _unreached(silent, config, adapter)
        supports, energies = {name: ranks.first(supports[name]) for name in layers}, ranks.first(energies)
        if save_sketches is not None:
            names = {id(layer): name for name, layer in adapted.items()}
            sums = {place.module: sketch for place, sketch in heard.items()}
            tied = {name: [names[id(each)] for each in layers[name].adapters[adapter].tied_layers] for name in sums}
            with ranks.stage():
                if ranks.rank == 0:
                    write_sketches(save_sketches, sums, tied)
        for parameter in head if head_steps else []:
            ranks.copy_first(parameter.data)
        used = None if batches is None else ranks.total(len(run.batches))
    with unchanged_on_failure(adapted, adapter), ranks.stage():
        if budget:
            set_ranks(adapted, adapter, {name: support.rank for name, support in supports.items()})
        for name, layer in layers.items():
            layer.adapters[adapter].set_side(supports[name].side)
        note_sides(adapted, adapter)
        for name, layer in layers.items():
            if not (name in silent and layer.adapters[adapter].ready):
                layer.adapters[adapter].set_basis(supports[name].basis, supports[name].energy)
    evidence = {place.module: each for place, each in evidence.items() if place.side == supports[place.module].side}
    sides = {name: {side: energies.get(Place(name, side), 0.0) for side in SIDES} for name in undecided}
    seconds = time.perf_counter() - started
    return CalibrationReport(
        method, order, done, used, head_steps, seconds, supports, evidence, footprint, sides, pilot
    )


def checked_batches(
    dataloader: Iterable | None, train_step: Callable[[], Any] | None, max_batches: int | None, pilot: Pilot | None
) -> list[Mapping | list | tuple] | None:
    """The batches that every pass uses, checked; None where there is a train_step."""
    if max_batches is None:
        max_batches = BATCHES if pilot is None else pilot.steps
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


def _checked_options(
    config: LoftConfig,
    layers: Mapping[str, Linear],
    adapter: str,
    passes: Any,
    oversampling: Any,
    tol: Any,
    budget: Any,
    share_by: Any,
    save_sketches: Any,
    train_step: Any,
    offload: bool,
) -> dict[str, int]:
    """The ranks that a budget calibrates the layers for; refuses what does not fit together."""
    if config.support == "pilot":
        given = {"passes": passes != 2, "share_by": share_by != "energy", "offload": offload}
        given |= {"oversampling": oversampling is not None, "save_sketches": save_sketches is not None}
        given |= {"budget": budget is not None, "tol": tol is not None}
        for name in [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"{name} is for supports from sketches, but support is 'pilot', which a training chooses")
        return {}
    if passes not in (1, 2) or isinstance(passes, bool):
        raise ValueError(f"passes must be 1 or 2, got {passes!r}")
    if oversampling is not None and (not is_int(oversampling) or oversampling < 2 or oversampling % 2):
        raise ValueError(f"oversampling must be None or an even number of at least 2, got {oversampling!r}")
    if tol is not None and not (isinstance(tol, (int, float)) and 0 < tol < 1):
        raise ValueError(f"tol must be None or a number between 0 and 1, got {tol!r}")
    if share_by not in SHARED_BY:
        raise ValueError(f"share_by must be one of {sorted(SHARED_BY)}, got {share_by!r}")
    given = {"tol": tol, "budget": budget, "save_sketches": save_sketches, "oversampling": oversampling}
    for name in [name for name, value in given.items() if value is not None]:
        if not config.needs_calibration:
            raise ValueError(f"{name} needs a support that data chooses, but support is {config.support!r}")
    if tol is not None and train_step is not None:
        raise ValueError("tol needs a dataloader: a train_step cannot be stopped between two batches")
    if save_sketches is not None:
        if passes != 1:
            raise ValueError("save_sketches needs passes=1: a second pass depends on the first and cannot be added up")
        check_writable(save_sketches)
    if share_by != "energy" and budget is None:
        raise ValueError(f"share_by={share_by!r} needs a budget")
    if budget is None:
        return {}
    if not isinstance(budget, Budget):
        raise TypeError(f"budget must be a loft_rs.Budget, got {type(budget).__name__}")
    if budget.transform != config.transform or config.magnitudes:
        named = config.transform + " with magnitudes" * config.magnitudes
        raise ValueError(
            f"budget counts the parameters of {budget.transform!r}, but the adapter's transform is {named}"
        )
    if any(each < 2 for each in (budget.floor.values() if isinstance(budget.floor, Mapping) else [budget.floor])):
        raise ValueError(
            "budget must have a floor of at least 2 here: exclude a module in the LoftConfig to leave it out"
        )
    limits = {name: layer.adapters[adapter].largest_rank for name, layer in layers.items()}
    if narrow := [name for name, limit in limits.items() if limit < 2]:
        raise ValueError(f"budget gives even ranks, which these modules are too narrow for: {', '.join(narrow)}")
    allowed = budget.allowed(limits)
    even = max(
        r
        for r in range(2, max(limits.values()) + 1, 2)
        if r == 2 or budget.parameters(r) * len(layers) <= budget.params
    )
    return {name: min(max(TRIAL * even, ranks.start), ranks[-1]) for name, ranks in allowed.items()}


def _require_decidable(undecided: Mapping[str, Linear], method: str, passes: int, save_sketches: Any) -> None:
    """Refuse what cannot tell the sides of these modules."""
    if undecided and save_sketches is not None:
        raise ValueError(
            "save_sketches needs the side of every module beforehand, which side='auto' leaves open: give side='input' or 'output', or "
            "a side_pattern"
        )
    if method != "gradsvd":
        return
    if undecided and passes == 1:
        raise ValueError("side='auto' with support='gradsvd' needs passes=2, or support='skewgrad'")
    for name, layer in undecided.items():
        if dense_weight(base := layer.get_base_layer()) is None:
            raise TypeError(
                f"side='auto' with support='gradsvd' needs dense weights, to compare the sides, but {name} is a {type(base).__name__}; "
                "use support='skewgrad'"
            )


def _shared(
    sketches: Mapping[Place, Sketch],
    layers: Mapping[str, Linear],
    budget: Budget,
    share_by: str,
    energy: Callable[[Place, Sketch, int], float],
) -> dict[Place, int]:
    """The place and the rank of every layer, from the spectra that the sketches have found."""
    reached = by_module(sketches)
    if silent := [name for name in layers if name not in reached]:
        raise ValueError(
            f"budget: no calibration batch reached {', '.join(silent)}; exclude these modules in the LoftConfig"
        )
    spectra = {place: sketch.spectrum() for place, sketch in sketches.items()}
    if share_by == "reproducible":
        spectra = {place: sketch.evidence.reproduced(spectra[place]) for place, sketch in sketches.items()}
        if any(not np.isfinite(each).all() for each in spectra.values()):
            raise ValueError("share_by='reproducible' needs two batches or more that reach every layer")
    trial = {place.module: sketch.rank for place, sketch in sketches.items()}
    return share_both(spectra, budget, trial, lambda place, rank: energy(place, sketches[place], rank))


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
                method=config.support if config.support in DATA_FREE_SUPPORTS else "custom",
            )
    for what, ready in (("their supports are left as they were", True), ("a random support was put there", False)):
        names = [name for name, layer in layers.items() if layer.adapters[adapter].ready is ready]
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
