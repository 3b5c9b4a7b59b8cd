"""What a saved adapter holds: rank, captured energy, orthogonality error and angles of every module. NumPy alone.

With the stored P, E = C D C, C = (P^T P)^{-1/2} where P is not orthonormal (it was rounded to half precision) and I elsewhere, and
D = T - I from the trained theta:

    R = I + P E P^T,   ||R^T R - I||_2 = ||K^T K - I||_2,   K = I + H E H,   H = (P^T P)^{1/2}       (all in float64)
    angles: arg of the eigenvalues of K; a plane turned by phi appears as +-phi, given once
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ._io import read_safetensors

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PARTS = ("theta", "support", "energy")
_SUPPORT_GRAM = 0.05  # ||P^T P - I||_2 that a basis rounded to half precision may have; float32 ones are far below
ORTHONORMAL = 1e-5  # ||P^T P - I||_2 up to which P counts as orthonormal, and C is left out


@dataclass(frozen=True)
class ModuleReport:
    """One adapted module. `angles` are in degrees, descending, one for each turned plane."""

    name: str
    width: int
    rank: int
    transform: str
    side: str
    energy: float
    orthogonality_error: float
    angles: np.ndarray

    @property
    def largest_angle(self) -> float:
        return float(self.angles[0]) if self.angles.size else 0.0

    @property
    def rms_angle(self) -> float:
        return float(np.sqrt(np.mean(np.square(self.angles)))) if self.angles.size else 0.0


def inspect_adapter(path: str | os.PathLike) -> list[ModuleReport]:
    """Read the folder that `save_pretrained` wrote; one report for each module, layer 2 before layer 10."""
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
    return [_report(folder, name, parts, config) for name, parts in sorted(modules.items(), key=_natural)]


def _natural(item: tuple[str, object]) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in item[0].split(".")]


def read_config(folder: Path) -> dict:
    """`adapter_config.json`, checked to be a LOFT one that this package knows."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG_FILE} in it; a folder written by save_pretrained is expected")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LOFT":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{file}: peft_type is {kind!r}, not 'LOFT'")
    if config.get("loft_format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file}: format version {config.get('loft_format_version')!r} is not known to this loft_rs, "
            f"which reads version {FORMAT_VERSION}"
        )
    return config


def _report(folder: Path, name: str, parts: dict[str, np.ndarray], config: dict) -> ModuleReport:
    what = f"{folder / WEIGHTS_FILE}: module {name!r}"
    if set(parts) != set(_PARTS):
        odd = ", ".join(f"loft_{part}" for part in sorted(set(parts) ^ set(_PARTS)))
        raise ValueError(f"{what} has missing or unexpected tensors: {odd}")
    basis, theta = parts["support"].astype(np.float64), parts["theta"].astype(np.float64)
    if basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0]:
        raise ValueError(f"{what} has a support of shape {basis.shape}; (n, r) with 1 <= r <= n is expected")
    if not (np.isfinite(basis).all() and np.isfinite(theta).all()):
        raise ValueError(f"{what} has a NaN or an infinite entry")
    gram = basis.T @ basis
    rank = len(gram)
    if not basis.any():
        raise ValueError(f"{what} has no support: it was saved before loft_rs.calibrate ran")
    if np.linalg.norm(gram - np.eye(rank), 2) > _SUPPORT_GRAM:
        raise ValueError(f"{what} has a support that is not orthonormal")
    turned = _turned(gram, _delta(what, theta, rank, str(config.get("transform"))))
    return ModuleReport(
        name=name,
        width=basis.shape[0],
        rank=rank,
        transform=str(config.get("transform")),
        side=str(config.get("side")),
        energy=float(np.ravel(parts["energy"])[0]),
        orthogonality_error=float(np.linalg.norm(turned.T @ turned - np.eye(rank), 2)),
        angles=_angles(turned),
    )


def _turned(gram: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """K = I + H E H, with E rounded to float32 as the forward uses it."""
    values, vectors = np.linalg.eigh(gram)
    root = (vectors * np.sqrt(values)) @ vectors.T
    apart = np.abs(values - 1).max()  # ||P^T P - I||_2
    fold = (vectors / np.sqrt(values)) @ vectors.T if apart > ORTHONORMAL else np.eye(len(gram))
    folded = (fold @ delta @ fold).astype(np.float32).astype(np.float64)
    return np.eye(len(gram)) + root @ folded @ root


def _delta(what: str, theta: np.ndarray, rank: int, transform: str) -> np.ndarray:
    """D = T - I of `cayley`, `exp` or `free` (transform.py has the formulas)."""
    expected = {"cayley": (rank * (rank - 1) // 2,), "exp": (rank * (rank - 1) // 2,), "free": (rank, rank)}
    if transform not in expected:
        raise ValueError(f"{what}: transform {transform!r} is not one of {', '.join(expected)}")
    if theta.shape != expected[transform]:
        raise ValueError(
            f"{what} has a theta of shape {theta.shape}; {transform} at rank {rank} needs {expected[transform]}"
        )
    if transform == "free":
        return theta
    lower = np.zeros((rank, rank))
    lower[np.tril_indices(rank, -1)] = theta
    skew = lower - lower.T
    if transform == "cayley":
        return -2 * np.linalg.solve((np.eye(rank) + skew).T, skew.T).T
    values, vectors = np.linalg.eigh(1j * skew)  # skew = -i * Hermitian
    return ((vectors * np.expm1(-1j * values)) @ vectors.conj().T).real


def _angles(turned: np.ndarray) -> np.ndarray:
    degrees = np.degrees(np.angle(np.linalg.eigvals(turned)))
    return np.sort(degrees[degrees > 0])[::-1]


def text_table(reports: list[ModuleReport]) -> str:
    """One line for each module and one for all of them."""
    head = ("module", "side", "width", "rank", "energy", "orthogonality", "largest angle", "rms angle")
    lines = [head]
    for each in reports:
        energy = "unknown" if np.isnan(each.energy) else f"{each.energy:.4f}"
        angles = (f"{each.largest_angle:.3f}°", f"{each.rms_angle:.3f}°")
        lines.append(
            (each.name, each.side, str(each.width), str(each.rank), energy, f"{each.orthogonality_error:.1e}", *angles)
        )
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
