"""Where a LOFT step's extra time goes: kernels of a few steps of the 8B-shaped model, beside the
frozen base's, against the card's.

Each device kernel is charged to the operation that launched it (torch.profiler), and each operation
to a group:

    base GEMM       a matrix product none of whose operands has a side of r, 2 r or 3 r (layers of one input share a product)
    adapter GEMM    one with such a side; the small batched products and solves of the transform as well
    attention, optimiser, adapter other (operations of LOFT's own that touch the rank, or its fused
    kernels), elementwise (the rest)

The floor of a matrix product is the larger of its operations over the best measured GEMM rate and
its bytes (every operand once, two bytes a number) over the measured copy rate.
`--device cpu --tiny` tries the script: operators then, no kernels.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from blocks.text import table
from gpu_workloads import BASE, Card, Method, Step, Workload, lofts
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

GEMM = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::linear",
    "aten::matmul",
    "aten::addmm_",
    "aten::_addmm",
)
SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))  # (in, out) of the seven linears
GROUPS = ("base GEMM", "adapter GEMM", "adapter other", "attention", "elementwise", "optimiser", "unattributed")


def group_of(name: str, shapes: list[list[int]], rank: int) -> str:
    """The group of one operation, from its name and its operands' shapes."""
    lowered = name.lower()
    matrices = [shape for shape in shapes if len(shape) >= 2]
    # Only r itself in what has a batch, and nothing with heads, whose halves are as wide as a rank
    # may be.
    sides = {side for shape in matrices if len(shape) == 2 for side in shape}
    ranked = any(rank * count in sides for count in (1, 2, 3)) or any(rank in s[-2:] for s in matrices if len(s) == 3)
    if "adam" in lowered or "_foreach" in lowered or "optimizer" in lowered:
        return "optimiser"
    if "attention" in lowered or "flash" in lowered:
        return "attention"
    if name in GEMM or "linalg" in lowered or "getr" in lowered or "lu_" in lowered:
        return "adapter GEMM" if ranked or "linalg" in lowered else "base GEMM"
    own = any(word in lowered for word in ("lowrank", "rotate", "loft", "_delta"))
    return "adapter other" if own or ranked else "elementwise"


def floor_us(name: str, shapes: list[list[int]], tflop_s: float, copy_gb_s: float) -> float | None:
    """The least time of a matrix product of two-byte numbers on this card, in microseconds; None
    for anything else.
    """
    if name not in ("aten::mm", "aten::addmm", "aten::addmm_"):
        return None
    (m, k), (_, n) = shapes[:2] if name == "aten::mm" else shapes[1:3]  # an `out` comes last
    moved = 2 * (m * k + k * n + m * n * (2 if name != "aten::mm" else 1))
    return max(2 * m * k * n / (1e6 * tflop_s), moved / (1e3 * copy_gb_s))


class Breakdown:
    """Microseconds a step: by group, by kernel, and by operation and shape."""

    def __init__(self, rank: int, steps: int, cuda: bool = True):
        self.rank, self.steps, self.cuda = rank, steps, cuda
        self.groups: dict[str, float] = defaultdict(float)
        self.kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # us, launches
        self.operations: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, events: Iterable[Any]) -> None:
        device = 0.0
        for event in events:
            if event.device_type != DeviceType.CPU:
                # A range that a user or the profiler marked spans kernels that are counted
                # themselves.
                if getattr(event, "is_user_annotation", False) or event.name.startswith(("ProfilerStep", "Optimizer.")):
                    continue
                taken = event.time_range.end - event.time_range.start
                device += taken / self.steps
                self.kernels[event.name][0] += taken / self.steps
                self.kernels[event.name][1] += 1 / self.steps
                continue
            taken = sum(kernel.duration for kernel in event.kernels) if self.cuda else event.self_cpu_time_total
            if not taken:
                continue
            shapes = [list(shape) for shape in event.input_shapes or [] if isinstance(shape, (list, tuple))]
            self.groups[group_of(event.name, shapes, self.rank)] += taken / self.steps
            held = self.operations[event.name, json.dumps([shape for shape in shapes if shape])]
            held[0] += taken / self.steps
            held[1] += len(event.kernels) / self.steps
        if self.cuda:
            self.groups["unattributed"] = device - sum(self.groups.values())

    @property
    def total(self) -> float:
        return sum(each for each, _ in self.kernels.values())


def profiled(workload: Workload, method: Method, rank: int, card: Card, steps: int) -> tuple[Breakdown, float]:
    """(breakdown, milliseconds of an unprofiled step)."""
    step = Step(workload, method)
    for _ in range(4):
        step.run()
    plain = median(card.times(step.run, 10))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card.cuda else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(steps):
            step.run()
        if card.cuda:
            torch.cuda.synchronize()
    found = Breakdown(rank, steps, card.cuda)
    found.add(profiler.events())
    return found, plain


