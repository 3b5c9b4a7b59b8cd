"""The moment of a support that is chosen already, for its order alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..support.support import Support
from .base import Plan, Sketch
from .products import inner_product, product
from .small import ordered_basis

__all__ = ["MomentSketch"]


class MomentSketch(Sketch):
    """Only sum z^T z, z = A P, for the order inside a support P that is chosen already. facts:
    fields of that support. first: the columns of its first half, which is ordered apart from the
    second."""

    backward = False

    def __init__(
        self,
        plan: Plan,
        home: torch.device,
        dtype: torch.dtype,
        basis: Tensor,
        facts: dict[str, Any],
        first: int | None = None,
    ):
        super().__init__(plan, home, dtype)
        self.basis, self.facts, self.first = basis, facts, first
        self.finished = plan.order == "natural"

    @property
    def sketched(self) -> int:
        return 0

    def begin_pass(self) -> None:
        self.pending = {"moment": self.zeros(self.rank, self.rank)}

    def on_forward(self, x: Tensor, y0: Tensor | None) -> None:
        assert self.basis is not None
        self.seen += 1
        z = product(self.activations(x, y0), self.basis)
        self.plus("moment", inner_product(z, z))

    def solve(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        return self.q, np.full(self.rank, math.nan), math.nan, 0.0

    def moment(self, p: np.ndarray) -> np.ndarray:
        return self.numpy("moment")

    def ordered(self, p: np.ndarray, moment: np.ndarray | None) -> np.ndarray:
        return ordered_basis(p, moment, self.first)

    def support(self, passes: int, rank: int | None = None) -> Support:
        return replace(super().support(passes, rank), **self.facts)
