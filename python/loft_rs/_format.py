"""What a saved adapter is: its files, their version, the tensors of an adapter, and the tolerances of a basis. NumPy alone.

`SLOTS` is the one list of an adapter's tensors. The containers of a layer, the names that PEFT is told, the move to a device, the
checks of a checkpoint, undoing and `loft-rs inspect` all follow from it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

__all__ = ["CONFIG_FILE", "FORMAT_VERSION", "ORTHONORMAL", "SLOTS", "SUPPORT_GRAM", "UNKNOWN_ENERGY", "WEIGHTS_FILE"]
__all__ += ["Slot", "slots_of"]

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

SUPPORT_GRAM = 0.05  # ||P^T P - I||_2 that a basis rounded to half precision may have; float32 ones are far below
ORTHONORMAL = 1e-5  # ||P^T P - I||_2 up to which P counts as orthonormal, and C is left out
UNKNOWN_ENERGY = -1.0  # in `loft_energy`; files of earlier versions hold NaN there


class Slot(NamedTuple):
    """One tensor of an adapter, `loft_<name>.<adapter>` in a state dict and `loft_<name>` in a file.

    trained: a parameter, otherwise a persistent buffer. when: which adapters have it: "always", or those of a trait.
    """

    name: str
    trained: bool
    when: str

    @property
    def key(self) -> str:
        return f"loft_{self.name}"


SLOTS = (
    Slot("theta", True, "always"),  # of the transform (`Transform.parameter_shape`), or what else the kind trains
    Slot("scale", True, "scaled"),  # (m,): the factor of every output, less 1
    Slot("support", False, "supported"),  # P (n x r), all zero until it is set
    Slot("energy", False, "supported"),  # (): the captured fraction, `UNKNOWN_ENERGY` where nobody measured it
    Slot("output_side", False, "movable"),  # (): 1 on the output side, else 0; a square layer's shapes do not tell
    Slot("frozen_basis", False, "refreshed"),  # P_f (n x r_f) and E_f (r_f x r_f): the rotation of earlier supports
    Slot("frozen_delta", False, "refreshed"),
)


def slots_of(traits: Collection[str]) -> list[Slot]:
    """The slots of an adapter with these traits, each one of "scaled", "supported", "movable" and "refreshed"."""
    return [slot for slot in SLOTS if slot.when == "always" or slot.when in traits]
