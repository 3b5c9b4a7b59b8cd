"""What a saved adapter is: its files, their version, the tensors of an adapter, and the tolerances
of a basis. NumPy alone.

`SLOTS` is the one list of an adapter's tensors. The containers of a layer, the names that PEFT is
told, the move to a device, the checks of a checkpoint, undoing and `loft-rs inspect` all follow
from it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ._transforms import TransformName

__all__ = ["CONFIG_FILE", "FORMAT_VERSION", "ORTHONORMAL", "SLOTS", "SUPPORT_GRAM", "UNKNOWN_ENERGY", "WEIGHTS_FILE"]
__all__ += ["READABLE_VERSIONS", "RETIRED_FIELDS", "Described", "Slot", "of_this_version", "slots_of"]

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1: options of the support and of the transform were fields of their own
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

SUPPORT_GRAM = 0.05  # ||P^T P - I||_2 that a basis rounded to half precision may have; float32 ones are far below
ORTHONORMAL = 1e-5  # ||P^T P - I||_2 up to which P counts as orthonormal, and C is left out
UNKNOWN_ENERGY = -1.0  # in `loft_energy`; files of earlier versions hold NaN there


class Slot(NamedTuple):
    """One tensor of an adapter, `loft_<name>.<adapter>` in a state dict and `loft_<name>` in a
    file.

    trained: a parameter, otherwise a persistent buffer. when: which adapters have it: "always", or
    those of a trait.
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
    """The slots of an adapter with these traits, each one of "scaled", "supported", "movable" and
    "refreshed".
    """
    return [slot for slot in SLOTS if slot.when == "always" or slot.when in traits]


# What version 1 had as fields -> where it is said now.
RETIRED_FIELDS = {
    "halves": "support=loft_rs.Pilot(halves=True)",
    "magnitudes": "transform='cayley+magnitudes'",
    "neumann_terms": "transform='cayley_neumann:5'",
    "factors": "support=loft_rs.Blocks(factors=...)",
    "share": "support=loft_rs.Blocks(share=True)",
    "output_scale": "support=loft_rs.Blocks(output_scale=True)",
}


def of_this_version(config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved `adapter_config.json` with the fields of this version, every one of version 1
    mapped.
    """
    fields = dict(config)
    old = {name: fields.pop(name) for name in RETIRED_FIELDS if name in fields}
    support, transform = fields.get("support"), fields.get("transform")
    if support == "blocks":
        kept = {name: old[name] for name in ("factors", "share", "output_scale") if name in old}
        fields["support"] = {"name": "blocks", **kept}
    if support == "trained":
        fields["support"] = {"name": "reflections", "gram_schmidt": transform == "reflection"}
        fields["transform"] = "cayley"
    elif isinstance(transform, str) and old:
        halves = bool(old.get("halves"))
        if halves and support == "pilot":
            fields["support"], halves = {"name": "pilot", "halves": True}, False
        name = TransformName(transform, old.get("neumann_terms"), bool(old.get("magnitudes")), halves)
        fields["transform"] = str(name)
    return fields


class Described(NamedTuple):
    """What a saved config says of its adapter. method: the support's name, or the path of a file.
    options: those of its object, by name.
    """

    method: str
    options: dict[str, Any]
    transform: TransformName

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Described:
        """Of the fields of an `adapter_config.json` of any readable version."""
        fields = of_this_version(config)
        support, transform = fields.get("support"), TransformName.of(fields.get("transform") or "cayley")
        options = (
            {key: value for key, value in support.items() if key != "name"} if isinstance(support, Mapping) else {}
        )
        method = str(support.get("name")) if isinstance(support, Mapping) else str(support)
        return cls(method, options, transform._replace(halves=transform.halves or bool(options.get("halves"))))
