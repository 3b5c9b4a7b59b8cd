"""Sketches: what calibration accumulates of one layer, fed by a tap in its forward (`tap.py`).

With A the activations on the support's side (X, or Y0 = Y - b on the output side), B the gradient there (dX or dY), k = r + oversampling:

    skewgrad    pass 1  S Omega = (B^T (A Omega) - A^T (B Omega)) / 2        pass 2  S Q, in the same way, and A^T [B Q, A Q] at once
    gradsvd     pass 1  G^T Omega = X^T (dY Omega)                           pass 2  G Q = dY^T (X Q)
    activation  pass 1  A^T (A Omega)                                        pass 2  (A Q)^T (A Q)

where Q is the orthonormal basis of the first pass's sketch. Every sum is linear in the batches, so those of several processes add up,
and is held in float32 (float64 for a float64 base). A few columns of Omega are probes: they do not enter Q and estimate what Q misses
of the squared norm, with a standard error. Pass 1 keeps the even and the odd batches apart, for `evidence.py`.

Two passes, skewgrad: S is known on all of span(Q), so P lies in [Q, U], U the part of span(S Q) outside Q, where S is

    [[Q^T S Q, -R^T], [R, U^T S U]],   R = U^T S Q       with U^T S U, of second order, left out.

One pass (`single`; Halko, Martinsson and Tropp 2011, 5.5; Tropp, Yurtsever, Udell and Cevher 2017), from the sketch Y alone:

    skewgrad    Q: the q < k leading left singular vectors of Y; the skew C that minimises ||C (Q^T Omega) - Q^T Y||_F is Q^T S Q
    gradsvd     P: the r leading left singular vectors of Y
    activation  the r leading eigenvectors of Y (Omega^T Y)^+ Y^T, Nystroem's

What orders P is its moment P^T M P, M = A^T A. Where only M on a test matrix T (Omega or Q) is known it is Nystroem's, which is
exact on span(T): (P^T M T) (T^T M T)^+ (P^T M T)^T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import linalg
from .compressed import descending, left_vectors, nystroem, ordered_basis, skew_core, standard_error
from .evidence import Evidence, evidence_of
from .products import as_it_is, forget_products, gaussian, gram_image, inner_product, narrow, product, shared_narrow
from .support import STORED_METHODS, Support

if TYPE_CHECKING:
    from .layer import AdaptedLinear

__all__ = ["SKETCHES", "Plan", "Sketch", "plan_for", "sketch_for"]

OVERSAMPLING = 16
# Of a single pass. MiniLM and SmolLM2-135M want so many for 0.97 of the optimum (bench/calibration.py), at low ranks and high ones.
SINGLE_OVERSAMPLING = 192
PROBES = 8


@dataclass(frozen=True)
class Plan:
    """What a sketch knows of its layer and of the run: plain data, which is saved with it.

    method: skewgrad, gradsvd or activation; any other asks for the order of the support that is there, and is its name
    rank: the largest that will be asked for. columns: k. single: pass 1 is the only one
    heights: of the tied layers, which are one layer with all their outputs: S is the sum of theirs, G their stack
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


def plan_for(
    method: str,
    layer: AdaptedLinear,
    adapter: str,
    *,
    order: str,
    seed: int,
    side: str | None = None,
    rank: int | None = None,
    oversampling: int | None = None,
    single: bool = False,
    loss_scale: float = 1.0,
) -> Plan:
    """The plan of one layer. side, rank: default the adapter's. oversampling: columns beyond it; default 16, or 192 for a single pass."""
    side = side or layer.adapters[adapter].side
    rank = layer.adapters[adapter].rank if rank is None else rank
    width, other = layer.support_width(side), "output" if side == "input" else "input"
    heights = tuple(each.support_width(other) for each in layer.adapters[adapter].tied_layers)
    if oversampling is None:
        oversampling = SINGLE_OVERSAMPLING if single else OVERSAMPLING
    # A single gradsvd pass samples the other side's rows: a sketch as wide as the layer leaves nothing to its second pass, but not here.
    most = sum(heights) if single and method == "gradsvd" else width
    columns = min(rank + rank % 2 + oversampling, most)
    return Plan(method, side, order, seed, rank, width, heights, columns, single, loss_scale)


def sketch_for(
    plan: Plan,
    layer: AdaptedLinear,
    adapter: str,
    home: torch.device | str | None = None,
    chosen: Support | None = None,
) -> Sketch:
    """A fresh sketch of one layer for a support that sketches choose, or for the order of one that is chosen already.

    home: the device that holds it between batches; None: the layer's own. chosen: default the one the layer has.
    """
    held = layer.adapters[adapter].support
    home, dtype = torch.device(home or held.device), torch.promote_types(held.dtype, torch.float32)
    kind = SKETCHES.get(plan.method)
    if kind is None:
        basis, facts = held, {"energy": layer.adapters[adapter].energy}
        if chosen is not None:
            basis = torch.from_numpy(chosen.basis)
            facts = {name: getattr(chosen, name) for name in ("energy", "energy_stderr", "values", "gap")}
        return MomentSketch(plan, home, dtype, basis.to(home, dtype), facts, layer.adapters[adapter].first_half)
    return kind(plan, home, dtype)


