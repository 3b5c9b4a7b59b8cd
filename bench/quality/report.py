"""Tables (Markdown) from the lines of `sweep.py` and `timing.py`. Everything that was scored is in
them.

    python bench/quality/report.py --runs bench/quality/runs/*.jsonl --times
    bench/quality/times_h100.jsonl --out bench/quality

writes TABLES.md. Intervals are Student's t, 95 %, over seeds; differences are paired by seed. With
so many comparisons some exclude zero by chance.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from protocol import interval, paired, read_lines

from loft_rs._files import whole_file

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where this file is run by itself
from blocks.text import table

AGAINST = ("LoRA r1", "LOFT principal")
LEGEND = (
    "± is a 95 % interval over seeds (Student's t); differences are paired by seed, * where the interval excludes zero. Higher is better: "
    "`nll` stands negated. `LoRA r1 longer` trains 64 steps more than the others. `trained` leaves out the head, which every method trains "
    "as well; `(edge)`: the rate taken is the lowest or highest tried."
)
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A method's scored runs on one task. `trials`: rates tried; `edge`: the rate taken is the
    lowest or highest of them.
    """

    task: str
    steps: int
    family: str
    metric: str
    method: str
    rank: int
    trained: int
    rate: float
    trials: int
    edge: bool
    matmul: str
    failed: int
    scores: dict[int, float]  # by seed


def rows_of(lines: Lines) -> list[Row]:
    """One row for every method that has scored runs on a task, in the order of the tasks and of the
    trained parameters.
    """
    held: dict[tuple, Lines] = defaultdict(list)
    for line in lines:
        held[line["task"], line["steps"], line["method"]].append(line)
    order = list(dict.fromkeys((line["task"], line["steps"]) for line in lines))
    found = []
    for (task, steps, method), mine in held.items():
        scored = [line for line in mine if line["phase"] == "score"]
        good = [line for line in scored if line.get("score") is not None]
        if not good:
            continue
        tried = {line["rate"] for line in mine if line["phase"] == "tune"}
        first = good[0]
        found.append(
            Row(task, steps, first["family"], first["metric"], method, first["rank"], first["trained"], first["rate"], len(tried),
                bool(tried) and first["rate"] in (min(tried), max(tried)), "+".join(sorted({line["matmul"] for line in good})),
                len(scored) - len(good), {line["seed"]: line["score"] for line in good})
        )  # fmt: skip
    return sorted(found, key=lambda row: (order.index((row.task, row.steps)), row.trained, row.method))


def signed(difference: tuple[float, float, int]) -> str:
    """`+.012 +- .008`, starred where the interval excludes zero; empty where nothing is shared."""
    value, half, count = difference
    if not count:
        return ""
    if math.isnan(half):
        return f"{value:+.4f} (n=1)"
    return f"{value:+.4f} ± {half:.4f}{' *' if abs(value) > half else ''}"


def measured(value: float, half: float, digits: int) -> str:
    """`.012 +- .008`, without an interval where one seed gives none."""
    return f"{value:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def reference(by_name: dict[str, Row], name: str) -> Row | None:
    """The row of a reference, or of the same at rank 46 where the task has only that."""
    return by_name.get(name) or by_name.get(f"{name} r46")


def task_table(rows: list[Row]) -> str:
    by_name = {row.method: row for row in rows}
    against = [reference(by_name, name) for name in AGAINST]
    head = [
        "method",
        "r",
        "trained",
        "rate",
        "trials",
        "seeds",
        rows[0].metric,
        *(f"minus {other.method if other else name}" for name, other in zip(AGAINST, against, strict=True)),
        "matmul",
    ]
    found = []
    for row in rows:
        value, half = interval(list(row.scores.values()))
        differences = [
            signed(paired(row.scores, other.scores)) if other and other.method != row.method else ""
            for other in against
        ]
        failed = f" ({row.failed} diverged)" if row.failed else ""
        cells = [row.method, row.rank or "-", f"{row.trained:,}", f"{row.rate:.2g}{' (edge)' if row.edge else ''}", row.trials or "-",
                 f"{len(row.scores)}{failed}", measured(value, half, 4), *differences, row.matmul]  # fmt: skip
        found.append(cells)
    return table(head, found)


