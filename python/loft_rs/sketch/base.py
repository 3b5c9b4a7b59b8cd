"""Sketches: what calibration accumulates of one layer, fed by a tap in its forward (`tap.py`).

With A the activations on the support's side (X, or Y0 = Y - b on the output side), B the gradient
there (dX or dY), k = r + oversampling:

    skewgrad    pass 1  S Omega = (B^T (A Omega) - A^T (B Omega)) / 2        pass 2  S Q, in the same way, and A^T [B Q, A Q] at once
    gradsvd     pass 1  G^T Omega = X^T (dY Omega)                           pass 2  G Q = dY^T (X Q)
    activation  pass 1  A^T (A Omega)                                        pass 2  (A Q)^T (A Q)

where Q is the orthonormal basis of the first pass's sketch. Every sum is linear in the batches, so
those of several processes add up, and is held in float32 (float64 for a float64 base). A few
columns of Omega are probes: they do not enter Q and estimate what Q misses of the squared norm,
with a standard error. Pass 1 keeps the even and the odd batches apart, for `evidence.py`.

Two passes, skewgrad: S is known on all of span(Q), so P lies in [Q, U], U the part of span(S Q)
outside Q, where S is

    [[Q^T S Q, -R^T], [R, U^T S U]],   R = U^T S Q       with U^T S U, of second order, left out.

One pass (`single`; Halko, Martinsson and Tropp 2011, 5.5; Tropp, Yurtsever, Udell and Cevher 2017),
from the sketch Y alone:

    skewgrad    Q: the q < k leading left singular vectors of Y; the skew C that minimises ||C (Q^T Omega) - Q^T Y||_F is Q^T S Q
    gradsvd     P: the r leading left singular vectors of Y
    activation  the r leading eigenvectors of Y (Omega^T Y)^+ Y^T, Nystroem's

What orders P is its moment P^T M P, M = A^T A. Where only M on a test matrix T (Omega or Q) is
known it is Nystroem's, which is exact on span(T): (P^T M T) (T^T M T)^+ (P^T M T)^T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from .. import linalg
from ..support.methods import STORED_METHODS
from ..support.support import Support
from .products import forget_products, gaussian
from .small import left_vectors, nystroem, ordered_basis
from .split_half import SplitHalf, split_half_of

__all__ = ["PROBES", "Plan", "Sketch"]

PROBES = 8


@dataclass(frozen=True)
class Plan:
    """What a sketch knows of its layer and of the run: plain data, which is saved with it.

    method: skewgrad, gradsvd or activation; any other asks for the order of the support that is
    there, and is its name
    rank: the largest that will be asked for. columns: k. single: pass 1 is the only one
    heights: of the tied layers, which are one layer with all their outputs: S is the sum of theirs,
    G their stack
    loss_scale: what the loss is multiplied by where the support comes from its gradient
    """

    method: str
    side: str
    order: str
    seed: int
    rank: int
    width: int
    heights: tuple[int, ...]
    columns: int
    single: bool
    loss_scale: float = 1.0


class Sketch:
    """One layer's sums. `on_forward` runs in the layer's forward, `on_backward` in its backward,
    `end_pass` after the last batch of a pass.

    `pending` are the sums of the pass that runs; they are there from its start, so that every
    process has the same ones to add up.
    """

    tap_input = False
    pairs = False  # columns come two to a plane, and half a plane captures nothing
    backward = True  # a gradient is what it waits for

    def __init__(self, plan: Plan, home: torch.device, dtype: torch.dtype):
        self.plan, self.side, self.rank, self.columns = plan, plan.side, plan.rank, plan.columns
        ends = list(accumulate(plan.heights))
        self.parts = [slice(end - height, end) for end, height in zip(ends, plan.heights, strict=True)]
        self.other = ends[-1]
        self.home, self.dtype = home, dtype
        self.omega = gaussian(self.sketched, plan.columns + PROBES, plan.seed, home)
        self.seen = 0  # batches that reached this sketch, over all passes
        self.parity, self.first_of_batch, self.batch_announced, self.gradient_seen = 1, True, False, True
        self.unreached = False  # reached by none, or by zeros only
        self.finished = False
        self.pending: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}  # of the passes that are over, on the CPU
        self.basis: Tensor | None = None  # Q (n x k), once the first pass of two is over
        self.evidence: SplitHalf | None = None
        self.begin_pass()

    @property
    def sketched(self) -> int:
        """Rows of Omega."""
        return self.plan.width

    def begin_pass(self) -> None:
        """Fill `pending` with the zeros that the coming pass adds to."""
        if self.basis is None:
            self.pending = {
                "sketch": self.zeros(2, self.plan.width, self.columns + PROBES),
                "batches": torch.zeros(2, dtype=torch.float64, device=self.home),
            }

    def begin_batch(self, half: int) -> None:
        """What follows belongs to this half of the batches. Where nobody says so (`train_step`),
        `note_run` finds out.
        """
        self.parity, self.first_of_batch, self.batch_announced = half, True, True

    def note_run(self, watched: bool) -> None:
        """The layer runs: in a new batch, if it has had an answer to the last one, or none is to
        come.
        """
        if not self.batch_announced and (self.gradient_seen or not (self.backward or watched)):
            self.parity, self.first_of_batch, self.gradient_seen = 1 - self.parity, True, False

    def on_forward(self, x: Tensor, y0: Tensor | None) -> Tensor | None:
        """Accumulate what the forward shows; return what the backward will need."""
        raise AssertionError("each kind of sketch says what it keeps")

    def on_backward(self, kept: Tensor | None, gradient: Tensor, part: int) -> None:
        """Accumulate what the backward shows. part: which of the tied layers shows it."""
        self.gradient_seen = True
        if self.backward:
            assert kept is not None
            self.seen += 1
            self.add_gradient(kept, rows_of(gradient), part)

    def add_gradient(self, kept: Tensor, gradient: Tensor, part: int) -> None:
        """`on_backward`, of a gradient (N x m or N x n) that the sketch waits for."""
        raise AssertionError("each kind of sketch that waits for gradients says what it takes")

    def activations(self, x: Tensor, y0: Tensor | None) -> Tensor:
        if self.side == "input":
            return rows_of(x)
        assert y0 is not None
        return rows_of(y0)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.home)

    def plus(self, name: str, value: Tensor) -> None:
        self.pending[name] += value.to(self.home)

    def plus_sketch(self, value: Tensor) -> None:
        self.pending["sketch"][self.parity] += value.to(self.home)
        self.pending["batches"][self.parity] += self.first_of_batch
        self.first_of_batch = False

    def gaussians(self) -> list[Tensor]:
        """What it multiplies with that was drawn at random, and that others share."""
        return [self.omega]

    def held(self) -> int:
        """Bytes of its tensors now, without those that others share."""
        return sum(held.nbytes for held in (*self.pending.values(), self.basis) if held is not None)

    def workspace(self, rows: int, dtype: torch.dtype, device: str, offload: bool) -> int:
        """Bytes, at most, of what `on_forward` and `on_backward` make and drop for so many rows in
        `dtype` on a device of this type.
        """
        tall, k, size = max(self.plan.width, self.other), self.columns + PROBES, self.dtype.itemsize
        narrow = dtype.itemsize < size and (dtype, device) != (torch.bfloat16, "cuda")
        # A copy in float32; the tap's own of Y.
        wide = rows * tall * (size * narrow + dtype.itemsize * (not self.tap_input))
        thin = 4 if "moments" in self.pending else 2
        return wide + thin * rows * k * size + (3 + offload) * tall * k * size

    def start_second_pass(self, basis: Tensor) -> None:
        """basis: Q (n x k)."""
        self.basis = basis.to(self.home)
        self.begin_pass()

    def to_cpu(self) -> None:
        """Leave the device: what is still to be done is done on the CPU."""
        self.home, self.pending = torch.device("cpu"), {}
        self.omega = gaussian(self.omega.shape[0], self.omega.shape[1], self.plan.seed)
        self.__dict__.pop("test", None)
        self.basis = None if self.basis is None else self.basis.cpu()

    def require_finite(self, name: str, when: str) -> None:
        for what, value in self.pending.items():
            if not bool(torch.isfinite(value).all()):
                raise linalg.NonFiniteError(f"layer {name} saw NaN or Inf in {when} ({what}); nothing was changed")

    def end_pass(self, name: str) -> None:
        """Judge the pass by its sums and say whether another one is needed (`finished`)."""
        self.require_finite(name, "calibration")
        forget_products()
        self.sums |= {what: value.cpu() for what, value in self.pending.items()}
        main = self.sums["sketch" if "sketch" in self.sums else "moment"]
        if not bool(main.any()):
            self.unreached = self.finished = True
        elif self.basis is None:
            self.evidence = split_half_of(
                self.numpy("sketch"), self.numpy("batches"), self.plan.rank, self.directions, pairs=self.pairs
            )
            self.finished = self.plan.single
            if not self.finished:
                whole = main.sum(0)
                self.sums["sketch"] = whole[None, :, self.columns :].clone()  # the probes: Q holds the rest
                self.start_second_pass(torch.from_numpy(linalg.orthonormalize(whole[:, : self.columns].numpy())))
        else:
            self.finished = True

    def numpy(self, name: str) -> np.ndarray:
        return self.sums[name].double().numpy()

    @property
    def q(self) -> np.ndarray:
        """Q (n x k), once the first pass of two is over."""
        assert self.basis is not None
        return self.basis.double().cpu().numpy()

    @property
    def drawn(self) -> np.ndarray:
        return self.omega.double().cpu().numpy()

    @property
    def whole(self) -> np.ndarray:
        """The sketch of all the batches; after a first pass of two only its probes are left."""
        return self.numpy("sketch").sum(0)

    def probes(self) -> tuple[np.ndarray, np.ndarray]:
        """(the sketch's last columns, those of Omega)."""
        return self.whole[:, -PROBES:], self.drawn[:, -PROBES:]

    def directions(self, y: np.ndarray) -> np.ndarray:
        """A basis (n x r) of what a sketch y (n x k) of these columns shows, strongest first, whole
        planes together.
        """
        return left_vectors(y, self.rank)

    def solve(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        """(basis (n x r at least), all values found, ||S||_F^2 or ||G||_F^2, its standard
        error).
        """
        raise AssertionError("each kind of sketch solves its own problem")

    def solved(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        """`solve`, once."""
        if self._solved is None:
            self._solved = self.solve()
        return self._solved

    _solved: tuple[np.ndarray, np.ndarray, float, float] | None = None

    def spectrum(self) -> np.ndarray:
        """Squared values, descending, as many as the plan's rank."""
        return np.square(np.minimum.accumulate(self.solved()[1][: self.rank])) / self.plan.loss_scale**2

    def rotation_energy(self, rank: int, weight: Tensor | None) -> float:
        """||P^T S P||_F^2 of the support P of this rank. weight: W0 (m x n), for a sketch that does
        not see S.
        """
        raise AssertionError("each kind of sketch that waits for gradients has its own")

    def moment(self, p: np.ndarray) -> np.ndarray:
        """P^T M P (r x r) of a basis P (n x r)."""
        image = self.numpy("moments")
        test = self.drawn if self.plan.single else self.q
        return nystroem(p.T @ image, test.T @ image)

    def ordered(self, p: np.ndarray, moment: np.ndarray | None) -> np.ndarray:
        """P (n x r) in the order of its moment, where that is given."""
        return ordered_basis(p, moment)

    def support(self, passes: int, rank: int | None = None) -> Support:
        """The support of the plan's rank, or a smaller one."""
        rank, plan = rank or self.rank, self.plan
        p, values, total, spread = self.solved()
        p, whole = p[:, :rank], rank - rank % 2 if self.pairs else rank
        captured = float(np.sum(values[:whole] ** 2))
        energy = min(captured / total, 1.0)
        last = values[whole - 1] if whole else 0.0
        following = values[rank] if len(values) > rank else math.nan
        return Support(
            basis=self.ordered(p, None if plan.order == "natural" else self.moment(p)),
            energy=energy,
            energy_stderr=energy * spread / total,
            values=np.append(values[:whole], np.zeros(rank - whole)) / plan.loss_scale,
            residuals=np.full(rank, math.nan),
            gap=float((last - following) / last) if last > 0 else math.nan,
            passes=passes,
            seconds=math.nan,
            method=plan.method if plan.method in STORED_METHODS else "custom",
            side=self.side,
            seed=plan.seed,
            order=plan.order,
        )


def rows_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def moment_within(p: np.ndarray, q: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """P^T M P of a P in span(Q), from Q^T M Q."""
    v = q.T @ p
    return v.T @ moment @ v
