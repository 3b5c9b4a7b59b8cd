"""The methods that the demo compares.

LOFT trains at the rate that `suggest_lr` gives. Of supports that it says nothing of, and of LoRA, a
sweep of this demo found the rate: 600 pairs carved from the training pairs by object, 60 steps of
64, Adam, MRR averaged over up to 3 seeds, ranks 64 and 128 for LOFT and rates from 1e-3 to 8e-3 for
LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..support.methods import CALIBRATED_SUPPORTS, DATA_FREE_SUPPORTS, Pilot

LORA = "lora"
KEPT, HALVES = "kept", "halves"
PILOTS = {"pilot": Pilot(), HALVES: Pilot(halves=True), KEPT: Pilot(halves=True, keep=True)}
SUPPORTS = tuple(dict.fromkeys((*PILOTS, *CALIBRATED_SUPPORTS, *DATA_FREE_SUPPORTS)))
SWEPT = {"activation": 0.1, "random": 0.2, "coordinate": 0.3}  # lr * r
# Calibrated by forward passes alone: the span of activation, and the order of the coordinates,
# which helped principal.
FORWARD_SUPPORTS = ("activation", "principal")
POOLER = r"(.*\.)?pooler\..*"
LORA_RANK = 8
LORA_RATE = 4e-3


@dataclass(frozen=True)
class Method:
    """One row of the table: a LOFT support at a rank, or PEFT's LoRA."""

    name: str
    rank: int
    learning_rate: float

    @property
    def is_loft(self) -> bool:
        return self.name != LORA

    @property
    def pilot_steps(self) -> int:
        """Steps of low-rank training before its own."""
        return PILOTS[self.name].steps if self.name in PILOTS else 0

    @property
    def label(self) -> str:
        return f"LOFT {self.name} r={self.rank}" if self.is_loft else f"PEFT LoRA r={self.rank}"

    def adapt(self, base: nn.Module) -> nn.Module:
        """The base with adapters on all linear layers but the pooler's, which mean pooling never
        reads.
        """
        from peft import LoraConfig, get_peft_model

        has_pooler = getattr(base, "pooler", None) is not None
        layers: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": POOLER if has_pooler else None}
        if not self.is_loft:
            return get_peft_model(base, LoraConfig(r=self.rank, lora_alpha=2 * self.rank, **layers))
        from .. import LoftConfig

        return get_peft_model(base, LoftConfig(r=self.rank, support=support(self.name), **layers))

    def calibrate(self, model: nn.Module, forward: Callable[[], None], backward: Callable[[], None]) -> Any:
        """The report of `calibrate`, by a forward pass where that suffices; None for a method that
        takes no data.
        """
        if self.name not in (*PILOTS, *CALIBRATED_SUPPORTS, *FORWARD_SUPPORTS):
            return None
        from .. import calibrate

        return calibrate(model, train_step=forward if self.name in FORWARD_SUPPORTS else backward, progress=None)


def support(name: str) -> Any:
    """As `LoftConfig` takes it."""
    return PILOTS.get(name, name)


def rate(name: str, rank: int) -> float:
    """The learning rate of a LOFT support."""
    from .. import LoftConfig, suggest_lr

    return SWEPT[name] / rank if name in SWEPT else suggest_lr(LoftConfig(r=rank, support=support(name)))


def chosen(first: str, rank: int, compare: list[str]) -> list[Method]:
    """The support asked for, LoRA, then what else is to be compared; each once."""
    known = (*SUPPORTS, LORA)
    for option, name in [("--support", first), *(("--compare", name) for name in compare)]:
        allowed = SUPPORTS if option == "--support" else known
        if name not in allowed:
            raise ValueError(f"{option} {name}: one of {', '.join(allowed)} is expected")
    names = dict.fromkeys([first, LORA, *compare])
    return [
        Method(LORA, LORA_RANK, LORA_RATE) if name == LORA else Method(name, rank, rate(name, rank)) for name in names
    ]
