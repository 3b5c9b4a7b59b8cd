"""`CalibrationReport`: what `calibrate` did. What it says of that, `summary.py` puts into words."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from ..plots import as_page, finish
from ..sketch.split_half import SplitHalf
from ..support.methods import Pilot
from ..support.support import Support
from .memory import Footprint
from .start import Starts
from .summary import figure, rows_of, short, summary, table

__all__ = ["CalibrationReport"]


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` did. `print(report)`: a summary with advice; `report.table()`: every layer;
    `report.rows()`: the same as dicts.

    supports: module name -> the `Support` stored there (energy with its standard error, values,
        order)
    evidence: module name -> `SplitHalf`, how far that support is the task's and not these batches';
        of chosen supports only
    memory: the bytes it was to take above the frozen training step, as it was known before it
        started
    sides: of modules whose side was open (`side="auto"`), module name -> {side: ||P^T S P||_F^2},
        what decided it (`sides.py`); the chosen one is that of the support in `supports`
    pilot: the short training that the supports come from (`support="pilot"`); its steps are not
        counted in `passes`
    start: where training starts after a kept pilot: `scale`, and `made`, module name -> the part of
        the pilot's change that is made
    """

    method: str
    order: str
    passes: int
    batches: int | None  # of all processes
    head_steps: int
    seconds: float
    supports: dict[str, Support] = field(repr=False)
    evidence: dict[str, SplitHalf] = field(default_factory=dict, repr=False)
    memory: Footprint | None = None
    sides: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)
    pilot: Pilot | None = None
    start: Starts | None = None

    def __str__(self) -> str:
        """A summary with advice, and the layers by kind and depth; `table()` has all of them."""
        return summary(self)

    def __repr__(self) -> str:
        return short(self)

    def table(self) -> str:
        """One line for every layer, in at most 100 columns."""
        return table(self)

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """The matplotlib figure: energy, agreement, what is reproducible and differing ranks by
        depth and kind of module, the supports' values, and the layers that capture the least.

        path: also written there, .png or .svg. ModuleNotFoundError without matplotlib.
        """
        return finish(lambda: figure(self), path)

    def _repr_html_(self) -> str:
        return as_page(str(self), self.plot, self.table())

    def rows(self) -> list[dict[str, Any]]:
        """One dict for every layer, as `pandas.DataFrame(report.rows())` takes them; nan where
        nothing is known."""
        return rows_of(self)
