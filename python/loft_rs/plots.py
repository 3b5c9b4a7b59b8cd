"""Pictures of an adapter: captured energy, angles and orthogonality error of every module, as one PNG."""

from __future__ import annotations

import os

import numpy as np

from ._files import whole_file
from .inspection import ModuleReport


def plot_adapter(reports: list[ModuleReport], path: str | os.PathLike, title: str = "") -> None:
    """Write the picture to `path`, whole or not at all. Needs matplotlib: pip install 'loft_rs[plot]'."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    labels = short_names([each.name for each in reports])
    figure = Figure(figsize=(11, max(3.0, 0.22 * len(reports) + 1.8)), layout="constrained")
    energy, angles, error = figure.subplots(1, 3, sharey=True)
    rows = np.arange(len(reports))
    energy.barh(rows, [0 if np.isnan(each.energy) else each.energy for each in reports], color="#4477aa")
    energy.set(title="captured energy", xlim=(0, 1), yticks=rows)
    energy.set_yticklabels(labels, fontsize=7)
    energy.set_ylim(len(reports) - 0.4, -0.6)
    for row, each in enumerate(reports):
        if np.isnan(each.energy):
            energy.text(0.02, row, "unknown", va="center", fontsize=6)
        angles.plot(each.angles, np.full(each.angles.size, row), "|", color="#cc6677", markersize=6)
    angles.set(title="angles of the turned planes, degrees", xlim=(0, None))
    errors = np.maximum([each.orthogonality_error for each in reports], 1e-17)
    error.plot(errors, rows, "o", color="#228833", markersize=4)
    decades = (10 ** np.floor(np.log10(errors.min())), 10 ** np.floor(np.log10(errors.max()) + 1))
    error.set(title="orthogonality error ||RᵀR − I||₂", xscale="log", xlim=decades)
    error.xaxis.set_minor_formatter(NullFormatter())
    for axis in (energy, angles, error):
        axis.grid(axis="x", alpha=0.3)
    if title:
        figure.suptitle(title)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=120)


def short_names(names: list[str]) -> list[str]:
    """Names without the dotted beginning that all of them share."""
    if len(names) < 2:
        return names
    split = [name.split(".") for name in names]
    shared = 0
    while all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    return [".".join(parts[shared:]) for parts in split]