def ceilings(card: Card, tokens: int, rank: int, tiny: bool) -> dict[str, Any]:
    """What this card does: copies, and bf16 products of the shapes that a step is made of."""
    scale = 64 if tiny else 1
    rates = {}
    for n, m in SHAPES:
        n, m = n // scale, m // scale
        rates[f"{tokens}x{n} @ {n}x{m}"] = card.gemm_tflop_s(tokens, n, m, torch.bfloat16)
    for n in sorted({width // scale for shape in SHAPES for width in shape}):
        rates[f"{tokens}x{n} @ {n}x{rank}"] = card.gemm_tflop_s(tokens, n, rank, torch.bfloat16)
        rates[f"{tokens}x{rank} @ {rank}x{n}"] = card.gemm_tflop_s(tokens, rank, n, torch.bfloat16)
    return {"copy_gb_s": card.copy_gb_s((1 << 20) if tiny else (1 << 31)), "gemm_tflop_s": rates}


def differences(ours: dict, base: dict, count: int) -> list[tuple[Any, float, float, float, float]]:
    """(key, us here, us in the base, launches here, launches in the base), the largest difference
    first.
    """
    keys = set(ours) | set(base)
    rows = [
        (key, *(ours.get(key, [0.0, 0.0])[i] if d else base.get(key, [0.0, 0.0])[i] for i in (0, 1) for d in (1, 0)))
        for key in keys
    ]
    return sorted(rows, key=lambda row: -abs(row[1] - row[2]))[:count]


def _beside(here: float, base: float) -> list[str]:
    return [f"{here:.0f}", f"{base:.0f}", f"{here - base:+.0f}"]


def show(name: str, ours: Breakdown, base: Breakdown, limits: dict[str, Any], count: int) -> dict[str, Any]:
    print(f"\n## {name}: us a step of kernels, and beside the frozen base's\n")
    groups = [(group, ours.groups.get(group, 0.0), base.groups.get(group, 0.0)) for group in GROUPS]
    groups.append(("all kernels", ours.total, base.total))
    print(table(["group", name, "frozen base", "difference"], [[w, *_beside(a, b)] for w, a, b in groups]))
    kernels = differences(ours.kernels, base.kernels, count)
    head = ["kernel", "us", "base us", "difference", "launches", "base"]
    cells = [
        [f"`{key[:110].replace('|', '/')}`", *_beside(a, b), f"{n:.0f}", f"{m:.0f}"] for key, a, b, n, m in kernels
    ]
    print(f"\n{table(head, cells)}")
    operations, rows = differences(ours.operations, base.operations, count), []
    best = max(limits["gemm_tflop_s"].values())
    cells = []
    for (operation, shapes), a, b, launched, before in operations:
        least = floor_us(operation, json.loads(shapes), best, limits["copy_gb_s"])
        least = None if least is None else least * launched
        shown = "" if least is None else f"{least:.0f}"
        cells.append([f"{operation} {shapes}", *_beside(a, b), f"{launched:.0f}", shown])
        rows.append(
            {"operation": operation, "shapes": json.loads(shapes), "us": a, "base_us": b, "launches": launched,
             "base_launches": before, "floor_us": least}
        )  # fmt: skip
    print(f"\n{table(['operation and shapes', 'us', 'base us', 'difference', 'launches', 'floor us'], cells)}")
    return {
        "groups": {group: [ours.groups.get(group, 0.0), base.groups.get(group, 0.0)] for group in GROUPS},
        "kernels_us": [ours.total, base.total],
        "kernels": [
            dict(zip(("name", "us", "base_us", "launches", "base_launches"), row, strict=True)) for row in kernels
        ],
        "operations": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--steps", type=int, default=3, help="profiled steps")
    parser.add_argument("--count", type=int, default=25, help="rows of the largest differences")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu_profile.json"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    card = Card(arguments.device)
    tokens = 32 if arguments.tiny else arguments.tokens
    workload = Workload("8b", "bf16", arguments.device, arguments.layers, tokens, arguments.tiny)
    machine, limits = card.describe(), ceilings(card, tokens, arguments.rank, arguments.tiny)
    print(f"{machine['device']}, torch {machine['torch']}; copy {limits['copy_gb_s']:.0f} GB/s read and written")
    print("".join(f"  {shape}: {rate:.0f} TFLOP/s\n" for shape, rate in limits["gemm_tflop_s"].items()), end="")
    base, base_ms = profiled(workload, BASE, arguments.rank, card, arguments.steps)
    result: dict[str, Any] = {
        "machine": machine,
        "ceilings": limits,
        "tokens": tokens,
        "base_ms": base_ms,
        "methods": {},
    }
    for method in lofts(arguments.rank):
        card.clear()
        ours, ms = profiled(workload, method, arguments.rank, card, arguments.steps)
        print(f"\nunprofiled step: {ms:.2f} ms, frozen base {base_ms:.2f} ms")
        result["methods"][method.name] = {"ms": ms, **show(method.name, ours, base, limits, arguments.count)}
        part = arguments.out.with_name(arguments.out.name + ".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(arguments.out)


if __name__ == "__main__":
    main()