class Sketch:
    """One layer's sums. `keep` runs in the layer's forward, `collect` in its backward, `end_pass` after the last batch of a pass.

    `pending` are the sums of the pass that runs; they are there from its start, so that every process has the same ones to add up.
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
        self.half, self.fresh, self.told, self.answered = 1, True, False, True
        self.silent = False  # reached by none, or by zeros only
        self.finished = False
        self.pending: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}  # of the passes that are over, on the CPU
        self.basis: Tensor | None = None  # Q (n x k), once the first pass of two is over
        self.evidence: Evidence | None = None
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
        """What follows belongs to this half of the batches. Where nobody says so (`train_step`), `runs` finds out."""
        self.half, self.fresh, self.told = half, True, True

    def runs(self, watched: bool) -> None:
        """The layer runs: in a new batch, if it has had an answer to the last one, or none is to come."""
        if not self.told and (self.answered or not (self.backward or watched)):
            self.half, self.fresh, self.answered = 1 - self.half, True, False

    def keep(self, x: Tensor, y0: Tensor | None) -> Tensor | None:
        """Accumulate what the forward shows; return what the backward will need."""
        raise AssertionError("each kind of sketch says what it keeps")

    def collect(self, kept: Tensor | None, gradient: Tensor, part: int) -> None:
        """Accumulate what the backward shows. part: which of the tied layers shows it."""
        self.answered = True
        if self.backward:
            self.seen += 1
            self.take(kept, _rows(gradient), part)

    def take(self, kept: Tensor, gradient: Tensor, part: int) -> None:
        """`collect`, of a gradient (N x m or N x n) that the sketch waits for."""
        raise AssertionError("each kind of sketch that waits for gradients says what it takes")

    def activations(self, x: Tensor, y0: Tensor | None) -> Tensor:
        return _rows(x if self.side == "input" else y0)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.home)

    def plus(self, name: str, value: Tensor) -> None:
        self.pending[name] += value.to(self.home)

    def plus_sketch(self, value: Tensor) -> None:
        self.pending["sketch"][self.half] += value.to(self.home)
        self.pending["batches"][self.half] += self.fresh
        self.fresh = False

    def gaussians(self) -> list[Tensor]:
        """What it multiplies with that was drawn at random, and that others share."""
        return [self.omega]

    def held(self) -> int:
        """Bytes of its tensors now, without those that others share."""
        return sum(held.nbytes for held in (*self.pending.values(), self.basis) if held is not None)

    def workspace(self, rows: int, dtype: torch.dtype, device: str, offload: bool) -> int:
        """Bytes, at most, of what `keep` and `collect` make and drop for so many rows in `dtype` on a device of this type."""
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

    def retire(self) -> None:
        """Leave the device: what is still to be done is done on the CPU."""
        self.home, self.pending = torch.device("cpu"), {}
        self.omega = gaussian(*self.omega.shape, self.plan.seed)
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
        main = self.sums.get("sketch", self.sums.get("moment"))
        if not bool(main.any()):
            self.silent = self.finished = True
        elif self.basis is None:
            self.evidence = evidence_of(
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
        """A basis (n x r) of what a sketch y (n x k) of these columns shows, strongest first, whole planes together."""
        return left_vectors(y, self.rank)

    def solve(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        """(basis (n x r at least), all values found, ||S||_F^2 or ||G||_F^2, its standard error)."""
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
        """||P^T S P||_F^2 of the support P of this rank. weight: W0 (m x n), for a sketch that does not see S."""
        raise AssertionError("each kind of sketch that waits for gradients has its own")

    def moment(self, p: np.ndarray) -> np.ndarray:
        """P^T M P (r x r) of a basis P (n x r)."""
        image = self.numpy("moments")
        test = self.drawn if self.plan.single else self.basis.double().cpu().numpy()
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

    def keep(self, x: Tensor, y0: Tensor | None) -> Tensor:
        return self.activations(x, y0)

    def take(self, kept: Tensor, gradient: Tensor, part: int) -> None:
        first = self.basis is None
        test, rounded = self.omega if first else self.basis, as_it_is(kept, gradient)
        mine = (shared_narrow if first else narrow)(kept, test, rounded)
        its = narrow(gradient, test, rounded)
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
        q, image = self.basis.double().cpu().numpy(), self.numpy("image")
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
            # C was fitted and its planes chosen on the same columns. The probes had no part in either: E (P^T S w) (P^T w)^T = P^T S P.
            fitted = v[:, : self.rank].T @ c @ v[:, : self.rank]
            told = np.sum((p.T @ probes) * (fitted @ (p.T @ omega)), 0)
            # C is P^T S P and an error with no part in it, so <C, P^T S P> = ||P^T S P||^2.
            sigma = sigma * math.sqrt(min(1.0, max(0.0, float(told.mean() / np.sum(fitted**2)))))
            return p, sigma, float(np.sum(self.whole**2) / self.whole.shape[1]), standard_error(np.sum(probes**2, 0))
        return p, sigma, max(known + float(missed.mean()), known), standard_error(missed)


class GradientSketch(Sketch):
    """G = dY^T X (input side), or its transpose (output side): right singular vectors either way."""

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

    def keep(self, x: Tensor, y0: Tensor | None) -> Tensor:
        a = self.activations(x, y0)
        if self.basis is None:
            if "moments" in self.pending:
                self.plus("moments", gram_image(a, self.test))
            return _rows(x)
        aq = product(a, self.basis)
        self.plus("moment", inner_product(aq, aq))
        return aq if self.side == "input" else _rows(x)

    def take(self, kept: Tensor, gradient: Tensor, part: int) -> None:
        rows = self.parts[part]
        own, other = (kept, gradient) if self.side == "input" else (gradient, kept)
        if self.basis is None:
            rounded = as_it_is(own, other)
            self.plus_sketch(inner_product(own, narrow(other, self.omega[rows], rounded)))
        else:
            image = inner_product(other, own if self.side == "input" else product(own, self.basis))
            self.pending["image"][rows] += image.to(self.home)

    def rotation_energy(self, rank: int, weight: Tensor | None) -> float:
        """Of two passes: P^T W0^T G P = (W0 P)^T (G P), on the output side (W0^T P)^T (G^T P), transposed."""
        q, p = self.basis.double().cpu().numpy(), self.solved()[0][:, :rank]
        w = weight.detach() if self.side == "input" else weight.detach().mT
        left = product(w, torch.from_numpy(np.ascontiguousarray(p)).to(self.dtype)).double().cpu().numpy()
        c = left.T @ (self.numpy("image") @ (q.T @ p)) / self.plan.loss_scale
        return float(np.sum(((c - c.T) / 2) ** 2))

    def moment(self, p: np.ndarray) -> np.ndarray:
        if self.plan.single:
            image = self.numpy("moments")
            return nystroem(p.T @ image, self.test.double().cpu().numpy().T @ image)
        return _within(p, self.basis, self.numpy("moment"))

    def solve(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        probes, _ = self.probes()
        if self.plan.single:
            y = self.whole
            squares, _ = descending(y[:, : self.columns].T @ y[:, : self.columns])
            p = left_vectors(y[:, : self.columns], self.rank)
            captured, total = np.sum((p.T @ probes) ** 2, 0), np.sum(probes**2, 0)
            # Y's values are too large by what P was fitted to; of the probes, which had no part in that, P captures what is there.
            values = np.sqrt(squares[: self.rank] * max(captured.mean(), 0) / np.sum(squares[: self.rank]))
            return p, values, float(total.mean()), standard_error(total)
        image, q = self.numpy("image"), self.basis.double().cpu().numpy()
        squares, v = descending(image.T @ image)
        missed = np.sum((probes - q @ (q.T @ probes)) ** 2, 0)
        total = float(np.sum(image**2)) + float(missed.mean())
        return q @ v[:, : self.rank], np.sqrt(squares), total, standard_error(missed)


class ActivationSketch(Sketch):
    """X^T X (or Y0^T Y0): forward passes only."""

    backward = False

    def begin_pass(self) -> None:
        super().begin_pass()
        if self.basis is None:
            self.pending["norm"] = torch.zeros((), dtype=torch.float64, device=self.home)
        else:
            self.pending = {"moment": self.zeros(self.columns, self.columns)}

    def keep(self, x: Tensor, y0: Tensor | None) -> None:
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
        return _within(p, self.basis, self.numpy("moment"))

    def solve(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        if self.plan.single:
            q = left_vectors(self.whole, min(self.whole.shape))
            moment = self.moment(q)
        else:
            q, moment = self.basis.double().cpu().numpy(), self.numpy("moment")
        squares, v = descending(moment)
        return q @ v[:, : self.rank], np.sqrt(squares), float(self.sums["norm"]), 0.0


class MomentSketch(Sketch):
    """Only sum z^T z, z = A P, for the order inside a support P that is chosen already. facts: fields of that support. first: the
    columns of its first half, which is ordered apart from the second."""

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

    def keep(self, x: Tensor, y0: Tensor | None) -> None:
        self.seen += 1
        z = product(self.activations(x, y0), self.basis)
        self.plus("moment", inner_product(z, z))

    def solve(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        return self.basis.double().cpu().numpy(), np.full(self.rank, math.nan), math.nan, 0.0

    def moment(self, p: np.ndarray) -> np.ndarray:
        return self.numpy("moment")

    def ordered(self, p: np.ndarray, moment: np.ndarray | None) -> np.ndarray:
        return ordered_basis(p, moment, self.first)

    def support(self, passes: int, rank: int | None = None) -> Support:
        return replace(super().support(passes, rank), **self.facts)


SKETCHES: dict[str, type[Sketch]] = {
    "skewgrad": SkewSketch,
    "gradsvd": GradientSketch,
    "activation": ActivationSketch,
}


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _within(p: np.ndarray, basis: Tensor, moment: np.ndarray) -> np.ndarray:
    """P^T M P of a P in span(Q), from Q^T M Q."""
    v = basis.double().cpu().numpy().T @ p
    return v.T @ moment @ v
