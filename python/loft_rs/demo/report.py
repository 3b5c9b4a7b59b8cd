"""What the demo tells: its tables, held-out queries answered before and after, what to do next; its
JSON, and the README of an adapter.
"""

from __future__ import annotations

import json
import math
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
    rank: int = 0
    steps: str | None = None
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
    "rate": ("learning_rate", "{:g}"),
    "steps": ("steps", "{}"),
    "s/step": ("seconds_per_step", "{:.2f}"),
    "calibration s": ("calibration_seconds", "{:.1f}"),
}
CHECKS = {
    "method": ("method", "{}"),
    "T from orthogonal": ("orthogonality_error", "{:.1e}"),
    "reloaded": ("reload_difference", "{:.1e}"),
    "as LoRA, in stock PEFT": ("lora_export_difference", "{:.1e}"),
}


def cells(row: Row, columns: dict[str, tuple[str, str]]) -> list[str]:
    """A row's values as they are printed."""
    values = [(getattr(row, field), form) for field, form in columns.values()]
    return [NONE if value is None else "0" if value == 0 else form.format(value) for value, form in values]


def _pad(cells: list[str], widths: list[int]) -> list[str]:
    """The first column to the left, figures to the right."""
    return [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]


def table(rows: list[Row]) -> str:
    """The scores, as an aligned Markdown table."""
    return _aligned(rows, COLUMNS)


def checks(rows: list[Row]) -> str:
    """What is exact: largest differences of the last hidden state, as an aligned Markdown table."""
    return _aligned([row for row in rows if row.reload_difference is not None], CHECKS)


def _aligned(rows: list[Row], columns: dict[str, tuple[str, str]]) -> str:
    lines = [list(columns), *(cells(row, columns) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    aligned = [f"| {' | '.join(_pad(line, widths))} |" for line in lines]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if not column else ":") for column, width in enumerate(widths)) + "|"
    return "\n".join([aligned[0], rule, *aligned[1:]])


def verdict(rows: list[Row], queries: int) -> str:
    """What the first LOFT row gained, for how many trained numbers and how long a step, beside
    LoRA. pilot_steps: on top.
    """
    before, loft = rows[:2]
    lora = next(row for row in rows if "LoRA" in row.method)
    share = 100 * loft.trained / lora.trained
    chance = math.sqrt(max(loft.recall_at_1 * (1 - loft.recall_at_1), 1e-9) / queries)
    lines = [
        f"{loft.method}: recall@1 {before.recall_at_1:.3f} -> {loft.recall_at_1:.3f}, {loft.recall_at_1 - before.recall_at_1:+.3f}",
        f"{lora.method}: recall@1 {before.recall_at_1:.3f} -> {lora.recall_at_1:.3f}, {lora.recall_at_1 - before.recall_at_1:+.3f}",
        f"LOFT trained {share:.0f} % of LoRA's numbers. One seed and {queries} queries: a recall has a standard error of {chance:.3f}.",
    ]
    if loft.seconds_per_step and lora.seconds_per_step:
        lines.append(f"A step of LOFT took {loft.seconds_per_step / lora.seconds_per_step:.2f} of LoRA's.")
    if loft.steps and "+" in loft.steps:
        lines.append("Both had as many steps in all: those of the pilot, a short low-rank training, count among them.")
    return "\n".join(lines)


def next_steps(out: Path, support: str, base: Path, rank: int) -> str:
    """Commands for what to do next, which run as they stand."""
    lines = {
        "the same on your own pairs": "loft-rs demo --data pairs.csv",
        "see what was turned": f"loft-rs inspect {out / support} --plot angles.png",
        "merge it into the model": f"loft-rs merge {out / support} --base {base} --out merged",
        "serve it as a LoRA": f"vllm serve ... --enable-lora --max-lora-rank {rank} --lora-modules mine={out / f'{support}-as-lora'}",
        "write your own training": "docs/start.md, in ten minutes",
    }
    return "\n".join(["What to do next:", *(f"  {what + ':':<28} {how}" for what, how in lines.items())])


def card(row: Row, base: Path) -> str:
    """The README of an adapter's folder."""
    how = "\n".join(
        [
            "```python",
            *(["import loft_rs  # makes PEFT know LOFT"] if row.method.startswith("LOFT") else []),
            "from peft import PeftModel",
            "from transformers import AutoModel",
            "",
            f'model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), "THIS FOLDER").eval()',
            "```",
        ]
    )
    return f"""---
library_name: peft
base_model: {base}
---
# {row.method}

Trained by `loft-rs demo` on pairs of a query and a passage.

| trained numbers | learning rate | recall@1 | MRR |
|---:|---:|---:|---:|
| {row.trained:,} | {row.learning_rate:g} | {row.recall_at_1:.3f} | {row.mrr:.3f} |

{how}
"""


def examples(held_out: list[Pair], before: Answers, after: Answers, label: str) -> str:
    """How many answers became right and wrong, and a few of them (one that became wrong, if there
    is one).
    """
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


def write(folder: Path, rows: list[Row], facts: dict, told: list[str]) -> None:
    """results.json and table.md."""
    results = {**facts, "rows": [asdict(row) for row in rows]}
    (folder / "results.json").write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    tables, texts = told[:2], told[2:]
    text = "\n\n".join([*tables, *(f"```\n{each}\n```" for each in texts)])
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
