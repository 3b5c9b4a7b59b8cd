"""Blocks of FINDINGS.md, docs/results.md and the README that come from the runs of the quality
bench.

Differences are of scores, so that above zero is better everywhere: an NLL counts negated. * where
the 95 % interval excludes zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean

import rates
from compare import FAMILIES, MINILM, SUPPORTS, TITLES, Difference, Scores, over_tasks
from report import tables

from .sources import lines, runs
from .text import short, table

GROUPS = {"mathematics, mean of three": FAMILIES["mathematics"], "SIB-200, unseen languages": FAMILIES["languages"],
          "images, mean of four": FAMILIES["images"], "sentences, mean of five": FAMILIES["sentences"]}  # fmt: skip
TASKS = {title: (task,) for task, title in TITLES.items()}
SHORT = {"LOFT principal": "principal", "LOFT pilot": "pilot", "LOFT halves": "halves", "LOFT halves 64": "halves, 64 steps",
         "LOFT gradsvd": "gradsvd", "LOFT skewgrad": "skewgrad", "LoRA r1": "LoRA r=1", "LoRA r8": "LoRA r=8",
         "LoRA r1 longer": "LoRA r=1, 304 steps", "OFT b4": "OFT, blocks of 4", "full fine-tuning": "all weights"}  # fmt: skip
MATHEMATICS = FAMILIES["mathematics"]


@functools.cache
def scores() -> Scores:
    return Scores(runs())


def named(method: str) -> str:
    """A method's name on a page."""
    return SHORT.get(method, method)


def cell(found: Difference | None, of: int) -> str:
    """`+.012 ± .008 *`, with the number of tasks where they are fewer than asked for."""
    if found is None:
        return ""
    value, half, count = found
    star = " *" if abs(value) > half else ""
    return f"{short(value, sign=True)} ± {short(half)}{star}{f' ({count} of {of})' if count < of else ''}"


def against(methods: Sequence[str], other: str, groups: dict[str, Sequence[str]]) -> str:
    """Each method minus another, a row a group of tasks; groups in which nothing was scored are
    left out.
    """
    found = []
    for name, tasks in groups.items():
        cells = [cell(scores().difference(tasks, method, other), len(tasks)) for method in methods]
        if any(cells):
            found.append([name, *cells])
    return table([f"minus {named(other)}", *map(named, methods)], found)


def many(methods: Sequence[str], others: Sequence[str], tasks: Sequence[str], lower: bool = False) -> str:
    """A row a method: what it trains, its score on one task or the mean over some, and the
    differences to others.
    """
    found = []
    for method in methods:
        row, value = scores().row(tasks[0], method), scores().value(tasks, method)
        differences = [
            cell(scores().difference(tasks, method, other), 1) if other != method else "" for other in others
        ]
        found.append(
            [
                named(method),
                f"{row.trained:,}",
                short(-value[0] if lower else value[0], 4 if lower else 3),
                *differences,
            ]
        )
    return table(
        ["method", "trained", "NLL" if lower else "score", *(f"minus {named(other)}" for other in others)], found
    )


def forgetting() -> str:
    """NLL of text outside the task after training, by task."""
    held = {task: scores().traced(task, "outside") for task in MATHEMATICS}
    began = next(line["nll"]["outside"] for line in runs() if line["phase"] == "untrained" and line["task"] == "gsm8k")
    methods = [
        m
        for m in dict.fromkeys(m for each in held.values() for m in each)
        if sum(m in each for each in held.values()) > 1
    ]
    found = [["untrained", *[f"{began:.3f}"] * 3]]
    for method in sorted(methods, key=lambda m: mean(held["gsm8k"].get(m, {0: 9.0}).values())):
        found.append([method, *(f"{mean(held[task][method].values()):.3f}" if len(held[task].get(method, ())) > 1 else ""
                                for task in MATHEMATICS)])  # fmt: skip
    return table(["NLL of news sentences after", *(TITLES[task] for task in MATHEMATICS)], found)


def traced_difference(field: str, method: str, other: str, tasks: Sequence[str]) -> str:
    """What was traced of one method minus that of another, the mean over the tasks; the sign is the
    field's own.
    """
    held = [scores().traced(task, field) for task in tasks]
    pairs = []
    for each in held:
        a, b = (
            next((each[name + end] for end in ("", " r46", " r64") if name + end in each), {})
            for name in (method, other)
        )
        if len(a.keys() & b.keys()) < 2:
            return ""
        pairs.append((a, b))
    value, half, _ = over_tasks(pairs, len(pairs))
    digits = 1 if field == "exact" else 3
    return f"{short(value, digits, sign=True)} ± {short(half, digits)}{' *' if abs(value) > half else ''}"


