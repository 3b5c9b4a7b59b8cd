"""Supports: the frozen orthonormal columns P of R = I + P D P^T. NumPy and Rust, no torch.

methods.py            the ways to choose a support
support.py            Support
select.py             select_support: checks, then the core
blind.py              random and coordinate ones
budget.py             Budget, share_ranks: one number of parameters shared out as ranks
allocate.py           solve, share, solve again
gradient_factors.py   a gradient given as (dY, X)
custom.py             a basis of the user's own
files.py              save_supports, load_supports
"""

from .allocate import shared_supports
from .budget import Allocation, Budget, share_ranks
from .files import load_supports, save_supports
from .gradient_factors import Factored
from .methods import METHODS, SIDES
from .select import select_support
from .support import Support

__all__ = [
    "METHODS",
    "SIDES",
    "Allocation",
    "Budget",
    "Factored",
    "Support",
    "load_supports",
    "save_supports",
    "select_support",
    "share_ranks",
    "shared_supports",
]
