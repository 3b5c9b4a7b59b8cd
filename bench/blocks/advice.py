"""Blocks of the README and of docs/choosing: which rate to start from, and what an adapter weighs on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matrices import LLAMA_8B

from loft_rs import LoftConfig, advice

from .text import short, table

LAYERS = 32  # of Llama-3.1-8B, each with the seven linears of LLAMA_8B
RANKS = (16, 32, 64, 128)


def rates() -> str:
    """Support -> c of lr = c / r, the rate at r = 64, and what it costs beside the rate tuned for each task."""
    cells = [
        [f"`{name}`", short(c, 3), f"{advice.suggest_lr(LoftConfig(r=64, support=name)):g}", short(advice.COSTS[name])]
        for name, c in advice.RATES.items()
    ]
    return table(["support", "c", "learning rate at r = 64", "mean loss against the tuned rate"], cells)


def loft_numbers(r: int, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(trained numbers, numbers in the file) of LOFT on layers of shape (outputs, inputs): theta; theta, P and the energy."""
    return len(shapes) * r * (r - 1) // 2, sum(r * (r - 1) // 2 + n * r + 1 for _, n in shapes)


def lora_numbers(r: int, shapes: Sequence[tuple[int, int]]) -> int:
    """Numbers that LoRA trains, all of them in its file."""
    return sum(r * (m + n) for m, n in shapes)


def disk() -> str:
    """What LOFT and LoRA of one rank train and weigh on all linears of Llama-3.1-8B, in millions of bytes."""
    shapes = [shape for shape in LLAMA_8B.values() for _ in range(LAYERS)]
    cells = []
    for r in RANKS:
        trained, stored = loft_numbers(r, shapes)
        lora = lora_numbers(r, shapes)
        sizes = [count * width / 1e6 for count in (stored, lora) for width in (4, 2)]
        cells.append([r, f"{trained:,}", f"{lora:,}", *(f"{size:.0f}" for size in sizes)])
    head = ["r", "LOFT trains", "LoRA trains", "LOFT fp32, MB", "bf16", "LoRA fp32, MB", "bf16"]
    return table(head, cells)


BLOCKS: dict[str, Callable[[], str]] = {"rates": rates, "disk": disk}
