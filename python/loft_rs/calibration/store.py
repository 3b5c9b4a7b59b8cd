"""What a calibration found, put into the adapter: all of it or nothing."""

from __future__ import annotations

import torch

from ..tuner.adapters import note_sides, set_ranks
from ..tuner.undo import unchanged_on_failure
from .choose import Chosen
from .options import Job

__all__ = ["store"]


def store(job: Job, chosen: Chosen) -> None:
    """Ranks, sides and supports. A layer that no batch reached keeps the support it has."""
    with unchanged_on_failure(job.adapted, job.adapter), job.processes.stage():
        if job.budget is not None:
            ranks = {name: support.rank for name, support in chosen.supports.items()}
            set_ranks(job.adapted, job.adapter, ranks)
        adapters = {name: layer.adapters[job.adapter] for name, layer in job.layers.items()}
        for name, adapter in adapters.items():
            adapter.set_side(chosen.supports[name].side)
        note_sides(job.adapted, job.adapter)
        for name, adapter in adapters.items():
            if not (name in chosen.unreached and adapter.ready):
                adapter.set_basis(chosen.supports[name].basis, chosen.supports[name].energy)
        for name, theta in (chosen.starts.thetas if chosen.starts else {}).items():
            with torch.no_grad():
                adapters[name].theta.copy_(theta)
