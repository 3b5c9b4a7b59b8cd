"""The names of all transforms."""

from __future__ import annotations

from loft_rs.transform.transforms import TRANSFORMS

VARIANTS = [
    "cayley_neumann:1",
    "cayley_neumann:3",
    "cayley+magnitudes",
    "exp+magnitudes",
    "cayley+halves",
    "exp+halves",
    "cayley_neumann:2+magnitudes",
]


NAMES = [*sorted(TRANSFORMS), *VARIANTS]
