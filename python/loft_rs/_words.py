"""Words that messages share: how to install an extra, counts, long lists cut short, the nearest
name.

The standard library alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

__all__ = ["count", "did_you_mean", "how_to_install", "some"]

SHOWN = 3


def how_to_install(extra: str) -> str:
    """What to type for an extra. loft_rs is not on the package index: it comes from a clone."""
    return f'pip install ".[{extra}]" in a clone of loft_rs'


def count(number: int, noun: str) -> str:
    """A number with its noun: 1 pass, 2 passes."""
    plural = noun + ("es" if noun.endswith(("s", "ch", "x")) else "s")
    return f"{number} {noun if number == 1 else plural}"


def some(names: Sequence[str], shown: int = SHOWN) -> str:
    """The first few names and how many more. Four are named: `and 1 more` is no shorter."""
    if len(names) <= shown + 1:
        return ", ".join(names)
    return f"{', '.join(names[:shown])} and {len(names) - shown} more"


def did_you_mean(name: str, known: Iterable[str] | Collection[str]) -> str:
    """The end of a message: the known name that is nearest, or nothing."""
    from difflib import get_close_matches

    nearest = get_close_matches(name, list(known), 1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
