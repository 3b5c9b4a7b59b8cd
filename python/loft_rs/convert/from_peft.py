"""PEFT's OFT, BOFT, HRA and PSOFT checkpoints as LOFT adapters; the formulas stand in the package's
docstring.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._format import FORMAT_VERSION
from .._words import some
from ..support.methods import Blocks
from ..transform.skew import skew
from ..tuner.config import LoftConfig
from .base_model import Base, psoft_basis, psoft_weight
from .checkpoint import Checkpoint, Converted, Progress, ranks_of, require_parts
from .triangles import lower, lower_from_upper, size_of

__all__ = ["from_boft", "from_hra", "from_oft", "from_psoft"]

_ONCE = "is applied once, to the stored values; further training is not constrained"
# ||W0 P - U S|| / ||U S|| up to which PSOFT's update is W0 R in float32.
_ROUNDING = 1e-5


def _projected(values: Tensor, norms: Tensor, limit: float) -> Tensor:
    """`values` scaled so that no norm is above `limit`."""
    return torch.where(norms <= limit, values, values * (limit / norms.clamp_min(torch.finfo(norms.dtype).tiny)))


def _terms(checkpoint: Checkpoint) -> int | None:
    """K of PEFT's series, or None where it solves Cayley exactly."""
    if not checkpoint.config.get("use_cayley_neumann", checkpoint.kind == "OFT"):
        return None
    t = checkpoint.config.get("num_cayley_neumann_terms", 5)
    if t < 3:
        raise checkpoint.refuse(
            f"num_cayley_neumann_terms={t} leaves I{' + 2Q' if t == 2 else ''}, which is no rotation that trains"
        )
    return max(t - 2, 2)


def from_oft(checkpoint: Checkpoint, base: Base, progress: Progress | None) -> Converted:
    parts = {part for tensors in checkpoint.modules.values() for part in tensors}
    embeddings = [name for name, tensors in checkpoint.modules.items() if any("embedding" in part for part in tensors)]
    if embeddings:
        raise checkpoint.refuse(f"module {embeddings[0]!r} is an embedding; only linear layers can be converted")
    if "oft_r" in parts:
        return _from_oft_015(checkpoint, base)
    require_parts(checkpoint, {"oft_R.weight": 2})
    config, terms = checkpoint.config, _terms(checkpoint)
    share, sign = bool(config.get("block_share")), 1 if terms is None else -1
    sizes, modules, notes, idle = {}, {}, [], []
    furthest = 0.0
    for name, tensors in checkpoint.modules.items():
        v = tensors["oft_R.weight"].float()
        b = size_of(v.shape[1])
        if b is None or not len(v) or (share and len(v) != 1):
            raise checkpoint.refuse(f"module {name!r} has oft_R.weight of the unexpected shape {tuple(v.shape)}")
        if config.get("coft"):
            v = _projected(v, v.norm(dim=1, keepdim=True) * 2**0.5, config.get("eps", 6e-5) / len(v) ** 0.5)
        if b == 1:  # PEFT's nearest divisor of a prime width
            idle.append(name)
            continue
        if terms is not None and not _since(config, 18):
            furthest = max(furthest, float(torch.linalg.matrix_norm(skew(v, b), 2).max()))
        sizes[name], modules[name] = b, {"loft_theta": sign * lower_from_upper(v, b)[None]}
    if not modules:
        raise checkpoint.refuse("all its blocks have size 1, so there is nothing in it to convert")
    if idle:
        notes.append(f"blocks of size 1 turn nothing: {some(idle)} left out of the converted adapter")
        checkpoint.modules = {name: tensors for name, tensors in checkpoint.modules.items() if name in modules}
    if config.get("coft"):
        notes.append(f"coft's bound {_ONCE}")
    if terms is not None and furthest:
        notes.append(
            f"this adapter is of a PEFT before 0.18, whose series differs from today's by Q^{terms + 1}: the converted adapter is what "
            f"PEFT makes of it today, up to {furthest ** (terms + 1):.1e} away in a block"
        )
    widths = {name: None if share else b * modules[name]["loft_theta"].shape[1] for name, b in sizes.items()}
    base.check(widths)
    b, pattern = ranks_of(sizes)
    fields = checkpoint.targets(by_name=bool(idle)) | {"rank_pattern": pattern}
    return Converted(LoftConfig.oft(b, share=share, neumann_terms=terms, **fields), modules, notes)


def _since(config: Mapping[str, Any], minor: int) -> bool:
    """Whether a PEFT of at least 0.`minor` saved it; the field is there since 0.18."""
    found = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return found is not None and (int(found[1]), int(found[2])) >= (0, minor)


