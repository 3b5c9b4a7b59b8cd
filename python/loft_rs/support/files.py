"""Supports in files: safetensors, with what is known of each support in the metadata."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from .._checks import of
from .methods import ORDERS, SIDES, STORED_METHODS
from .support import Support, check_basis

__all__ = ["FORMAT_VERSION", "holds_supports", "load_supports", "save_supports"]

FORMAT_VERSION = 1

_METADATA_KEY = "loft_rs.supports"
_ARRAYS = {"basis": np.float32, "values": np.float64, "residuals": np.float64}


def save_supports(path: str | os.PathLike, supports: Support | Mapping[str, Support]) -> None:
    """Write supports to one safetensors file, bit for bit; the same supports give the same
    bytes.

    >>> loft_rs.save_supports("supports.safetensors", {"q_proj": loft_rs.select_support(G, 8)})
    >>> list(loft_rs.load_supports("supports.safetensors"))
    ['q_proj']
    """
    from safetensors.numpy import save_file

    from .._files import whole_file

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
    if isinstance(value, (str, bool)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return None if math.isnan(value) else float(value)


def load_supports(path: str | os.PathLike) -> Support | dict[str, Support]:
    """Read what `save_supports` wrote. Anything else (truncated, another version, not orthonormal)
    is a ValueError.

    >>> loft_rs.save_supports("one.safetensors", loft_rs.select_support(G, 8))
    >>> loft_rs.load_supports("one.safetensors").basis.shape
    (64, 8)
    """
    from .._files import read_safetensors

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
        scalars = {"columns": 0, "halves": False} | scalars  # which older files lack
        _validate(f"{path}: the support{of(name)}", arrays, scalars)
        known: dict[str, Any] = {key: math.nan if value is None else value for key, value in scalars.items()}
        supports[name] = Support(**arrays, **known)
    return supports[""] if set(supports) == {""} else supports


def holds_supports(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file's metadata is that of `save_supports`."""
    return _METADATA_KEY in metadata


def _facts(path: str | os.PathLike, metadata: Mapping[str, str]) -> dict[str, dict]:
    if not holds_supports(metadata):
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
    "halves": lambda value: type(value) is bool,
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