def forgetting_differences() -> str:
    methods = (
        "LOFT pilot",
        "LOFT halves",
        "LOFT halves 64",
        "LOFT gradsvd",
        "LOFT principal",
        "LOFT skewgrad",
        "OFT b4",
        "LoRA r8",
    )
    found = [
        [named(m), *(traced_difference("outside", m, "LoRA r1", (task,)) for task in MATHEMATICS)] for m in methods
    ]
    return table(["NLL outside, minus LoRA r=1", *(TITLES[task] for task in MATHEMATICS)], found)


def exact_answers() -> str:
    """Percent of generated answers that are right, and the differences to LoRA over both tasks."""
    tasks = ("asdiv", "mawps")
    held = {task: scores().traced(task, "exact") for task in tasks}
    methods = (
        "LoRA r1",
        "LoRA r8",
        "OFT b4",
        "LOFT halves 64",
        "LOFT halves",
        "LOFT pilot",
        "LOFT gradsvd",
        "LOFT principal",
    )
    found = []
    for method in methods:
        shares = [
            next(held[task][method + end] for end in ("", " r46", " r64") if method + end in held[task])
            for task in tasks
        ]
        differences = [
            traced_difference("exact", method, other, tasks) if method != other else ""
            for other in ("LoRA r1", "LoRA r8")
        ]
        found.append([named(method), *(f"{mean(share.values()):.1f}" for share in shares), *differences])
    return table(["right answers, %", "ASDiv", "MAWPS", "mean, minus LoRA r=1", "mean, minus LoRA r=8"], found)


def step_cost() -> str:
    """A step of the ViT on GTSRB, each method alone on the card."""
    found = []
    for line in lines("quality/times_h100.jsonl"):
        found.append([named(line["method"]), f"{line['trained']:,}", f"{line['eager_ms']:.1f}", f"{line['graph_ms']:.1f}",
                      f"{line['step_mib']:.0f}", f"{line['prepare_seconds']:.1f}"])  # fmt: skip
    return table(["method", "trained", "ms from Python", "ms as a graph", "MiB a step", "preparation, s"], found)


IDEAS = {
    "pilot of 64 steps": ("LOFT pilot 64 r46", "LOFT pilot r46"),
    "ranks by kind of layer": ("LOFT pilot ranks r42", "LOFT pilot r46"),
    "ranks by kind, on 64 steps": ("LOFT pilot 64 ranks r42", "LOFT pilot 64 r46"),
    "halved batches, on 64 steps and ranks": ("LOFT pilot 64 halved ranks r42", "LOFT pilot 64 ranks r42"),
    "half transforms": ("LOFT halves r64", "LOFT pilot r46"),
    "half transforms, on 64 steps": ("LOFT halves 64 r64", "LOFT pilot 64 r46"),
    "pairs": ("LOFT pairs auto r46", "LOFT pilot r46"),
    "quiet": ("LOFT pilot quiet r46", "LOFT pilot r46"),
    "quieter": ("LOFT pilot quieter r46", "LOFT pilot r46"),
    "quieter, on 64 steps and ranks": ("LOFT pilot 64 ranks quieter r42", "LOFT pilot 64 ranks r42"),
    "energetic, the reverse of quiet": ("LOFT pilot energetic r46", "LOFT pilot r46"),
    "magnitudes around the transform": ("LOFT pilot magnitudes r44", "LOFT pilot r46"),
    "tied q/k/v and gate/up": ("LOFT pilot tied r60", "LOFT pilot r46"),
    "two free bases (LoRA-XS)": ("LoRA-XS pilot r32", "LOFT pilot r46"),
    "K-FAC": ("LOFT kfac r46", "LOFT gradsvd r46"),
    "two sides": ("LOFT gradsvd both sides r32", "LOFT gradsvd r46"),
    "OFT in PCA coordinates": ("OFT pca b4", "OFT b4"),
    "OFT, one of each quarter": ("OFT pca strided b4", "OFT b4"),
}


def ideas() -> str:
    """What was tried on GSM8K: its NLL and the score gained over what it varies, on each task where
    both were scored.
    """
    found = []
    for idea, (method, base) in IDEAS.items():
        row = scores().row("gsm8k", method)
        gains = [cell(scores().difference((task,), method, base), 1) for task in MATHEMATICS]
        found.append([idea, base.removeprefix("LOFT "), short(-mean(row.scores.values()), 4), *gains])
    return table(["idea", "varies", "NLL, GSM8K", "gain, GSM8K", "gain, ASDiv", "gain, MAWPS"], found, left=2)