def family_table(rows: list[Row]) -> str:
    """Differences to each reference, the mean over the family's tasks within every seed, for
    methods scored on two tasks or more.
    """
    by_task: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_task[row.task][row.method] = row
    found = []
    for method in dict.fromkeys(row.method for row in rows):
        cells, shared = [], set()
        for name in AGAINST:
            tasks = [
                task
                for task, held in by_task.items()
                if method in held and reference(held, name) and reference(held, name).method != method
            ]
            shared |= set(tasks)
            if len(tasks) < 2:
                cells.append("")
                continue
            pairs = [(by_task[task][method].scores, reference(by_task[task], name).scores) for task in tasks]
            seeds = set.intersection(*(a.keys() & b.keys() for a, b in pairs))
            cells.append(
                signed(paired({s: mean(a[s] - b[s] for a, b in pairs) for s in seeds}, dict.fromkeys(seeds, 0.0)))
            )
        if any(cells):
            found.append([method, ", ".join(sorted(shared)), *cells])
    return table(["method", "tasks", *(f"minus {name}" for name in AGAINST)], found, left=2)


def variants_table(rows: list[Row]) -> str:
    """`LOFT pilot quiet r46` minus `LOFT pilot r46`, and so on: what one word more in a name
    changes, paired by seed.

    Ranks in names are passed over where the one with the word trains .75 to 1.1 of the other's
    parameters.
    """

    def plain(name: str) -> list[str]:
        return [word for word in name.split() if not re.fullmatch(r"r\d+", word)]

    found = []
    for row in rows:
        words = plain(row.method)
        fewer = [words[:i] + words[i + 1 :] for i in range(len(words))]
        for other in rows:
            alike = (row.task, row.steps) == (other.task, other.steps) and plain(other.method) in fewer
            if alike and 0.75 * other.trained <= row.trained <= 1.1 * other.trained:
                difference = signed(paired(row.scores, other.scores))
                found.append([row.task, row.method, other.method, difference])
    return table(["task", "method", "minus", "difference"], found, left=3) if found else ""


def forgetting_table(lines: Lines, task: str) -> str:
    """The NLL on the task beside that on text outside it, after training, and the answers that were
    right; of tasks that trace them.
    """
    traced = [line for line in lines if line["task"] == task and line["phase"] == "score" and line.get("trace")]
    if not traced:
        return ""
    began = [line["nll"] for line in lines if line["task"] == task and line["phase"] == "untrained"]
    held: dict[str, Lines] = defaultdict(list)
    for line in traced:
        held[line["method"]].append(line)
    outside = {name: {each["seed"]: each["trace"][-1]["outside"] for each in mine} for name, mine in held.items()}
    found = [["untrained", "-", f"{line['tune']:.4f}", f"{line['outside']:.3f}", "", ""] for line in began]
    for name, mine in sorted(held.items(), key=lambda each: mean(outside[each[0]].values())):
        tune = interval([line["tune_nll"] for line in mine])
        value, half = interval(list(outside[name].values()))
        exact = [100 * line["exact"] for line in mine if line.get("exact") is not None]
        said = f"{mean(exact):.1f} (n={len(exact)})" if exact else ""
        difference = "" if name == "LoRA r1" else signed(paired(outside[name], outside.get("LoRA r1", {})))
        cells = [name, f"{mine[0]['trained']:,}", f"{tune[0]:.4f}", measured(value, half, 3), difference, said]
        found.append(cells)
    return table(["method", "trained", "NLL, tuning split", "NLL outside", "minus LoRA r1", "exact match, %"], found)


