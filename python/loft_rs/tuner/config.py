"""`LoftConfig`: what a LOFT adapter is, as PEFT users write it and as `adapter_config.json` keeps it."""

from __future__ import annotations

import os
import re
import warnings
from copy import copy
from dataclasses import dataclass, field

from peft.config import PeftConfig
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from .._format import FORMAT_VERSION
from ..layer.kinds import Householder, Kind, Partition, Supported
from ..support.methods import SIDES
from ..transform.transforms import TRANSFORMS

__all__ = ["LoftConfig"]

# Chosen when the model is built, from the weights or a seed; the others wait for `calibrate`.
DATA_FREE_SUPPORTS = ("principal", "random", "coordinate")
GRADIENT_SUPPORTS = ("skewgrad", "gradsvd")
CALIBRATED_SUPPORTS = (*GRADIENT_SUPPORTS, "activation", "pilot")
# Kinds of adapters without a frozen support.
WITHOUT_SUPPORT = ("blocks", "trained")
ORDERS = ("auto", "natural", "input_pca")
_TRANSFORMS = {"trained": ("householder", "reflection"), "others": (*TRANSFORMS, "cayley_neumann")}


def full_name(module: str) -> str:
    """A pattern for one module: PEFT reads a key as the end of a name, and a regular expression, in which "^" is the start."""
    return f"^{re.escape(module)}"


def _neumann(terms: int | None) -> dict:
    return {} if terms is None else {"transform": "cayley_neumann", "neumann_terms": terms}


def _and_others(method: str, own: dict, options: dict) -> dict:
    if twice := sorted(own.keys() & options.keys()):
        raise TypeError(f"LoftConfig.{method} sets {', '.join(twice)} itself, from its own arguments")
    return own | options


