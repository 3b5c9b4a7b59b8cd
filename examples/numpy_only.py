"""Supports from matrices with NumPy alone: one layer, several layers under a budget, a file.

    python examples/numpy_only.py              a second

Needs `pip install .` and nothing else: neither torch nor peft. The matrices are made here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import loft_rs


def make_gradient(draw: np.random.Generator, m: int, n: int, strength: float) -> np.ndarray:
    """Noise, and ten directions that stand out of it."""
    strong = draw.standard_normal((m, 10)) @ draw.standard_normal((10, n))
    return (strength * strong + draw.standard_normal((m, n))).astype(np.float32)


def main() -> None:
    draw = np.random.default_rng(0)
    weight = draw.standard_normal((768, 768), dtype=np.float32)
    gradient = make_gradient(draw, 768, 768, 1.0)

    support = loft_rs.select_support(gradient, 16)
    print(support)
    print("orthonormal to", f"{np.abs(support.basis.T @ support.basis - np.eye(16)).max():.0e}")
    print(loft_rs.select_support(gradient, 16, weights=weight, method="skewgrad"))

    layers = {f"layer{i}.{name}": make_gradient(draw, 256, 256, i + 1) for i in range(3) for name in ("q", "v")}
    supports = loft_rs.select_support(layers, loft_rs.Budget(params=600))
    print("ranks under one budget:", {name: each.rank for name, each in supports.items()})

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "supports.safetensors"
        loft_rs.save_supports(file, supports)
        loaded = loft_rs.load_supports(file)
        print(
            f"{file.name}: {file.stat().st_size:,} bytes; equal bits:",
            all(np.array_equal(loaded[name].basis, each.basis) for name, each in supports.items()),
        )


if __name__ == "__main__":
    main()
