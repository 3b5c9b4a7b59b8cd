"""Supports: the frozen orthonormal columns P of R = I + P D P^T, and how they are chosen from dense matrices.

With G = dL/dW and W0 both (m, n) = (out, in), on the input side (the output side takes the left-hand counterpart):

    gradsvd      top-r right singular vectors of G
    skewgrad     top-r invariant subspace of S = (W0^T G - G^T W0) / 2
    principal    top-r right singular vectors of W0
    random       Q of a Gaussian
    coordinate   r columns of the identity

The work is done in Rust (`loft_rs._core.select`); this file checks every argument before any of it begins. `activation`
and `pilot` need the model's inputs and exist in calibration only.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ._checks import check_names, is_int, of
from .factored import Factored, padded
from .linalg import NonFiniteError, as_matrix, row_blocks

if TYPE_CHECKING:
    from .budget import Budget

METHODS = ("gradsvd", "skewgrad", "principal", "random", "coordinate")
SIDES = ("input", "output")
ORDERS = ("natural", "input_pca")
STORED_METHODS = (*METHODS, "activation", "pilot", "custom")
FORMAT_VERSION = 1

_METADATA_KEY = "loft_rs.supports"
_ARRAYS = {"basis": np.float32, "values": np.float64, "residuals": np.float64}
# ||P^T P - I||_2 of a float32 basis: ours stay under 50 eps; one that is read may have been made elsewhere.
_ORTHONORMAL = 100 * float(np.finfo(np.float32).eps)


@dataclass(frozen=True, eq=False, repr=False)
class Support:
    """A chosen basis and what it captured.

    basis: (n, r) float32, orthonormal columns (n is the layer's inputs, or its outputs on the output side)
    energy: captured fraction of the squared objective, in [0, 1]; nan where it is unknown
    energy_stderr: 0.0 where the energy is exact
    values: (r,) singular values (gradsvd, principal; of what a pilot changed, in halves for each of them), plane strengths twice each
        (skewgrad), ||G p_i|| (random, coordinate); nan where no matrix was given. From float32 or half input their squares are right
        to about 1e-6 of the largest, so values below 1e-3 of it are rounding; `loft_rs.linalg.randomized_svd` resolves more
    residuals: (r,) Ritz residual norms, rounding included; nan where no such problem was solved
    gap: (sigma_r - sigma_{r+1}) / sigma_r, in halves of what the first one reads; nan where there is no sigma_{r+1}
    passes: passes over the data
    columns: columns multiplied with the data, summed over the passes: 2 m n operations each (4 m n for skewgrad, which reads W0
        and G); 0 where no product was made, or with a dense decomposition
    """

    basis: np.ndarray
    energy: float
    energy_stderr: float
    values: np.ndarray
    residuals: np.ndarray
    gap: float
    passes: int
    seconds: float
    method: str
    side: str
    seed: int
    order: str = "natural"
    columns: int = 0

    @property
    def identifiable(self) -> bool:
        """Whether the last direction is told from the next: gap sigma_r > residual_r, or rank = min(m, n).

        False where the gap is 0 or no larger than what the residual (rounding included) can resolve, and for the odd last column
        of skewgrad: another seed may then choose other last directions that capture as much. Where the residual is nan the gap
        alone decides, and a nan gap leaves nothing to confuse.
        """
        last = self.values[-1]
        return math.isnan(self.gap) or not (self.gap == 0 or self.gap * last <= self.residuals[-1])

    @property
    def rank(self) -> int:
        """The number of columns."""
        return self.basis.shape[1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.basis, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.basis.shape))
        passes = f"{self.passes} pass" + ("" if self.passes == 1 else "es")
        return f"Support({self.method}, {self.side} side, {size}, energy {self.energy:.4f}, {passes})"


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

    grads: (m, n) = (out, in) gradient, a NumPy array or a torch tensor (f16, bf16, f32, f64; any strides; any device), or a
        pair (dY, X) of them, (N, m) and (N, n), for the gradient dY^T X, or a mapping of either
    rank: columns of the basis, 1..min(m, n), or a mapping with the same names, or a `Budget` that shares even ranks out so that
        the layers together capture the most energy (gradsvd, skewgrad, principal)
    method: gradsvd (grads), skewgrad (grads and weights), principal (weights alone), random or coordinate (either, for
        the shape)
    weights: W0, like `grads`
    side: "input" for W = W0 R, "output" for W = R W0
    tol: largest fraction of the captured energy that may be missing, by the Ritz residuals; None for a fixed depth with at most
        about 1 percent missing, after which a flat spectrum is given up on: `gap` and `residuals` tell
    progress: called as progress(name, done, in_all) after each layer; raising stops the call. With a `Budget` a layer that turns
        out to deserve more than it was first solved for is solved, and counted, again, and in_all grows

    A mapping gives, bit for bit, what single calls with the same seed give. A mapping and a `Budget` give an `Allocation`: a
    dict with the parameters given out and the proven gap to the best allocation; a layer that is given rank 0 is not in it.
    """
    from .budget import Budget, shared_supports

    _check_options(method, side, tol, seed, threads, progress)
    if isinstance(rank, Budget) and method in ("random", "coordinate"):
        raise ValueError(f"rank may not be a Budget with {method!r}, which has no spectrum to share it by")
    single, layers = _layers(grads, weights, method)
    ranks = {} if isinstance(rank, Budget) else _ranks(rank, single, layers)
    matrices = {name: _matrices(name, grad, weight) for name, (grad, weight) in layers.items()}
    shapes = {name: _common_shape(name, grad, weight) for name, (grad, weight) in matrices.items()}

    def solve(ranks: Mapping[str, int], progress: Callable | None) -> dict[str, Support]:
        jobs = [(name, *(padded(each, rank, side) for each in matrices[name]), rank) for name, rank in ranks.items()]
        if method in ("random", "coordinate"):
            chosen = _select_blind(jobs, method, side, seed, progress)
        else:
            from . import _core

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
            f"with skewgrad an odd rank gains nothing over the even one below it: {', '.join(odd)}",
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


def _shape(matrix: Any) -> tuple[int, int]:
    return (matrix[0] if isinstance(matrix, tuple) else matrix).shape


def _common_shape(name: str, grad: Any, weight: Any) -> tuple[int, int]:
    shapes = {_shape(matrix) for matrix in (grad, weight) if matrix is not None}
    if len(shapes) > 1:
        raise ValueError(
            f"grads{of(name)} is {_shape(grad)} and weights{of(name)} is {_shape(weight)}: the shapes must be equal"
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


def _select_blind(jobs: list, method: str, side: str, seed: int, progress: Callable | None) -> list[Support]:
    """random and coordinate: the matrix gives the shape, and the energy that was captured by chance."""
    scales = []
    for name, grad, weight, _ in jobs:
        given = [_scale(name, what, each) for what, each in (("grads", grad), ("weights", weight)) if each is not None]
        scales.append(given[0])
    zero = [name or "the matrix" for (name, *_), scale in zip(jobs, scales, strict=True) if scale == 0]
    if zero:
        raise ValueError(f"all entries are zero in {', '.join(zero)}: there is no direction to choose")
    chosen = []
    for done, ((name, grad, weight, rank), scale) in enumerate(zip(jobs, scales, strict=True), start=1):
        chosen.append(_blind(grad if grad is not None else weight, scale, rank, method, side, seed))
        if progress is not None:
            progress(name, done, len(jobs))
    return chosen


def _blind(matrix: Any, scale: float, rank: int, method: str, side: str, seed: int) -> Support:
    begun = time.perf_counter()
    support = blind_support(_shape(matrix)[1 if side == "input" else 0], rank, method=method, side=side, seed=seed)
    total = sum(float(np.square(rows).sum()) for _, rows in row_blocks(matrix, scale))
    captured = _captured(matrix, scale, support.basis.astype(np.float64), side)
    return replace(
        support,
        energy=min(1.0, float(captured.sum() / total)),
        energy_stderr=0.0,
        values=np.sqrt(captured) * scale,
        passes=1,
        seconds=time.perf_counter() - begun,
    )


def blind_support(width: int, rank: int, *, method: str, side: str, seed: int) -> Support:
    """A `random` or `coordinate` support of a layer `width` wide, chosen without any matrix, so of unknown energy."""
    from . import _core

    if method == "random":
        basis = _core.random_basis(width, rank, seed)
    else:
        basis = np.zeros((width, rank), np.float32)
        basis[_core.coordinate_indices(width, rank, seed), np.arange(rank)] = 1
    unknown = np.full(rank, math.nan)
    return Support(basis, math.nan, math.nan, unknown, unknown.copy(), math.nan, 0, 0.0, method, side, seed)


def _scale(name: str, argument: str, matrix: Any) -> float:
    """The power of two below the largest entry, so that no square of an entry over it overflows or vanishes; 0 if all are zero."""
    largest = 0.0
    for _, rows in row_blocks(matrix):
        if not np.isfinite(rows).all():
            raise NonFiniteError(f"{argument}{of(name)} has a NaN or an infinite entry")
        largest = max(largest, float(np.abs(rows).max()))
    return math.ldexp(1.0, math.frexp(largest)[1] - 1) if largest else 0.0


def _captured(matrix: Any, scale: float, basis: np.ndarray, side: str) -> np.ndarray:
    """||G p_i||^2 for every column (input side), ||G^T p_i||^2 (output side), of G over `scale`."""
    if side == "input":
        return sum(np.square(rows @ basis).sum(0) for _, rows in row_blocks(matrix, scale))
    product = sum(basis[start : start + len(rows)].T @ rows for start, rows in row_blocks(matrix, scale))
    return np.square(product).sum(1)


def cut_support(support: Support, rank: int) -> Support:
    """The leading `rank` columns of a gradsvd, skewgrad or principal support (skewgrad: an even number), and their energy."""
    if rank == support.rank:
        return support
    squares = np.square(support.values / support.values[0])
    kept = float(squares[:rank].sum() / squares.sum())
    last, following = support.values[rank - 1 : rank + 1]
    # The core's rule: where sigma_r is rounding, its direction is as arbitrary as the next one's.
    known = last > 8 * np.finfo(np.float32).eps * support.values[0]
    return replace(
        support,
        basis=np.ascontiguousarray(support.basis[:, :rank]),
        energy=support.energy * kept,
        energy_stderr=support.energy_stderr * kept,
        values=support.values[:rank].copy(),
        residuals=support.residuals[:rank].copy(),
        gap=float((last - following) / last) if known else 0.0,
    )


def save_supports(path: str | os.PathLike, supports: Support | Mapping[str, Support]) -> None:
    """Write supports to one safetensors file, bit for bit; the same supports give the same bytes."""
    from safetensors.numpy import save_file

    from ._io import whole_file

    if not isinstance(supports, (Support, Mapping)):
        raise TypeError(f"supports must be a Support or a mapping of names to them, not {type(supports).__name__}")
    if isinstance(supports, Support):
        named = {"": supports}
    else:
        named = dict(supports)
        wrong = [name for name in named if not isinstance(name, str) or not name]
        if wrong:
            raise TypeError(f"the names in supports must be non-empty strings, not {wrong[0]!r}")
        if not named:
            raise ValueError("supports is empty: there is nothing to save")
    tensors: dict[str, np.ndarray] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name, support in sorted(named.items()):
        if not isinstance(support, Support):
            raise TypeError(f"supports{of(name)} must be a Support, not {type(support).__name__}")
        arrays = {key: np.ascontiguousarray(getattr(support, key), dtype=kind) for key, kind in _ARRAYS.items()}
        scalars = {
            each.name: _plain(getattr(support, each.name)) for each in fields(Support) if each.name not in _ARRAYS
        }
        _validate(f"supports{of(name)}", arrays, scalars)
        tensors |= {f"{name}.{key}": array for key, array in arrays.items()}
        facts[name] = scalars
    header = json.dumps({"version": FORMAT_VERSION, "supports": facts}, sort_keys=True)
    with whole_file(path) as part:
        save_file(tensors, part, metadata={_METADATA_KEY: header})


def _plain(value: Any) -> Any:
    """A JSON scalar; nan, which JSON lacks, becomes null."""
    if isinstance(value, str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return None if math.isnan(value) else float(value)


def load_supports(path: str | os.PathLike) -> Support | dict[str, Support]:
    """Read what `save_supports` wrote. Anything else (truncated, another version, not orthonormal) is a ValueError."""
    from ._io import read_safetensors

    tensors, metadata = read_safetensors(path)
    facts = _facts(path, metadata)
    expected = {f"{name}.{key}" for name in facts for key in _ARRAYS}
    if expected != set(tensors):
        odd = sorted(expected ^ set(tensors))
        raise ValueError(
            f"{path}: tensors and list of supports differ: {', '.join(map(repr, odd[:4]))} missing or unexpected"
        )
    supports = {}
    for name, scalars in facts.items():
        arrays: dict[str, Any] = {key: np.array(tensors[f"{name}.{key}"]) for key in _ARRAYS}
        scalars = {"columns": 0} | scalars  # which older files lack
        _validate(f"{path}: the support{of(name)}", arrays, scalars)
        known: dict[str, Any] = {key: math.nan if value is None else value for key, value in scalars.items()}
        supports[name] = Support(**arrays, **known)
    return supports[""] if set(supports) == {""} else supports


def _facts(path: str | os.PathLike, metadata: Mapping[str, str]) -> dict[str, dict]:
    if _METADATA_KEY not in metadata:
        raise ValueError(f"{path}: not a file that loft_rs.save_supports wrote (no {_METADATA_KEY!r} in its metadata)")
    try:
        header = json.loads(metadata[_METADATA_KEY])
    except ValueError as error:
        raise ValueError(f"{path}: its metadata is not JSON ({error})") from None
    if not isinstance(header, dict) or header.get("version") != FORMAT_VERSION:
        version = header.get("version") if isinstance(header, dict) else None
        raise ValueError(
            f"{path}: format version {version!r} is not known to this loft_rs, which reads version {FORMAT_VERSION}"
        )
    facts = header.get("supports")
    if not isinstance(facts, dict) or not facts or not all(isinstance(each, dict) for each in facts.values()):
        raise ValueError(f"{path}: its metadata has no list of supports")
    return facts


_ALLOWED: dict[str, Callable[[Any], bool]] = {
    "energy": lambda value: value is None or (type(value) is float and 0 <= value <= 1),
    "energy_stderr": lambda value: value is None or (type(value) is float and value >= 0 and math.isfinite(value)),
    "gap": lambda value: value is None or (type(value) is float and math.isfinite(value)),
    "passes": lambda value: type(value) is int and value >= 0,
    "seconds": lambda value: value is None or (type(value) is float and value >= 0 and math.isfinite(value)),
    "method": lambda value: value in STORED_METHODS,
    "side": lambda value: value in SIDES,
    "seed": lambda value: type(value) is int and 0 <= value < 2**64,
    "order": lambda value: value in ORDERS,
    "columns": lambda value: type(value) is int and value >= 0,
}


def _validate(what: str, arrays: Mapping[str, np.ndarray], scalars: Mapping[str, Any]) -> None:
    if set(scalars) != set(_ALLOWED):
        odd = sorted(set(scalars) ^ set(_ALLOWED))
        raise ValueError(f"{what} has missing or unknown fields: {', '.join(odd)}")
    for field, allowed in _ALLOWED.items():
        if not allowed(scalars[field]):
            raise ValueError(f"{what} has an impossible {field}: {scalars[field]!r}")
    check_basis(arrays["basis"], what)
    rank = arrays["basis"].shape[1]
    for field in ("values", "residuals"):
        array = arrays[field]
        if array.dtype != _ARRAYS[field] or array.shape != (rank,):
            raise ValueError(f"{what} has {field} of {array.dtype} {array.shape}, float64 ({rank},) is expected")
        if np.isinf(array).any():
            raise ValueError(f"{what} has {field} that are infinite")


def check_basis(basis: np.ndarray, what: str) -> None:
    """Refuse a basis that is not (n, r) float32 with 1 <= r <= n, finite, and orthonormal to its dtype."""
    if basis.dtype != np.float32 or basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0]:
        raise ValueError(
            f"{what} has a basis of {basis.dtype} {basis.shape}, float32 (n, r) with 1 <= r <= n is expected"
        )
    if not np.isfinite(basis).all():
        raise ValueError(f"{what} has a basis with a NaN or an infinite entry")
    wide = basis.astype(np.float64)
    error = float(np.linalg.norm(wide.T @ wide - np.eye(basis.shape[1]), 2))
    if error > _ORTHONORMAL:
        raise ValueError(
            f"{what} has a basis that is not orthonormal: ||P^T P - I|| is {error:.1e}, more than {_ORTHONORMAL:.1e}"
        )