def _from_oft_015(checkpoint: Checkpoint, base: Base) -> Converted:
    """PEFT 0.14 and 0.15: full blocks B, turned as BOFT's with one factor, and an output scale."""
    config = checkpoint.config
    if all(set(tensors) == {"oft_r"} for tensors in checkpoint.modules.values()):
        raise checkpoint.refuse(
            "this is an OFT of PEFT 0.13 or before, which turns a layer's outputs (in blocks that may reach past its width), while LOFT's "
            "blocks turn inputs: merge it with that PEFT instead"
        )
    require_parts(checkpoint, {"oft_r": 3, "oft_s": 2})
    share, coft = bool(config.get("block_share")), bool(config.get("coft"))
    if coft and share:
        raise checkpoint.refuse(
            "coft with block_share in an OFT of PEFT 0.15 or before: its bound cannot be told from the file"
        )
    renamed = {}
    for name, tensors in checkpoint.modules.items():
        blocks, scale = tensors["oft_r"].float(), tensors["oft_s"]
        if coft:
            per = math.ceil(scale.numel() / len(blocks)) ** 2
            norms = torch.linalg.matrix_norm(blocks, keepdim=True)
            blocks = _projected(blocks, norms, config.get("eps", 6e-5) * per / len(blocks) ** 0.5)
        renamed[name] = {"boft_R": blocks[None], "boft_s": scale}
    checkpoint.modules = renamed
    converted = from_boft(checkpoint, base, None, share=share)
    if coft:
        converted.notes.append(f"coft's bound {_ONCE}")
    return converted


def from_boft(checkpoint: Checkpoint, base: Base, progress: Progress | None, *, share: bool = False) -> Converted:
    for tensors in checkpoint.modules.values():
        tensors.pop("boft_P", None)  # a constant that PEFT 0.12 saved
    require_parts(checkpoint, {"boft_R": 4, "boft_s": 2})
    sizes, modules, notes = {}, {}, []
    for name, tensors in checkpoint.modules.items():
        stored, scale = tensors["boft_R"].float(), tensors["boft_s"].float()
        if len(scale) == 1 and scale.shape[1] > 1:
            raise checkpoint.refuse(f"module {name!r} is a Conv2d; only linear layers can be converted")
        b = stored.shape[-1]
        if stored.shape[-2] != b or scale.shape[1] != 1 or not stored.numel():
            shapes = f"{tuple(stored.shape)} and {tuple(scale.shape)}"
            raise checkpoint.refuse(f"module {name!r} has blocks and scale of the unexpected shapes {shapes}")
        if b == 1:
            raise checkpoint.refuse(f"module {name!r} has blocks of size 1, which turn nothing")
        sizes[name] = b
        modules[name] = {"loft_theta": lower(stored.mT - stored) / 2, "loft_scale": scale[:, 0] - 1}
    counts = {name: len(tensors["boft_R"][:, 0]) for name, tensors in checkpoint.modules.items()}
    if len(set(counts.values())) > 1:
        raise checkpoint.refuse(
            f"its modules have different numbers of butterfly factors: {sorted(set(counts.values()))}"
        )
    factors = next(iter(counts.values()))
    if (asked := checkpoint.config.get("boft_n_butterfly_factor", factors)) != factors:
        notes.append(
            f"boft_n_butterfly_factor is {asked} but the tensors have {factors}: PEFT runs one where its CUDA extension is missing, and "
            f"this adapter was trained with {factors}"
        )
    base.check({n: None if share else b * checkpoint.modules[n]["boft_R"].shape[1] for n, b in sizes.items()})
    b, pattern = ranks_of(sizes)
    fields = checkpoint.targets() | {"rank_pattern": pattern}
    made = LoftConfig(r=b, support=Blocks(factors=factors, share=share, output_scale=True), **fields)
    return Converted(made, modules, notes)


def from_hra(checkpoint: Checkpoint, base: Base, progress: Progress | None) -> Converted:
    require_parts(checkpoint, {"hra_u": 2})
    sizes = {name: tensors["hra_u"].shape[1] for name, tensors in checkpoint.modules.items()}
    for name, tensors in checkpoint.modules.items():
        u = tensors["hra_u"]
        if not 1 <= u.shape[1] <= u.shape[0] - u.shape[0] % 2:
            raise checkpoint.refuse(
                f"module {name!r} has hra_u of shape {tuple(u.shape)}: more reflections than LOFT allows"
            )
        if not bool((u != 0).any(0).all()):
            raise checkpoint.refuse(f"module {name!r} has a zero column in hra_u, which is no reflection")
    base.check({name: tensors["hra_u"].shape[0] for name, tensors in checkpoint.modules.items()})
    r, pattern = ranks_of(sizes)
    fields = checkpoint.targets() | {"rank_pattern": pattern}
    # Trained already, so where such vectors start is no matter.
    fields["loft_format_version"] = FORMAT_VERSION
    config = LoftConfig.hra(r, gram_schmidt=bool(checkpoint.config.get("apply_GS")), **fields)
    return Converted(config, {n: {"loft_theta": t["hra_u"].float()} for n, t in checkpoint.modules.items()})


