"""`select_support`: supports from dense matrices.

With G = dL/dW and W0 both (m, n) = (out, in), on the input side (the output side takes the
left-hand counterpart):

    gradsvd      top-r right singular vectors of G
    skewgrad     top-r invariant subspace of S = (W0^T G - G^T W0) / 2
    principal    top-r right singular vectors of W0
    random       Q of a Gaussian
    coordinate   r columns of the identity

The work is done in Rust (`loft_rs._core.select`); this file checks every argument before any of it
begins.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .._checks import check_names, is_int, of
from .._words import some
from ..linalg import as_matrix
from .blind import BLIND, select_blind, shape_of
from .gradient_factors import Factored, padded
from .methods import METHODS, SIDES
from .support import Support

if TYPE_CHECKING:
    from .budget import Budget

__all__ = ["select_support"]


def select_support(
    grads: Any,
    rank: int | Mapping[str, int] | Budget,
    *,
    method: str = "gradsvd",
    weights: Any = None,
    side: str = "input",
    tol: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[str, int, int], object] | None = None,
) -> Support | dict[str, Support]:
    """Choose a support for one matrix, or one for each matrix of a mapping.

    grads: (m, n) = (out, in) gradient, a NumPy array or a torch tensor (f16, bf16, f32, f64; any
        strides; any device), or a pair (dY, X) of them, (N, m) and (N, n), for the gradient dY^T X,
        or a mapping of either
    rank: columns of the basis, 1..min(m, n), or a mapping with the same names, or a `Budget` that
        shares even ranks out so that the layers together capture the most energy (gradsvd,
        skewgrad, principal)
    method: gradsvd (grads), skewgrad (grads and weights), principal (weights alone), random or
        coordinate (either, for the shape)
    weights: W0, like `grads`
    side: "input" for W = W0 R, "output" for W = R W0
    tol: largest fraction of the captured energy that may be missing, by the Ritz residuals; None
        for a fixed depth with at most about 1 percent missing, after which a flat spectrum is given
        up on: `gap` and `residuals` tell
    progress: called as progress(name, done, in_all) after each layer; raising stops the call. With
        a `Budget` a layer that turns out to deserve more than it was first solved for is solved,
        and counted, again, and in_all grows

    A mapping gives, bit for bit, what single calls with the same seed give. A mapping and a
    `Budget` give an `Allocation`: a dict with the parameters given out and the proven gap to the
    best allocation; a layer that is given rank 0 is not in it.

    >>> loft_rs.select_support(G, 8)
    Support(gradsvd, input side, 64 x 8, energy ..., ...)
    >>> loft_rs.select_support(G, 8, weights=W0, method="skewgrad").basis.shape
    (64, 8)
    """
    from .allocate import shared_supports
    from .budget import Budget

    _check_options(method, side, tol, seed, threads, progress)
    if isinstance(rank, Budget) and method in BLIND:
        raise ValueError(f"rank may not be a Budget with {method!r}, which has no spectrum to share it by")
    single, layers = _layers(grads, weights, method)
    ranks = {} if isinstance(rank, Budget) else _ranks(rank, single, layers)
    matrices = {name: _matrices(name, grad, weight) for name, (grad, weight) in layers.items()}
    shapes = {name: _common_shape(name, grad, weight) for name, (grad, weight) in matrices.items()}

    def solve(ranks: Mapping[str, int], progress: Callable | None) -> dict[str, Support]:
        jobs = []
        for name, rank in ranks.items():
            grad, weight = matrices[name]
            jobs.append((name, padded(grad, rank, side), padded(weight, rank, side), rank))
        if method in BLIND:
            chosen = select_blind(jobs, method, side, seed, progress)
        else:
            from .. import _core

            found = _core.select(jobs, method=method, side=side, tol=tol, seed=seed, threads=threads, progress=progress)
            chosen = [Support(method=method, side=side, seed=seed, **each) for each in found]
        return dict(zip(ranks, chosen, strict=True))

    _check_ranks(ranks, shapes)
    for name, (grad, weight) in matrices.items():
        if isinstance(grad, Factored):
            matrices[name] = grad.problem(weight, method, side)
    odd = [name or "the matrix" for name, each in ranks.items() if each % 2 and method == "skewgrad"]
    if odd:
        warnings.warn(
            f"with skewgrad an odd rank gains nothing over the even one below it: {some(odd)}",
            stacklevel=2,
        )
    budget = rank if isinstance(rank, Budget) else None
    named = shared_supports(budget, shapes, solve, progress) if budget else solve(ranks, progress)
    return named[""] if single else named


def _check_options(method: Any, side: Any, tol: Any, seed: Any, threads: Any, progress: Any) -> None:
    if method == "activation":
        raise ValueError("method 'activation' needs a layer's inputs, so it exists in loft_rs.calibrate only")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if side not in SIDES:
        raise ValueError(f"side must be 'input' or 'output', not {side!r}")
    if tol is not None and not (isinstance(tol, numbers.Real) and 0 < float(tol) < 1):
        raise ValueError(f"tol must be a number between 0 and 1, or None, not {tol!r}")
    if not is_int(seed) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, not {seed!r}")
    if threads is not None and (not is_int(threads) or threads < 1):
        raise ValueError(f"threads must be an integer from 1 to 1024, or None, not {threads!r}")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable, not {type(progress).__name__}")


def _layers(grads: Any, weights: Any, method: str) -> tuple[bool, dict[str, tuple[Any, Any]]]:
    """(one matrix?, name -> (gradient, weight)); the name of a single matrix is empty."""
    _check_presence(grads, weights, method)
    given = [(argument, value) for argument, value in (("grads", grads), ("weights", weights)) if value is not None]
    mappings = [isinstance(value, Mapping) for _, value in given]
    if not any(mappings):
        return True, {"": (grads, weights)}
    if not all(mappings):
        raise TypeError("grads and weights must both be single matrices, or both mappings with the same names")
    for argument, value in given:
        if not value:
            raise ValueError(f"{argument} is an empty mapping")
        wrong = next((name for name in value if not isinstance(name, str) or not name), None)
        if wrong is not None:
            raise TypeError(f"the names in {argument} must be non-empty strings, not {wrong!r}")
        none = next((name for name in value if value[name] is None), None)
        if none is not None:
            raise TypeError(f"{argument}[{none!r}] must be a matrix, not None")
    if len(given) == 2:
        check_names("weights", weights, "grads", grads)
    names = given[0][1]
    return False, {name: (grads and grads[name], weights and weights[name]) for name in names}


def _check_presence(grads: Any, weights: Any, method: str) -> None:
    if method == "gradsvd" and weights is not None:
        raise ValueError("weights have no part in method 'gradsvd': leave them out, or choose method='skewgrad'")
    if method == "principal" and grads is not None:
        raise ValueError("grads have no part in method 'principal': pass None in their place and weights=W0")
    if grads is None and method in ("gradsvd", "skewgrad"):
        raise ValueError(f"grads are missing: method {method!r} needs {_NEEDS[method]}")
    if weights is None and method in ("skewgrad", "principal"):
        raise ValueError(f"weights are missing: method {method!r} needs {_NEEDS[method]}")
    if grads is None and weights is None:
        raise ValueError(f"method {method!r} needs {_NEEDS[method]}, and neither grads nor weights were given")


_NEEDS = {
    "gradsvd": "grads",
    "skewgrad": "both grads and weights",
    "principal": "weights",
    "random": "grads or weights, for the shape",
    "coordinate": "grads or weights, for the shape",
}


def _ranks(rank: Any, single: bool, layers: Mapping) -> dict[str, int]:
    if isinstance(rank, Mapping):
        if single:
            raise TypeError("rank may be a mapping only where grads or weights are one")
        check_names("rank", rank, "the matrices", layers)
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(layers, rank)
    for name, each in ranks.items():
        if not is_int(each):
            raise TypeError(f"rank{of(name)} must be an integer, not {type(each).__name__}")
        if each < 1:
            raise ValueError(f"rank{of(name)} must be at least 1, not {each}")
    return {name: int(ranks[name]) for name in layers}


def _matrices(name: str, grad: Any, weight: Any) -> tuple[Any, Any]:
    place = f"[{name!r}]" if name else ""
    if isinstance(grad, tuple):
        grad = Factored(grad, f"grads{place}")
    elif grad is not None:
        grad = as_matrix(grad, f"grads{place}")
    return grad, None if weight is None else as_matrix(weight, f"weights{place}")


def _common_shape(name: str, grad: Any, weight: Any) -> tuple[int, int]:
    shapes = {shape_of(matrix) for matrix in (grad, weight) if matrix is not None}
    if len(shapes) > 1:
        raise ValueError(
            f"grads{of(name)} is {shape_of(grad)} and weights{of(name)} is {shape_of(weight)}: the shapes must be equal"
        )
    (shape,) = shapes
    if 0 in shape:
        raise ValueError(f"the matrix{of(name)} is empty: its shape is {shape}")
    return shape


def _check_ranks(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> None:
    for name, rank in ranks.items():
        m, n = shapes[name]
        if rank > min(m, n):
            raise ValueError(f"rank{of(name)} is {rank}, but a {m} x {n} matrix allows at most {min(m, n)}")
