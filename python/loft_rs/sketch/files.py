"""Saved sketches: what one calibration pass has summed, in a file; files of other batches add up,
and give supports without the model.

A sketch is linear in the batches (`sketch.py`), and so is the moment that orders the support. One
safetensors file holds, by module, the sums of a single pass (`loft_rs.save_sketches`) over the loss
scale, which is a power of two. Omega is drawn again from the seed. The metadata is JSON: a version,
and of every module its plan, the modules tied in it, and Omega's first number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from .._files import read_safetensors, whole_file
from ..support.support import Support
from .base import Plan, Sketch
from .plan import SKETCHES
from .products import gaussian

__all__ = ["supports_from_sketches", "write_sketches"]

FORMAT_VERSION = 1
_METADATA_KEY = "loft_rs.sketches"
_SCALED = ("sketch",)  # sums that are linear in the gradient


def write_sketches(path: str | os.PathLike, sketches: Mapping[str, Sketch], tied: Mapping[str, Sequence[str]]) -> None:
    """Write the sums of sketches whose single pass is over; `tied`: the modules that each is the
    sketch of.
    """
    from safetensors.torch import save_file

    tensors, facts = {}, {}
    for name, sketch in sorted(sketches.items()):
        for key, value in sketch.sums.items():
            scale = sketch.plan.loss_scale if key in _SCALED else 1.0
            tensors[f"{name}.{key}"] = (value / scale).contiguous().cpu()
        facts[name] = asdict(replace(sketch.plan, loss_scale=1.0)) | {
            "tied": list(tied[name]),
            "drawn": float(gaussian(1, 1, sketch.plan.seed)),
        }
    header = json.dumps({"version": FORMAT_VERSION, "sketches": facts}, sort_keys=True)
    with whole_file(path) as part:
        save_file(tensors, part, metadata={_METADATA_KEY: header})


def supports_from_sketches(*paths: str | os.PathLike) -> dict[str, Support]:
    """Supports by module from files that `save_sketches` wrote, the sketches of several added up.

    To rounding those of one `calibrate` with a single pass over all their batches; `set_support`
    and `save_supports` take them. FileNotFoundError; ValueError for a damaged or foreign file, one
    given twice, and files that differ in modules, method, side, seed, rank or shape.

    >>> config = LoftConfig(r=4, target_modules=["o_proj"], support=GradSVD(passes=1))
    >>> model = get_peft_model(load_base(), config)
    >>> loft_rs.save_sketches(model, batches[:2], "monday.safetensors")
    >>> loft_rs.save_sketches(model, batches[2:], "tuesday.safetensors")
    >>> supports = loft_rs.supports_from_sketches("monday.safetensors", "tuesday.safetensors")
    >>> loft_rs.set_support(model, supports)
    """
    if not paths:
        raise ValueError("paths is empty: give at least one file that loft_rs.save_sketches wrote")
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise ValueError("paths names a file twice: its batches would count twice")
    first, *others = [_read(path) for path in paths]
    for path, other in zip(paths[1:], others, strict=True):
        _require_alike(paths[0], first, path, other)
    supports = {}
    for name, (plan, _, sums) in first.items():
        if not plan.single:
            raise ValueError(f"{paths[0]}: the sketch of {name!r} is not of a single pass")
        sketch = SKETCHES[plan.method](plan, torch.device("cpu"), sums["sketch"].dtype)
        sketch.pending = {key: sum((each[name][2][key] for each in others), value) for key, value in sums.items()}
        sketch.end_pass(name)
        if not sketch.unreached:
            supports[name] = sketch.support(passes=1)
    return supports


def _read(path: str | os.PathLike) -> dict[str, tuple[Plan, tuple[str, ...], dict[str, torch.Tensor]]]:
    tensors, metadata = read_safetensors(path)
    try:
        header = json.loads(metadata[_METADATA_KEY])
        version, facts = header["version"], dict(header["sketches"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: not a file that loft_rs.save_sketches wrote") from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version!r} is not known to this loft_rs, which reads version {FORMAT_VERSION}"
        )
    found = {}
    for name, fact in facts.items():
        try:
            tied, drawn = tuple(fact.pop("tied")), float(fact.pop("drawn"))
            plan = Plan(**fact | {"heights": tuple(fact["heights"])})
            kind = SKETCHES[plan.method]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: the description of {name!r} is not one of a sketch") from None
        # torch promises no stream of random numbers across its versions.
        if drawn != float(gaussian(1, 1, plan.seed)):
            raise ValueError(
                f"{path}: this torch draws other random numbers from seed {plan.seed} than the one that sketched {name!r}; use that version"
            )
        wanted = kind(plan, torch.device("cpu"), torch.float32).pending
        sums = {}
        for key, like in wanted.items():
            value = tensors.get(f"{name}.{key}")
            if value is None or value.shape != like.shape or not np.isfinite(value).all():
                raise ValueError(f"{path}: {name}.{key} is missing, not finite, or not of shape {tuple(like.shape)}")
            sums[key] = torch.from_numpy(np.array(value))
        found[name] = plan, tied, sums
    if not found:
        raise ValueError(f"{path}: holds no sketch")
    return found


def _require_alike(path: Any, one: dict, other_path: Any, other: dict) -> None:
    if one.keys() != other.keys():
        odd = sorted(one.keys() ^ other.keys())
        raise ValueError(f"{other_path}: holds other modules than {path}: {', '.join(odd[:4])}")
    for name, (plan, tied, _) in one.items():
        facts, others = asdict(plan) | {"tied": tied}, asdict(other[name][0]) | {"tied": other[name][1]}
        for key, value in facts.items():
            if others[key] != value:
                raise ValueError(
                    f"{other_path}: {key} of {name!r} is {others[key]!r}, but {value!r} in {path}; only sketches that are alike add up"
                )