def single(task: str, method: str) -> str:
    row = scores().row(task, method)
    return short(abs(mean(row.scores.values()))) if row else ""


FRONT = ("gsm8k", "sib200", "gtsrb", "mrpc")


def front() -> str:
    """The README's table: the default support and the pilot beside LoRA and OFT, one number a
    cell.
    """
    methods = {"LoRA r1": "LoRA r=1", "LoRA r8": "LoRA r=8", "OFT b4": "OFT, blocks of 4",
               "LOFT principal": "LOFT, principal", "LOFT pilot": "LOFT, pilot"}  # fmt: skip
    found = [
        [title, f"{scores().row('gsm8k', m).trained:,}", *(single(task, m) for task in FRONT)]
        for m, title in methods.items()
    ]
    return table(["method", "trained, GSM8K", "GSM8K, NLL", "SIB-200, acc.", "GTSRB, acc.", "MRPC, acc."], found)


RIVALS = ("LoRA r1", "LoRA r8", "full fine-tuning")


def by_family(kind: str) -> str:
    """The best support of every family beside LoRA and full fine-tuning: differences, scores or
    trained numbers.
    """
    found = []
    for group, tasks in GROUPS.items():
        loft = scores().best(tasks)
        if kind == "families":
            found.append(
                [group, named(loft), *(cell(scores().difference(tasks, loft, other), len(tasks)) for other in RIVALS)]
            )
        for task in tasks if kind == "scores" else ():
            found.append([TITLES[task], named(loft), *(single(task, m) for m in (loft, *RIVALS))])
        for task in models_of(tasks) if kind == "trained" else ():
            rows = [scores().row(task, m) for m in (loft, *RIVALS)]
            found.append([MODELS[task], named(loft), *(f"{row.trained:,}" if row else "" for row in rows)])
    if kind == "families":
        return table(["LOFT minus", "support", *map(named, RIVALS)], found, left=2)
    head = ["model" if kind == "trained" else "task", "support", "LOFT", *map(named, RIVALS)]
    return table(head, found, left=2) + (f"\n\nSeeds: {seeds()}." if kind == "scores" else "")


MODELS = {
    "gsm8k": "SmolLM2-135M",
    "sib200": "Gemma 3 270M",
    "gtsrb": "ViT, 4 M",
    "mrpc": "MiniLM-L6",
    "rte_mpnet": "all-mpnet-base-v2",
}


def models_of(tasks: Sequence[str]) -> list[str]:
    return [task for task in tasks if task in MODELS]


def seeds() -> str:
    """How many seeds each scored method of the families' tables has."""
    counts = {len(row.scores) for tasks in FAMILIES.values() for task in tasks for m in (*SUPPORTS, *RIVALS)
              if (row := scores().row(task, m))}  # fmt: skip
    return f"{min(counts)} each" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def kept() -> str:
    """A kept pilot beside a cold one of as many steps in all, and LoRA r=1: the best mean of the
    tuning split, and its rate * r or rate.
    """
    found = []
    for task, steps in (("asdiv", 96), ("asdiv", 240), ("mawps", 240), ("gtsrb", 300), ("flowers17", 300)):
        end = " r64" if task in MATHEMATICS else ""
        cells = []
        for method in (f"LOFT kept halves{end}", f"LOFT halves counted{end}", "LoRA r1"):
            grid: dict[float, list[float]] = {}
            for line in runs():
                if (line["task"], line["method"], line["phase"], line["steps"]) == (task, method, "tune", steps):
                    grid.setdefault(line["rate"] * (line["rank"] if "LOFT" in method else 1), []).append(line["score"])
            best = max((rate for rate in grid if len(grid[rate]) == 2), key=lambda rate: mean(grid[rate]))
            cells.append(f"{short(abs(mean(grid[best])), 4)} at {best:.3g}")
        found.append([f"{TITLES[task]}, {'NLL' if end else 'accuracy'}", steps, *cells])
    return table(["task", "steps in all", "kept, at lr · r", "cold, at lr · r", "LoRA r=1, at lr"], found)


def one_rate() -> str:
    """The rate that costs least when it is used for all tasks, and the next."""
    found = []
    for name, (_, times_rank) in rates.METHODS.items():
        least, then = rates.one_rate(rates.trials(runs(), name), name)[:2]
        what = "lr · r" if times_rank else "lr"
        found.append([name, what, f"{least.rate:.2g}", short(least.loss), f"{then.rate:.2g}", short(then.loss)])
    return table(["method", "of", "best single rate", "mean loss", "next best", "mean loss"], found, left=2)


