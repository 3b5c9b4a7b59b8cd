"""Advice: a learning rate to start from, by what the runs of `bench/quality` say.

    lr = c / r      c = .16 pilot, also in halves      .064 principal, gradsvd      .026 skewgrad      `exp`: twice that

Thirteen tasks, Adam with `cayley`. At c the mean loss against the rate that was tuned for a task is
`COSTS`, in the score of a task. The callbacks call `warn_of_low_rate` where a training begins.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tuner.config import LoftConfig

__all__ = ["rate_of", "suggest_lr", "warn_of_low_rate"]

# lr * r of the best single rate over 13 tasks, and what it costs on average against the rate tuned
# for each.
RATES = {"pilot": 0.16, "principal": 0.064, "gradsvd": 0.064, "skewgrad": 0.026}
COSTS = {"pilot": 0.010, "principal": 0.016, "gradsvd": 0.010, "skewgrad": 0.010}
_TRANSFORMS = {"cayley": 1.0, "exp": 2.0}
_LOW = 3.0  # times below the suggestion: worth a warning


def suggest_lr(config: LoftConfig) -> float:
    """A learning rate for Adam to start from: c / r, c by the support (see `advice.py`). Then try
    one three times larger.

    Provisional: c is from runs of ranks 34 to 86 on small models, and 1/r was in their grids, not
    measured for itself. What c costs against the rate that was tuned for each of 13 tasks, in the
    mean of their scores (2 seeds, the tuning split):

        pilot .010     pilot in halves .013     principal .016     gradsvd .010     skewgrad .010

    config: a `LoftConfig` with an integer r. Returns the rate. ValueError where no run says
    anything: other supports (random, coordinate, activation, files), OFT, BOFT, HRA, the transforms
    `free` and `cayley_neumann`, a `Budget`.

    >>> from loft_rs import LoftConfig, suggest_lr
    >>> suggest_lr(LoftConfig(r=64))
    0.001
    """
    name = config.named_transform
    if config.method not in RATES:
        raise ValueError(
            f"suggest_lr knows the supports {', '.join(sorted(RATES))}, from runs; none says anything of {config.method!r}: try "
            "rates from .001 to .1 divided by r"
        )
    if name.base not in _TRANSFORMS:
        raise ValueError(
            f"suggest_lr knows the transforms cayley and exp; no run says anything of {config.transform!r}"
        )
    if not isinstance(config.r, int):
        raise ValueError("suggest_lr needs an integer r: under a Budget the ranks of the layers differ")
    return float(f"{RATES[config.method] * _TRANSFORMS[name.base] / config.r:.2g}")


def rate_of(optimizer: Any, parameter: Any) -> float | None:
    """The rate that an Adam gives a parameter after the warm-up.

    None for another kind of optimiser, of which no run speaks, and for a parameter that it lacks.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if "adam" not in type(inner).__name__.lower():
        return None
    for group in inner.param_groups:
        if any(each is parameter for each in group["params"]):
            return float(group.get("initial_lr", group["lr"]))
    return None


def warn_of_low_rate(config: LoftConfig, rate: float | None) -> None:
    """Warn of a third of the suggested rate or less, such as a Trainer's default of 5e-5."""
    try:
        suggested = suggest_lr(config)
    except ValueError:
        return
    if rate and rate * _LOW <= suggested:
        warnings.warn(
            f"learning_rate={rate:g} is low for this adapter: loft_rs.suggest_lr(config) gives {suggested:g} to start from",
            stacklevel=2,
        )
