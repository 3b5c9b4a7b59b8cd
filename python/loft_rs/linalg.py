"""The numerical core in Rust for NumPy arrays and torch tensors: what supports and transforms are
made of.

Every function takes 2-D NumPy arrays or torch tensors (float32, float64, float16, bfloat16; any
strides; CPU or GPU) and returns NumPy arrays: float64 for float64 input, float32 otherwise. CPU
input is read where it lies. Bad input is refused before any work: TypeError for what is not a
matrix, `NonFiniteError` (a ValueError) for NaN and Inf, ValueError for the rest, each naming the
argument. Results have the same bits for any `threads`; the default is torch's thread count where
torch is loaded, else the cores, and LOFT_RS_NUM_THREADS overrides that default.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from . import _core
from ._core import NonFiniteError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "NonFiniteError",
    "TruncatedSVD",
    "as_matrix",
    "cayley",
    "coordinate_indices",
    "householder_wy",
    "orthonormalize",
    "random_basis",
    "randomized_svd",
    "row_blocks",
    "skew_planes",
    "skew_project",
]

Matrix: TypeAlias = "NDArray[np.floating] | tuple[NDArray[np.uint16], str]"
_FLOATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))
# Entries that are widened at a time.
_ROWS_AT_ONCE = 1 << 22
_WANTED = "a 2-D NumPy array or torch tensor of float32, float64, float16 or bfloat16"


class TruncatedSVD(NamedTuple):
    """`a` is about `u @ diag(s) @ vt`, and what is known about how well."""

    u: NDArray[np.floating]
    """(m, r) orthonormal columns."""
    s: NDArray[np.float64]
    """(r,) singular values, descending."""
    vt: NDArray[np.floating]
    """(r, n) orthonormal rows; the largest entry of each is positive."""
    energy: float
    """Captured fraction of ||a||_F^2."""
    residuals: NDArray[np.float64]
    """(r,) ||a^T u_i - s_i v_i||."""
    gap: float
    """(s_r - s_{r+1}) / s_r; NaN at full rank. Near 0 the last directions are not determined by `a`."""
    passes: int
    """Passes over the data; 1 where the dense SVD was cheaper."""
    columns: int
    """Columns multiplied with `a`, summed over the passes: 2 m n operations each; 0 where the dense SVD was cheaper."""
    seconds: float
    """Wall-clock time in the core."""


def as_matrix(array: Any, argument: str) -> Matrix:
    """`array` as the core reads it, without a copy on the CPU; bfloat16 becomes (its bits as
    uint16, "bfloat16").

    TypeError or ValueError, naming `argument`, for anything but a dense real floating-point matrix.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, getattr(torch, "Tensor", ())):
        return _from_torch(torch, array, argument)
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{argument} must be {_WANTED}, got {type(array).__name__}")
    # A masked array or a matrix subclass would answer differently from the memory that the core
    # reads.
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{argument} must be {_WANTED}, got a masked array")
    _two_dimensional(array, argument)
    if array.dtype.name == "bfloat16":
        return array.view(np.uint16), "bfloat16"
    if array.dtype.newbyteorder("=") not in _FLOATS:
        raise TypeError(f"{argument} must be {_WANTED}, got dtype {array.dtype}")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _from_torch(torch: Any, tensor: Any, argument: str) -> Matrix:
    if tensor.is_meta:
        raise ValueError(f"{argument} is a meta tensor, which holds no data; load it first")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{argument} must be {_WANTED}, got a tensor of layout {tensor.layout}; use .to_dense()")
    if tensor.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise TypeError(f"{argument} must be {_WANTED}, got dtype {tensor.dtype}")
    _two_dimensional(tensor, argument)
    tensor = tensor.detach().cpu().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy(), "bfloat16"
    return tensor.numpy()


def row_blocks(matrix: Any, scale: float = 1.0):
    """Rows over `scale` in float64, a block at a time; bfloat16 comes as
    (uint16 array, "bfloat16").
    """
    bits = isinstance(matrix, tuple)
    array = matrix[0] if bits else matrix
    step = max(1, _ROWS_AT_ONCE // array.shape[1])
    for start in range(0, array.shape[0], step):
        rows = array[start : start + step]
        rows = (rows.astype(np.uint32) << 16).view(np.float32) if bits else rows
        yield start, rows.astype(np.float64, order="C") / scale  # one layout, one order of summation


def _two_dimensional(array: Any, argument: str) -> None:
    if array.ndim != 2:
        raise ValueError(f"{argument} must be 2-D, got shape {tuple(array.shape)}")


def randomized_svd(
    a: Any, rank: int, *, tol: float | None = None, seed: int = 0, threads: int | None = None
) -> TruncatedSVD:
    """The `rank` leading singular triplets of `a` (m, n): randomised block Krylov, or dense for
    `rank` near min(m, n).

    `tol` asks for at most that fraction of the captured energy to be missing, as judged by the
    residuals. The default takes the depth that decaying spectra need and goes a little deeper while
    that estimate stays above 1e-2: about 1e-4 is then missing on singular values that fall like
    i^-0.5, less on faster decay, at most 1e-3 on MiniLM's weights.
    """
    u, s, vt, info = _core.randomized_svd(as_matrix(a, "a"), rank, tol=tol, seed=seed, threads=threads)
    return TruncatedSVD(u, s, vt, **info)


def skew_project(weight: Any, grad: Any, *, side: str = "input", threads: int | None = None) -> NDArray[np.floating]:
    """(W^T G - G^T W) / 2 (n, n) for `side="input"`, (G W^T - W G^T) / 2 (m, m) for "output"; W and
    G are (m, n).
    """
    return _core.skew_project(as_matrix(weight, "weight"), as_matrix(grad, "grad"), side=side, threads=threads)


def skew_planes(s: Any, rank: int) -> tuple[NDArray[np.floating], NDArray[np.float64]]:
    """(V, sigma): the top-`rank` invariant subspace V (k, r) of a skew `s` (k, k), each column's
    plane strength (r,).

    Columns come in plane pairs with v_1^T s v_2 = sigma, each strength twice, descending; the last
    column of an odd `rank` lies in the next plane and has strength 0, since half a plane captures
    nothing.
    """
    return _core.skew_planes(as_matrix(s, "s"), rank)


def orthonormalize(a: Any, *, threads: int | None = None) -> NDArray[np.floating]:
    """Q of `a` = Q R (n, r), r <= n, with diag(R) >= 0; completed deterministically where `a` is
    rank deficient.
    """
    return _core.orthonormalize(as_matrix(a, "a"), threads=threads)


def cayley(a: Any) -> NDArray[np.floating]:
    """(I - A)(I + A)^{-1} of a skew-symmetric `a` (r, r), solved in float64."""
    return _core.cayley(as_matrix(a, "a"))


def householder_wy(u: Any) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """(Y, T) with H_0 H_1 ... H_{k-1} = I - Y T Y^T for the reflections along the columns of `u`
    (n, k).

    Y (n, k) has unit columns and T (k, k) = (I/2 + striu(Y^T Y))^{-1} is upper triangular.
    """
    return _core.householder_wy(as_matrix(u, "u"))


def random_basis(n: int, rank: int, *, seed: int = 0) -> NDArray[np.float32]:
    """Q of an (n, rank) Gaussian matrix that depends on `seed` alone."""
    return _core.random_basis(n, rank, seed)


def coordinate_indices(n: int, rank: int, *, seed: int = 0) -> NDArray[np.int64]:
    """`rank` distinct indices below `n`, ascending, that depend on `seed` alone."""
    return _core.coordinate_indices(n, rank, seed)
