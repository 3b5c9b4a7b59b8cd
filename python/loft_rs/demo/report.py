"""The demo's table, its JSON, and held-out queries answered before and after."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

from .data import Pair
from .train import Answers

EXAMPLES = 4
NONE = "-"


@dataclass(frozen=True)
class Row:
    """One method's measurements; None where a column does not apply."""

    method: str
    recall_at_1: float
    mrr: float
    trained: int = 0
    seconds_per_step: float | None = None
    calibration_seconds: float | None = None
    orthogonality_error: float | None = None
    reload_difference: float | None = None
    lora_export_difference: float | None = None
    learning_rate: float | None = None


COLUMNS = {
    "method": ("method", "{}"),
    "recall@1": ("recall_at_1", "{:.3f}"),
    "MRR": ("mrr", "{:.3f}"),
    "trained": ("trained", "{:,}"),
    "s/step": ("seconds_per_step", "{:.2f}"),
    "calibration s": ("calibration_seconds", "{:.1f}"),
    "orthogonality error": ("orthogonality_error", "{:.1e}"),
    "reload difference": ("reload_difference", "{:.1e}"),
    "LoRA export difference": ("lora_export_difference", "{:.1e}"),
}


def _cells(row: Row) -> list[str]:
    values = [(getattr(row, field), form) for field, form in COLUMNS.values()]
    return [NONE if value is None else "0" if value == 0 else form.format(value) for value, form in values]


def _pad(cells: list[str], widths: list[int]) -> list[str]:
    """The first column to the left, figures to the right."""
    return [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]


def table(rows: list[Row]) -> str:
    """The rows as an aligned Markdown table."""
    lines = [list(COLUMNS), *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    aligned = [f"| {' | '.join(_pad(line, widths))} |" for line in lines]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if not column else ":") for column, width in enumerate(widths)) + "|"
    return "\n".join([aligned[0], rule, *aligned[1:]])


def examples(held_out: list[Pair], before: Answers, after: Answers, label: str) -> str:
    """How many answers became right and wrong, and a few of them (one that became wrong, if there is one)."""
    right_before, right_after = before.ranks == 1, after.ranks == 1
    better = (right_after & ~right_before).nonzero().flatten().tolist()
    worse = (right_before & ~right_after).nonzero().flatten().tolist()
    shown = better[: EXAMPLES - bool(worse)] + worse[:1]
    counts = f"{len(better)} became right with {label} and {len(worse)} became wrong"
    head = f"Of {len(held_out)} held-out queries, {counts}. Some of them:"
    return "\n\n".join([head, *(_example(held_out, before, after, index) for index in shown)])


def _example(held_out: list[Pair], before: Answers, after: Answers, index: int) -> str:
    def line(title: str, answers: Answers) -> str:
        mark = (
            "right" if answers.ranks[index] == 1 else f"wrong, its own passage is at place {int(answers.ranks[index])}"
        )
        return f"  {title} ({mark}): {textwrap.shorten(held_out[answers.best[index]].passage, 110)}"

    return "\n".join([f"? {held_out[index].query}", line("before", before), line("after ", after)])


def write(folder: Path, rows: list[Row], facts: dict, shown: str) -> None:
    """results.json and table.md."""
    results = {**facts, "rows": [asdict(row) for row in rows]}
    (folder / "results.json").write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(f"{table(rows)}\n\n```\n{shown}\n```\n", encoding="utf-8")
