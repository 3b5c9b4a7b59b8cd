"""Blocks of bench/CALIBRATION.md: what calibration costs, what it captures, how far it agrees with
other batches.
"""

from __future__ import annotations

from collections.abc import Callable

from .sources import one, rows
from .text import short, table

GPU, CPU = "calibration_scale_gpu", "calibration_cpu"


def span(values: list[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def cost() -> str:
    """A batch on a GPU, over the frozen pass; the code before on two cards beside it."""
    cells = []
    for row in rows(GPU, "cost"):
        old = [one(rows(GPU, f"cost_of_7ce0b78^{card}"), step=row["step"])["over_frozen"] for card in ("", "_h100")]
        name = row["step"].replace("full gradients", "full weight gradients")
        cells.append([name, f"{row['over_frozen']:.3f}", span(row["ratios"]), f"{row['extra_mib']:.0f}",
                      f"{row['known_mib']:.0f}", *(f"{each:.3f}" for each in old)])  # fmt: skip
    head = ["step", "time over frozen", "rounds", "extra MiB", "predicted MiB", "before", "before, H100"]
    return table(head, cells)


def big() -> str:
    names = {
        "at once": "all layers at once",
        "memory=1GiB": '`memory="1GiB"` (4 groups)',
        "offload=True": "`offload=True`",
    }
    cells = [
        [
            names[row["run"]],
            f"{row['above_frozen_mib']:.0f}",
            f"{row['known_mib']:.0f}",
            f"{row['peak_gib']:.1f}",
            f"{row['s']:.1f}",
        ]
        for row in rows(GPU, "big")
    ]
    return table(["run", "above the frozen step, MiB", "predicted MiB", "peak GiB", "s"], cells)


def on_cpu() -> str:
    cells = [
        [
            row["memory"].replace("-", "no limit"),
            f"{row['above_frozen_mib']:.0f}",
            f"{row['known_mib']:.0f}",
            f"{row['s']:.0f}",
        ]
        for row in rows("calibration_scale_cpu", "cpu")
    ]
    return table(["`memory=`", "above the frozen step, MiB", "predicted MiB", "s"], cells)


KINDS = (
    (1, lambda r: 2 * r + 16, "one pass, k = 2r + 16"),
    (1, lambda r: r + 192, "one pass, k = r + 192 (the default)"),
    (2, lambda r: r + 16, "two passes, k = r + 16 (the default)"),
    (2, lambda r: r + 48, "two passes, k = r + 48"),
)
CASES = [(model, r) for model in ("MiniLM-L6", "SmolLM2-135M") for r in (16, 64)]


def captured(support: str, least: bool) -> str:
    """The captured energy over the optimum, mean over the layers (or the least), by passes and
    columns.
    """
    cells = []
    for passes, columns, name in KINDS:
        mine = [
            one(rows(CPU, "quality"), model=model, support=support, rank=r, passes=passes, k=columns(r))[
                "least" if least else "captured"
            ]
            for model, r in CASES
        ]
        cells.append([name, *(short(each, 4 if each > 0.9995 else 3) for each in mine)])
    head = [f"{model.split('-')[0]} r={r}" for model, r in CASES]
    return table([f"{support}, {'least layer' if least else 'mean'}", *head], cells)


def split_half(kind: str) -> str:
    """What is stated of other batches, and what they show."""
    cells = []
    for row in rows(CPU, "split-half"):
        if row["loss"] != "cosine":
            continue
        where = [row["support"], row["batches"]]
        if kind == "agreement":
            cells.append([*where, *(short(row[key]) for key in ("agreement", "next_draw", "other_batches"))])
        else:
            bias = row["reproducible"] - row["true_reproducible"]
            spread = f"{short(row['true_tenth'], 2)} to {short(row['true_nine_tenths'], 2)}"
            cells.append([*where, short(row["reproducible"]), short(row["true_reproducible"]), spread,
                          f"{short(bias, 2, sign=True)} ± {short(row['reproducible_bias_stderr'], 2)}",
                          short(row["reproducible_spread"], 2)])  # fmt: skip
    if kind == "agreement":
        return table(["support", "batches", "agreement stated", "next draw", "all others"], cells)
    head = ["support", "batches", "stated", "true", "tenth to nine tenths", "difference", "spread"]
    return table(head, cells)


def sides() -> str:
    found = rows(CPU, "sides")
    shown: tuple[tuple[str, Callable[[dict], str]], ...] = (
        ("modules that turn their output", lambda row: str(row["output"])),
        ("total with all on the input side", lambda row: short(row["all_input"])),
        ("total with all on the output side", lambda row: short(row["all_output"])),
        ("larger side over the smaller, median", lambda row: f"{row['median_ratio']:.1f}"),
        ("larger side over the smaller, most", lambda row: f"{row['largest_ratio']:.0f}"),
        (
            "modules for which the other batches choose the same side",
            lambda row: short(row["same_on_other_batches"], 2),
        ),
        ("modules whose chosen side captures more there, same P", lambda row: short(row["better_on_other_batches"], 2)),
    )
    head = [f"{row['support']} r={row['rank']}" for row in found]
    return table(["", *head], [[name, *map(cell, found)] for name, cell in shown])


def pilot() -> str:
    cells = [
        [
            row["what"],
            f"{row['median_seconds']:.1f}",
            short(row["over_lora"], 2),
            short(row["least"], 2),
            short(row["most"], 2),
        ]
        for row in rows(CPU, "pilot")
    ]
    return table(["", "s", "over LoRA", "least", "most"], cells)


def pilot_gpu() -> str:
    cells = [[row["way"], f"{row['s']:.2f}", short(row["over_lora"], 2)] for row in rows(GPU, "pilot")]
    return table(["", "s", "over LoRA fp32"], cells)


def brief() -> str:
    """The cost of a batch in three columns, for docs/results.md."""
    cells = [[row["step"], f"{row['over_frozen']:.2f}", f"{row['extra_mib']:.0f}"] for row in rows(GPU, "cost")]
    return table(["a batch of", "time over frozen", "extra MiB"], cells)


BLOCKS: dict[str, Callable[[], str]] = {
    "calibration-cost": cost,
    "calibration-brief": brief,
    "calibration-big": big,
    "calibration-cpu": on_cpu,
    "captured-skewgrad": lambda: captured("skewgrad", least=False),
    "captured-skewgrad-least": lambda: captured("skewgrad", least=True),
    "captured-gradsvd": lambda: captured("gradsvd", least=False),
    "agreement": lambda: split_half("agreement"),
    "reproducible": lambda: split_half("reproducible"),
    "sides": sides,
    "pilot-cost": pilot,
    "pilot-cost-gpu": pilot_gpu,
}
