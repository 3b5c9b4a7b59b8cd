"""LOFT adapters as PEFT's OFT, BOFT, HRA and PSOFT, where they are one; the formulas stand in the
package's docstring.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import BOFTConfig, HRAConfig, OFTConfig, PsoftConfig
from torch import Tensor

from .._format import Described
from ..layer.kinds import BlocksKind
from ..transform.skew import skew
from .base_model import Base, psoft_basis, psoft_weight
from .checkpoint import Checkpoint, Converted, Progress, require_parts
from .triangles import lower, size_of, upper_from_lower

__all__ = ["from_loft"]

# ||P - P' V||_2 from which on it is worth a warning, and from which on P is not the basis that
# PSOFT would compute.
_ROUNDING, _BASIS = 1e-5, 1e-3

_INSTEAD = "loft_rs.export_lora writes an exact LoRA of any low-rank adapter, and merging works for all"


def from_loft(checkpoint: Checkpoint, base: Base, progress: Progress | None) -> Converted:
    config = checkpoint.config
    for name, default in (("side", "input"), ("side_pattern", {}), ("tied", False), ("trainable_token_indices", None)):
        if (config.get(name) or default) != default:
            raise checkpoint.refuse(f"no other method of PEFT's has {name}={config[name]!r}; {_INSTEAD}")
    writers = {"blocks": _to_blocks, "reflections": _to_hra, "principal": _to_psoft}
    method = Described.of(config).method
    if method not in writers:
        raise checkpoint.refuse(f"support={method!r} has no counterpart in PEFT's OFT, BOFT, HRA or PSOFT; {_INSTEAD}")
    return writers[method](checkpoint, base, progress)


def _neumann_fields(checkpoint: Checkpoint, method: str) -> dict[str, Any]:
    said = Described.of(checkpoint.config).transform
    name, terms = said.base, said.terms
    if name == "cayley":
        return {"use_cayley_neumann": False}
    if name != "cayley_neumann" or terms is None or terms < 2:
        raise checkpoint.refuse(f"{method} has no transform {str(said)!r}; {_INSTEAD}")
    return {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms + 2}


def _to_blocks(checkpoint: Checkpoint, base: Base, progress: Progress | None) -> Converted:
    scaled = bool(Described.of(checkpoint.config).options.get("output_scale"))
    if (name := Described.of(checkpoint.config).transform.base) not in ("cayley", "cayley_neumann"):
        raise checkpoint.refuse(f"neither OFT nor BOFT has transform {name!r}; {_INSTEAD}")
    require_parts(checkpoint, {"loft_theta": 3} | ({"loft_scale": 1} if scaled else {}))
    factors = {len(tensors["loft_theta"]) for tensors in checkpoint.modules.values()}
    if len(factors) > 1:
        raise checkpoint.refuse(f"its modules have different numbers of factors: {sorted(factors)}")
    sizes = {}
    for name, tensors in checkpoint.modules.items():
        b = size_of(tensors["loft_theta"].shape[2])
        if b is None or not tensors["loft_theta"].numel():
            raise checkpoint.refuse(
                f"module {name!r} has loft_theta of the unexpected shape {tuple(tensors['loft_theta'].shape)}"
            )
        sizes[name] = b
    if scaled or factors != {1}:
        return _to_boft(checkpoint, base, sizes, factors.pop())
    return _to_oft(checkpoint, base, sizes)


def _to_oft(checkpoint: Checkpoint, base: Base, sizes: dict[str, int]) -> Converted:
    share, method = bool(Described.of(checkpoint.config).options.get("share")), _neumann_fields(checkpoint, "OFT")
    sign = -1 if method["use_cayley_neumann"] else 1
    modules, widths = {}, {}
    for name, tensors in checkpoint.modules.items():
        theta, b = tensors["loft_theta"][0].float(), sizes[name]
        modules[name] = {"oft_R.weight": sign * upper_from_lower(theta, b)}
        widths[name] = None if share else b * len(theta)
    base.check(widths)
    if share and len(set(sizes.values())) > 1:
        # The widths that PEFT would adjust one block size to are not in the file.
        widths = {
            name: base.layer(name, "shared blocks of several sizes need its widths").in_features for name in sizes
        }
    made = OFTConfig(**_oft_size(checkpoint, sizes, widths), block_share=share, **method, **checkpoint.targets())
    return Converted(made, modules)


def _oft_size(checkpoint: Checkpoint, sizes: dict[str, int], widths: Mapping[str, int | None]) -> dict[str, Any]:
    """The one number by which PEFT finds every module's block size: it takes the nearest that
    divides the module's width.
    """
    common = set(sizes.values())
    if len(common) == 1:
        return {"r": 0, "oft_block_size": common.pop()}
    nearest = BlocksKind().fit  # PEFT's rule as well
    known = [(width, sizes[name]) for name, width in widths.items() if width is not None]
    for tried in range(2, max(width for width, _ in known) + 1):
        if all(nearest(tried, width, width) == b for width, b in known):
            return {"r": 0, "oft_block_size": tried}
        if all(nearest(tried, width, width) == width // b for width, b in known):
            return {"r": tried, "oft_block_size": 0}
    raise checkpoint.refuse(f"OFT has one block size for all modules, and none gives {sorted(common)} here; {_INSTEAD}")


def _to_boft(checkpoint: Checkpoint, base: Base, sizes: dict[str, int], factors: int) -> Converted:
    if (name := str(Described.of(checkpoint.config).transform)) != "cayley":
        raise checkpoint.refuse(f"BOFT has no transform {name!r}; {_INSTEAD}")
    if Described.of(checkpoint.config).options.get("share"):
        raise checkpoint.refuse(f"BOFT has no shared blocks; {_INSTEAD}")
    modules, counts = {}, set()
    for name, tensors in checkpoint.modules.items():
        theta = tensors["loft_theta"].float()
        scale = tensors.get("loft_scale")
        if scale is None:
            scale = torch.zeros(base.layer(name, "BOFT has an output scale, whose size is the layer's").out_features)
        modules[name] = {"boft_R": -skew(theta, sizes[name]), "boft_s": 1 + scale.float()[:, None]}
        counts.add(theta.shape[1])
    base.check({name: b * checkpoint.modules[name]["loft_theta"].shape[1] for name, b in sizes.items()})
    common = set(sizes.values())
    if len(common) == 1:
        size: dict[str, Any] = {"boft_block_size": common.pop(), "boft_block_num": 0}
    elif len(counts) == 1:
        size = {"boft_block_size": 0, "boft_block_num": counts.pop()}
    else:
        raise checkpoint.refuse(
            f"BOFT has one block size or number of blocks for all modules, not {sorted(common)}; {_INSTEAD}"
        )
    notes = []
    if factors > 1:
        notes.append(f"PEFT runs one butterfly factor where its CUDA extension is missing; this BOFT needs {factors}")
    return Converted(BOFTConfig(**size, boft_n_butterfly_factor=factors, **checkpoint.targets()), modules, notes)


def _to_hra(checkpoint: Checkpoint, base: Base, progress: Progress | None) -> Converted:
    require_parts(checkpoint, {"loft_theta": 2})
    r = _one_rank(checkpoint, "HRA", {n: tensors["loft_theta"].shape[1] for n, tensors in checkpoint.modules.items()})
    base.check({name: tensors["loft_theta"].shape[0] for name, tensors in checkpoint.modules.items()})
    made = HRAConfig(
        r=r, apply_GS=bool(Described.of(checkpoint.config).options.get("gram_schmidt")), **checkpoint.targets()
    )
    return Converted(made, {n: {"hra_u": t["loft_theta"].float()} for n, t in checkpoint.modules.items()})


def _one_rank(checkpoint: Checkpoint, method: str, ranks: Mapping[str, int]) -> int:
    if len(set(ranks.values())) > 1:
        raise checkpoint.refuse(f"{method} has one rank for all modules, not {sorted(set(ranks.values()))}; {_INSTEAD}")
    return next(iter(ranks.values()))


def _to_psoft(checkpoint: Checkpoint, base: Base, progress: Progress | None) -> Converted:
    require_parts(checkpoint, {"loft_theta": (1, 2), "loft_support": 2, "loft_energy": (0, 1)})
    said = Described.of(checkpoint.config).transform
    free, scaled = said.base == "free", said.magnitudes
    method = {} if free else _neumann_fields(checkpoint, "PSOFT")
    r = _one_rank(checkpoint, "PSOFT", {n: t["loft_support"].shape[1] for n, t in checkpoint.modules.items()})
    expected = (r, r) if free else (r * (r - 1) // 2 + 2 * r * scaled,)
    modules, furthest = {}, 0.0
    for done, (name, tensors) in enumerate(checkpoint.modules.items()):
        theta = tensors["loft_theta"].double()
        if theta.shape != expected:
            raise checkpoint.refuse(f"module {name!r} has loft_theta of shape {tuple(theta.shape)}, not {expected}")
        turn, apart = _to_psofts_basis(checkpoint, base, name, tensors["loft_support"], scaled)
        furthest = max(furthest, apart)
        if free:
            modules[name] = {"psoft_R.weight": (torch.eye(r) + turn @ theta @ turn.mT).float()}
        else:
            count = r * (r - 1) // 2
            generator = turn @ skew(theta[:count], r) @ turn.mT
            modules[name] = {"psoft_R.weight": upper_from_lower(lower(generator - generator.mT) / 2, r).float()}
        if scaled:
            a, b = theta[count : count + r], theta[count + r :]
            modules[name] |= {"psoft_R.vector_a": (1 + a).float(), "psoft_R.vector_b": (1 + b).float()}
        if progress is not None:
            progress(name, done + 1, len(checkpoint.modules))
    made = PsoftConfig(
        r=r, psoft_orth=not free, psoft_mag_a=scaled, psoft_mag_b=scaled, **method, **checkpoint.targets()
    )
    notes = [f"PSOFT's own basis is up to {furthest:.1e} away from this adapter's, and so is its rotation"]
    return Converted(made, modules, notes if furthest > _ROUNDING else [])


def _to_psofts_basis(checkpoint: Checkpoint, base: Base, name: str, held: Tensor, scaled: bool) -> tuple[Tensor, float]:
    """(V, ||P - P' V||_2) for the basis P' that PEFT will compute. V (r x r, float64) holds signs
    alone where magnitudes belong to the columns. The distance is 0 for a P in half precision that
    is as near as its rounding allows."""
    weight = psoft_weight(checkpoint, base, name, held.shape[1])
    wanted = psoft_basis(weight.float(), held.shape[1], {})[0].double().cpu()
    if wanted.shape != held.shape:
        raise checkpoint.refuse(f"module {name!r} has {len(held)} inputs, but {len(wanted)} in base_model")
    rounded = held.dtype in (torch.bfloat16, torch.float16)
    limit = 2 * torch.finfo(held.dtype).eps if rounded else _BASIS
    u, _, vh = torch.linalg.svd(held.double(), full_matrices=False)  # P (P^T P)^{-1/2}, as the layer folds the Gram in
    turn = wanted.mT @ (u @ vh)
    if scaled:
        turn = torch.diag(turn.diagonal().sign())
    apart = float(torch.linalg.matrix_norm(u @ vh - wanted @ turn, 2))
    if apart > limit:
        what = "its columns are not" if scaled else "its span is not that of"
        raise checkpoint.refuse(
            f"PSOFT takes its basis from the SVD of W0, and in module {name!r} {what} the top {held.shape[1]} singular vectors "
            f"({apart:.1e} apart, {limit:.0e} allowed); {_INSTEAD}"
        )
    return turn, 0.0 if rounded else apart
