"""What a `LoftConfig` refuses: each rule with its message. `config.py` imports this; a config is
handed in.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from .._format import READABLE_VERSIONS, RETIRED_FIELDS
from .._transforms import TABLE, TransformName
from .._words import did_you_mean
from ..support.budget import PARAMETERS, Budget
from ..support.methods import (
    CALIBRATED_SUPPORTS,
    DATA_FREE_SUPPORTS,
    GRADIENT_SUPPORTS,
    SIDES,
    WITHOUT_SUPPORT,
    name_of,
)

__all__ = ["check", "check_fields"]

ORDERS = ("auto", "natural", "input_pca")

_NO_ALPHA = "LOFT has no alpha: its scale is 1 at every r"
_NO_DROPOUT = "LOFT has no dropout: leave it out"
_BLOCKS = "say LoftConfig.oft(block_size=...) or LoftConfig.boft(block_size=...)"
# Fields of LoRA and of other methods -> what LOFT has in their place.
HABITS = {
    **dict.fromkeys(("lora_alpha", "alpha", "alpha_pattern", "scale", "scaling", "use_rslora"), _NO_ALPHA),
    **dict.fromkeys(("lora_dropout", "dropout", "module_dropout"), _NO_DROPOUT),
    **dict.fromkeys(("rank", "lora_r", "lora_rank", "dim"), "say r=..."),
    **dict.fromkeys(("budget", "params", "init_r", "target_r"), "say r=loft_rs.Budget(params=...)"),
    **dict.fromkeys(
        ("lr", "learning_rate"), "a rate is the optimiser's: loft_rs.suggest_lr(config) gives one to start from"
    ),
    **dict.fromkeys(("block_size", "oft_block_size", "boft_block_size"), _BLOCKS),
    **dict.fromkeys(("init_lora_weights", "method"), "say support=..., how the frozen directions are chosen"),
    **dict.fromkeys(("steps", "pilot"), "say support=loft_rs.Pilot(steps=...)"),
    **dict.fromkeys(("passes", "oversampling"), "say support=loft_rs.SkewGrad(...), GradSVD or Activation alike"),
    "use_dora": "LOFT has no DoRA: transform='cayley+magnitudes' trains magnitudes around the rotation",
    "bias": "LOFT trains no bias: name modules that are to be trained whole in modules_to_save",
}


def check_fields(names: Iterable[str], known: Collection[str]) -> None:
    """TypeError for a field that `LoftConfig` lacks, with what stands in its place."""
    for name in names:
        if name in RETIRED_FIELDS:
            raise TypeError(f"LoftConfig no longer takes {name}: say {RETIRED_FIELDS[name]}")
        if name not in known:
            said = f": {HABITS[name]}" if name in HABITS else did_you_mean(name, known)
            raise TypeError(f"LoftConfig has no argument {name!r}{said}")


def check(config: Any) -> None:
    if config.loft_format_version not in (None, *READABLE_VERSIONS):
        raise ValueError(
            f"loft_format_version is {config.loft_format_version!r}, but this loft_rs reads version {READABLE_VERSIONS[-1]}; "
            "upgrade loft_rs, or export the adapter again with this version"
        )
    _check_choices(config)
    _check_ranks(config)
    _check_tied(config)
    _check_together(config)


def _check_choices(config: Any) -> None:
    methods = (*DATA_FREE_SUPPORTS, *CALIBRATED_SUPPORTS, *WITHOUT_SUPPORT)
    if name_of(config.support) is None and config.support not in methods and not config.support_file:
        raise ValueError(
            f"support must be one of {sorted(methods)}, an object such as loft_rs.Pilot(), or the path of a .safetensors file "
            f"written by loft_rs.save_supports, got {config.support!r}"
        )
    if not isinstance(config.side_pattern, dict):
        raise ValueError(f"side_pattern must be a dict of names and sides, got {config.side_pattern!r}")
    for name in config.side_pattern:
        try:
            re.compile(name)
        except (TypeError, re.error) as error:
            raise ValueError(f"side_pattern[{name!r}] must be a name or a regular expression: {error}") from None
    for name, value, choices in (
        ("transform", TransformName.of(config.transform).base, TABLE),
        ("side", config.side, (*SIDES, "auto")),
        *((f"side_pattern[{key!r}]", side, SIDES) for key, side in config.side_pattern.items()),
        ("order", config.order, ORDERS),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {sorted(choices)}, got {value!r}")
    if not isinstance(config.seed, int) or config.seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {config.seed!r}")


def _check_ranks(config: Any) -> None:
    if isinstance(config.r, dict):
        config.r = Budget(**{key: value for key, value in config.r.items() if key != "name"})
    if isinstance(config.r, Budget):
        _check_budget(config)
    base, blocks = config.named_transform.base, config.method == "blocks"
    for name, rank in {"r": config.rank, **{f"rank_pattern[{k!r}]": v for k, v in config.rank_pattern.items()}}.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            what = "r (the block size)" if blocks and name == "r" else name
            raise ValueError(f"{what} must be a positive{'' if blocks else ', even'} integer, got {rank!r}")
        if config.method == "reflections":
            _warn_of_the_start(config, name, rank)
            continue
        if rank == 1 and base != "free" and not config.supports_from_checkpoint:
            raise ValueError(f"{name} must be at least 2: a {base} transform of rank 1 has nothing to train")
        if rank % 2 and base != "free" and config.has_support:
            warnings.warn(f"{name} = {rank} is odd: a skew transform gains nothing over rank {rank - 1}", stacklevel=6)


def _check_budget(config: Any) -> None:
    transform = config.named_transform
    if config.method not in (*GRADIENT_SUPPORTS, "activation"):
        raise ValueError(
            f"r=Budget(...) is shared out by what sketches show: it needs support='skewgrad', 'gradsvd' or 'activation', got "
            f"{config.method!r}"
        )
    if transform.magnitudes or transform.base not in PARAMETERS:
        raise ValueError(f"r=Budget(...) cannot count the parameters of the transform {config.transform!r}")
    if config.rank_pattern and not config.supports_from_checkpoint:
        raise ValueError(
            "r=Budget(...) gives every layer its rank: leave rank_pattern out, or bound ranks by its floor and cap"
        )
    floors = config.r.floor.values() if isinstance(config.r.floor, Mapping) else [config.r.floor]
    if any(floor < 2 for floor in floors):
        raise ValueError("r=Budget(...) must have a floor of at least 2: leave a module out by exclude_modules")
    config.r = replace(config.r, transform=transform.base)


def _check_tied(config: Any) -> None:
    if config.tied and config.side != "input":
        raise ValueError("tied needs side='input': what layers of one input have in common is their input")
    names = config.tied if isinstance(config.tied, (list, tuple)) else []
    groups = all(isinstance(group, (list, tuple)) and len(group) > 1 for group in names)
    if (
        not isinstance(config.tied, (bool, list, tuple))
        or not groups
        or any(not isinstance(n, str) for g in names for n in g)
    ):
        raise ValueError(
            f"tied must be True, False or a list of lists of two or more module names, got {config.tied!r}"
        )


def _check_together(config: Any) -> None:
    transform, waits = config.named_transform, config.method in GRADIENT_SUPPORTS or bool(config.support_file)
    halved = config.method == "pilot" or bool(config.support_file)
    rules = (
        (
            not config.has_support and (config.side != "input" or config.side_pattern or config.tied),
            f"support={config.method!r} needs side='input', no side_pattern and tied=False",
        ),
        (
            (transform.base == "cayley_neumann") != (transform.terms is not None),
            "transform='cayley_neumann' needs its number of terms, as in 'cayley_neumann:5', and no other has one; "
            f"got {config.transform!r}",
        ),
        (
            transform.magnitudes and (not config.has_support or transform.base == "free"),
            "magnitudes needs a support and a transform other than 'free', which has them already",
        ),
        (
            config.side == "auto" and not waits,
            "side='auto' is decided by what the gradient shows: it needs support='skewgrad' or 'gradsvd', or a file of supports, "
            f"which know their sides, got {config.method!r}",
        ),
        (
            transform.halves and not halved,
            f"halves needs support=Pilot(halves=True), which finds both halves, or a file of such supports, got {config.method!r}",
        ),
        (
            transform.halves and (not TABLE[transform.base].halves or transform.magnitudes),
            f"halves needs the transform 'cayley' or 'exp' without magnitudes, got {config.transform!r}",
        ),
        (
            getattr(config.options, "keep", False) and (not TABLE[transform.base].halves or transform.magnitudes),
            f"Pilot(keep=True) needs the transform 'cayley' or 'exp' without magnitudes, got {config.transform!r}",
        ),
        (
            config.layers_to_transform is not None and isinstance(config.target_modules, str),
            "layers_to_transform needs target_modules to be a list of names, not a string",
        ),
        (
            bool(config.layers_pattern) and config.layers_to_transform is None,
            "layers_pattern needs layers_to_transform: give the indices of the layers to adapt",
        ),
    )
    for refused, message in rules:
        if refused:
            raise ValueError(message)


def _warn_of_the_start(config: Any, name: str, rank: int) -> None:
    """Householder vectors that cannot be paired reflect: the adapted model is not the base model
    before it is trained.
    """
    if config.supports_from_checkpoint or not config.init_weights:
        return
    if config.options.gram_schmidt and name == "r":
        warnings.warn("gram_schmidt starts at a reflection: the model begins away from the base model", stacklevel=7)
    elif not config.options.gram_schmidt and rank % 2:
        warnings.warn(
            f"{name} = {rank} is odd: an odd number of reflections is none the base model starts from; give {rank + 1}",
            stacklevel=7,
        )
