"""`LoftConfig`: what a LOFT adapter is, as PEFT users write it and as `adapter_config.json` keeps
it.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from copy import copy
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from .._files import read_safetensors
from .._format import FORMAT_VERSION, RETIRED_FIELDS, WEIGHTS_FILE, of_this_version
from .._transforms import TransformName
from .._words import some
from ..layer.kinds import BlocksKind, Kind, ReflectionsKind, SubspaceKind
from ..support.budget import Budget
from ..support.methods import (
    CALIBRATED_SUPPORTS,
    OPTIONS,
    WITHOUT_SUPPORT,
    Blocks,
    Reflections,
    as_dict,
    from_dict,
    name_of,
)
from .checks import check, check_fields

__all__ = ["LoftConfig", "full_name"]

BEFORE_SHARED = 2  # the rank of every layer until `calibrate` has shared a `Budget` out


def full_name(module: str) -> str:
    """A pattern for one module: PEFT reads a key as the end of a name, and a regular expression, in
    which "^" is the start.
    """
    return f"^{re.escape(module)}"


def _and_others(method: str, own: dict, options: dict) -> dict:
    if twice := sorted(own.keys() & options.keys()):
        raise TypeError(f"LoftConfig.{method} sets {', '.join(twice)} itself, from its own arguments")
    return own | options


@dataclass
class LoftConfig(PeftConfig):
    """Configuration of a LOFT adapter, W = W0 R or R W0 with R = I + P (T - I) P^T
    (arXiv 2605.11872).

    `loft_rs.suggest_lr(config)` gives a learning rate to start from: .001 for the default config. A
    Trainer's default, 5e-5, is a twentieth of that.

    Args:
        r (`int` or `Budget`): Rank of the support. Trained parameters a layer: r(r - 1)/2
            (`cayley`, `exp`), r^2 (`free`) or, of a pilot in halves, r^2/4. Even: an odd rank gains
            nothing over the even one below it under a skew transform, and warns. A layer with
            min(in, out) < r gets the largest even rank that fits, in one warning that lists the
            layers. `Budget(params=...)`: one number for all layers, which `loft_rs.calibrate`
            shares out by what each rank captures; for supports from gradients or activations.
        target_modules (`list[str] | str`): Names or suffixes, a regular expression, or
            `"all-linear"`. None: the usual modules of the architecture.
        exclude_modules (`list[str] | str`): Names, suffixes or a regular expression of modules to
            leave alone.
        support (`str` or an object): How P is chosen. Without data: `principal` (top singular
            vectors of W0, the default), `random`, `coordinate`. By `loft_rs.calibrate`: `skewgrad`,
            `gradsvd`, `activation`, or `pilot`, the directions that a few steps of low-rank
            training changed the most; each is also an object with options: `SkewGrad(passes=1)`,
            `Pilot(halves=True)`. Or the path of a file written by `loft_rs.save_supports`. Without
            a support: `Blocks(...)` turns all coordinates, r at a time (OFT, BOFT), and
            `Reflections()` trains r Householder vectors (HRA); `LoftConfig.oft`, `.boft`, `.hra`
            and `.psoft` set them.
        transform (`str`): `cayley` (default), `exp` or `free` (not orthogonal). `cayley_neumann:K`
            cuts Cayley's series off after K terms, to go on with an adapter that was trained with
            it. `+magnitudes` trains diag(1 + b) T diag(1 + a), as PSOFT does; no longer orthogonal.
        side (`str`): `input` (W0 R, default), `output` (R W0), or `auto` (experimental):
            `loft_rs.calibrate` chooses for every module the side whose support captures more of the
            loss's first-order decrease (see `calibration/sides.py`), and writes it into
            `side_pattern`; until then the module is the identity, on the input side. Once decided
            it stays. Needs `skewgrad` or `gradsvd`, or a file of supports, each of which knows its
            side.
        side_pattern (`dict[str, str]`): Sides of single modules, `input` or `output`, by name,
            suffix or regular expression; as in `rank_pattern`, what names no module has no effect.
        order (`str`): Order of the coordinates inside the support, of halves inside each.
            `input_pca`: eigenvectors of sum z^T z, z = X P, descending; `natural`: as the support's
            method gives them; `auto` (default): `input_pca` wherever `calibrate` runs.
        tied (`bool | list[list[str]]`): One support and one transform for layers that read the same
            input, a third of the parameters and less time for q, k and v. True: those that are so
            named (`q_proj, k_proj, v_proj`; `gate_proj, up_proj`; and other common names); or
            groups of names of one parent's modules, such as `[["q_proj", "k_proj"]]`. Input side
            only, not `auto`.
        seed (`int`): Seed of the support's random sketch, or of a `random` or `coordinate` support.
        rank_pattern (`dict[str, int]`): Ranks of single modules, by name, suffix or regular
            expression.
        modules_to_save (`list[str]`): Modules trained and saved whole, such as a fresh
            classification head.
        layers_to_transform, layers_pattern: Restrict the adapter to layer indices, as in PEFT's
            other methods.
        trainable_token_indices: Token embeddings trained beside the adapter, as in PEFT.
        fan_in_fan_out (`bool`): Accepted for PEFT's sake; the layout of the weight is read from the
            layer itself.
        init_weights (`bool`): True starts at the identity; False at a small random rotation, for
            tests.
        frozen_ranks (`dict[str, int]`): Set by `loft_rs.refresh`, and read when an adapter is
            loaded: the rank of what is frozen, by module.
        loft_format_version (`int`): Named by saved configs only; leave it alone. A version this
            package does not know is refused.

    >>> config = LoftConfig(r=64, target_modules="all-linear", support=Pilot(steps=64))
    >>> suggest_lr(config)
    0.0025
    """

    r: int | Budget = field(default=64, metadata={"help": "Rank of the support, even, or a Budget."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    support: Any = field(default="principal", metadata={"help": "How the support is chosen, or a saved supports file."})
    transform: str = field(default="cayley", metadata={"help": "cayley, exp or free, and what is added to it."})
    side: str = field(default="input", metadata={"help": "input (W0 R), output (R W0) or auto."})
    side_pattern: dict[str, str] = field(default_factory=dict, metadata={"help": "Sides of single modules."})
    order: str = field(default="auto", metadata={"help": "auto, natural or input_pca."})
    tied: bool | list[list[str]] = field(default=False, metadata={"help": "One rotation for layers of one input."})
    seed: int = field(default=0, metadata={"help": "Seed of the support."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Ranks of single modules."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token embeddings to train."}
    )
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: read from the layer."})
    init_weights: bool = field(default=True, metadata={"help": "Start at the identity."})
    frozen_ranks: dict[str, int] = field(default_factory=dict, metadata={"help": "Ranks frozen by refresh."})
    loft_format_version: int | None = field(default=None, metadata={"help": "Version of the saved form."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.LOFT  # type: ignore[attr-defined]  # our registration's
        if isinstance(self.support, os.PathLike):
            self.support = os.fspath(self.support)
        if isinstance(self.support, dict):
            self.support = from_dict(self.support)
        for name in ("rank_pattern", "side_pattern", "frozen_ranks"):
            if getattr(self, name) is None:
                setattr(self, name, {})
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        check(self)

    @classmethod
    def oft(
        cls, block_size: int = 32, *, share: bool = False, neumann_terms: int | None = None, **options
    ) -> LoftConfig:
        """OFT (arXiv 2306.07280, 2506.19847): every `block_size` neighbouring inputs rotated,
        b(b - 1)/2 parameters a block, exactly unless `neumann_terms` is given. share: one rotation
        for all blocks of a layer. options: other fields of LoftConfig."""
        fields = {"r": block_size, "support": Blocks(share=share)}
        if neumann_terms is not None:
            fields["transform"] = f"cayley_neumann:{neumann_terms}"
        return cls(**_and_others("oft", fields, options))

    @classmethod
    def boft(cls, block_size: int = 8, factors: int = 1, *, output_scale: bool = True, **options) -> LoftConfig:
        """BOFT (arXiv 2311.06243): `factors` rotations of blocks of `block_size` inputs, each after
        a butterfly permutation, and a trained scale of every output, as PEFT has it. b(b - 1)/2
        parameters a block, where PEFT stores b^2."""
        fields = {"r": block_size, "support": Blocks(factors=factors, output_scale=output_scale)}
        return cls(**_and_others("boft", fields, options))

    @classmethod
    def hra(cls, r: int = 8, *, gram_schmidt: bool = False, **options) -> LoftConfig:
        """HRA (arXiv 2405.17484): a product of `r` trained Householder reflections; r even, for a
        start at the identity. gram_schmidt: I - 2 Q Q^T with Q an orthonormal basis of the vectors,
        which does not start there."""
        fields = {"r": r, "support": Reflections(gram_schmidt=gram_schmidt)}
        return cls(**_and_others("hra", fields, options))

    @classmethod
    def psoft(cls, r: int = 64, *, magnitudes: bool = True, neumann_terms: int | None = None, **options) -> LoftConfig:
        """PSOFT (arXiv 2505.11235): the principal support, Cayley, and trained magnitudes around
        it; r(r - 1)/2 + 2r parameters.
        """
        base = "cayley" if neumann_terms is None else f"cayley_neumann:{neumann_terms}"
        fields = {"r": r, "support": "principal", "transform": base + "+magnitudes" * magnitudes}
        return cls(**_and_others("psoft", fields, {"order": "natural", **options}))

    # -- what it says -----------------------------------------------------------------------------

    @property
    def method(self) -> str:
        """The name of the support, or the path of its file."""
        return name_of(self.support) or self.support

    @property
    def options(self) -> Any:
        """The support's options, an object of `support.methods.OPTIONS`; None where it has none."""
        if name_of(self.support) is not None:
            return self.support
        kind = OPTIONS.get(self.method)
        return None if kind is None else kind()

    @property
    def rank(self) -> int:
        """The rank of a layer that `rank_pattern` does not name. Under a `Budget` the smallest,
        until `calibrate` has shared it out.
        """
        return BEFORE_SHARED if isinstance(self.r, Budget) else self.r

    @property
    def named_transform(self) -> TransformName:
        """The transform's name taken apart; in halves where a pilot is."""
        name = TransformName.of(self.transform)
        return name._replace(halves=name.halves or bool(getattr(self.options, "halves", False)))

    @property
    def kind(self) -> Kind:
        """What an adapter's tensors are and which factor they make."""
        if self.method == "blocks":
            return BlocksKind(self.options.factors, self.options.share)
        return ReflectionsKind(self.options.gram_schmidt) if self.method == "reflections" else SubspaceKind()

    @property
    def output_scale(self) -> bool:
        """Whether there is a trained factor for every output."""
        return self.method == "blocks" and self.options.output_scale

    @property
    def has_support(self) -> bool:
        """Whether there is a frozen support."""
        return self.method not in WITHOUT_SUPPORT

    @property
    def transform_name(self) -> str | None:
        """The transform as `transform.get_transform` knows it; None for trained Householder
        vectors.
        """
        return None if self.method == "reflections" else str(self.named_transform)

    @property
    def needs_calibration(self) -> bool:
        """Whether the support comes from data, by `loft_rs.calibrate`."""
        return self.method in CALIBRATED_SUPPORTS

    @property
    def mixed_sides(self) -> bool:
        """Whether modules may be on different sides, so that the adapter's state says which each is
        on.
        """
        return self.side == "auto" or bool(self.side_pattern)

    def side_of(self, module: str) -> str:
        """The side of a module: `input`, `output`, or `auto` where nothing has decided it yet. Its
        full name comes before what PEFT would find first, which takes a regular expression for
        every other module."""
        key = full_name(module)
        if key not in self.side_pattern:
            key = get_pattern_key(list(self.side_pattern), module)
        return self.side_pattern.get(key, self.side)

    @property
    def support_file(self) -> str | None:
        """The path of the saved supports, where `support` names one."""
        return self.support if isinstance(self.support, str) and self.support.endswith(".safetensors") else None

    @property
    def supports_from_checkpoint(self) -> bool:
        """Whether this is a saved adapter's config. Its supports are in the checkpoint that is
        loaded next: choosing them when the model is built would cost an SVD a layer and could
        differ. Where none is loaded they are chosen at the first use."""
        return self.loft_format_version is not None

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """As PEFT's, with the version of the saved form; warns where no support is set yet.

        PEFT has written the tensors by then.
        """
        saved = copy(self)
        saved.loft_format_version = FORMAT_VERSION
        if unset := _unset_supports(save_directory):
            warnings.warn(
                f"saved without a support in {some(unset)}: call loft_rs.calibrate, or train with LoftCalibrationCallback, before "
                "save_pretrained",
                stacklevel=3,
            )
        super(LoftConfig, saved).save_pretrained(save_directory, **kwargs)

    def __repr__(self) -> str:
        """What differs from the default, as it would be written; not what PEFT notes by itself."""
        first, noted = ("r", "support", "target_modules"), ("peft_type", "peft_version", "auto_mapping")
        said = []
        for each in sorted(fields(self), key=lambda each: first.index(each.name) if each.name in first else len(first)):
            value = getattr(self, each.name)
            default = each.default if each.default_factory is MISSING else each.default_factory()
            if each.name not in noted and value != default:
                said.append(f"{each.name}={sorted(value) if isinstance(value, set) else value!r}")
        return f"LoftConfig({', '.join(said)})"

    def to_dict(self) -> dict:
        """The fields as plain data, sets sorted, so that the same adapter always writes the same
        bytes.
        """
        saved = {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}
        if name_of(self.support) is not None:
            saved["support"] = as_dict(self.support)
        if isinstance(self.r, Budget):
            saved["r"] = {"name": "budget", **saved["r"]}  # type: ignore[dict-item]
        return saved


