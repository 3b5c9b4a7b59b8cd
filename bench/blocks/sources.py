"""The rows that the blocks are made of, read once."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent.parent
Rows = list[dict[str, Any]]


@functools.cache
def sections(name: str) -> dict[str, Any]:
    """A report of `bench/results`, by section."""
    return json.loads((BENCH / "results" / f"{name}.json").read_text(encoding="utf-8"))


def rows(name: str, section: str) -> Rows:
    """The rows of one section; KeyError names what is missing."""
    return sections(name)[section]["rows"]


def one(found: Rows, **fields: Any) -> dict[str, Any]:
    """The only row with these fields."""
    mine = [row for row in found if all(row.get(key) == value for key, value in fields.items())]
    if len(mine) != 1:
        raise LookupError(f"{len(mine)} rows with {fields}, expected one")
    return mine[0]


@functools.cache
def lines(path: str) -> Rows:
    """A JSON-lines file under `bench`."""
    return [json.loads(line) for line in (BENCH / path).read_text(encoding="utf-8").splitlines() if line]


def runs() -> Rows:
    """All runs of the quality bench, family by family."""
    return [
        line
        for path in sorted((BENCH / "quality" / "runs").glob("*.jsonl"))
        for line in lines(f"quality/runs/{path.name}")
    ]
