"""What `calibrate` refuses before any work, and the defaults of what it was not told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from torch import nn

from .._checks import is_int
from .._files import check_writable
from ..layer.base_layer import dense_weight
from ..support.budget import Budget
from ..tuner.config import LoftConfig
from ..tuner.layer import Linear
from .pilot import Pilot

__all__ = ["BATCHES", "HEAD_STEPS", "SHARED_BY", "TRIAL", "checked_batches"]

HEAD_STEPS = 20
SHARED_BY = ("energy", "reproducible")
BATCHES = 8
# A layer may deserve more than an even share; to how much of it its spectrum is known.
TRIAL = 2


def checked_batches(
    dataloader: Iterable | None, train_step: Callable[[], Any] | None, max_batches: int | None, pilot: Pilot | None
) -> list[Mapping | list | tuple] | None:
    """The batches that every pass uses, checked; None where there is a train_step."""
    if max_batches is None:
        max_batches = BATCHES if pilot is None else pilot.steps
    if (dataloader is None) == (train_step is None):
        raise ValueError("give exactly one of dataloader and train_step")
    if not is_int(max_batches) or max_batches < 1:
        raise ValueError(f"max_batches must be an integer of at least 1, got {max_batches!r}")
    if dataloader is None:
        if not callable(train_step):
            raise TypeError(f"train_step must be a function of no arguments, got {type(train_step).__name__}")
        return None
    if isinstance(dataloader, (Mapping, str)) or not (
        isinstance(dataloader, Iterable) or hasattr(dataloader, "__getitem__")
    ):
        raise TypeError(
            f"dataloader must give batches one by one, got one {type(dataloader).__name__}; put a single batch in a list"
        )
    batches = list(islice(dataloader, max_batches))
    if not batches:
        raise ValueError("dataloader gave no batch")
    wrong = [type(batch).__name__ for batch in batches if not isinstance(batch, (Mapping, list, tuple))]
    if wrong:
        raise TypeError(
            f"dataloader must give batches that are mappings, for model(**batch), or lists or tuples, for model(*batch), got {wrong[0]}"
        )
    return batches


def checked_options(
    config: LoftConfig,
    layers: Mapping[str, Linear],
    adapter: str,
    passes: Any,
    oversampling: Any,
    tol: Any,
    budget: Any,
    share_by: Any,
    save_sketches: Any,
    train_step: Any,
    offload: bool,
) -> dict[str, int]:
    """The ranks that a budget calibrates the layers for; refuses what does not fit together."""
    if config.support == "pilot":
        given = {"passes": passes != 2, "share_by": share_by != "energy", "offload": offload}
        given |= {"oversampling": oversampling is not None, "save_sketches": save_sketches is not None}
        given |= {"budget": budget is not None, "tol": tol is not None}
        for name in [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"{name} is for supports from sketches, but support is 'pilot', which a training chooses")
        return {}
    if passes not in (1, 2) or isinstance(passes, bool):
        raise ValueError(f"passes must be 1 or 2, got {passes!r}")
    if oversampling is not None and (not is_int(oversampling) or oversampling < 2 or oversampling % 2):
        raise ValueError(f"oversampling must be None or an even number of at least 2, got {oversampling!r}")
    if tol is not None and not (isinstance(tol, (int, float)) and 0 < tol < 1):
        raise ValueError(f"tol must be None or a number between 0 and 1, got {tol!r}")
    if share_by not in SHARED_BY:
        raise ValueError(f"share_by must be one of {sorted(SHARED_BY)}, got {share_by!r}")
    given = {"tol": tol, "budget": budget, "save_sketches": save_sketches, "oversampling": oversampling}
    for name in [name for name, value in given.items() if value is not None]:
        if not config.needs_calibration:
            raise ValueError(f"{name} needs a support that data chooses, but support is {config.support!r}")
    if tol is not None and train_step is not None:
        raise ValueError("tol needs a dataloader: a train_step cannot be stopped between two batches")
    if save_sketches is not None:
        if passes != 1:
            raise ValueError("save_sketches needs passes=1: a second pass depends on the first and cannot be added up")
        check_writable(save_sketches)
    if share_by != "energy" and budget is None:
        raise ValueError(f"share_by={share_by!r} needs a budget")
    if budget is None:
        return {}
    if not isinstance(budget, Budget):
        raise TypeError(f"budget must be a loft_rs.Budget, got {type(budget).__name__}")
    if budget.transform != config.transform or config.magnitudes:
        named = config.transform + " with magnitudes" * config.magnitudes
        raise ValueError(
            f"budget counts the parameters of {budget.transform!r}, but the adapter's transform is {named}"
        )
    if any(each < 2 for each in (budget.floor.values() if isinstance(budget.floor, Mapping) else [budget.floor])):
        raise ValueError(
            "budget must have a floor of at least 2 here: exclude a module in the LoftConfig to leave it out"
        )
    limits = {name: layer.adapters[adapter].largest_rank for name, layer in layers.items()}
    if narrow := [name for name, limit in limits.items() if limit < 2]:
        raise ValueError(f"budget gives even ranks, which these modules are too narrow for: {', '.join(narrow)}")
    allowed = budget.allowed(limits)
    even = max(
        r
        for r in range(2, max(limits.values()) + 1, 2)
        if r == 2 or budget.parameters(r) * len(layers) <= budget.params
    )
    return {name: min(max(TRIAL * even, ranks.start), ranks[-1]) for name, ranks in allowed.items()}


def require_decidable(undecided: Mapping[str, Linear], method: str, passes: int, save_sketches: Any) -> None:
    """Refuse what cannot tell the sides of these modules."""
    if undecided and save_sketches is not None:
        raise ValueError(
            "save_sketches needs the side of every module beforehand, which side='auto' leaves open: give side='input' or 'output', or "
            "a side_pattern"
        )
    if method != "gradsvd":
        return
    if undecided and passes == 1:
        raise ValueError("side='auto' with support='gradsvd' needs passes=2, or support='skewgrad'")
    for name, layer in undecided.items():
        if dense_weight(base := layer.get_base_layer()) is None:
            raise TypeError(
                f"side='auto' with support='gradsvd' needs dense weights, to compare the sides, but {name} is a {type(base).__name__}; "
                "use support='skewgrad'"
            )


def checked_head_steps(steps: int | None, head: list[nn.Parameter], needs_gradient: bool) -> int:
    if steps is None:
        return HEAD_STEPS if needs_gradient and head else 0
    if not is_int(steps) or steps < 0:
        raise ValueError(f"head_steps must be None or an integer of at least 0, got {steps!r}")
    if steps and not head:
        raise ValueError("head_steps needs modules_to_save in the LoftConfig: there is no head to warm up")
    return int(steps)


# -- running the model -----------------------------------------------------------------------------------------------------


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    from peft.utils.other import ModulesToSaveWrapper

    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return [p for wrapper in wrappers for p in wrapper.parameters() if p.requires_grad]
