"""What `calibrate` refuses before any work, and the job that is left: `Job`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from .._checks import is_int
from .._words import some
from ..layer.base_layer import dense_weight
from ..support.budget import Budget
from ..support.methods import CALIBRATED_SUPPORTS, GRADIENT_SUPPORTS, Pilot
from ..tuner.adapters import adapted_layers, owners, require_plain, require_untrained
from ..tuner.config import LoftConfig
from ..tuner.layer import Linear
from ..tuner.supports import choose_supports
from .memory import byte_count
from .pilot import changes_for
from .processes import Processes
from .sides import ModuleSide, by_module, open_places

__all__ = ["BATCHES", "HEAD_STEPS", "TRIAL", "Job", "checked_batches", "checked_job"]

HEAD_STEPS = 20
BATCHES = 8
# A layer may deserve more than an even share; to how much of it its spectrum is known.
TRIAL = 2


@dataclass(frozen=True)
class Job:
    """One calibration, checked.

    adapted: the adapter's layers by name; layers: those that hold a support of their own. places:
    the sides at which each is sketched, of both in `undecided`. batches: None where a train_step
    takes their place. head: what is warmed up first. trial: ranks that a budget is shared out from.
    single: one pass, from a wider sketch.
    """

    model: nn.Module
    adapter: str
    config: LoftConfig
    adapted: dict[str, Linear]
    layers: dict[str, Linear]
    places: list[ModuleSide]
    undecided: list[str]
    batches: list | None
    train_step: Callable[[], Any] | None
    head: list[nn.Parameter]
    head_steps: int
    trial: dict[str, int]
    single: bool
    oversampling: int | None
    limit: int | None
    offload: bool
    processes: Processes
    progress: bool | None

    @property
    def method(self) -> str:
        return self.config.method

    @property
    def order(self) -> str:
        return "natural" if self.config.order == "natural" else "input_pca"

    @property
    def pilot(self) -> Pilot | None:
        return self.config.options if self.method == "pilot" else None

    @property
    def budget(self) -> Budget | None:
        return self.config.r if isinstance(self.config.r, Budget) else None

    @property
    def needs_gradient(self) -> bool:
        """Whether the passes that feed sketches run backward."""
        return self.method in GRADIENT_SUPPORTS

    @property
    def homes(self) -> dict[ModuleSide, Linear]:
        """The layer of each place."""
        return {place: self.layers[place.module] for place in self.places}


def checked_job(
    model: nn.Module,
    dataloader: Iterable | None,
    *,
    train_step: Callable[[], Any] | None,
    max_batches: int | None,
    adapter_name: str | None,
    head_steps: int | None,
    memory: int | str | None,
    offload: bool,
    progress: bool | None,
    caller: str = "calibrate",
) -> Job:
    """Everything that can be refused is refused here, in all processes where in one."""
    require_plain(model, caller)
    limit = byte_count(memory)
    processes = Processes(next(model.parameters()).device)
    with processes.stage():
        adapter, adapted = adapted_layers(model, adapter_name)
        require_untrained(adapted, adapter, caller)
        layers = owners(adapted, adapter)
        config = next(iter(layers.values())).adapters[adapter].config
        single = caller == "save_sketches" or getattr(config.options, "passes", 2) == 1
        places = open_places(layers, adapter)
        undecided = [name for name, each in by_module(places).items() if len(each) > 1]
        if caller == "save_sketches":
            require_sketched(config, undecided)
        require_decidable({name: layers[name] for name in undecided}, config.method, single)
        _check_config(config, {place: layers[place.module] for place in places}, adapter, offload)
        trial = trial_ranks(config.r, layers, adapter) if isinstance(config.r, Budget) else {}
        pilot = config.options if config.method == "pilot" else None
        batches = checked_batches(dataloader, train_step, max_batches, pilot)
        head = head_parameters(model)
        steps = checked_head_steps(head_steps, head, config.method in (*GRADIENT_SUPPORTS, "pilot"))
        sharded = any("FSDPModule" in {kind.__name__ for kind in type(m).__mro__} for m in model.modules())
        if sharded and steps:
            raise ValueError(
                "head_steps cannot warm up a head that FSDP2 has sharded: calibrate before fully_shard, or give 0"
            )
        unset = [layer for layer in layers.values() if not layer.adapters[adapter].ready]
        if unset and config.method not in CALIBRATED_SUPPORTS:
            choose_supports(layers, config, adapter)  # built to be loaded, and never was
    if sharded and batches is not None:
        _require_equally_many(batches, processes)
    head, wide = head if steps else [], getattr(config.options, "oversampling", None)
    found = (model, adapter, config, adapted, layers, places, undecided, batches, train_step, head, steps, trial)
    return Job(*found, single, wide, limit, offload, processes, progress)


def _check_config(config: LoftConfig, homes: Mapping[ModuleSide, Linear], adapter: str, offload: bool) -> None:
    """Refuse an adapter that has nothing to be calibrated, or not in this way."""
    if config.method == "pilot":
        if offload:
            raise ValueError("offload is for supports from sketches, but support is 'pilot', which a training chooses")
        changes_for(homes, adapter, config.options, None)
    if config.method not in CALIBRATED_SUPPORTS and config.order == "natural":
        raise ValueError(
            f"support={config.method!r} with order='natural' takes nothing from data; there is nothing to calibrate"
        )


def _require_equally_many(batches: list, processes: Processes) -> None:
    total = processes.total(len(batches))
    with processes.stage():
        if total != processes.size * len(batches):
            raise ValueError(
                f"dataloader must give every process equally many batches under FSDP2: {total} in all, {len(batches)} here"
            )


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
    if any(map(_of_plain_values, batches)):
        raise TypeError(
            "dataloader must give batches that hold tensors, and one holds numbers or text alone, as a row of a dataset does: give a "
            "DataLoader with your collator (collate_fn=...)"
        )
    return batches


def _of_plain_values(batch: Any) -> bool:
    """Whether there is nothing but text, numbers and None in it, of which no model computes a
    loss.
    """
    if isinstance(batch, Mapping):
        return all(map(_of_plain_values, batch.values()))
    if isinstance(batch, (list, tuple)):
        return all(map(_of_plain_values, batch))
    return batch is None or isinstance(batch, (str, bytes, int, float))


def trial_ranks(budget: Budget, layers: Mapping[str, Linear], adapter: str) -> dict[str, int]:
    """The rank at which each layer is calibrated before the budget is shared out."""
    limits = {name: layer.adapters[adapter].largest_rank for name, layer in layers.items()}
    if narrow := [name for name, limit in limits.items() if limit < 2]:
        raise ValueError(f"r=Budget(...) gives even ranks, which these modules are too narrow for: {some(narrow)}")
    allowed = budget.allowed(limits)
    even = max(
        r
        for r in range(2, max(limits.values()) + 1, 2)
        if r == 2 or budget.parameters(r) * len(layers) <= budget.params
    )
    return {name: min(max(TRIAL * even, ranks.start), ranks[-1]) for name, ranks in allowed.items()}


def require_sketched(config: LoftConfig, undecided: list[str]) -> None:
    """Refuse what no saved sketch tells."""
    if config.method not in (*GRADIENT_SUPPORTS, "activation"):
        raise ValueError(
            f"save_sketches needs support='skewgrad', 'gradsvd' or 'activation', but support is {config.method!r}"
        )
    if undecided:
        raise ValueError(
            "save_sketches needs the side of every module beforehand, which side='auto' leaves open: give side='input' or 'output', or "
            "a side_pattern"
        )


def require_decidable(undecided: Mapping[str, Linear], method: str, single: bool) -> None:
    """Refuse what cannot tell the sides of these modules."""
    if method != "gradsvd":
        return
    if undecided and single:
        raise ValueError(
            "side='auto' with support='gradsvd' needs two passes, not GradSVD(passes=1), or support='skewgrad'"
        )
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


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    from peft.utils.other import ModulesToSaveWrapper

    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return [p for wrapper in wrappers for p in wrapper.parameters() if p.requires_grad]
