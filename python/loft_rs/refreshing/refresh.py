"""Refresh: a new support in the middle of training, at the weight that training has reached. W = W0
R_f R with R_f what earlier refreshes froze (the identity at first) and R = I + P E P^T trained. A
refresh

    freezes     R_f <- R_f R, one factor I + P_f E_f P_f^T: with Q L = [P_f, P] and M as `factor.Frozen` has it, P_f <- Q V and
                E_f <- V^T (L M L^T) V, V the directions that are turned; in float64. Its rank grows
                by at most r, never past the width.
    chooses     P at W_cur = W0 R_f: `calibrate` with its taps before (output side: after) the frozen factor, so that
                S = Skew(W_cur^T G); a support that needs no data is that of W_cur
    restarts    theta = 0, so the function is what it was
    carries     the optimiser's state over (`optimizer_state.py`)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .._checks import retired
from ..calibration.driver import calibrate
from ..calibration.options import checked_batches
from ..calibration.processes import Processes
from ..calibration.report import CalibrationReport
from ..tuner.adapters import adapted_layers, note_frozen_ranks, owners, require_plain
from ..tuner.config import LoftConfig
from ..tuner.supports import choose_supports
from ..tuner.undo import unchanged_on_failure
from .conditions import require_choosable, require_refreshable
from .freeze import change_of_basis, frozen_product, orthonormal
from .optimizer_state import held_moments

__all__ = ["refresh"]


@retired(
    pilot="use LoftConfig(support=loft_rs.Pilot(...))",
    passes="use LoftConfig(support=loft_rs.SkewGrad(passes=...)), GradSVD or Activation alike",
    oversampling="use LoftConfig(support=loft_rs.SkewGrad(oversampling=...)), GradSVD or Activation alike",
    moments="moments are turned into the new basis; give optimizer=None and make it anew to restart",
    fold="use model.merge_and_unload(), and a new adapter on what it gives",
)
def refresh(
    model: nn.Module,
    dataloader: Iterable | None = None,
    *,
    train_step: Callable[[], Any] | None = None,
    max_batches: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    adapter_name: str | None = None,
    memory: int | str | None = None,
    offload: bool = False,
    progress: bool | None = None,
) -> CalibrationReport:
    """Experimental: a new support for an adapter's current weight, to go on from there; the model's
    function stays what it is.

    The trained rotation is kept as a frozen factor of rank r_f, which grows by at most r a refresh
    and never past the layer's width, and is saved with the adapter (P_f (n x r_f) and E_f
    (r_f x r_f), float32). `export_lora` stays exact, at a rank of up to r_f + r.

    Args:
        model: a PEFT model whose only active adapter is the LOFT one, unmerged, not wrapped in DDP,
            not compiled, its LOFT parameters not sharded. Call this between an optimiser's step and
            the next forward pass: gradients of the old transform are dropped.
        dataloader, train_step, max_batches, memory, offload, progress: as of `loft_rs.calibrate`. A
            gradient, activation or pilot support needs one of the first two; `principal`, `random`
            and `coordinate` need neither, and are put in input-PCA order where one is given and
            `LoftConfig.order` is not "natural".
        optimizer: the one that trains the adapter: its moments are turned into the new basis
            (see `optimizer_state.py`), step counts go on; None: left as it is.
        adapter_name: default: the active one.

    Returns the report of the new supports. A refresh that fails leaves model and optimiser as they
    were. ValueError: an adapter without a support (OFT, BOFT, HRA), with magnitudes, in halves,
    with a `Budget`, or with supports from a file, merged, disabled or not alone; an optimiser that
    does not train it or whose state has no such moments; no data where the support needs it; no
    support yet. `loft_rs.NonFiniteError`: NaN or Inf in a transform or in what a layer saw.

    >>> config = LoftConfig(r=4, target_modules=["o_proj"], support="gradsvd")
    >>> model = get_peft_model(load_base(), config)
    >>> report = loft_rs.calibrate(model, batches)
    >>> report = loft_rs.refresh(model, batches)
    """
    started = time.perf_counter()
    require_plain(model, "refresh")
    processes = Processes(next(model.parameters()).device)
    with processes.stage():
        adapter, adapted = adapted_layers(model, adapter_name)
        layers = owners(adapted, adapter)
        config = next(iter(layers.values())).adapters[adapter].config
        require_choosable(adapter, config)
        require_refreshable(adapted, adapter, config, "refresh")
        data = _data(dataloader, train_step, max_batches, config)
        carried = {} if optimizer is None else held_moments(optimizer, layers, adapter)
        frozen = {name: frozen_product(name, layer, adapter) for name, layer in layers.items()}
    frozen = {name: processes.first(factor) for name, factor in frozen.items()}
    bases = {name: orthonormal(layer.adapters[adapter].support) for name, layer in layers.items()}
    with unchanged_on_failure(adapted, adapter):
        with processes.stage(), torch.no_grad():
            for name, layer in layers.items():
                layer.adapters[adapter].set_frozen(frozen[name])
                layer.adapters[adapter].theta.zero_()
            supports = {} if config.needs_calibration else choose_supports(layers, config, adapter)
        report = CalibrationReport(config.method, "natural", 0, None, 0, time.perf_counter() - started, supports)
        if data:
            options: dict[str, Any] = {
                "memory": memory,
                "offload": offload,
                "adapter_name": adapter,
                "progress": progress,
            }
            report = calibrate(model, **data, **options, head_steps=0)
        with processes.stage():
            carried = change_of_basis(carried, layers, adapter, bases)
    note_frozen_ranks(adapted, adapter)
    for name, layer in layers.items():
        layer.adapters[adapter].theta.grad = None
        for key, value in carried.get(name, {}).items():
            assert optimizer is not None
            optimizer.state[layer.adapters[adapter].theta][key].copy_(value)
    return report


def _data(dataloader: Any, train_step: Any, max_batches: int | None, config: LoftConfig) -> dict[str, Any]:
    """The arguments of `calibrate`; none where the support takes nothing from data."""
    if dataloader is None and train_step is None:
        if config.needs_calibration:
            raise ValueError(f"support={config.method!r} comes from data: give refresh a dataloader or a train_step")
        return {}
    batches = checked_batches(dataloader, train_step, max_batches, config.options if config.method == "pilot" else None)
    if not config.needs_calibration and config.order == "natural":
        return {}
    return {"train_step": train_step} if batches is None else {"dataloader": batches, "max_batches": len(batches)}
