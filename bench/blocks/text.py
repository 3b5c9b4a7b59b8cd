"""How a table and its numbers are written: the one printer of the benches, the report and the
pages. Imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

REMARKS = ("error", "note", "recompile_limit", "no_full_graph", "why")  # fields that stand behind a method's name


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """A Markdown table. left: so many first columns hold words and are set to the left; the others
    hold numbers.
    """
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * left + "---:|" * (len(head) - left)]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def method_table(rows: Sequence[dict[str, Any]], shown: dict[str, tuple[str, str]], first: str = "method") -> str:
    """Rows by method. shown: field -> (heading, format), left out where no row has it."""
    used = {key: each for key, each in shown.items() if any(row.get(key) is not None for row in rows)}
    found = []
    for row in rows:
        remark = "".join(f" ({row[key]})" for key in REMARKS if row.get(key))
        cells = [form.format(row[key]) if row.get(key) is not None else "" for key, (_, form) in used.items()]
        found.append([f"{row['method']}{remark}".replace("|", "/"), *cells])
    return table([first, *(name for name, _ in used.values())], found)


def short(value: float, digits: int = 3, sign: bool = False) -> str:
    """`.885`, `-.012`, `1.07`: no zero before the point."""
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and text.lstrip("+-").startswith("0.") else text


def tiny(value: float | None, digits: int = 1) -> str:
    """`4.1e-7`, with `0` for nothing at all."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"
