"""The sketch of S = Skew(W0^T G), for skewgrad."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .. import linalg
from .base import PROBES, Plan, Sketch
from .products import as_it_is, inner_product, shared_skinny_product, skinny_product
from .small import left_vectors, skew_core, standard_error

__all__ = ["SkewSketch"]


class SkewSketch(Sketch):
    """S = (B^T A - A^T B) / 2 with B the gradient at A."""

    pairs = True

    def __init__(self, plan: Plan, home: torch.device, dtype: torch.dtype):
        super().__init__(plan, home, dtype)
        self.tap_input = self.side == "input"

    def begin_pass(self) -> None:
        super().begin_pass()
        test = self.columns + PROBES
        if self.basis is not None:
            test = self.columns
            self.pending = {"image": self.zeros(self.plan.width, test)}
        if self.plan.order != "natural" and (self.plan.single or self.basis is not None):
            self.pending["moments"] = self.zeros(self.plan.width, test)

    def on_forward(self, x: Tensor, y0: Tensor | None) -> Tensor:
        return self.activations(x, y0)

    def add_gradient(self, kept: Tensor, gradient: Tensor, part: int) -> None:
        first, rounded = self.basis is None, as_it_is(kept, gradient)
        test = self.omega if self.basis is None else self.basis
        mine = (shared_skinny_product if first else skinny_product)(kept, test, rounded)
        its = skinny_product(gradient, test, rounded)
        back = inner_product(kept, torch.cat([its, mine], 1) if "moments" in self.pending else its)
        image = inner_product(gradient, mine).sub_(back[:, : test.shape[1]]).div_(2)
        if "moments" in self.pending:
            self.plus("moments", back[:, test.shape[1] :])
        if first:
            self.plus_sketch(image)
        else:
            self.plus("image", image)

    def rotation_energy(self, rank: int, weight: Tensor | None) -> float:
        return float(self.spectrum()[: rank - rank % 2].sum())

    def directions(self, y: np.ndarray) -> np.ndarray:
        p = left_vectors(y, self.rank)
        v, _ = linalg.skew_planes(skew_core(p.T @ self.drawn[:, : y.shape[1]], p.T @ y), self.rank)
        return p @ v

    def compressed(self) -> tuple[np.ndarray, np.ndarray]:
        """(B (n x q) with orthonormal columns, B^T S B or what is known of it)."""
        k, n = self.columns, self.plan.width
        if self.plan.single:
            complete = k == n  # nothing is missed: the probes tell of S as the others do
            y, omega = self.whole[:, : None if complete else k], self.drawn[:, : None if complete else k]
            q = left_vectors(y, k if complete else min(k, self.rank + (k - self.rank) // 3))
            return q, skew_core(q.T @ omega, q.T @ y)
        q, image = self.q, self.numpy("image")
        inner = q.T @ image
        if k == n:
            return q, (inner - inner.T) / 2
        outside = image - q @ inner
        u = left_vectors(outside - q @ (q.T @ outside), min(k, n - k))
        b = linalg.orthonormalize(np.hstack([q, u]))
        inner, r = (inner - inner.T) / 2, b[:, k:].T @ image
        return b, np.block([[inner, -r.T], [r, np.zeros((len(r), len(r)))]])

    def solve(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        b, c = self.compressed()
        # Whole planes, and the one after them for the gap.
        planes = min(len(c) - len(c) % 2, self.rank + self.rank % 2 + 2)
        v, sigma = linalg.skew_planes(c, max(planes, self.rank))
        probes, omega = self.probes()
        # E ||S w||^2 = ||S||_F^2; the compressed part, known exactly, is the control variate.
        missed = np.sum(probes**2, 0) - np.sum((c @ (b.T @ omega)) ** 2, 0)
        known = float(np.sum(c**2))
        p = b @ v[:, : self.rank]
        if self.plan.single and len(c) < self.plan.width:
            # C was fitted and its planes chosen on the same columns. The probes had no part in
            # either: E (P^T S w) (P^T w)^T = P^T S P.
            fitted = v[:, : self.rank].T @ c @ v[:, : self.rank]
            told = np.sum((p.T @ probes) * (fitted @ (p.T @ omega)), 0)
            # C is P^T S P and an error with no part in it, so <C, P^T S P> = ||P^T S P||^2.
            sigma = sigma * math.sqrt(min(1.0, max(0.0, float(told.mean() / np.sum(fitted**2)))))
            return p, sigma, float(np.sum(self.whole**2) / self.whole.shape[1]), standard_error(np.sum(probes**2, 0))
        return p, sigma, max(known + float(missed.mean()), known), standard_error(missed)
