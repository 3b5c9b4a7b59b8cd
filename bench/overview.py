"""The README's picture: quality against trained numbers, beside step time and activation memory,
from the benches' rows.

    python bench/overview.py          writes docs/pictures/overview.png

Left: NLL on GSM8K (SmolLM2-135M, 240 steps, mean of the seeds; quality/runs). Right: four
Llama-3.1-8B-shaped layers, 8192 tokens, bf16, r = 64, over the frozen model's (gpu_step_h100.json).
Drawn for a width of 700 pixels.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
OUT = HERE.parent / "docs" / "pictures" / "overview.png"
# method in the runs -> (label, horizontal and vertical offset in points, alignment)
POINTS = {
    "LOFT halves 64 r64": ("LOFT, pilot in halves", 8, -3, "left"),
    "LOFT pilot r46": ("LOFT, pilot", -9, -5, "right"),
    "LOFT principal r46": ("LOFT, principal", -9, -4, "right"),
    "OFT b4": ("OFT", 3, 9, "center"),
    "PSOFT": ("PSOFT", 8, 2, "left"),
    "LoRA r1": ("LoRA r=1", 9, -2, "left"),
    "LoRA r8": ("LoRA r=8", 8, 3, "left"),
    "full fine-tuning": ("all weights", -8, 4, "right"),
}
BARS = {"LOFT r64": "LOFT", "LoRA r64 bf16 adapters": "LoRA, bf16", "LoRA r64 fp32 adapters": "LoRA, fp32"}
BLUE, GREY = "#1f6fb2", "#8a8f98"


def quality() -> dict[str, tuple[int, float]]:
    """Method -> (trained numbers, NLL)."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for line in (HERE / "quality" / "runs" / "mathematics.jsonl").read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        if run["task"] == "gsm8k" and run["phase"] == "score" and run["method"] in POINTS:
            found[run["method"], run["trained"]].append(run["nll"])
    return {method: (trained, mean(scores)) for (method, trained), scores in found.items()}


def cost(field: str) -> dict[str, float]:
    """Method -> a ratio to the frozen model."""
    (path,) = HERE.rglob("gpu_step_h100.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["8b"]["rows"]
    return {BARS[row["method"]]: row[field] for row in rows if row["method"] in BARS}


def draw() -> plt.Figure:
    plt.rcParams.update(
        {"font.size": 13, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, (left, *right) = plt.subplots(1, 3, figsize=(14, 4.6), width_ratios=[2.3, 1, 1], layout="constrained")
    for method, (trained, nll) in quality().items():
        label, dx, dy, side = POINTS[method]
        ours = method.startswith("LOFT")
        left.plot(trained, nll, "o", color=BLUE if ours else GREY, markersize=10)
        weight = "bold" if ours else "normal"
        left.annotate(
            label,
            (trained, nll),
            (dx, dy),
            textcoords="offset points",
            ha=side,
            color=BLUE if ours else "#444",
            weight=weight,
        )
    left.set_xscale("log")
    left.set_xlim(1e4, 4e8)
    left.set_xlabel("trained numbers")
    left.set_title("GSM8K, NLL (lower is better)", loc="left", fontsize=14)
    for axis, field, title in zip(
        right,
        ("over_base", "activations_over_base"),
        ("step, over the frozen model", "activations, over it"),
        strict=True,
    ):
        values = cost(field)
        bars = axis.bar(
            list(values), [value - 1 for value in values.values()], bottom=1, color=[BLUE, GREY, GREY], width=0.6
        )
        axis.bar_label(bars, [f"{value:.2f}" for value in values.values()], padding=3)
        axis.set_ylim(1, 2.1)
        axis.set_yticks([1, 1.5, 2])
        axis.set_title(title, loc="left", fontsize=14)
        axis.tick_params(axis="x", labelsize=11)
    return figure


if __name__ == "__main__":
    OUT.parent.mkdir(parents=True, exist_ok=True)
    draw().savefig(OUT, dpi=100, facecolor="white")
