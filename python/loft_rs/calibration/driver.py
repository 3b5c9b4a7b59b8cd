"""Calibration: supports from a task's own batches, without one weight gradient.

With X a layer's input, dX its own input gradient, Y0 its output without bias and dY that output's
gradient,

    skewgrad    S = Skew(W0^T G) = (dX^T X - X^T dX) / 2        output side  S = (dY^T Y0 - Y0^T dY) / 2
    gradsvd     G = dY^T X                                       output side  G^T
    activation  X^T X                                            output side  Y0^T Y0

Each is seen only through skinny products, summed over the batches (`sketch/`). Pass 1 accumulates a
random sketch (n x k); its orthonormal basis Q is held for pass 2, which accumulates what S, G or
X^T X makes of Q. The small problem is finished in Rust, and a moment of the same pass turns P into
input-PCA order. A single pass (`SkewGrad(passes=1)`) makes do with a wider sketch. A support that
needs no data takes one forward pass, for its order alone. The sums are linear in the batches: the
processes of a `torch.distributed` run add theirs up after each pass, and saved ones
(`sketch/files.py`) add up anywhere. Pass 1 keeps the even and the odd batches apart, which shows
how much of a support is theirs (`sketch/split_half.py`). With a `Budget` layers are calibrated for
twice the rank of an even share, and then given theirs. Under `side="auto"` both sides of a module
are sketched, and the one that captures more is kept (`sides.py`). A pilot's supports come from a
short training in place of sums (`pilot.py`), and are then ordered as those that need no data.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .._checks import retired
from .._files import check_writable
from ..sketch.base import Sketch
from ..sketch.files import write_sketches
from ..support.methods import SIDES
from .choose import choose, groups_of, plans_of, run_groups
from .options import checked_job
from .passes import Passes
from .processes import Processes
from .report import CalibrationReport
from .session import calibrating
from .sides import ModuleSide
from .store import store

__all__ = ["calibrate", "save_sketches"]


@retired(
    pilot="use LoftConfig(support=loft_rs.Pilot(...))",
    passes="use LoftConfig(support=loft_rs.SkewGrad(passes=...)), GradSVD or Activation alike",
    oversampling="use LoftConfig(support=loft_rs.SkewGrad(oversampling=...)), GradSVD or Activation alike",
    budget="use LoftConfig(r=loft_rs.Budget(...))",
    save_sketches="use loft_rs.save_sketches(model, dataloader, path)",
    tol="use max_batches; the report's evidence says how many batches are needed",
    share_by="a budget is shared out by captured energy",
)
def calibrate(
    model: nn.Module,
    dataloader: Iterable | None = None,
    *,
    train_step: Callable[[], Any] | None = None,
    max_batches: int | None = None,
    adapter_name: str | None = None,
    head_steps: int | None = None,
    memory: int | str | None = None,
    offload: bool = False,
    progress: bool | None = None,
) -> CalibrationReport:
    """Choose and store the supports of an untrained LOFT adapter from a task's batches, then order
    them (`LoftConfig.order`).

    Under `LoftConfig(side="auto")` the side of every module that has none yet is chosen too
    (`sides.py`) and noted in the config's `side_pattern`: both sides are sketched, at the memory
    and the products of both. gradsvd then needs two passes and dense weights.

    Args:
        model: a PEFT model with a LOFT adapter, on any device and of any base, not wrapped in DDP
            and not compiled; FSDP2 (`fully_shard`) and gradient checkpointing stay as they are.
        dataloader: batches as the model takes them: a mapping gives `model(**batch)`, a list or
            tuple `model(*batch)`. Gradient supports and pilots need `.loss` in the output, so the
            batches must carry labels. The first `max_batches` are kept and used in every pass. The
            loss is scaled, so that float16 gradients do not vanish.
        train_step: instead of a dataloader, a function of no arguments called once a pass (and once
            a head or pilot step) that runs forward and `backward()` over the calibration batches,
            the same ones each time; no optimiser step. Where gradients are float16 it should scale
            its loss: supports and energies do not depend on the scale, only `Support.values` do.
        max_batches: how many batches of the dataloader to use. None: 8, or as many as the pilot has
            steps, which are used in turn, and again where they are fewer.
        adapter_name: default: the active one.
        head_steps: optimiser steps that warm up the `modules_to_save` of a fresh head first, and
            are kept, since step-0 gradients through a random head say little. None: 20 for a
            gradient support or a pilot where the adapter has such modules, else 0.
        memory: the most bytes, or a string as "512MiB", that this may take on the model's device
            above the frozen training step. Layers are then calibrated in groups, each over the same
            batches again, with the same result up to what a backward pass on a GPU does not repeat
            to the bit. None: all layers at once. With a train_step only the sketches count, since
            nothing is known of its batches. What it takes is in the report (`memory`), and logged
            before the first pass. A pilot trains all layers at once.
        offload: hold the sketches on the CPU between batches. Not for a pilot.
        progress: show a progress bar; None: on a terminal only.

    In a `torch.distributed` run every process calls this with its own share of the batches, and all
    get the supports, and the warmed-up head, that one process with all the batches would get
    (rank 0's, bit for bit); an error in one raises in all. Under FSDP2 every process must have
    equally many batches. DeepSpeed ZeRO-3, FSDP1: calibrate before they take the model.

    Dropout is off, gradients of parameters are left as they were, no base parameter is ever asked
    for one. A layer that no batch reaches keeps the support it has, or gets a random one, with a
    warning. TypeError or ValueError for a bad argument, a trained adapter, batches without loss or
    gradient, or a layer, or a pilot, that alone needs more than `memory`; `loft_rs.NonFiniteError`
    names the batch and the layer that saw NaN or Inf. The adapter and the head are changed only
    once everything has succeeded.

    >>> config = LoftConfig(r=4, target_modules="all-linear", support="gradsvd")
    >>> model = get_peft_model(load_base(), config)
    >>> loft_rs.calibrate(model, batches)
    CalibrationReport(gradsvd, 14 layers, energy ...)
    """
    started = time.perf_counter()
    job = checked_job(
        model,
        dataloader,
        train_step=train_step,
        max_batches=max_batches,
        adapter_name=adapter_name,
        head_steps=head_steps,
        memory=memory,
        offload=offload,
        progress=progress,
    )
    with calibrating(job.model, job.adapted, job.head):
        chosen = choose(job)
    store(job, chosen)
    sides = {name: {side: chosen.energies.get(ModuleSide(name, side), 0.0) for side in SIDES} for name in job.undecided}
    kept = {p.module: each for p, each in chosen.evidence.items() if p.side == chosen.supports[p.module].side}
    return CalibrationReport(
        job.method,
        job.order,
        chosen.passes,
        chosen.batches,
        job.head_steps,
        time.perf_counter() - started,
        chosen.supports,
        kept,
        chosen.memory,
        sides,
        job.pilot,
        chosen.starts,
    )


def save_sketches(
    model: nn.Module,
    dataloader: Iterable | None,
    path: str | os.PathLike,
    *,
    train_step: Callable[[], Any] | None = None,
    max_batches: int | None = None,
    adapter_name: str | None = None,
    memory: int | str | None = None,
    offload: bool = False,
    progress: bool | None = None,
) -> None:
    """Sum the sketches of one pass over these batches into a file; the model stays as it is.

    `loft_rs.supports_from_sketches` computes the supports, also of several files together: those of
    one `calibrate` with a single pass over all their batches, to rounding. Under `r=Budget(...)`
    they are of the wider ranks that a budget is shared out from.

    Args:
        path: the file, written whole.
        dataloader, train_step, max_batches, adapter_name, memory, offload, progress: as of
            `calibrate`.

    ValueError for a support that is not sketched (skewgrad, gradsvd and activation are), an open
    side, and what `calibrate` refuses. OSError where the file cannot be written.

    >>> loft_rs.save_sketches(model, monday, "monday.safetensors")          # doctest: +SKIP
    >>> loft_rs.supports_from_sketches("monday.safetensors", "tuesday.safetensors")     # doctest: +SKIP
    """
    with Processes(next(model.parameters()).device).stage():
        check_writable(path)
    job = checked_job(
        model,
        dataloader,
        train_step=train_step,
        max_batches=max_batches,
        adapter_name=adapter_name,
        head_steps=0,
        memory=memory,
        offload=offload,
        progress=progress,
        caller="save_sketches",
    )
    sums: dict[str, Sketch] = {}

    def finished(sketches: dict[ModuleSide, Sketch], passes: int) -> None:
        with job.processes.stage():
            for place, sketch in sketches.items():
                sketch.to_cpu()
                sums[place.module] = sketch

    with calibrating(job.model, job.adapted, []):
        run = Passes(job)
        plans = plans_of(job, run)
        groups, _ = groups_of(job, run, plans)
        run_groups(job, run, plans, groups, finished, {})
        names = {id(layer): name for name, layer in job.adapted.items()}
        tied = {n: [names[id(x)] for x in job.layers[n].adapters[job.adapter].tied_layers] for n in sums}
        with job.processes.stage():
            if job.processes.rank == 0:
                write_sketches(path, sums, tied)
