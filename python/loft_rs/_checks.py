"""What several files check their arguments with, and how their messages name a layer."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


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


def retired(**places: str) -> Callable[[F], F]:
    """Let a function refuse arguments that it once took, by TypeError, naming where each is said
    now.
    """

    def wrap(function: F) -> F:
        @functools.wraps(function)
        def checked(*args: Any, **given: Any) -> Any:
            for name in given:
                if name in places:
                    raise TypeError(f"{function.__name__}() no longer takes {name}: {places[name]}")
            return function(*args, **given)

        return checked  # type: ignore[return-value]

    return wrap
