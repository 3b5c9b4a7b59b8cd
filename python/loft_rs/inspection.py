"""What a saved adapter holds: rank, captured energy, orthogonality error and angles of every
module. NumPy alone.

With the stored P, E = C D C, C = (P^T P)^{-1/2} where P is not orthonormal (it was rounded to half
precision) and I elsewhere, and D = T - I from the trained theta:

    R = I + P E P^T,   ||R^T R - I||_2 = ||K^T K - I||_2,   K = I + H E H,   H = (P^T P)^{1/2}       (all in float64)
    angles: arg of the eigenvalues of K; a plane turned by phi appears as +-phi, given once

Of a refreshed adapter R is the product with the frozen I + P_f E_f P_f^T: P and E above are then
[P_f, P] and M (factor.py, `Frozen`). Without a support, K is the rotation of every block of every
factor (`blocks`), or R on the span of the trained vectors (`trained`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._files import read_safetensors
from ._format import (
    CONFIG_FILE,
    ORTHONORMAL,
    READABLE_VERSIONS,
    SUPPORT_GRAM,
    UNKNOWN_ENERGY,
    WEIGHTS_FILE,
    Described,
    slots_of,
)
from ._transforms import TransformName
from ._transforms import delta as delta_of


@dataclass(frozen=True)
class ModuleReport:
    """One adapted module. `angles` are in degrees, descending, one for each turned plane. Of
    blocks, `rank` is the size, and where all share one rotation `width` is that size too, since the
    file does not tell the layer's. `frozen_rank`: of what `loft_rs.refresh` has frozen, 0
    elsewhere; angles and orthogonality error are those of the product."""

    name: str
    width: int
    rank: int
    transform: str
    side: str
    energy: float
    orthogonality_error: float
    angles: np.ndarray
    frozen_rank: int = 0

    @property
    def largest_angle(self) -> float:
        return float(self.angles[0]) if self.angles.size else 0.0

    @property
    def rms_angle(self) -> float:
        return float(np.sqrt(np.mean(np.square(self.angles)))) if self.angles.size else 0.0


class AdapterReport(list[ModuleReport]):
    """The reports of all modules, layer 2 before layer 10. In a notebook it is shown as its picture
    and its table."""

    def plot(self, path: str | os.PathLike | None = None, title: str = "") -> Any:
        """The matplotlib figure: energy and angles by depth and kind of module, the angles'
        spectra, and what moved most.

        path: also written there, .png or .svg. ModuleNotFoundError without matplotlib.
        """
        from .plots import Map, Spectra, draw_layers, energy_map, finish

        largest = [each.largest_angle for each in self]
        maps = [
            energy_map([each.energy for each in self]),
            Map("largest angle, degrees", largest, low=0.0, framed=True),
            Map("rms angle, degrees", [each.rms_angle for each in self], low=0.0),
        ]
        spectra = Spectra(
            "angles, degrees", "turned plane", [each.angles for each in self], "moved most: largest angle", largest
        )
        return finish(lambda: draw_layers([each.name for each in self], maps, spectra, title), path)

    def _repr_html_(self) -> str:
        from .plots import as_page

        table = text_table(self)
        return as_page(table.splitlines()[-1], self.plot, table)


def inspect_adapter(path: str | os.PathLike) -> AdapterReport:
    """Read the folder that `save_pretrained` wrote; one report for each module, layer 2 before
    layer 10."""
    folder = Path(path)
    config = read_config(folder)
    tensors, _ = read_safetensors(folder / WEIGHTS_FILE)
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        name, dot, part = key.rpartition(".loft_")
        if dot:
            modules.setdefault(name, {})[part] = tensor
    if not modules:
        raise ValueError(f"{folder / WEIGHTS_FILE}: no LOFT module in it")
    return AdapterReport(_report(folder, name, parts, config) for name, parts in sorted(modules.items(), key=_natural))


def _natural(item: tuple[str, object]) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in item[0].split(".")]


def read_peft_config(folder: Path) -> dict:
    """`adapter_config.json` of any PEFT method. FileNotFoundError or ValueError names the file that
    is missing or no JSON object."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG_FILE} in it; a folder written by save_pretrained is expected")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: peft_type is {type(config).__name__!r}, not that of an adapter")
    return config


