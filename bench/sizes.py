"""From a rank to trained numbers and bytes on disk: the table of docs/choosing.md, computed from the shapes of models.

    python bench/sizes.py            prints it
    python bench/sizes.py --write    puts it into the page

An adapter file holds, a layer, P in the base's precision and the trained numbers in float32; an exported LoRA holds A and B
in float32. `tests/features/test_documents.py` compares the sums with files that were written.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parent.parent / "docs" / "choosing.md"
RANKS = (8, 16, 32, 64, 128, 256)
_BLOCK = re.compile(r"(<!-- sizes: python bench/sizes.py --write -->\n).*?(<!-- end of sizes -->)", re.S)


class Model(NamedTuple):
    """Shapes (m, n) = (out, in) of the adapted layers of one block, how many blocks, and the bytes of a weight's number."""

    name: str
    layers: tuple[tuple[int, int], ...]
    blocks: int
    width: int


MODELS = (
    Model("MiniLM-L6, float32", ((384, 384),) * 4 + ((1536, 384), (384, 1536)), 6, 4),
    Model(
        "Llama-3.1-8B, bfloat16",
        ((4096, 4096),) * 2 + ((1024, 4096),) * 2 + ((14336, 4096),) * 2 + ((4096, 14336),),
        32,
        2,
    ),
)


def trained(model: Model, rank: int) -> int:
    """Numbers that `cayley` trains, r(r - 1)/2 a layer."""
    return model.blocks * len(model.layers) * (rank * (rank - 1) // 2)


def adapter_bytes(model: Model, rank: int) -> int:
    """P (n x r) of every layer and the trained numbers; names and shapes in the file's head apart."""
    return model.blocks * sum(n for _, n in model.layers) * rank * model.width + 4 * trained(model, rank)


def lora_trained(model: Model, rank: int) -> int:
    """Numbers of A (r x n) and B (m x r)."""
    return model.blocks * sum(m + n for m, n in model.layers) * rank


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"


def table() -> str:
    """A table a model, each with LoRA's r=8 below it."""
    lines = []
    for model in MODELS:
        count = model.blocks * len(model.layers)
        lines += [f"{model.name}, all {count} linear layers of the blocks:", ""]
        lines += ["| r | trained a layer | trained in all | adapter on disk | as LoRA, float32 |", "|" + "---:|" * 5]
        for rank in RANKS:
            sizes = (adapter_bytes(model, rank), 4 * lora_trained(model, rank))
            numbers = (f"{rank * (rank - 1) // 2:,}", f"{trained(model, rank):,}")
            lines.append("| " + " | ".join([str(rank), *numbers, *map(_megabytes, sizes)]) + " |")
        few = lora_trained(model, 8)
        lines += ["", f"PEFT's LoRA of r=8 there: {few:,} trained numbers, {_megabytes(4 * few)} in float32.", ""]
    return "\n" + "\n".join(lines) + "\n"


def on_page(text: str) -> str:
    """The page with the table in its place. ValueError where it has none."""
    text, count = _BLOCK.subn(lambda match: match[1] + table() + match[2], text)
    if count != 1:
        raise ValueError(f"{PAGE.name} must hold the marks of the table once, found {count}")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/choosing.md")
    if parser.parse_args().write:
        PAGE.write_text(on_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), end="")
