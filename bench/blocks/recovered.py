"""Blocks of bench/RECOVERED.md: OFT, BOFT, HRA and PSOFT beside PEFT's own."""

from __future__ import annotations

from collections.abc import Callable

from .sources import rows
from .text import table, tiny


def outputs() -> str:
    cells = [
        [
            row["method"],
            row["setting"].replace(" 1 factors", " 1 factor"),
            f"{row['adapter_moves']:.2f}",
            *(tiny(row.get(key)) for key in ("converted", "merged", "back")),
        ]
        for row in rows("recovered", "outputs")
    ]
    return table(["method", "setting", "moves", "converted", "merged", "back in PEFT"], cells, left=2)


def error(value: float) -> str:
    return tiny(value) if value < 0.5 else f"{value:.0f}"


def orthogonality() -> str:
    cells = [
        [row["method"], row["setting"], row["norm"], *(error(row[key]) for key in ("peft", "converted", "loft"))]
        for row in rows("recovered", "orthogonality")
    ]
    return table(["method", "setting", "norm of Q", "PEFT", "converted", "LOFT config"], cells, left=2)


BLOCKS: dict[str, Callable[[], str]] = {"same-outputs": outputs, "orthogonality": orthogonality}