def read_config(folder: Path) -> dict:
    """`adapter_config.json`, checked to be a LOFT one that this package knows."""
    file, config = folder / CONFIG_FILE, read_peft_config(folder)
    if config.get("peft_type") != "LOFT":
        known = ("OFT", "BOFT", "HRA", "PSOFT")
        hint = "; loft-rs convert makes a LOFT adapter of it" if config.get("peft_type") in known else ""
        raise ValueError(f"{file}: peft_type is {config.get('peft_type')!r}, not 'LOFT'{hint}")
    if config.get("loft_format_version") not in READABLE_VERSIONS:
        raise ValueError(
            f"{file}: format version {config.get('loft_format_version')!r} is not known to this loft_rs, "
            f"which reads version {READABLE_VERSIONS[-1]}"
        )
    return config


def _report(folder: Path, name: str, parts: dict[str, np.ndarray], config: dict) -> ModuleReport:
    what = f"{folder / WEIGHTS_FILE}: module {name!r}"
    said = Described.of(config)
    has_support = said.method not in ("blocks", "reflections")
    traits = {
        "supported": has_support,
        "scaled": bool(said.options.get("output_scale")),
        "movable": config.get("side") == "auto" or bool(config.get("side_pattern")),
        "refreshed": has_support and bool({"frozen_basis", "frozen_delta"} & set(parts)),
    }
    expected = {slot.name for slot in slots_of([trait for trait, has in traits.items() if has])}
    if set(parts) != expected:
        odd = ", ".join(f"loft_{part}" for part in sorted(set(parts) ^ expected))
        raise ValueError(f"{what} has missing or unexpected tensors: {odd}")
    if not all(np.isfinite(tensor).all() for part, tensor in parts.items() if part != "energy"):
        raise ValueError(f"{what} has a NaN or an infinite entry")
    theta = parts["theta"].astype(np.float64)
    read = {"blocks": _of_blocks, "reflections": _of_vectors}.get(said.method, _of_support)
    turned, width, rank, energy = read(what, parts, theta, config, said)
    errors = np.linalg.norm(turned.swapaxes(-1, -2) @ turned - np.eye(turned.shape[-1]), 2, axis=(-2, -1))
    return ModuleReport(
        name=name,
        width=width,
        rank=rank,
        transform=("householder", "reflection")[bool(said.options.get("gram_schmidt"))]
        if said.method == "reflections"
        else str(said.transform._replace(terms=None, magnitudes=False)),
        side=_side(parts, config),
        energy=energy,
        # The factors' largest errors add up; of one factor it is exact.
        orthogonality_error=float(errors.max(-1).sum()),
        angles=_angles(turned),
        frozen_rank=parts["frozen_basis"].shape[1] if "frozen_basis" in parts else 0,
    )


def _side(parts: dict, config: dict) -> str:
    """The module's side, which its tensors tell where modules may differ."""
    if "output_side" not in parts:
        return str(config.get("side"))
    return "output" if parts["output_side"].any() else "input"


def _of_support(
    what: str, parts: dict, theta: np.ndarray, config: dict, said: Described
) -> tuple[np.ndarray, int, int, float]:
    """(K (1, 1, r, r), n, r, captured energy). Of a refreshed adapter K is as large as the span of
    both bases."""
    basis = parts["support"].astype(np.float64)
    if basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0]:
        raise ValueError(f"{what} has a support of shape {basis.shape}; (n, r) with 1 <= r <= n is expected")
    gram = basis.T @ basis
    rank = len(gram)
    if not basis.any():
        raise ValueError(f"{what} has no support: it was saved before loft_rs.calibrate ran")
    if np.linalg.norm(gram - np.eye(rank), 2) > SUPPORT_GRAM:
        raise ValueError(f"{what} has a support that is not orthonormal")
    delta = _delta(what, theta, rank, said.transform)
    turned = _with_frozen(what, parts, basis, delta, config) if "frozen_basis" in parts else _rotation(gram, delta)
    energy = float(np.ravel(parts["energy"])[0])
    return turned[None, None], basis.shape[0], rank, float("nan") if energy == UNKNOWN_ENERGY else energy


