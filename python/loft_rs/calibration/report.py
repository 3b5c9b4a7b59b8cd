"""`CalibrationReport`: what `calibrate` did, and its table."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..sketch.split_half import SplitHalf
from ..support.methods import SIDES, Pilot
from ..support.support import Support
from .memory import Footprint
from .start import Starts

__all__ = ["DOMINATED", "CalibrationReport"]

# Halves of batches that are alike rarely have as much: at 2, 4 and 8 batches 7, 3 and 0 % (bench/CALIBRATION.md).
DOMINATED = 0.9


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` did.

    supports: module name -> the `Support` stored there (energy with its standard error, values, order)
    evidence: module name -> `SplitHalf`, how far that support is the task's and not these batches'; of chosen supports only
    memory: the bytes it was to take above the frozen training step, as it was known before it started
    sides: of modules whose side was open (`side="auto"`), module name -> {side: ||P^T S P||_F^2}, what decided it (`sides.py`); the
        chosen one is that of the support in `supports`
    pilot: the short training that the supports come from (`support="pilot"`); its steps are not counted in `passes`
    start: where training starts after a kept pilot: `scale`, and `made`, module name -> the part of the pilot's change that is made
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
        batches = f", {self.batches} batches" if self.batches is not None else ""
        head = f", head warmed up for {self.head_steps} steps" if self.head_steps else ""
        pilot = f" of {self.pilot.steps} steps" if self.pilot else ""
        lines = [
            f"{self.method}{pilot}, {self.order} order: {len(self.supports)} layers, {self.passes} passes{batches}{head}, "
            f"{self.seconds:.1f} s",
            f"{'layer':<48} {'rank':>5} {'energy':>8} {'+-':>7}"
            + f" {'side':>7} {'on input':>9} {'on output':>9}" * bool(self.sides)
            + f" {'agreement':>10} {'reproducible':>13} {'for .9':>7}" * bool(self.evidence),
        ]
        if self.start is not None and self.start.made:
            made = np.mean(list(self.start.made.values()))
            lines[0] += f"; starts at {self.start.scale:g} times the nearest rotation, {made:.2f} of the pilot's change"
        if self.memory is not None:
            lines.insert(1, f"memory: {self.memory}")
        for name, s in self.supports.items():
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
