"""The compiled core. `loft_rs.linalg` and `loft_rs.select_support` are the public forms of what is here.

`_Matrix`: a 2-D array of float16, float32 or float64 with any strides, or (uint16 array, "bfloat16"); read in place.
Errors come before any work and name the argument: TypeError, ValueError, NonFiniteError.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypedDict, type_check_only

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "NonFiniteError",
    "cayley",
    "coordinate_indices",
    "householder_wy",
    "orthonormalize",
    "random_basis",
    "randomized_svd",
    "select",
    "skew_planes",
    "skew_project",
]

_Matrix: TypeAlias = NDArray[np.floating[Any]] | tuple[NDArray[np.uint16], str]
_Floats: TypeAlias = NDArray[np.floating[Any]]

@type_check_only
class _Selection(TypedDict):
    basis: NDArray[np.float32]
    values: NDArray[np.float64]
    energy: float
    energy_stderr: float
    residuals: NDArray[np.float64]
    gap: float
    passes: int
    columns: int
    seconds: float

@type_check_only
class _SvdInfo(TypedDict):
    energy: float
    residuals: NDArray[np.float64]
    gap: float
    passes: int
    columns: int
    seconds: float

class NonFiniteError(ValueError): ...

def select(
    jobs: Sequence[tuple[str, _Matrix | None, _Matrix | None, int]],
    *,
    method: str,
    side: str,
    tol: float | None,
    seed: int,
    threads: int | None,
    progress: Callable[[str, int, int], object] | None,
) -> list[_Selection]: ...
def randomized_svd(
    a: _Matrix, rank: int, *, tol: float | None, seed: int, threads: int | None
) -> tuple[_Floats, NDArray[np.float64], _Floats, _SvdInfo]: ...
def skew_project(weight: _Matrix, grad: _Matrix, *, side: str, threads: int | None) -> _Floats: ...
def skew_planes(s: _Matrix, rank: int) -> tuple[_Floats, NDArray[np.float64]]: ...
def orthonormalize(a: _Matrix, *, threads: int | None) -> _Floats: ...
def cayley(a: _Matrix) -> _Floats: ...
def householder_wy(u: _Matrix) -> tuple[_Floats, _Floats]: ...
def random_basis(n: int, rank: int, seed: int) -> NDArray[np.float32]: ...
def coordinate_indices(n: int, rank: int, seed: int) -> NDArray[np.int64]: ...
