"""Comparisons over tasks, paired by seed: the mean over a family's tasks within every seed, of
scores or of what was traced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean

from protocol import interval, paired
from report import Lines, Row, rows_of

# What a family is called on the pages -> its tasks
FAMILIES = {
    "mathematics": ("gsm8k", "asdiv", "mawps"),
    "languages": ("sib200",),
    "images": ("gtsrb", "emnist_letters", "flowers17", "blood_cells"),
    "sentences": ("mrpc", "sst2", "cola", "mrpc_mpnet", "rte_mpnet"),
}
MINILM = ("mrpc", "sst2", "cola")
TITLES = {
    "gsm8k": "GSM8K", "asdiv": "ASDiv", "mawps": "MAWPS", "sib200": "SIB-200", "gtsrb": "GTSRB", "emnist_letters": "EMNIST letters",
    "flowers17": "Flowers-17", "blood_cells": "blood cells", "mrpc": "MRPC, MiniLM", "sst2": "SST-2", "cola": "CoLA",
    "mrpc_mpnet": "MRPC, mpnet", "rte_mpnet": "RTE",
}  # fmt: skip
SUPPORTS = ("LOFT principal", "LOFT pilot", "LOFT halves", "LOFT gradsvd", "LOFT skewgrad")
RANKED = ("", " r46", " r64")  # what a method is called where its rank was given
Difference = tuple[float, float, int]  # value, half its interval, tasks


class Scores:
    """The scored rows, by task and method."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.held: dict[str, dict[str, Row]] = defaultdict(dict)
        for row in rows_of(lines):
            self.held[row.task][row.method] = row

    def row(self, task: str, name: str) -> Row | None:
        return next((self.held[task][name + end] for end in RANKED if name + end in self.held[task]), None)

    def shared(self, tasks: Sequence[str], *names: str) -> list[str]:
        """The tasks on which every one of the methods was scored by more than one seed."""
        return [t for t in tasks if all((row := self.row(t, name)) and len(row.scores) > 1 for name in names)]

    def difference(self, tasks: Sequence[str], name: str, other: str) -> Difference | None:
        """name minus other, the mean over the tasks that both have; None where they share none."""
        mine = self.shared(tasks, name, other)
        if not mine:
            return None
        pairs = [(self.row(task, name).scores, self.row(task, other).scores) for task in mine]
        return over_tasks(pairs, len(mine))

    def value(self, tasks: Sequence[str], name: str) -> tuple[float, float] | None:
        """The mean score over the tasks, and half its interval over seeds; None where one is
        missing.
        """
        if len(self.shared(tasks, name)) < len(tasks):
            return None
        found = [self.row(task, name).scores for task in tasks]
        seeds = set.intersection(*(set(each) for each in found))
        return interval([mean(each[seed] for each in found) for seed in sorted(seeds)])

    def best(self, tasks: Sequence[str], names: Sequence[str] = SUPPORTS) -> str:
        """The method with the best mean over the tasks, of those scored on all of them."""
        return max((name for name in names if self.value(tasks, name)), key=lambda name: self.value(tasks, name)[0])

    def traced(self, task: str, field: str) -> dict[str, dict[int, float]]:
        """Method -> seed -> what a scored run has beside its score: `exact`, in percent, or
        `outside`, the last trace's NLL.
        """
        found: dict[str, dict[int, float]] = defaultdict(dict)
        for line in self.lines:
            if line["task"] != task or line["phase"] != "score" or line.get("score") is None:
                continue
            if field == "exact" and line.get("exact") is not None:
                found[line["method"]][line["seed"]] = 100 * line["exact"]
            elif field == "outside" and line.get("trace"):
                found[line["method"]][line["seed"]] = line["trace"][-1]["outside"]
        return dict(found)


def over_tasks(pairs: Sequence[tuple[dict[int, float], dict[int, float]]], tasks: int) -> Difference:
    """The mean of a - b over the pairs within every seed that all of them have."""
    seeds = set.intersection(*(a.keys() & b.keys() for a, b in pairs))
    within = {seed: mean(a[seed] - b[seed] for a, b in pairs) for seed in seeds}
    value, half, _ = paired(within, dict.fromkeys(within, 0.0))
    return value, half, tasks