def _with_frozen(what: str, parts: dict, basis: np.ndarray, delta: np.ndarray, config: dict) -> np.ndarray:
    """K of the product with the frozen factor, on the span of [P_f, P]."""
    pf, ef = (parts[part].astype(np.float64) for part in ("frozen_basis", "frozen_delta"))
    if pf.ndim != 2 or len(pf) != len(basis) or ef.shape != (pf.shape[1], pf.shape[1]):
        raise ValueError(
            f"{what} has a frozen factor of shapes {pf.shape} and {ef.shape}; (n, r) and (r, r) are expected"
        )
    if np.linalg.norm(pf.T @ pf - np.eye(len(ef)), 2) > SUPPORT_GRAM:
        raise ValueError(f"{what} has a frozen basis that is not orthonormal")
    e, ef = _with_gram_root(basis.T @ basis, delta), _with_gram_root(pf.T @ pf, ef)
    upper, lower = ef @ pf.T @ basis @ e, np.zeros((len(e), len(ef)))
    if _side(parts, config) == "output":
        upper, lower = lower.T, e @ basis.T @ pf @ ef
    both = np.block([[ef, upper], [lower, e]])
    _, strengths, right = np.linalg.svd(np.hstack([pf, basis]), full_matrices=False)
    span = strengths > 1e-6  # the two may overlap, and what is in both is there once
    root = strengths[span, None] * right[span]
    return np.eye(len(root)) + root @ both @ root.T


def _of_blocks(
    what: str, parts: dict, theta: np.ndarray, config: dict, said: Described
) -> tuple[np.ndarray, int, int, float]:
    """(T (m, n/b, b, b), n, b, NaN)."""
    if theta.ndim != (4 if said.transform.base == "free" else 3):
        raise ValueError(f"{what} has a theta of shape {theta.shape}; (factors, blocks, entries) is expected")
    entries = theta.shape[-1]
    b = entries if said.transform.base == "free" else (1 + round((1 + 8 * entries) ** 0.5)) // 2
    turned = np.stack([[np.eye(b) + _delta(what, block, b, said.transform) for block in factor] for factor in theta])
    return turned, b if said.options.get("share") else b * theta.shape[1], b, float("nan")


def _of_vectors(
    what: str, parts: dict, theta: np.ndarray, config: dict, said: Described
) -> tuple[np.ndarray, int, int, float]:
    """(R on the span of U (1, 1, r, r), n, r, NaN)."""
    if theta.ndim != 2 or not np.linalg.norm(theta, axis=0).all():
        raise ValueError(f"{what} has a theta of shape {theta.shape}; (n, r) with no zero column is expected")
    basis = np.linalg.qr(theta)[0]
    rank = basis.shape[1]
    turned = np.eye(rank)
    if said.options.get("gram_schmidt"):
        return -turned[None, None], len(theta), rank, float("nan")
    for column in (basis.T @ (theta / np.linalg.norm(theta, axis=0))).T:
        turned = turned - 2 * np.outer(turned @ column, column)
    return turned[None, None], len(theta), rank, float("nan")


def _rotation(gram: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """K = I + H E H."""
    values, vectors = np.linalg.eigh(gram)
    root = (vectors * np.sqrt(values)) @ vectors.T
    return np.eye(len(gram)) + root @ _with_gram_root(gram, delta) @ root


def _with_gram_root(gram: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """E = C D C, rounded to float32 as the forward uses it."""
    values, vectors = np.linalg.eigh(gram)
    apart = np.abs(values - 1).max()  # ||P^T P - I||_2
    fold = (vectors / np.sqrt(values)) @ vectors.T if apart > ORTHONORMAL else np.eye(len(gram))
    return (fold @ delta @ fold).astype(np.float32).astype(np.float64)


def _delta(what: str, theta: np.ndarray, rank: int, name: TransformName) -> np.ndarray:
    try:
        return delta_of(name, theta, rank)
    except ValueError as error:
        raise ValueError(f"{what} has {error}") from None


def _angles(turned: np.ndarray) -> np.ndarray:
    degrees = np.degrees(np.angle(np.linalg.eigvals(turned))).ravel()
    return np.sort(degrees[degrees > 0])[::-1]


def text_table(reports: list[ModuleReport]) -> str:
    """One line for each module and one for all of them."""
    head = ("module", "side", "width", "rank", "energy", "orthogonality", "largest angle", "rms angle")
    lines = [head]
    for each in reports:
        energy = "unknown" if np.isnan(each.energy) else f"{each.energy:.4f}"
        rank = f"{each.rank} + {each.frozen_rank}" if each.frozen_rank else str(each.rank)
        angles = (f"{each.largest_angle:.3f}°", f"{each.rms_angle:.3f}°")
        lines.append((each.name, each.side, str(each.width), rank, energy, f"{each.orthogonality_error:.1e}", *angles))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    aligned = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    worst = max(each.orthogonality_error for each in reports)
    furthest = max(each.largest_angle for each in reports)
    return "\n".join(
        [*aligned, f"{len(reports)} modules; largest orthogonality error {worst:.1e}; largest angle {furthest:.3f}°"]
    )
