"""Blocks of bench/SOLVERS.md: our truncated solvers beside the rivals'."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .sources import Rows, one, rows
from .text import table

OURS, TORCH, EXACT = "ours", "torch svd_lowrank(niter=4)", "exact"
RIVALS = {TORCH: "torch", "sklearn auto": "scikit-learn auto", "svds arpack": "ARPACK", "svds propack": "PROPACK"}
SUPPORT = ("ours, one call", OURS, TORCH)


def by_case(found: Rows, *fields: str) -> dict[tuple, dict[str, dict[str, Any]]]:
    """Case -> method -> row, in the order of the rows."""
    held: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in found:
        held.setdefault(tuple(row[field] for field in fields), {})[row["method"]] = row
    return held


def over(mine: dict[str, dict[str, Any]], base: str, rival: str) -> str:
    other = mine.get(rival, {}).get("s")
    return f"{mine[base]['s'] / other:.2f}" if other else ""


def svd() -> str:
    head = ["shape", "spectrum", "r", "ours, ms", f"{TORCH}, ms", *(f"over {name}" for name in RIVALS.values())]
    cells = []
    for (shape, spectrum, r), mine in by_case(rows("solvers_cpu", "svd"), "shape", "spectrum", "r").items():
        if OURS not in mine:
            continue  # the exact SVD, which serves all ranks
        ours, torch = mine[OURS], mine[TORCH]
        missing = [f"{max(1 - each['energy'], 0):.1e}" for each in (ours, torch)]
        times = [f"{1e3 * each['s']:.1f}" for each in (ours, torch)]
        ratios = [over(mine, OURS, each) for each in RIVALS]
        cells.append([shape, spectrum.removesuffix(".0"), r, *times, *ratios, *missing, f"{ours['floor_share']:.2f}"])
    return table([*head, "missing, ours", "missing, torch", "floor"], cells, left=2)


def real() -> str:
    head = ["model", "of", "r", "ours, one call, ms", "ours, one by one, ms", f"{TORCH}, ms", "one call over torch"]
    head += [f"over {name}" for name in list(RIVALS.values())[1:]]
    cells = []
    for case, mine in by_case(rows("solvers_cpu", "real"), "model", "of", "r").items():
        if not all("s" in mine.get(name, {}) for name in SUPPORT):
            continue
        energies = [f"{mine[name]['least_energy']:.4f}" for name in (SUPPORT[0], TORCH)]
        times = [f"{1e3 * mine[name]['s']:.0f}" for name in SUPPORT]
        cells.append([*case, *times, *(over(mine, SUPPORT[0], each) for each in (*RIVALS, EXACT)), *energies])
    return table([*head, "over the exact SVD", "least energy, ours", "torch"], cells, left=2)


def skew(name: str, *kinds: str) -> str:
    """The top 32 of Skew(W^T G), for some kinds of W."""
    cells = []
    for (shape, w), mine in by_case(rows(name, "skew"), "shape", "W").items():
        if w not in kinds or OURS not in mine:
            continue
        rival = next((row for method, row in mine.items() if method.startswith("torch") and "s" in row), {})
        seconds = [
            f"{each['s']:.3g}" if "s" in each else "" for each in (mine[OURS], rival, mine.get("dense eigh", {}))
        ]
        cells.append([f"{shape}, W {w}", *seconds, f"{mine[OURS]['energy']:.5f}", f"{mine[OURS]['floor_share']:.2f}"])
    return table(
        [
            "top 32 of Skew(W^T G)",
            "ours, s",
            "torch subspace iteration, s",
            "dense eigh, s",
            "our energy over the best",
            "floor",
        ],
        cells,
    )


def dtype(name: str) -> str:
    cells = []
    found = rows(name, "dtype")
    for shape, r in dict.fromkeys((row["shape"], row["r"]) for row in found):
        mine = [one(found, shape=shape, r=r, dtype=each)["over_f32"] for each in ("bfloat16", "float16")]
        cells.append([shape, r, *(f"{each:.2f}" for each in mine)])
    return table(["time over float32 input", "r", "bf16", "f16"], cells)


def memory() -> str:
    shown = [OURS, "ours, bf16", TORCH, "sklearn auto", EXACT]
    cells = []
    for (shape,), mine in by_case(rows("solvers_cpu", "memory"), "shape").items():
        cells.append(
            [
                f"{shape} ({mine[OURS]['input_mib']:.0f} MiB in f32)",
                *(f"{mine[each]['extra_mib']:.0f}" for each in shown),
            ]
        )
    return table(
        ["peak memory above the input, MiB, r = 64", "ours, f32", "ours, bf16", "torch", "scikit-learn", EXACT], cells
    )


def whole_model() -> str:
    """All 224 linears of Llama-3.1-8B's shapes."""
    cells = [
        [row["method"], row["linears"], f"{row['s']:.0f}", f"{row['extra_mib']:.0f}"]
        for row in rows("solvers_cpu", "model8b")
    ]
    return table(["support", "linears", "s in all", "most above the input, MiB"], cells)


def brief() -> str:
    """One line a shape, for docs/results.md: r = 64, the slower spectrum."""
    cells = []
    found = rows("solvers_cpu", "svd")
    for (shape, spectrum, r), mine in by_case(found, "shape", "spectrum", "r").items():
        if (spectrum, r) == ("i^-0.5", 64):
            mine = mine | {EXACT: one(found, shape=shape, spectrum=spectrum, method=EXACT)}
            energy = [f"{max(1 - mine[each]['energy'], 0):.1e}" for each in (OURS, TORCH)]
            cells.append(
                [shape, f"{1e3 * mine[OURS]['s']:.0f}", over(mine, OURS, TORCH), over(mine, OURS, EXACT), *energy]
            )
    return table(["matrix", "ours, ms", "over torch", "over the exact SVD", "missing, ours", "missing, torch"], cells)


def exact_seconds() -> str:
    """How long the exact SVD takes."""
    held = by_case(rows("solvers_cpu", "svd"), "shape", "spectrum")
    cells = [[shape, f"{mine[EXACT]['s']:.2f}"] for (shape, spectrum), mine in held.items() if spectrum == "i^-0.5"]
    return table(["matrix", "exact SVD, s"], cells)


BLOCKS: dict[str, Callable[[], str]] = {
    "svd": svd,
    "svd-exact": exact_seconds,
    "svd-real": real,
    "skew": partial(skew, "solvers_cpu", "Gaussian", "i^-0.5"),
    "skew-xeon": partial(skew, "solvers_xeon", "Gaussian"),
    "dtype": partial(dtype, "solvers_cpu"),
    "dtype-xeon": partial(dtype, "solvers_xeon"),
    "solver-memory": memory,
    "solver-8b": whole_model,
    "solvers-brief": brief,
}
