"""The sketch of G, for gradsvd."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .base import PROBES, Sketch, moment_within, rows_of
from .products import as_it_is, gaussian, gram_image, inner_product, product, skinny_product
from .small import descending, left_vectors, nystroem, standard_error

__all__ = ["GradientSketch"]


class GradientSketch(Sketch):
    """G = dY^T X (input side), or its transpose (output side): right singular vectors either
    way.
    """

    @property
    def sketched(self) -> int:
        return self.other

    def begin_pass(self) -> None:
        super().begin_pass()
        k = self.columns
        if self.basis is not None:
            self.pending = {"moment": self.zeros(k, k), "image": self.zeros(self.other, k)}
        elif self.plan.single and self.plan.order != "natural":
            self.pending["moments"] = self.zeros(self.plan.width, k + PROBES)

    @cached_property
    def test(self) -> Tensor:
        """What M is multiplied with in a single pass; Omega has the other side's rows."""
        return gaussian(self.plan.width, self.columns + PROBES, self.plan.seed, self.home)

    def gaussians(self) -> list[Tensor]:
        return [self.omega, *([self.test] if "moments" in self.pending else [])]

    def on_forward(self, x: Tensor, y0: Tensor | None) -> Tensor:
        a = self.activations(x, y0)
        if self.basis is None:
            if "moments" in self.pending:
                self.plus("moments", gram_image(a, self.test))
            return rows_of(x)
        aq = product(a, self.basis)
        self.plus("moment", inner_product(aq, aq))
        return aq if self.side == "input" else rows_of(x)

    def add_gradient(self, kept: Tensor, gradient: Tensor, part: int) -> None:
        rows = self.parts[part]
        own, other = (kept, gradient) if self.side == "input" else (gradient, kept)
        if self.basis is None:
            rounded = as_it_is(own, other)
            self.plus_sketch(inner_product(own, skinny_product(other, self.omega[rows], rounded)))
        else:
            image = inner_product(other, own if self.side == "input" else product(own, self.basis))
            self.pending["image"][rows] += image.to(self.home)

    def rotation_energy(self, rank: int, weight: Tensor | None) -> float:
        """Of two passes: P^T W0^T G P = (W0 P)^T (G P), on the output side (W0^T P)^T (G^T P),
        transposed.
        """
        q, p = self.q, self.solved()[0][:, :rank]
        assert weight is not None
        w = weight.detach() if self.side == "input" else weight.detach().mT
        left = product(w, torch.from_numpy(np.ascontiguousarray(p)).to(self.dtype)).double().cpu().numpy()
        c = left.T @ (self.numpy("image") @ (q.T @ p)) / self.plan.loss_scale
        return float(np.sum(((c - c.T) / 2) ** 2))

    def moment(self, p: np.ndarray) -> np.ndarray:
        if self.plan.single:
            image = self.numpy("moments")
            return nystroem(p.T @ image, self.test.double().cpu().numpy().T @ image)
        return moment_within(p, self.q, self.numpy("moment"))

    def solve(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        probes, _ = self.probes()
        if self.plan.single:
            y = self.whole
            squares, _ = descending(y[:, : self.columns].T @ y[:, : self.columns])
            p = left_vectors(y[:, : self.columns], self.rank)
            captured, total = np.sum((p.T @ probes) ** 2, 0), np.sum(probes**2, 0)
            # Y's values are too large by what P was fitted to; of the probes, which had no part in
            # that, P captures what is there.
            values = np.sqrt(squares[: self.rank] * max(captured.mean(), 0) / np.sum(squares[: self.rank]))
            return p, values, float(total.mean()), standard_error(total)
        image, q = self.numpy("image"), self.q
        squares, v = descending(image.T @ image)
        missed = np.sum((probes - q @ (q.T @ probes)) ** 2, 0)
        total = float(np.sum(image**2)) + float(missed.mean())
        return q @ v[:, : self.rank], np.sqrt(squares), total, standard_error(missed)
