"""Sketches: what calibration accumulates of one layer, and the tap in the layer's forward that feeds them.

With A the activations on the support's side (X, or Y0 = Y - b on the output side), B the gradient there (dX or dY), k = r + oversampling:

    skewgrad    pass 1  S Omega = (B^T (A Omega) - A^T (B Omega)) / 2        pass 2  Q^T S Q = Skew((B Q)^T (A Q))
    gradsvd     pass 1  G^T Omega = X^T (dY Omega)                           pass 2  G Q = dY^T (X Q)
    activation  pass 1  A^T (A Omega)                                        pass 2  (A Q)^T (A Q)

where Q is the orthonormal basis of the first pass's sketch. Every sum is linear in the batches, so those of several processes add up,
and is held in float32 (float64 for a float64 base). A few columns of Omega are probes: they do not enter Q and estimate what Q misses
of the squared norm, with a standard error.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import linalg
from .support import STORED_METHODS, Support

if TYPE_CHECKING:
    from .layer import AdaptedLinear
    from .tuner.config import LoftConfig

__all__ = ["LayerTap", "Sketch", "output_product", "sketch_for"]

OVERSAMPLING = 16
PROBES = 8
# Omega depends on its size, the seed and the device alone: layers of one width hold one between them.
_GAUSSIANS: weakref.WeakValueDictionary[tuple, Tensor] = weakref.WeakValueDictionary()


class _Tap(torch.autograd.Function):
    """The identity on `value`; its backward hands what was kept in the forward, and dL/dvalue, to a sketch."""

    @staticmethod
    def forward(ctx, value: Tensor, kept: Tensor | None, anchor: Tensor, sketch: Sketch, part: int) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.sketch, ctx.part = sketch, part
        # What follows the layer may change its output in place, which neither a view nor the output that was kept would survive.
        return value.view_as(value) if sketch.tap_input else value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        with torch.autocast(gradient.device.type, enabled=False):
            ctx.sketch.collect(ctx.saved_tensors[0], gradient, ctx.part)
        return gradient, None, None, None, None


class LayerTap:
    """What a layer runs in place of its adapted forward during a pass: the same at the identity, tapped. After `refresh` that is the
    base layer with the frozen factor, W_cur = W0 R_f, and X, Y0 and their gradients are those of W_cur.

    The tap sees an activation and its own gradient together, whatever comes after the layer, however often it runs, and under
    checkpointing. Its anchor makes autograd reach the layers of a model in which nothing else requires a gradient.
    """

    def __init__(self, sketch: Sketch, adapter: str, part: int = 0):
        self.sketch, self.adapter, self.part = sketch, adapter, part

    def __call__(self, layer: AdaptedLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sketch, watched = self.sketch, torch.is_grad_enabled()
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        if sketch.backward and not watched:  # the first of the two forward passes of a checkpointed block
            return layer.at_identity(x, self.adapter, *args, **kwargs)
        if sketch.tap_input:
            kept = self._keep(x, None)
            x = _Tap.apply(x, kept, anchor, sketch, self.part) if watched else x
            return layer.at_identity(x, self.adapter, *args, **kwargs)
        y = layer.at_identity(x, self.adapter, *args, **kwargs)
        kept = self._keep(x, output_product(layer, y.detach()))
        return _Tap.apply(y, kept, anchor, sketch, self.part) if watched else y

    def _keep(self, x: Tensor, y0: Tensor | None) -> Tensor | None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return self.sketch.keep(x.detach(), None if y0 is None else y0.detach())


def output_product(layer: AdaptedLinear, y: Tensor) -> Tensor:
    """Y0 = Y - b (N x m)."""
    bias = getattr(layer.get_base_layer(), "bias", None)
    return y if bias is None else y - bias.detach()


def sketch_for(
    method: str,
    layer: AdaptedLinear,
    adapter: str,
    seed: int,
    loss_scale: float = 1.0,
    home: torch.device | str | None = None,
) -> Sketch:
    """A fresh sketch of one layer for a calibrated support, or for the order of a support it already has.

    `loss_scale`: what the loss is multiplied by where the support comes from its gradient. home: the device that holds it between
    batches; None: the layer's own.
    """
    kinds = {"skewgrad": SkewSketch, "gradsvd": GradientSketch, "activation": ActivationSketch}
    return kinds.get(method, MomentSketch)(layer, adapter, seed, loss_scale, home)


class Sketch:
    """One layer's sums. `keep` runs in the layer's forward, `collect` in its backward, `end_pass` after the last batch of a pass.

    `pending` are the sums of the pass that runs; they are there from its start, so that every process has the same ones to add up.
    """

    tap_input = False
    backward = False  # whether it takes a gradient
    pairs = False  # columns come two to a plane, and half a plane captures nothing

    def __init__(self, layer: AdaptedLinear, adapter: str, seed: int, loss_scale: float, home: Any):
        self.side, self.rank = layer.loft_side[adapter], layer.rank(adapter)
        self.width = layer.support_width(self.side)
        # Tied layers are one layer with all their outputs: S is the sum of theirs, G their stack.
        heights = [each.support_width("output" if self.side == "input" else "input") for each in layer.tied(adapter)]
        ends = list(accumulate(heights))
        self.parts = [slice(end - height, end) for end, height in zip(ends, heights, strict=True)]
        self.other = ends[-1]
        self.columns = min(self.rank + self.rank % 2 + OVERSAMPLING, self.width)
        self.seed, self.loss_scale = seed, loss_scale
        self.home = torch.device(home or layer.support(adapter).device)
        self.dtype = torch.promote_types(layer.support(adapter).dtype, torch.float32)
        self.seen = 0  # batches that reached this sketch, over all passes
        self.silent = False  # reached by none, or by zeros only
        self.finished = False
        self.pending: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}  # of the passes that are over, on the CPU
        self.omega: Tensor | None = None
        self.basis: Tensor | None = None  # Q (n x k), once the first pass is over
        self.begin_pass()

    def begin_pass(self) -> None:
        """Fill `pending` with the zeros that the coming pass adds to."""
        raise AssertionError("each kind of sketch names its sums")

    def keep(self, x: Tensor, y0: Tensor | None) -> Tensor | None:
        """Accumulate what the forward shows; return what the backward will need."""
        raise AssertionError("each kind of sketch says what it keeps")

    def collect(self, kept: Tensor | None, gradient: Tensor, part: int) -> None:
        """Accumulate what the backward shows. Forward-only sketches need nothing of it. part: which of the tied layers shows it."""

    def activations(self, x: Tensor, y0: Tensor | None) -> Tensor:
        return _rows(x if self.side == "input" else y0)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.home)

    def plus(self, name: str, value: Tensor) -> None:
        self.pending[name] += value.to(self.home)

    def gaussian(self, rows: int) -> Tensor:
        shape = (rows, self.columns + PROBES)
        held = _GAUSSIANS.get((*shape, self.seed, self.home))
        if held is None:
            on_meta = self.home.type == "meta"
            generator = None if on_meta else torch.Generator().manual_seed(self.seed)
            drawn = torch.randn(shape, generator=generator, device="meta" if on_meta else "cpu")
            held = _GAUSSIANS[(*shape, self.seed, self.home)] = drawn.to(self.home)
        return held

    def held(self) -> int:
        """Bytes of its tensors now, without Omega's, which other sketches share."""
        return sum(held.nbytes for held in (*self.pending.values(), self.basis) if held is not None)

    def workspace(self, rows: int, dtype: torch.dtype, device: str, offload: bool) -> int:
        """Bytes, at most, of what `keep` and `collect` make and drop for so many rows in `dtype` on a device of this type."""
        tall, k, size = max(self.width, self.other), self.columns + PROBES, self.dtype.itemsize
        narrow = dtype.itemsize < size and (dtype, device) != (torch.bfloat16, "cuda")
        wide = (
            rows * tall * (size * narrow + dtype.itemsize * (not self.tap_input))
        )  # a copy in float32; the tap's own of Y
        return wide + 2 * rows * k * size + (3 + offload) * tall * k * size

    def start_second_pass(self, basis: Tensor) -> None:
        self.basis = basis.to(self.home)
        self.begin_pass()

    def require_finite(self, name: str, when: str) -> None:
        for what, value in self.pending.items():
            if not bool(torch.isfinite(value).all()):
                raise linalg.NonFiniteError(f"layer {name} saw NaN or Inf in {when} ({what}); nothing was changed")

    def end_pass(self, name: str) -> None:
        """Judge the pass by its sums and say whether another one is needed (`finished`)."""
        self.require_finite(name, "calibration")
        self.sums |= {what: value.cpu() for what, value in self.pending.items()}
        main = self.sums.get("sketch", self.sums.get("moment"))
        if not bool(main.any()):
            self.silent = self.finished = True
        elif self.basis is None:
            self.start_second_pass(torch.from_numpy(linalg.orthonormalize(main[:, : self.columns].numpy())))
        else:
            self.finished = True

    def numpy(self, name: str) -> np.ndarray:
        return self.sums[name].double().numpy()

    def solve(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        """(V (k x r), all values found, ||S||_F^2 or ||G||_F^2, its standard error) of the compressed problem."""
        raise AssertionError("each kind of sketch solves its own problem")

    def support(self, order: str, passes: int, config: LoftConfig) -> Support:
        v, values, total, spread = self.solve()
        whole = self.rank - self.rank % 2 if self.pairs else self.rank
        captured = float(np.sum(values[:whole] ** 2))
        energy = min(captured / total, 1.0)
        last = values[whole - 1] if whole else 0.0
        following = values[self.rank] if len(values) > self.rank else math.nan
        return Support(
            basis=_ordered_basis(self.basis.double().cpu().numpy() @ v, v, self.numpy("moment"), order),
            energy=energy,
            energy_stderr=energy * spread / total,
            values=np.append(values[:whole], np.zeros(self.rank - whole)) / self.loss_scale,
            residuals=np.full(self.rank, math.nan),
            gap=float((last - following) / last) if last > 0 else math.nan,
            passes=passes,
            seconds=math.nan,
            method=config.support if config.support in STORED_METHODS else "custom",
            side=self.side,
            seed=config.seed,
            order=order,
        )


class SkewSketch(Sketch):
    """S = (B^T A - A^T B) / 2 with B the gradient at A."""

    backward = pairs = True

    def __init__(self, layer: AdaptedLinear, adapter: str, seed: int, loss_scale: float, home: Any):
        super().__init__(layer, adapter, seed, loss_scale, home)
        self.tap_input = self.side == "input"
        self.omega = self.gaussian(self.width)

    def begin_pass(self) -> None:
        k = self.columns
        if self.basis is None:
            self.pending = {"sketch": self.zeros(self.width, k + PROBES)}
        else:
            self.pending = {"moment": self.zeros(k, k), "compressed": self.zeros(k, k)}

    def keep(self, x: Tensor, y0: Tensor | None) -> Tensor:
        a = self.activations(x, y0)
        if self.basis is None:
            return a
        aq = _product(a, self.basis)
        self.plus("moment", _inner(aq, aq))
        return aq

    def collect(self, kept: Tensor, gradient: Tensor, part: int) -> None:
        self.seen += 1
        b = _rows(gradient)
        if self.basis is None:
            self.plus("sketch", (_inner(b, _product(kept, self.omega)) - _inner(kept, _product(b, self.omega))) / 2)
        else:
            self.plus("compressed", _inner(_product(b, self.basis), kept))

    def solve(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        c = self.numpy("compressed")
        c = (c - c.T) / 2
        # Whole planes, and the one after them for the gap.
        planes = min(len(c) - len(c) % 2, self.rank + self.rank % 2 + 2)
        v, sigma = linalg.skew_planes(c, max(planes, self.rank))
        probes, omega = self.numpy("sketch")[:, self.columns :], self.omega.double().cpu().numpy()[:, self.columns :]
        # E ||S w||^2 = ||S||_F^2; the compressed part, known exactly, is the control variate.
        q = self.basis.double().cpu().numpy()
        missed = np.sum(probes**2, 0) - np.sum((c @ (q.T @ omega)) ** 2, 0)
        known = float(np.sum(c**2))
        return v[:, : self.rank], sigma, max(known + float(missed.mean()), known), _standard_error(missed)


class GradientSketch(Sketch):
    """G = dY^T X (input side), or its transpose (output side): right singular vectors either way."""

    backward = True

    def __init__(self, layer: AdaptedLinear, adapter: str, seed: int, loss_scale: float, home: Any):
        super().__init__(layer, adapter, seed, loss_scale, home)
        self.omega = self.gaussian(self.other)

    def begin_pass(self) -> None:
        k = self.columns
        if self.basis is None:
            self.pending = {"sketch": self.zeros(self.width, k + PROBES)}
        else:
            self.pending = {"moment": self.zeros(k, k), "image": self.zeros(self.other, k)}

    def keep(self, x: Tensor, y0: Tensor | None) -> Tensor:
        if self.basis is None:
            return _rows(x)
        aq = _product(self.activations(x, y0), self.basis)
        self.plus("moment", _inner(aq, aq))
        return aq if self.side == "input" else _rows(x)

    def collect(self, kept: Tensor, gradient: Tensor, part: int) -> None:
        self.seen += 1
        dy, rows = _rows(gradient), self.parts[part]
        own, other = (kept, dy) if self.side == "input" else (dy, kept)
        if self.basis is None:
            self.plus("sketch", _inner(own, _product(other, self.omega[rows])))
        else:
            image = _inner(other, own if self.side == "input" else _product(own, self.basis))
            self.pending["image"][rows] += image.to(self.home)

    def solve(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        image = self.numpy("image")
        squares, v = _descending(image.T @ image)
        probes, q = self.numpy("sketch")[:, self.columns :], self.basis.double().cpu().numpy()
        missed = np.sum((probes - q @ (q.T @ probes)) ** 2, 0)
        return (
            v[:, : self.rank],
            np.sqrt(squares),
            float(np.sum(image**2)) + float(missed.mean()),
            _standard_error(missed),
        )


class ActivationSketch(Sketch):
    """X^T X (or Y0^T Y0): forward passes only."""

    def __init__(self, layer: AdaptedLinear, adapter: str, seed: int, loss_scale: float, home: Any):
        super().__init__(layer, adapter, seed, loss_scale, home)
        self.omega = self.gaussian(self.width)

    def begin_pass(self) -> None:
        k = self.columns
        if self.basis is None:
            norm = torch.zeros((), dtype=torch.float64, device=self.home)
            self.pending = {"sketch": self.zeros(self.width, k + PROBES), "norm": norm}
        else:
            self.pending = {"moment": self.zeros(k, k)}

    def keep(self, x: Tensor, y0: Tensor | None) -> None:
        self.seen += 1
        a = self.activations(x, y0)
        if self.basis is None:
            self.plus("sketch", _inner(a, _product(a, self.omega)))
            self.plus("norm", a.float().square().sum(dtype=torch.float64))
        else:
            aq = _product(a, self.basis)
            self.plus("moment", _inner(aq, aq))

    def solve(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        squares, v = _descending(self.numpy("moment"))
        return v[:, : self.rank], np.sqrt(squares), float(self.sums["norm"]), 0.0


class MomentSketch(Sketch):
    """Only sum z^T z, z = A P, for the order inside a support that the layer already has."""

    def __init__(self, layer: AdaptedLinear, adapter: str, seed: int, loss_scale: float, home: Any):
        super().__init__(layer, adapter, seed, loss_scale, home)
        self.basis = layer.support(adapter).to(self.home, self.dtype)
        self.energy = layer.energy(adapter)

    def begin_pass(self) -> None:
        self.pending = {"moment": self.zeros(self.rank, self.rank)}

    def keep(self, x: Tensor, y0: Tensor | None) -> None:
        self.seen += 1
        z = _product(self.activations(x, y0), self.basis)
        self.plus("moment", _inner(z, z))

    def solve(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        return np.eye(self.rank), np.full(self.rank, math.nan), math.nan, 0.0

    def support(self, order: str, passes: int, config: LoftConfig) -> Support:
        return replace(super().support(order, passes, config), energy=self.energy)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A B of a large A and a skinny B, in float32 or wider: half-precision products are slow on a CPU, and float16 could overflow.

    B comes to A's device. bfloat16 on a GPU is multiplied as it is, B rounded to it, and summed in float32.
    """
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b.to(a.device, a.dtype), out_dtype=torch.float32)
    work = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(work) @ b.to(a.device, work)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return _product(a.mT, b)


def _descending(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(gram)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def _standard_error(samples: np.ndarray) -> float:
    return float(np.std(samples, ddof=1) / math.sqrt(len(samples)))


def _ordered_basis(p: np.ndarray, v: np.ndarray, moment: np.ndarray, order: str) -> np.ndarray:
    """P (n x r), its columns turned to the eigenvectors of sum z^T z = V^T moment V where the order is `input_pca`."""
    if order == "input_pca":
        _, turn = _descending(v.T @ moment @ v)
        p = p @ turn
    p = linalg.orthonormalize(p)  # in order: it only mends rounding
    largest = np.take_along_axis(p, np.abs(p).argmax(0)[None], 0)
    return np.ascontiguousarray(p * np.where(largest < 0, -1.0, 1.0), dtype=np.float32)