def falls() -> str:
    """What one step of the grid beside and above the best rate costs."""
    found = []
    for name in rates.METHODS:
        mine = rates.trials(runs(), name)
        (fallen, tasks, middle), (beside, _) = rates.falls(mine), rates.beside(mine)
        found.append([name, fallen, tasks, short(middle), short(beside)])
    return table(["method", "tasks that fall", "of", "median loss above", "mean loss beside"], found)


def tuned() -> str:
    """The rate that the scored runs of each task took, as lr * r (LOFT) or lr (LoRA)."""
    shown = {**{name: True for name in SUPPORTS if name != "LOFT halves"}, "LoRA r1": False}
    found = []
    for task, title in TITLES.items():
        rows = [scores().row(task, name) for name in shown]
        taken = [row and row.rate * (row.rank if times else 1) for row, times in zip(rows, shown.values(), strict=True)]
        found.append([title, *(f"{rate:.2g}" if rate else "" for rate in taken)])
    return table(["tuned rate", *map(named, shown)], found)


def whole_page() -> str:
    """TABLES.md: everything that was scored."""
    return tables(runs(), lines("quality/times_h100.jsonl"))


def among(tasks: Sequence[str]) -> dict[str, Sequence[str]]:
    """Each of the tasks as a group of its own."""
    return {TITLES[task]: (task,) for task in tasks}


TENTH = {"images, mean of four": FAMILIES["images"], "SIB-200, unseen languages": FAMILIES["languages"]}
RANDOM = {
    "GSM8K": ("gsm8k",),
    "SIB-200": ("sib200",),
    "images, mean of four": FAMILIES["images"],
    "MiniLM, mean of three": MINILM,
}
FIVE = ("LOFT principal", "LOFT pilot", "LOFT halves", "LOFT gradsvd", "LOFT skewgrad")
GSM8K = ("full fine-tuning", "LoRA r8", "LOFT halves 64", "LoRA r1 longer", "LOFT pilot 64 ranks r42", "LOFT pilot 64", "LOFT halves",
         "LOFT pilot", "LoRA r1", "OFT b4", "LOFT gradsvd", "LOFT principal", "PSOFT", "LOFT skewgrad")  # fmt: skip
BLOCKS: dict[str, Callable[[], str]] = {
    "supports": partial(against, FIVE[1:], "LOFT principal", GROUPS),
    "supports-tasks": partial(against, FIVE[1:], "LOFT principal", TASKS),
    "random": partial(against, FIVE[:2] + FIVE[3:], "LOFT random", RANDOM | among(FAMILIES["images"])),
    "gsm8k": partial(many, GSM8K, ("LoRA r1", "OFT b4", "LoRA r1 longer"), ("gsm8k",), lower=True),
    "lora-r1": partial(against, FIVE, "LoRA r1", GROUPS),
    "lora-r1-tasks": partial(against, FIVE, "LoRA r1", TASKS),
    "lora-r8": partial(against, (*FIVE[:3], "LOFT halves 64", "LoRA r1"), "LoRA r8", GROUPS),
    "tenth": partial(against, ("LOFT principal tenth", "LoRA r1"), "LoRA r8", TENTH),
    "oft": partial(against, FIVE, "OFT b4", GROUPS),
    "oft-64": partial(against, ("LOFT halves 64", "LOFT pilot 64 ranks r42"), "OFT b4", among(MATHEMATICS)),
    "rivals": partial(
        against, ("HRA", "BOFT b2 m2", "LoRA-XS", "LOFT coordinate"), "LOFT principal", TENTH | among(FAMILIES["images"])),
    "full": partial(against, FIVE[:3], "full fine-tuning", GROUPS),
    "psoft": partial(against, FIVE[:3], "PSOFT", GROUPS),
    "refresh": lambda: table(
        ["refreshed, minus plain", "GTSRB", "blood cells"],
        [[s, *(cell(scores().difference((t,), f"LOFT {s} refresh", f"LOFT {s}"), 1) for t in ("gtsrb", "blood_cells"))]
         for s in ("principal", "gradsvd", "skewgrad")]),
    "forgetting": forgetting,
    "forgetting-differences": forgetting_differences,
    "exact": exact_answers,
    "step-vit-gtsrb": step_cost,
    "ideas": ideas,
    "against": front,
    "results-families": partial(by_family, "families"),
    "results-scores": partial(by_family, "scores"),
    "results-trained": partial(by_family, "trained"),
    "kept": kept,
    "rates-one": one_rate,
    "rates-falls": falls,
    "rates-tuned": tuned,
}  # fmt: skip
