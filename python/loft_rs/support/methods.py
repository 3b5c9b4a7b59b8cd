"""The ways to choose a support, in one table: what each needs, and the object that holds its
options.

    principal random coordinate   from the weights or a seed, when the model is built
    gradsvd skewgrad              from gradients: `select_support`, or `calibrate` over a task's batches
    activation                    from the inputs of the layers: `calibrate`
    pilot                         from what a short low-rank training changes: `calibrate`
    blocks reflections            kinds of adapters without a frozen support (OFT, BOFT; HRA)

A name stands for the object with its defaults: `support="pilot"` is `support=Pilot()`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from .._checks import is_int

__all__ = [
    "CALIBRATED_SUPPORTS",
    "DATA_FREE_SUPPORTS",
    "GRADIENT_SUPPORTS",
    "METHODS",
    "OPTIONS",
    "ORDERS",
    "PILOT_RANK",
    "SIDES",
    "STORED_METHODS",
    "WITHOUT_SUPPORT",
    "Activation",
    "Blocks",
    "GradSVD",
    "Pilot",
    "Reflections",
    "SkewGrad",
    "as_dict",
    "from_dict",
    "name_of",
]

SIDES = ("input", "output")
ORDERS = ("natural", "input_pca")

DATA_FREE_SUPPORTS = ("principal", "random", "coordinate")
GRADIENT_SUPPORTS = ("skewgrad", "gradsvd")
CALIBRATED_SUPPORTS = (*GRADIENT_SUPPORTS, "activation", "pilot")
WITHOUT_SUPPORT = ("blocks", "reflections")
METHODS = ("gradsvd", "skewgrad", "principal", "random", "coordinate")  # of `select_support`
STORED_METHODS = (*METHODS, "activation", "pilot", "custom")

PILOT_RANK = 64


def _positive(name: str, value: Any) -> None:
    if not is_int(value) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class _Sketched:
    """Options of a support that `calibrate` solves from sketches.

    passes: 2, or 1 for data that comes only once: the support is then chosen, and ordered, from a
    wider sketch alone.
    oversampling: columns of the sketch beyond the rank, n x 4 bytes each, twice; None: 16, or 192
        for a single pass. More capture more, up to the optimum.
    """

    passes: int = 2
    oversampling: int | None = None

    def __post_init__(self) -> None:
        if self.passes not in (1, 2) or isinstance(self.passes, bool):
            raise ValueError(f"passes must be 1 or 2, got {self.passes!r}")
        wide = self.oversampling
        if wide is not None and (not is_int(wide) or wide < 2 or wide % 2):
            raise ValueError(f"oversampling must be None or an even number of at least 2, got {wide!r}")


@dataclass(frozen=True, kw_only=True)
class SkewGrad(_Sketched):
    """The top invariant subspace of Skew(W0^T G) (arXiv 2605.11872). For its options see
    `GradSVD`.

    >>> LoftConfig(r=8, support=SkewGrad(passes=1)).support
    SkewGrad(passes=1, oversampling=None)
    """


@dataclass(frozen=True, kw_only=True)
class GradSVD(_Sketched):
    """The top right singular vectors of the gradient G (arXiv 2605.11872).

    passes: 2, or 1 for data that comes only once: the support is then chosen, and ordered, from a
    wider sketch alone.
    oversampling: columns of the sketch beyond the rank; None: 16, or 192 for a single pass.
    ValueError for other numbers.

    >>> from loft_rs import GradSVD
    >>> GradSVD(passes=1, oversampling=64)
    GradSVD(passes=1, oversampling=64)
    """


@dataclass(frozen=True, kw_only=True)
class Activation(_Sketched):
    """The top eigenvectors of X^T X, the layer's inputs. For its options see `GradSVD`.

    >>> LoftConfig(r=8, support=Activation(oversampling=32)).support
    Activation(passes=2, oversampling=32)
    """


@dataclass(frozen=True)
class Pilot:
    """A short low-rank training whose change the support spans (`calibration/pilot.py`).

    steps: of Adam, one batch each, at rate `lr`.
    rank: of the change of a layer, no more than min(m, n) there. None: 64, or the adapter's rank
        (in halves: the first one's) where that is larger.
    halves: the support's first half are the directions that the change reads, the second their
        partners, which W0 maps to what it writes. The transform turns one half towards the other
        only: r^2/4 trained numbers a layer. Needs dense weights.
    keep: experimental, for short runs. Training starts where the pilot ended, at the rotation
        nearest to its change (`calibration/start.py`), in place of the base model. Needs dense
        weights, and the transform `cayley` or `exp`.

    ValueError for anything but positive numbers.

    >>> from loft_rs import Pilot
    >>> Pilot(steps=64, halves=True)
    Pilot(steps=64, rank=None, lr=0.001, halves=True, keep=False)
    """

    steps: int = 32
    rank: int | None = None
    lr: float = 1e-3
    halves: bool = False
    keep: bool = False

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("rank", PILOT_RANK if self.rank is None else self.rank)):
            if not is_int(value) or value < 1:
                raise ValueError(
                    f"{name} must be {'None or ' * (name == 'rank')}an integer of at least 1, got {value!r}"
                )
        number = isinstance(self.lr, (int, float)) and not isinstance(self.lr, bool)
        if not number or not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be a positive number, got {self.lr!r}")
        _flag("halves", self.halves)
        _flag("keep", self.keep)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """No support: all coordinates are turned, r at a time (OFT, BOFT; `LoftConfig.oft` and `.boft`
    set this).

    factors: 1: blocks of neighbours; more: so many butterfly factors. share: one rotation for all
    blocks of a factor. output_scale: a trained factor for every output as well, as BOFT has.

    >>> LoftConfig.oft(block_size=32).support
    Blocks(factors=1, share=False, output_scale=False)
    """

    factors: int = 1
    share: bool = False
    output_scale: bool = False

    def __post_init__(self) -> None:
        _positive("factors", self.factors)
        _flag("share", self.share)
        _flag("output_scale", self.output_scale)


@dataclass(frozen=True, kw_only=True)
class Reflections:
    """No frozen support: r trained Householder vectors (HRA; `LoftConfig.hra` sets this).

    gram_schmidt: I - 2 Q Q^T with Q an orthonormal basis of the vectors, which does not start at
    the identity.

    >>> LoftConfig.hra(r=8).support
    Reflections(gram_schmidt=False)
    """

    gram_schmidt: bool = False

    def __post_init__(self) -> None:
        _flag("gram_schmidt", self.gram_schmidt)


OPTIONS: dict[str, type] = {
    "skewgrad": SkewGrad,
    "gradsvd": GradSVD,
    "activation": Activation,
    "pilot": Pilot,
    "blocks": Blocks,
    "reflections": Reflections,
}
_NAMES = {kind: name for name, kind in OPTIONS.items()}


def name_of(support: Any) -> str | None:
    """The name of an object of `OPTIONS`; None for anything else."""
    return _NAMES.get(type(support))


def as_dict(support: Any) -> dict[str, Any]:
    """An object of `OPTIONS` as JSON keeps it: its name and its fields."""
    return {"name": _NAMES[type(support)]} | {each.name: getattr(support, each.name) for each in fields(support)}


def from_dict(saved: dict[str, Any]) -> Any:
    """What `as_dict` made. ValueError for a name or a field that is not known."""
    options = {key: value for key, value in saved.items() if key != "name"}
    kind = OPTIONS.get(saved.get("name", ""))
    if kind is None:
        raise ValueError(f"support has the unknown name {saved.get('name')!r}; one of {', '.join(OPTIONS)} is expected")
    if unknown := options.keys() - {each.name for each in fields(kind)}:
        raise ValueError(f"support {saved['name']!r} has no {', '.join(sorted(unknown))} in this loft_rs; upgrade it")
    return kind(**options)
