"""What several files check their arguments with, and how their messages name a layer."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any


def is_int(value: Any) -> bool:
    """An integer of any kind, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def of(name: str) -> str:
    """The end of an argument's name in a message; nothing for a single matrix."""
    return f" of {name!r}" if name else ""


def check_names(argument: str, mapping: Mapping, reference: str, names: Mapping) -> None:
    """ValueError where the names in `argument` are not those in `reference`."""
    missing, extra = [name for name in names if name not in mapping], [name for name in mapping if name not in names]
    if missing or extra:
        parts = [
            f"{what} {', '.join(map(repr, some))}"
            for what, some in (("lacks", missing), ("has the unknown", extra))
            if some
        ]
        raise ValueError(f"{argument} must have the names of {reference}; it {' and '.join(parts)}")
