"""The sketch of X^T X, for activation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .base import Sketch, moment_within
from .products import gram_image, inner_product, product
from .small import descending, left_vectors, nystroem

__all__ = ["ActivationSketch"]


class ActivationSketch(Sketch):
    """X^T X (or Y0^T Y0): forward passes only."""

    backward = False

    def begin_pass(self) -> None:
        super().begin_pass()
        if self.basis is None:
            self.pending["norm"] = torch.zeros((), dtype=torch.float64, device=self.home)
        else:
            self.pending = {"moment": self.zeros(self.columns, self.columns)}

    def on_forward(self, x: Tensor, y0: Tensor | None) -> None:
        self.seen += 1
        a = self.activations(x, y0)
        if self.basis is None:
            self.plus_sketch(gram_image(a, self.omega))
            self.plus("norm", a.float().square().sum(dtype=torch.float64))
        else:
            aq = product(a, self.basis)
            self.plus("moment", inner_product(aq, aq))

    def moment(self, p: np.ndarray) -> np.ndarray:
        if self.plan.single:
            return nystroem(p.T @ self.whole, self.drawn.T @ self.whole)
        return moment_within(p, self.q, self.numpy("moment"))

    def solve(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        if self.plan.single:
            q = left_vectors(self.whole, min(self.whole.shape))
            moment = self.moment(q)
        else:
            q, moment = self.q, self.numpy("moment")
        squares, v = descending(moment)
        return q @ v[:, : self.rank], np.sqrt(squares), float(self.sums["norm"]), 0.0
