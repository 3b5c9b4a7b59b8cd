"""Blocks of the README and of docs/choosing: which rate to start from, and what an adapter weighs
on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matrices import LLAMA_8B

from loft_rs import LoftConfig, advice

from .text import short, table

LLAMA = [shape for shape in LLAMA_8B.values() for _ in range(32)]  # (outputs, inputs) of all linears of its blocks
MINILM = [(384, 384)] * 24 + [(1536, 384), (384, 1536)] * 6
RANKS = (16, 32, 64, 128)


def rates() -> str:
    """Support -> c of lr = c / r, the rate at r = 64, and what it costs beside the rate tuned for
    each task.
    """
    cells = [
        [
            f"`{name}`",
            short(c, 3).rstrip("0"),
            f"{advice.suggest_lr(LoftConfig(r=64, support=name)):g}",
            short(advice.COSTS[name]),
        ]
        for name, c in advice.RATES.items()
    ]
    return table(["support", "c", "learning rate at r = 64", "mean loss against the tuned rate"], cells)


def choose() -> str:
    """A user's case -> the config, the rate to start from, and what is done before training."""
    rows = (
        ("images, text classification, new languages", "", None, "nothing"),
        ("mathematics with a language model", ', support="pilot"', "pilot", "32 low-rank steps"),
        ("the same, with more steps", ", support=Pilot(steps=64, halves=True)", "pilot", "64 such steps"),
        ("to study the gradient's directions", ', support="gradsvd"', "gradsvd", "2 passes over 8 batches"),
    )
    cells = []
    for case, options, support, before in rows:
        config = LoftConfig(r=64, **({"support": support} if support else {}))
        cells.append([case, f"`r=64{options}`", short(advice.suggest_lr(config), 4).rstrip("0"), before])
    return table(["your case", "`LoftConfig(...)`", "rate", "before training"], cells, left=2)


def loft_sizes(r: int, shapes: Sequence[tuple[int, int]], width: int) -> tuple[int, int]:
    """(trained numbers, bytes of the tensors in the file) of LOFT on layers of shape
    (outputs, inputs) of a base with `width` bytes a number: P is in the base's precision; theta and
    the energy of each layer are float32."""
    trained = len(shapes) * r * (r - 1) // 2
    return trained, width * r * sum(n for _, n in shapes) + 4 * (trained + len(shapes))


def lora_numbers(r: int, shapes: Sequence[tuple[int, int]]) -> int:
    """Numbers that LoRA trains, all of them in its file."""
    return sum(r * (m + n) for m, n in shapes)


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}" if count < 1e8 else f"{count / 1e6:,.0f}"


def disk() -> str:
    """What LOFT and LoRA of one rank train and weigh on all linears of Llama-3.1-8B in bfloat16, in
    millions of bytes.
    """
    cells = []
    for r in RANKS:
        trained, stored = loft_sizes(r, LLAMA, 2)
        lora = lora_numbers(r, LLAMA)
        cells.append([r, f"{trained:,}", f"{lora:,}", *(f"{size / 1e6:.0f}" for size in (stored, 4 * lora, 2 * lora))])
    return table(["r", "LOFT trains", "LoRA trains", "LOFT, MB", "LoRA fp32, MB", "LoRA bf16, MB"], cells)


def sizes(shapes: Sequence[tuple[int, int]], width: int) -> str:
    """Rank -> what LOFT trains and weighs, and what it weighs as a LoRA in float32; PEFT's LoRA of
    r=8 is the last row.
    """
    cells = []
    for r in (8, 16, 32, 64, 128, 256):
        trained, stored = loft_sizes(r, shapes, width)
        exported = megabytes(4 * lora_numbers(r, shapes))
        cells.append([r, f"{r * (r - 1) // 2:,}", f"{trained:,}", megabytes(stored), exported])
    few = lora_numbers(8, shapes)
    cells.append(["LoRA r=8", "", f"{few:,}", "", megabytes(4 * few)])
    return table(["r", "trained a layer", "trained in all", "on disk, MB", "as LoRA, MB"], cells, left=0)


BLOCKS: dict[str, Callable[[], str]] = {
    "choose": choose,
    "rates": rates,
    "disk": disk,
    "sizes-minilm": lambda: sizes(MINILM, 4),
    "sizes-llama": lambda: sizes(LLAMA, 2),
}
