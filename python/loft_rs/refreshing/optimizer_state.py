"""What an optimiser holds for a transform's parameter theta, taken along to another support.

The moments of theta, the strict lower triangle of A in the basis P1, are those of a gradient with
respect to the ambient skew matrix P1 A P1^T. With O = P2^T P1, both bases orthonormal, and for
i > j, k > l

    first     skew(m) <- O skew(m) O^T                                       m_kl <- sum c_kl,ij m_ij,   c_kl,ij = O_ki O_lj - O_kj O_li
    second    v_kl <- sum c_kl,ij^2 v_ij + (1 - sum c_kl,ij^2) mean(v)       as of independent coordinates

where the second term stands for what lies outside the old support: from v = 0, Adam's first steps
there would be 3 times too long. Where P2 lies in the span of P1, as after `narrow`, O (r_2 x r_1)
has orthonormal rows and the second term is zero.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..transform.skew import skew
from ..tuner.layer import Linear

__all__ = ["held_moments", "replace_parameter", "transported", "warn_of_replaced"]

# What the optimisers of torch and transformers call a mean of gradients and a mean of their
# squares.
_FIRST, _SECOND = ("exp_avg", "momentum_buffer", "grad_avg"), ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def held_moments(
    optimizer: torch.optim.Optimizer, layers: dict[str, Linear], adapter: str
) -> dict[str, dict[str, Tensor]]:
    """The moments of every transform that has a state; what is no moment, such as the step count,
    stays as it is.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, layer in layers.items() if id(layer.adapters[adapter].theta) not in trained]
    if missing:
        raise ValueError(
            f"optimizer does not train adapter {adapter!r} in {missing[0]}; give the one that does, or None"
        )
    found = {}
    for name, layer in layers.items():
        theta = layer.adapters[adapter].theta
        if theta not in optimizer.state:
            continue
        tensors = {
            key: value for key, value in optimizer.state[theta].items() if isinstance(value, Tensor) and value.dim()
        }
        unknown = [key for key, value in tensors.items() if key not in _FIRST + _SECOND or value.shape != theta.shape]
        if unknown:
            raise ValueError(
                f"optimizer must hold no other states than {', '.join(_FIRST + _SECOND)}, but {type(optimizer).__name__} has "
                f"{unknown[0]!r}; give None, and make the optimiser anew afterwards"
            )
        found[name] = tensors
    return found


def transported(key: str, moment: Tensor, turn: Tensor) -> Tensor:
    """A moment of theta in the basis P2, from the one in P1. turn: O = P2^T P1 (r_2 x r_1)."""
    (new, old), value = turn.shape, moment.detach().cpu().double()
    free = value.dim() == 2
    if key in _FIRST:
        moved = turn @ (value if free else skew(value, old)) @ turn.mT
    else:
        ones = torch.ones_like(value)
        share = _squared(ones if free else _symmetric(ones, old), turn, free).clamp(0, 1)
        moved = _squared(value if free else _symmetric(value, old), turn, free).clamp_min(0)
        moved = moved + (1 - share) * value.mean()
    rows, columns = torch.tril_indices(new, new, -1)
    return (moved if free else moved[rows, columns]).to(moment)


def replace_parameter(
    optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor, moments: dict[str, Tensor] | None
) -> None:
    """Let an optimiser train `new` in place of `old`, with its state and these moments; None:
    without a state.
    """
    for group in optimizer.param_groups:
        group["params"][:] = [new if each is old else each for each in group["params"]]
    state = optimizer.state.pop(old, None)
    if moments is not None:
        optimizer.state[new] = {**state, **moments}


def warn_of_replaced(parameters: Iterable[Tensor]) -> None:
    """Warn, once, as soon as an optimiser that still has one of these takes a step."""
    _REPLACED.extend(weakref.ref(parameter) for parameter in parameters)


def _look_for_replaced(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not _REPLACED:
        return
    left = {id(parameter) for ref in _REPLACED if (parameter := ref()) is not None}
    found = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} & left
    _REPLACED[:] = [ref for ref in _REPLACED if ref() is not None and id(ref()) not in found]
    if found:
        warnings.warn(
            "an optimizer took a step that has parameters which loft_rs.narrow has replaced, and does not train the new ones: give it "
            "to narrow (optimizer=), or make it anew",
            stacklevel=2,
        )


_REPLACED: list[weakref.ref[Tensor]] = []  # by a `narrow` that was given no optimiser
register_optimizer_step_post_hook(_look_for_replaced)


def _symmetric(lower: Tensor, r: int) -> Tensor:
    return skew(lower, r).tril() + skew(lower, r).tril().mT


def _squared(v: Tensor, turn: Tensor, free: bool) -> Tensor:
    """sum over (i, j) of c_kl,ij^2 v_ij: c = O_ki O_lj of a free matrix, and O_ki O_lj - O_kj O_li
    over i > j of a skew one.
    """
    squares = turn.square()
    moved = squares @ v @ squares.mT
    if not free:
        for k, row in enumerate(turn):
            w = row * turn
            moved[k] -= ((w @ v) * w).sum(1)
    return moved
