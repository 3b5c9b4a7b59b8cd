"""The protocol, as functions of the lines written so far: which runs are due, which rate a method
has earned, and paired intervals.

A *cell* is one method on one task. It is tried at TRIALS rates, TUNE_SEEDS seeds each, on a split
that does not score; where the best rate is the grid's first or last, the next one beyond is tried
too, at most EXTENSIONS times, alike for every method. Then SEEDS runs with that rate are scored. A
seed fixes the head, the order of the batches and the calibration batches, for all methods alike:
they are paired.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

EXTENSIONS = 2
TUNE_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)
# 97.5 % quantiles of Student's t, by degrees of freedom.
STUDENT = (math.nan, 12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
           2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """One run. `rate`: the optimiser's learning rate. `phase`: "tune" or "score"; lines also have
    "trial", of prototypes that have left the bench, and "untrained" (`untrained.py`)."""

    task: str
    method: str
    phase: str
    rate: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Cell:
    """A method on a task, with its first rates (ascending) and the factor between them. `rate_of`:
    the method whose rate it takes.
    """

    task: str
    method: str
    rates: tuple[float, ...]
    factor: float
    steps: int
    rate_of: str | None = None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that may end in the middle of one; none where there is no file."""
    if not path.is_file():
        return []
    text = path.read_text().split("\n")
    return [json.loads(line) for line in text[:-1] if line]  # what follows the last newline was cut off


def to_line(found: dict[str, Any]) -> str:
    """A line of such a file, floats to seven digits."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: short(each) for name, each in value.items()}
        if isinstance(value, list):
            return [short(each) for each in value]
        return float(f"{value:.7g}") if isinstance(value, float) else value

    return json.dumps(short(found), separators=(",", ":")) + "\n"


def key(line: dict[str, Any] | Spec) -> tuple:
    held = asdict(line) if isinstance(line, Spec) else line
    return held["task"], held["method"], held["phase"], f"{held['rate']:.6g}", held["seed"], held["steps"]


def scores(lines: Iterable[dict[str, Any]]) -> list[float]:
    """Scores, minus infinity for a run that diverged or failed."""
    return [-math.inf if line.get("score") is None else line["score"] for line in lines]


def tried(lines: Iterable[dict[str, Any]], cell: Cell) -> dict[float, list[float]]:
    """Rate -> the tuning scores so far."""
    found = defaultdict(list)
    for line in lines:
        if (line["task"], line["method"], line["phase"], line["steps"]) == (cell.task, cell.method, "tune", cell.steps):
            found[float(f"{line['rate']:.6g}")] += scores([line])
    return dict(found)


def rates(found: dict[float, list[float]], cell: Cell) -> list[float]:
    """The rates to try, ascending: the first ones, and those beyond an edge that won."""
    ladder = [float(f"{rate:.6g}") for rate in cell.rates]
    for _ in range(EXTENSIONS):
        if not _complete(found, ladder):
            break
        best = _best(found, ladder)
        if best == ladder[-1]:
            ladder.append(float(f"{best * cell.factor:.6g}"))
        elif best == ladder[0]:
            ladder.insert(0, float(f"{best / cell.factor:.6g}"))
    return ladder


def _complete(found: dict[float, list[float]], ladder: Sequence[float]) -> bool:
    return all(len(found.get(rate, ())) >= len(TUNE_SEEDS) for rate in ladder)


def _best(found: dict[float, list[float]], ladder: Sequence[float]) -> float:
    """The rate with the best mean; of equals the lowest."""
    return max(ladder, key=lambda rate: (mean(found[rate]), -rate))


def tuned_rate(lines: Iterable[dict[str, Any]], cell: Cell) -> float | None:
    """The rate that the tuning split chose; None while trials are missing."""
    found = tried(lines, cell)
    ladder = rates(found, cell)
    return _best(found, ladder) if _complete(found, ladder) else None


def due(lines: list[dict[str, Any]], cells: Sequence[Cell]) -> list[Spec]:
    """The runs that can start now and are not written yet, those that score first, so that cells
    become complete.
    """
    done = {key(line) for line in lines}
    by_cell = defaultdict(list)
    for line in lines:
        by_cell[line["task"], line["method"]].append(line)
    trials, scored = [], []
    for cell in cells:
        mine = by_cell[cell.task, cell.method]
        source = (
            cell if cell.rate_of is None else next(c for c in cells if (c.task, c.method) == (cell.task, cell.rate_of))
        )
        if cell.rate_of is None:
            ladder = rates(tried(mine, cell), cell)
            trials += [
                Spec(cell.task, cell.method, "tune", rate, seed, cell.steps) for seed in TUNE_SEEDS for rate in ladder
            ]
        rate = tuned_rate(by_cell[source.task, source.method], source)
        if rate is not None:
            scored += [Spec(cell.task, cell.method, "score", rate, seed, cell.steps) for seed in SEEDS]
    return [spec for spec in scored + trials if key(spec) not in done]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t; the width is NaN for fewer than
    two values.
    """
    if len(values) < 2:
        return (mean(values) if values else math.nan), math.nan
    return mean(values), STUDENT[len(values) - 1] * stdev(values) / math.sqrt(len(values))


def paired(a: dict[int, float], b: dict[int, float]) -> tuple[float, float, int]:
    """Mean of a - b over the seeds that both have, half its 95 % interval, and their number."""
    shared = sorted(a.keys() & b.keys())
    return (*interval([a[seed] - b[seed] for seed in shared]), len(shared))
