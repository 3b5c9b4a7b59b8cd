"""What the tuning runs say of learning rates: the loss at a rate beside the best one, and at one
rate for all tasks.

A trial is the mean score of a method on a task's tuning split at one rate; its loss is the best
trial's score less its own. Rates of LOFT and PSOFT are lr * r, the others' lr. Neighbours are a
factor of 2.5 apart. The best rate is chosen on the lines that judge it, two seeds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import mean, median

from report import Lines
from tasks import TASKS

FACTOR = 2.5
FALL = 0.1  # a loss of more than that, one step above the best rate, is a fall
# name on the pages -> (methods in the runs, the rate is lr * r)
METHODS = {
    "LOFT principal": (("LOFT principal", "LOFT principal r46"), True),
    "LOFT pilot": (("LOFT pilot", "LOFT pilot r46"), True),
    "LOFT pilot, halves": (("LOFT halves", "LOFT halves r64"), True),
    "LOFT gradsvd": (("LOFT gradsvd", "LOFT gradsvd r46"), True),
    "LOFT skewgrad": (("LOFT skewgrad", "LOFT skewgrad r46"), True),
    "PSOFT": (("PSOFT",), True),
    "OFT, blocks of 4": (("OFT b4",), False),
    "LoRA r=1": (("LoRA r1",), False),
    "LoRA r=8": (("LoRA r8",), False),
    "full fine-tuning": (("full fine-tuning",), False),
}
_ANCHORS = {True: 0.15, False: 0.0025}  # rates of one step of the grid fall into one bin around these
Trials = dict[str, dict[float, float]]  # task -> rate -> mean score


@dataclass(frozen=True)
class OneRate:
    """One rate for all tasks: the median of the rates tried in this step of the grid, and the mean
    loss.
    """

    rate: float
    loss: float


def trials(lines: Lines, name: str) -> Trials:
    methods, times_rank = METHODS[name]
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        own = line["task"] in TASKS and line["steps"] == TASKS[line["task"]].steps
        if own and line["phase"] == "tune" and line["method"] in methods:
            rate = line["rate"] * (line["rank"] if times_rank else 1)
            found[line["task"]][float(f"{rate:.3g}")].append(-math.inf if line["score"] is None else line["score"])
    return {task: {rate: mean(scores) for rate, scores in sorted(grid.items())} for task, grid in found.items()}


def best(grid: dict[float, float]) -> float:
    """The best rate; of equals the lowest."""
    return max(grid, key=lambda rate: (grid[rate], -rate))


def beside(found: Trials) -> tuple[float, float]:
    """Mean and median loss of standing one step beside the best rate; runs that diverged are left
    out.
    """
    losses = []
    for grid in found.values():
        rates, at = list(grid), list(grid).index(best(grid))
        losses += [grid[rates[at]] - grid[rates[i]] for i in (at - 1, at + 1) if 0 <= i < len(rates)]
    finite = [loss for loss in losses if math.isfinite(loss)]
    return mean(finite), median(losses)


def falls(found: Trials) -> tuple[int, int, float]:
    """(tasks on which one step above the best rate costs more than FALL, tasks with such a trial,
    the median loss).
    """
    losses = []
    for grid in found.values():
        rates, at = list(grid), list(grid).index(best(grid))
        if at + 1 < len(rates):
            losses.append(grid[rates[at]] - grid[rates[at + 1]])
    return sum(loss > FALL for loss in losses), len(losses), median(losses)


def one_rate(found: Trials, name: str) -> list[OneRate]:
    """The steps of the grid that every task has a trial in, the least mean loss first."""
    anchor = _ANCHORS[METHODS[name][1]]
    bins: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for grid in found.values():
        for rate, score in grid.items():
            bins[round(math.log(rate / anchor, FACTOR))].append((rate, grid[best(grid)] - score))
    whole = [mine for mine in bins.values() if len(mine) == len(found)]
    return sorted(
        (OneRate(median(r for r, _ in mine), mean(e for _, e in mine)) for mine in whole), key=lambda each: each.loss
    )