def from_psoft(checkpoint: Checkpoint, base: Base, progress: Progress | None) -> Converted:
    config = checkpoint.config
    r, orth = config.get("r", 32), bool(config.get("psoft_orth", True))
    if config.get("ab_svd_init", "psoft_init") != "psoft_init":
        raise checkpoint.refuse(
            f"ab_svd_init={config['ab_svd_init']!r} makes the update a similarity transform, which is no rotation of W0; merge it with PEFT"
        )
    if config.get("psoft_svd") == "lowrank" and "random_seed" not in config:
        raise checkpoint.refuse("psoft_svd='lowrank' without random_seed: its basis cannot be computed again")
    if not config.get("psoft_alpha", 32):
        raise checkpoint.refuse("psoft_alpha=0 divides by zero in PEFT")
    vectors = {f"psoft_R.vector_{which}": 1 for which in "ab" if config.get(f"psoft_mag_{which}", True)}
    require_parts(checkpoint, {"psoft_R.weight": 1 if orth else 2} | vectors)
    terms = _terms(checkpoint) if orth else None
    bound = None if terms is None else config.get("cayley_neumann_eps")
    modules = {name: {"loft_theta": _psoft_theta(checkpoint, name, r, orth, bound)} for name in checkpoint.modules}
    for done, name in enumerate(modules):
        modules[name] |= _psoft_support(checkpoint, base, name, r)
        if progress is not None:
            progress(name, done + 1, len(modules))
    fields = checkpoint.targets()
    if orth:
        made = LoftConfig.psoft(r, magnitudes=bool(vectors), neumann_terms=terms, **fields)
    else:
        made = LoftConfig(r=r, support="principal", transform="free", order="natural", **fields)
    return Converted(made, modules, [] if bound is None else [f"cayley_neumann_eps {_ONCE}"])


def _psoft_theta(checkpoint: Checkpoint, name: str, r: int, orth: bool, bound: float | None) -> Tensor:
    tensors = checkpoint.modules[name]
    weight = tensors["psoft_R.weight"].float()
    a, b = (tensors.get(f"psoft_R.vector_{which}", torch.ones(r)).float() for which in "ab")
    shapes = [tuple(each.shape) for each in (weight, a, b)]
    if shapes != [(r * (r - 1) // 2,) if orth else (r, r), (r,), (r,)]:
        raise checkpoint.refuse(f"module {name!r} has tensors of shapes {', '.join(map(str, shapes))} at r={r}")
    if not orth:
        return b[:, None] * weight * a - torch.eye(r)
    if bound is not None:
        weight = _projected(weight, weight.norm() * 2**0.5, bound)
    theta = lower_from_upper(weight, r)
    return torch.cat([theta, a - 1, b - 1]) if len(tensors) > 1 else theta


def _psoft_support(checkpoint: Checkpoint, base: Base, name: str, r: int) -> dict[str, Tensor]:
    """P (n x r) as PEFT would compute it, and its energy."""
    weight = psoft_weight(checkpoint, base, name, r)
    w = weight.float()
    basis, image = psoft_basis(w, r, checkpoint.config)
    kept = w @ basis
    # In its low-rank mode PEFT lays U S (T - I) P^T onto W0. For m >= n that U S is W0 P only as
    # far as the subspace iteration got.
    apart = float((kept - image).norm() / image.norm().clamp_min(1e-30))
    if checkpoint.config.get("psoft_svd") == "lowrank" and apart > _ROUNDING:
        raise checkpoint.refuse(
            f"psoft_svd='lowrank' is not a rotation in module {name!r}: the U S of its approximate SVD is {apart:.1e} away from W0 P "
            f"({_ROUNDING:.0e} would be rounding); peft.convert_to_lora makes a LoRA of it"
        )
    half = weight.dtype in (torch.bfloat16, torch.float16)
    energy = (kept.double().norm() / w.double().norm().clamp_min(1e-300)) ** 2
    return {"loft_support": basis.to(weight.dtype if half else torch.float32), "loft_energy": energy.float()}