def unfinished(lines: Lines) -> list[str]:
    """Methods of which trials were run and nothing was scored yet."""
    scored = {(line["task"], line["method"]) for line in lines if line["phase"] == "score"}
    every = dict.fromkeys((line["task"], line["method"]) for line in lines if line["phase"] == "tune")
    return [f"{method} on {task}" for task, method in every if (task, method) not in scored]


def trial_table(lines: Lines) -> str:
    """Prototypes that were tried once, on the tuning split: lines of the phase `trial`, and tuning
    runs of a seed and method of theirs.
    """
    mine = [line for line in lines if line["phase"] == "trial"]
    if not mine:
        return ""
    seen = {(line["task"], line["method"], line["seed"]) for line in mine}
    mine += [line for line in lines if line["phase"] == "tune" and (line["task"], line["method"], line["seed"]) in seen]
    found = []
    for line in sorted(mine, key=lambda line: -line["score"]):
        found.append(
            [line["task"], line["method"], f"{line['trained']:,}", f"{line['rate']:.2g}", f"{line['score']:.4f}"]
        )
    return table(["task", "method", "trained", "rate", "score"], found, left=2)


def cost_table(times: Lines) -> str:
    found = []
    for line in times:
        if line.get("error"):
            found.append([line["task"], line["method"], f"failed: {line['error']}", *[""] * 5])
            continue
        graph = "-" if line["graph_ms"] is None else f"{line['graph_ms']:.1f}"
        cells = [line["task"], line["method"], line["rank"] or "-", f"{line['trained']:,}", f"{line['eager_ms']:.1f}", graph,
                 f"{line['step_mib']:.0f}", f"{line['prepare_seconds']:.2f}"]  # fmt: skip
        found.append(cells)
    head = ["task", "method", "r", "trained", "ms a step", "as a CUDA graph", "MiB a step", "preparation s"]
    return table(head, found, left=2)


def tables(lines: Lines, times: Lines) -> str:
    """The whole page."""
    rows = rows_of(lines)
    devices = sorted({line["device"] for line in lines if line["phase"] != "untrained"})
    runs = sum(line["phase"] != "untrained" for line in lines)
    trials = sum(line["phase"] in ("tune", "trial") for line in lines)
    made = f"Written by `report.py` from {runs} runs ({trials} of them trials of a rate or a prototype) on {', '.join(devices)}."
    parts = ["# What the runs say", f"{made} {LEGEND}"]
    for task, steps in dict.fromkeys((row.task, row.steps) for row in rows):
        mine = [row for row in rows if (row.task, row.steps) == (task, steps)]
        parts += [f"## {task} ({mine[0].family}, {steps} steps)", task_table(mine)]
        if forgetting := forgetting_table(lines, task):
            parts += [f"### {task}: text outside the task, and generated answers", forgetting]
    for family in dict.fromkeys(row.family for row in rows):
        mine = [row for row in rows if row.family == family]
        if len({row.task for row in mine}) > 1:
            parts += [f"## {family}: the mean over its tasks", family_table(mine)]
    if variants := variants_table(rows):
        parts += ["## What a variant changes", variants]
    if trial := trial_table(lines):
        parts += ["## Prototypes tried once (one seed, tuning split)", trial]
    if left := unfinished(lines):
        parts += [f"Tried at some rates and not scored: {', '.join(left)}."]
    if times:
        device = ", ".join(sorted({line["device"] for line in times}))
        parts += [f"## Cost of a step, alone on the card ({device})", cost_table(times)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--times", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True, help="folder")
    arguments = parser.parse_args()
    lines = [line for path in arguments.runs for line in read_lines(path)]
    times = [line for path in arguments.times for line in read_lines(path)]
    if not rows_of(lines):
        parser.error(f"no scored run in {', '.join(map(str, arguments.runs))}")
    page = tables(lines, times)
    with whole_file(arguments.out / "TABLES.md") as part:
        part.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