@dataclass
class LoftConfig(PeftConfig):
    """Configuration of a LOFT adapter, W = W0 R or R W0 with R = I + P (T - I) P^T (arXiv 2605.11872).

    Args:
        r (`int`): Rank of the support. Trained parameters a layer: r(r - 1)/2 (`cayley`, `exp`), r^2 (`free`) or, with `halves`, r^2/4.
            Even: an odd rank gains nothing over the even one below it under a skew transform, and warns; in halves, little. A layer with
            min(in, out) < r gets the largest even rank that fits, in one warning that lists the layers.
        target_modules (`list[str] | str`): Names or suffixes, a regular expression, or `"all-linear"`. None: the usual
            modules of the architecture.
        exclude_modules (`list[str] | str`): Names, suffixes or a regular expression of modules to leave alone.
        support (`str`): How P is chosen. Without data: `principal` (top singular vectors of W0, the default), `random`, `coordinate`. By
            `loft_rs.calibrate`: `skewgrad`, `gradsvd`, `activation`, or `pilot`, the directions that a few steps of low-rank training
            changed the most (see `loft_rs.Pilot`). Or the path of a file written by `loft_rs.save_supports`. Without a support: `blocks`
            turns all coordinates, r at a time (OFT, BOFT), and `trained` trains r Householder vectors (HRA); see `LoftConfig.oft`,
            `.boft`, `.hra` and `.psoft`, which set this and the six options at the end of this list.
        transform (`str`): `cayley` (default), `exp` or `free` (not orthogonal); `cayley_neumann`, a series cut off, to go on with an
            adapter that was trained with it; with `support="trained"` `householder` or `reflection`.
        side (`str`): `input` (W0 R, default), `output` (R W0), or `auto`: `loft_rs.calibrate` chooses for every module the side whose
            support captures more of the loss's first-order decrease with as many trained parameters (see `loft_rs.sides`), and
            writes it into `side_pattern`; until then the module is the identity, on the input side. Once decided it stays. Needs
            `skewgrad` or `gradsvd`, or a file of supports, each of which knows its side.
        side_pattern (`dict[str, str]`): Sides of single modules, `input` or `output`, by name, suffix or regular expression; as in
            `rank_pattern`, what names no module has no effect.
        order (`str`): Order of the coordinates inside the support, of halves inside each. `input_pca`: eigenvectors of sum z^T z,
            z = X P, descending; `natural`: as the support's method gives them; `auto` (default): `input_pca` wherever `calibrate` runs.
        tied (`bool | list[list[str]]`): One support and one transform for layers that read the same input, a third of the parameters
            and less time for q, k and v. True: those that are so named (`q_proj, k_proj, v_proj`; `gate_proj, up_proj`; and other
            common names); or groups of names of one parent's modules, such as `[["q_proj", "k_proj"]]`. Input side only, not `auto`.
        seed (`int`): Seed of the support's random sketch, or of a `random` or `coordinate` support.
        rank_pattern (`dict[str, int]`): Ranks of single modules, by name, suffix or regular expression.
        modules_to_save (`list[str]`): Modules trained and saved whole, such as a fresh classification head.
        layers_to_transform, layers_pattern: Restrict the adapter to layer indices, as in PEFT's other methods.
        trainable_token_indices: Token embeddings trained beside the adapter, as in PEFT.
        fan_in_fan_out (`bool`): Accepted for PEFT's sake; the layout of the weight is read from the layer itself.
        init_weights (`bool`): True starts at the identity; False at a small random rotation, for tests.
        factors (`int`): With `support="blocks"`, 1: blocks of neighbours; more: so many butterfly factors.
        share (`bool`): With `support="blocks"`, one rotation for all blocks of a factor.
        output_scale (`bool`): With `support="blocks"`, a trained factor for every output as well, as BOFT has.
        magnitudes (`bool`): diag(1 + b) T diag(1 + a) in place of T, 2r more parameters and no longer orthogonal, as PSOFT has.
        halves (`bool`): With `support="pilot"`: the support's first half are the directions v_i that the pilot's change reads, the second
            their partners, which W0 maps to what it writes, u_i; only rotations of the one half towards the other are trained, r^2/4
            parameters (see `pilot.py`). With a file of supports, which must be of such a pilot: one without halves cannot be told from it,
            and its columns would be split as they come. Needs `cayley` or `exp`, no magnitudes, and dense weights; not for `refresh` and
            `narrow`.
        neumann_terms (`int`): K of `cayley_neumann`, T = (I - A) sum_{k <= K} (-A)^k.
        frozen_ranks (`dict[str, int]`): Set by `loft_rs.refresh`, and read when an adapter is loaded: the rank of what is
            frozen, by module.
        loft_format_version (`int`): Named by saved configs only; leave it alone. A version this package does not know is refused.
    """

    r: int = field(default=64, metadata={"help": "Rank of the support, even."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    support: str = field(default="principal", metadata={"help": "How the support is chosen, or a saved supports file."})
    transform: str = field(default="cayley", metadata={"help": "cayley, exp or free."})
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
    factors: int = field(default=1, metadata={"help": "Butterfly factors of blocks."})
    share: bool = field(default=False, metadata={"help": "One rotation for all blocks of a factor."})
    output_scale: bool = field(default=False, metadata={"help": "A trained factor for every output."})
    magnitudes: bool = field(default=False, metadata={"help": "Trained magnitudes around the transform."})
    halves: bool = field(default=False, metadata={"help": "Turn one half of the support towards the other only."})
    neumann_terms: int | None = field(default=None, metadata={"help": "Terms of cayley_neumann."})
    frozen_ranks: dict[str, int] = field(default_factory=dict, metadata={"help": "Ranks frozen by refresh."})
    loft_format_version: int | None = field(default=None, metadata={"help": "Version of the saved form."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.LOFT
        if isinstance(self.support, os.PathLike):
            self.support = os.fspath(self.support)
        if self.rank_pattern is None:
            self.rank_pattern = {}
        if self.side_pattern is None:
            self.side_pattern = {}
        if self.frozen_ranks is None:
            self.frozen_ranks = {}
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._check()

    def _check(self) -> None:
        if self.loft_format_version not in (None, FORMAT_VERSION):
            raise ValueError(
                f"loft_format_version is {self.loft_format_version!r}, but this loft_rs reads version {FORMAT_VERSION}; "
                "upgrade loft_rs, or export the adapter again with this version"
            )
        for name, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                what = "r (the block size)" if self.support == "blocks" and name == "r" else name
                even = "" if self.support == "blocks" else ", even"
                raise ValueError(f"{what} must be a positive{even} integer, got {rank!r}")
            if self.support == "trained":
                self._warn_of_the_start(name, rank)
                continue
            if rank == 1 and self.transform != "free" and not self.supports_from_checkpoint:
                raise ValueError(
                    f"{name} must be at least 2: a {self.transform} transform of rank 1 has nothing to train"
                )
            if rank % 2 and self.transform != "free" and self.has_support:
                warnings.warn(
                    f"{name} = {rank} is odd: a skew transform gains nothing over rank {rank - 1}", stacklevel=4
                )
        if not isinstance(self.side_pattern, dict):
            raise ValueError(f"side_pattern must be a dict of names and sides, got {self.side_pattern!r}")
        for name in self.side_pattern:
            try:
                re.compile(name)
            except (TypeError, re.error) as error:
                raise ValueError(f"side_pattern[{name!r}] must be a name or a regular expression: {error}") from None
        for name, value, choices in (
            ("transform", self.transform, _TRANSFORMS["trained" if self.support == "trained" else "others"]),
            ("side", self.side, (*SIDES, "auto")),
            *((f"side_pattern[{key!r}]", side, SIDES) for key, side in self.side_pattern.items()),
            ("order", self.order, ORDERS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {sorted(choices)}, got {value!r}")
        if self.tied and self.side != "input":
            raise ValueError("tied needs side='input': what layers of one input have in common is their input")
        names = self.tied if isinstance(self.tied, (list, tuple)) else []
        groups = all(isinstance(group, (list, tuple)) and len(group) > 1 for group in names)
        if (
            not isinstance(self.tied, (bool, list, tuple))
            or not groups
            or any(not isinstance(n, str) for g in names for n in g)
        ):
            raise ValueError(
                f"tied must be True, False or a list of lists of two or more module names, got {self.tied!r}"
            )
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer >= 0, got {self.seed!r}")
        self._check_options()
        if self.side == "auto" and self.support not in GRADIENT_SUPPORTS and not self.support_file:
            raise ValueError(
                "side='auto' is decided by what the gradient shows: it needs support='skewgrad' or 'gradsvd', or a file of supports, "
                f"which know their sides, got {self.support!r}"
            )
        methods = (*DATA_FREE_SUPPORTS, *CALIBRATED_SUPPORTS, *WITHOUT_SUPPORT)
        if not isinstance(self.support, str) or (self.support not in methods and not self.support_file):
            raise ValueError(
                f"support must be one of {sorted(methods)} or the path of a .safetensors file written by "
                f"loft_rs.save_supports, got {self.support!r}"
            )
        self._check_halves()
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules to be a list of names, not a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: give the indices of the layers to adapt")

    def _warn_of_the_start(self, name: str, rank: int) -> None:
        """Householder vectors that cannot be paired reflect: the adapted model is not the base model before it is trained."""
        if self.supports_from_checkpoint or not self.init_weights:
            return
        if self.transform == "reflection" and name == "r":
            warnings.warn(
                "gram_schmidt starts at a reflection: the model begins away from the base model", stacklevel=5
            )
        elif self.transform == "householder" and rank % 2:
            warnings.warn(
                f"{name} = {rank} is odd: an odd number of reflections is none the base model starts from; give {rank + 1}",
                stacklevel=5,
            )

    def _check_options(self) -> None:
        if not isinstance(self.factors, int) or isinstance(self.factors, bool) or self.factors < 1:
            raise ValueError(f"factors must be a positive integer, got {self.factors!r}")
        for name, value in (("factors", self.factors > 1), ("share", self.share), ("output_scale", self.output_scale)):
            if value and self.support != "blocks":
                raise ValueError(f"{name} needs support='blocks', but support is {self.support!r}")
        if not self.has_support and (self.side != "input" or self.side_pattern or self.tied):
            raise ValueError(f"support={self.support!r} needs side='input', no side_pattern and tied=False")
        if (self.transform == "cayley_neumann") != (self.neumann_terms is not None):
            raise ValueError(
                "neumann_terms belongs to transform='cayley_neumann', which needs it: give both or neither"
            )
        terms = self.neumann_terms
        if terms is not None and (not isinstance(terms, int) or isinstance(terms, bool) or terms < 1):
            raise ValueError(f"neumann_terms must be a positive integer, got {terms!r}")
        if self.magnitudes and (not self.has_support or self.transform == "free"):
            raise ValueError("magnitudes needs a support and a transform other than 'free', which has them already")

    def _check_halves(self) -> None:
        if self.halves is False:
            return
        if self.halves is not True:
            raise ValueError(f"halves must be True or False, got {self.halves!r}")
        if self.support != "pilot" and not self.support_file:
            raise ValueError(
                f"halves needs support='pilot', which finds both halves, or a file of such supports, got {self.support!r}"
            )
        if self.transform not in ("cayley", "exp") or self.magnitudes:
            named = self.transform + " with magnitudes" * self.magnitudes
            raise ValueError(f"halves needs the transform 'cayley' or 'exp' without magnitudes, got {named}")

    @classmethod
    def oft(
        cls, block_size: int = 32, *, share: bool = False, neumann_terms: int | None = None, **options
    ) -> LoftConfig:
        """OFT (arXiv 2306.07280, 2506.19847): every `block_size` neighbouring inputs rotated, b(b - 1)/2 parameters a block, exactly unless
        `neumann_terms` is given. share: one rotation for all blocks of a layer. options: other fields of LoftConfig."""
        fields = {"r": block_size, "support": "blocks", "share": share, **_neumann(neumann_terms)}
        return cls(**_and_others("oft", fields, options))

    @classmethod
    def boft(cls, block_size: int = 8, factors: int = 1, *, output_scale: bool = True, **options) -> LoftConfig:
        """BOFT (arXiv 2311.06243): `factors` rotations of blocks of `block_size` inputs, each after a butterfly permutation, and a trained
        scale of every output, as PEFT has it. b(b - 1)/2 parameters a block, where PEFT stores b^2."""
        fields = {"r": block_size, "support": "blocks", "factors": factors, "output_scale": output_scale}
        return cls(**_and_others("boft", fields, options))

    @classmethod
    def hra(cls, r: int = 8, *, gram_schmidt: bool = False, **options) -> LoftConfig:
        """HRA (arXiv 2405.17484): a product of `r` trained Householder reflections; r even, for a start at the identity. gram_schmidt:
        I - 2 Q Q^T with Q an orthonormal basis of the vectors, which does not start there."""
        fields = {"r": r, "support": "trained", "transform": "reflection" if gram_schmidt else "householder"}
        return cls(**_and_others("hra", fields, options))

    @classmethod
    def psoft(cls, r: int = 64, *, magnitudes: bool = True, neumann_terms: int | None = None, **options) -> LoftConfig:
        """PSOFT (arXiv 2505.11235): the principal support, Cayley, and trained magnitudes around it; r(r - 1)/2 + 2r parameters."""
        fields = {"r": r, "support": "principal", "magnitudes": magnitudes, **_neumann(neumann_terms)}
        return cls(**_and_others("psoft", fields, {"order": "natural", **options}))

    @property
    def kind(self) -> Kind:
        """What an adapter's tensors are and which factor they make."""
        if self.support == "blocks":
            return Partition(self.factors, self.share)
        return Householder(self.transform == "reflection") if self.support == "trained" else Supported()

    @property
    def has_support(self) -> bool:
        """Whether there is a frozen support."""
        return self.support not in WITHOUT_SUPPORT

    @property
    def transform_name(self) -> str | None:
        """The transform with its options, as `transform.get_transform` knows it; None for trained Householder vectors."""
        if self.support == "trained":
            return None
        terms = "" if self.neumann_terms is None else f":{self.neumann_terms}"
        return self.transform + terms + "+magnitudes" * self.magnitudes + "+halves" * self.halves

    @property
    def needs_calibration(self) -> bool:
        """Whether the support comes from data, by `loft_rs.calibrate`."""
        return self.support in CALIBRATED_SUPPORTS

    @property
    def mixed_sides(self) -> bool:
        """Whether modules may be on different sides, so that the adapter's state says which each is on."""
        return self.side == "auto" or bool(self.side_pattern)

    def side_of(self, module: str) -> str:
        """The side of a module: `input`, `output`, or `auto` where nothing has decided it yet. Its full name comes before what PEFT would
        find first, which takes a regular expression for every other module."""
        key = full_name(module)
        if key not in self.side_pattern:
            key = get_pattern_key(list(self.side_pattern), module)
        return self.side_pattern.get(key, self.side)

    @property
    def support_file(self) -> str | None:
        """The path of the saved supports, where `support` names one."""
        return self.support if self.support.endswith(".safetensors") else None

    @property
    def supports_from_checkpoint(self) -> bool:
        """Whether this is a saved adapter's config. Its supports are in the checkpoint that is loaded next: choosing them when the
        model is built would cost an SVD a layer and could differ. Where none is loaded they are chosen at the first use."""
        return self.loft_format_version is not None

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """As PEFT's, with the version of the saved form."""
        saved = copy(self)
        saved.loft_format_version = FORMAT_VERSION
        super(LoftConfig, saved).save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict:
        """The fields as plain data, sets sorted, so that the same adapter always writes the same bytes."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}
