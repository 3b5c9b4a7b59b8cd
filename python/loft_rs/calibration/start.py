"""Kept pilots: the transform that training starts from, nearest to what the pilot has changed
(`Pilot(keep=True)`).

With Delta = B A the pilot's change of W0 (of an adapter on the output side W0^T and Delta^T, whose
rotation is T^T), theta makes
||W(theta) - W0 - Delta||_F small:

    any P            T is the polar factor of (W0 P)^T (W0 + Delta) P with determinant 1: W0 P T is nearest to (W0 + Delta) P
    halves [V, Y]    to first order W = W0 + s (M B V^T - N B^T Y^T),  M = W0 Y,  N = W0 V,  s = -2 for cayley and 1 for exp, is nearest
                     where (M^T M) B + B (N^T N) = (M^T Delta V - (N^T Delta Y)^T) / s, a Sylvester
                     equation of two symmetric matrices

The pilot has gone a part of the way, and the start makes a part of its change, so a longer step the
same way is better: theta is multiplied by the scale of `SCALES` at which the loss of a few batches
is lowest (`Passes.best_scale`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..layer import AdaptedLinear
from ..support.support import Support
from ..transform.skew import skew_gradient
from ..transform.transforms import Cayley, Halves, Transform
from .pilot import LowRankChange
from .sides import ModuleSide

if TYPE_CHECKING:
    from .options import Job
    from .passes import Passes

__all__ = ["SCALES", "Start", "Starts", "start_of", "starts_of"]

SCALES = (1.0, 1.5, 2.0, 3.0)  # ascending: the search ends where the loss rises
# Of the largest eigenvalue: below this W0 P tells nothing of a direction, and T leaves it alone.
_UNSEEN = 1e-6


class Start(NamedTuple):
    """theta (float64, as the transform shapes it) at scale 1; W0 P and Delta P (m x r) and
    ||Delta||_F^2, of the side's own form.
    """

    theta: Tensor
    images: Tensor
    changes: Tensor
    size: float

    def delta(self, transform: Transform, scale: float, output: bool) -> Tensor:
        """D = T - I (r x r) of theta times `scale`, of the side's own form."""
        rank = self.images.shape[1]
        d = transform.delta((scale * self.theta)[None], rank)[0][0]
        return d.mT if output else d

    def made(self, delta: Tensor) -> float:
        """1 - ||W(theta) - W0 - Delta||_F^2 / ||Delta||_F^2 at this D, the part of the pilot's
        change that is made.
        """
        step = self.images @ delta
        return float((2 * (step * self.changes).sum() - step.square().sum()) / self.size)


def start_of(change: LowRankChange, basis: Tensor, transform: Transform) -> Start:
    """The start at scale 1, of the support P (n x r) that was chosen for this change."""
    weight = change.weight()
    p = basis.to(weight)
    images, changes = weight @ p, change.times(p)
    if isinstance(transform, Halves):
        theta = _between(images, changes, p.shape[1] - p.shape[1] // 2, -2.0 if _is_cayley(transform) else 1.0)
    else:
        theta = _rotation(images, changes, _is_cayley(transform))
    return Start(-theta if change.side == "output" else theta, images, changes, change.size())


def _is_cayley(transform: Transform) -> bool:
    return isinstance(getattr(transform, "inner", transform), Cayley)


def _between(images: Tensor, changes: Tensor, first: int, slope: float) -> Tensor:
    """B (r//2 x (r - r//2)) of the Sylvester equation."""
    (n, m), (dv, dy) = (images[:, :first], images[:, first:]), (changes[:, :first], changes[:, first:])
    right = (m.mT @ dv - (n.mT @ dy).mT) / slope
    (a, qa), (b, qb) = torch.linalg.eigh(m.mT @ m), torch.linalg.eigh(n.mT @ n)
    sums = a[:, None] + b
    right = qa.mT @ right @ qb
    return qa @ torch.where(sums > _UNSEEN * sums.max(), right / sums, 0.0) @ qb.mT


def _rotation(images: Tensor, changes: Tensor, cayley: bool) -> Tensor:
    """theta (r(r - 1)/2,) of the polar factor, with determinant 1. Directions that W0 does not see
    are left alone.
    """
    gram = images.mT @ images
    gram.diagonal().add_(_UNSEEN * gram.diagonal().max())
    u, _, vt = torch.linalg.svd(gram + images.mT @ changes)
    u[:, -1] *= torch.linalg.det(u @ vt).sign()
    t = u @ vt
    eye = torch.eye(len(t), dtype=t.dtype, device=t.device)
    a = torch.linalg.solve(eye + t, eye - t)  # T = (I - A)(I + A)^{-1}
    a = (a - a.mT) / 2
    if not cayley:  # A = i Q diag(w) Q^H has T = exp(-2i Q diag(atan w) Q^H)
        w, q = torch.linalg.eigh(-1j * a)
        a = -2 * ((q * (1j * w.atan())) @ q.mH).real
    return skew_gradient(a) / 2  # of a skew matrix that is twice its lower triangle


class StartTap:
    """What a layer runs while the scale is looked for: W(theta) x in place of its adapted forward.
    factors: of W(theta) - W0.
    """

    def __init__(self, change: LowRankChange, adapter: str, factors: tuple[Tensor, Tensor]):
        self.change, self.adapter, self.factors = change, adapter, factors

    def __call__(self, layer: AdaptedLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = layer.at_identity(x, self.adapter, *args, **kwargs)
        return self.change.add_factors(y, x, *self.factors)


def taps_of(change: LowRankChange, adapter: str, basis: Tensor, start: Start, delta: Tensor) -> dict[Any, StartTap]:
    """The tap of each of the tied layers: P is what the pilot's change calls learnt, the layer's
    part of W0 P D what it calls drawn.
    """
    held = change.learnt[0]
    parts = (start.images @ delta).split([len(drawn) for drawn in change.drawn])
    factors = [(basis.to(held), part.to(held).contiguous()) for part in parts]
    return {layer: StartTap(change, adapter, each) for layer, each in zip(change.layers, factors, strict=True)}


@dataclass(frozen=True)
class Starts:
    """What training starts from. scale: of all layers. thetas: module name -> theta. made: module
    name -> the part of the pilot's
    ||B A||_F^2 that the start makes."""

    scale: float
    thetas: dict[str, Tensor]
    made: dict[str, float]


def starts_of(
    job: Job, run: Passes, changes: Mapping[ModuleSide, LowRankChange], supports: Mapping[str, Support]
) -> Starts:
    """The starts of these layers, alike in all processes."""
    transforms: dict[ModuleSide, Any] = {p: job.homes[p].adapters[job.adapter].transform for p in changes}
    with job.processes.stage():
        bases = {place: torch.from_numpy(supports[place.module].basis) for place in changes}
        found = {place: start_of(change, bases[place], transforms[place]) for place, change in changes.items()}

    def delta(place: ModuleSide, scale: float) -> Tensor:
        return found[place].delta(transforms[place], scale, place.side == "output")

    def taps(scale: float) -> dict[Any, StartTap]:
        every = (
            taps_of(change, job.adapter, bases[place], found[place], delta(place, scale))
            for place, change in changes.items()
        )
        return {layer: tap for each in every for layer, tap in each.items()}

    scale = run.best_scale(SCALES, taps)
    made = {place.module: start.made(delta(place, scale)) for place, start in found.items()}
    thetas = {place.module: (scale * start.theta).float().cpu() for place, start in found.items()}
    return job.processes.first(Starts(scale, thetas, made))