def _unset_supports(folder: str | os.PathLike) -> list[str]:
    """The modules in a folder's adapter file whose support is all zero: nothing has chosen one."""
    file = Path(folder) / WEIGHTS_FILE
    tensors = read_safetensors(file)[0] if file.is_file() else {}
    supports = {
        name.rpartition(".loft_support")[0]: basis for name, basis in tensors.items() if ".loft_support" in name
    }
    return [
        name.removeprefix("base_model.model.")
        for name, basis in supports.items()
        if basis.size and not basis[0].any() and not basis.any()
    ]


_from_fields = LoftConfig.__init__


@functools.wraps(_from_fields)
def _init(self: LoftConfig, *args: Any, **fields: Any) -> None:
    """Fields of version 1 are read from a saved adapter, and refused anywhere else."""
    retired = [name for name in fields if name in RETIRED_FIELDS]
    if fields.get("loft_format_version") is not None:
        fields = of_this_version(fields)
        # A newer PEFT's fields: of what PEFT, by the signature, takes for unknown, it would leave
        # version 1's out as well.
        if retired and (unknown := sorted(fields.keys() - self.__dataclass_fields__.keys())):
            warnings.warn(f"fields that this PEFT does not know are left out: {', '.join(unknown)}", stacklevel=3)
            fields = {name: value for name, value in fields.items() if name not in unknown}
        _from_fields(self, *args, **fields)
        return
    check_fields(fields, self.__dataclass_fields__)
    if fields.get("support") == "trained" or fields.get("transform") in ("householder", "reflection"):
        raise ValueError("trained Householder vectors are support=loft_rs.Reflections(), as LoftConfig.hra makes them")
    _from_fields(self, *args, **fields)


LoftConfig.__init__ = _init  # type: ignore[method-assign]
