"""Calibration: supports from a task's own batches, without one weight gradient.

With X a layer's input, dX its own input gradient, Y0 its output without bias and dY that output's gradient,

    skewgrad    S = Skew(W0^T G) = (dX^T X - X^T dX) / 2        output side  S = (dY^T Y0 - Y0^T dY) / 2
    gradsvd     G = dY^T X                                       output side  G^T
    activation  X^T X                                            output side  Y0^T Y0

Each is seen only through skinny products, summed over the batches (`sketch/`). Pass 1 accumulates a random sketch (n x k); its
orthonormal basis Q is held for pass 2, which accumulates what S, G or X^T X makes of Q. The small problem is finished in Rust, and a
moment of the same pass turns P into input-PCA order. `passes=1` makes do with a wider sketch. A support that needs no data takes one
forward pass, for its order alone. The sums are linear in the batches: the processes of a `torch.distributed` run add theirs up after
each pass, and saved ones (`sketch/files.py`) add up anywhere. Pass 1 keeps the even and the odd batches apart, which shows
how much of a support is theirs (`sketch/split_half.py`). With a `Budget` layers are calibrated
for twice the rank of an even share, and then given theirs.
Under `side="auto"` both sides of a module are sketched, and the one that captures more is kept (`sides.py`). A pilot's
supports come from a short training in place of sums (`pilot.py`), and are then ordered as those that need no data.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..layer.base_layer import dense_weight
from ..sketch.base import Sketch
from ..sketch.files import write_sketches
from ..sketch.plan import plan_for, sketch_for
from ..support.budget import Budget
from ..support.methods import SIDES
from ..tuner.adapters import adapted_layers, note_sides, owners, require_plain, require_untrained, set_ranks
from ..tuner.config import CALIBRATED_SUPPORTS, GRADIENT_SUPPORTS
from ..tuner.supports import choose_supports
from ..tuner.undo import unchanged_on_failure
from .choose import shared_ranks, unreached_supports
from .memory import Survey, byte_count
from .options import TRIAL, checked_batches, checked_head_steps, checked_options, head_parameters, require_decidable
from .passes import Runner
from .pilot import Pilot, changes_for, checked_pilot
from .processes import Ranks
from .report import CalibrationReport
from .session import calibrating
from .sides import Place, by_module, open_places, stronger

__all__ = ["TRIAL", "calibrate"]


_LOG = logging.getLogger(__name__)


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
        trial = checked_options(
            config, layers, adapter, passes, oversampling, tol, budget, share_by, save_sketches, train_step, offload
        )
        places = open_places(layers, adapter)
        homes = {place: layers[place.module] for place in places}
        changes = {} if pilot is None else changes_for(homes, adapter, pilot, None)
        undecided = [name for name, each in by_module(places).items() if len(each) > 1]
        require_decidable({name: layers[name] for name in undecided}, method, passes, save_sketches)
        if method not in CALIBRATED_SUPPORTS and order == "natural":
            raise ValueError(
                f"support={method!r} with order='natural' takes nothing from data; there is nothing to calibrate"
            )
        batches = checked_batches(dataloader, train_step, max_batches, pilot)
        head = head_parameters(model)
        head_steps = checked_head_steps(head_steps, head, needs_gradient or pilot is not None)
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
                shared = shared_ranks(heard, layers, budget, share_by, energy)
                found = {place: heard[place].support(done, rank) for place, rank in shared.items()}
                given = {place.module: rank for place, rank in shared.items()}
                energies = {place: energy(place, sketch, given[place.module]) for place, sketch in heard.items()}
            supports = {name: found[place] for name, place in stronger(found, energies.__getitem__).items()}
            silent = {name: layer for name, layer in layers.items() if name not in supports}
            supports |= unreached_supports(silent, config, adapter)
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
