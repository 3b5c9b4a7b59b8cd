"""Transforms: the trained orthogonal matrix T (r x r) of LOFT, stored and computed as D = T - I.

| name     | T                          | trained parameters theta                        |
|----------|----------------------------|-------------------------------------------------|
| `cayley` | (I - A)(I + A)^{-1}        | strict lower triangle of the skew A, r(r - 1)/2 |
| `exp`    | matrix exponential of A    | strict lower triangle of the skew A, r(r - 1)/2 |
| `free`   | I + D, unconstrained       | D itself, r x r                                 |

A_ij = theta_ij and A_ji = -theta_ij for i > j, the triangle read row by row. Every transform is the identity at theta = 0, and D
is never formed as a difference of T and I, so a small rotation keeps all its digits. A theta in half precision gives D in float32.

`NAME+halves` trains of A only what lies between the first r - r//2 coordinates and the others, A = [[0, -B^T], [B, 0]], theta = B
(r//2 x (r - r//2)): it turns the one half towards the other.

Two variants are not orthogonal and exist for the methods that trained with them (OFT, PSOFT): `cayley_neumann:K`, Cayley's series cut
off after K terms, and `NAME+magnitudes`, diag(1 + b) T diag(1 + a) with theta followed by a and b.

Gradients are closed forms, so no graph runs through a solver. The values of all layers of one rank come from one batched solve and
their gradients go through one batched node (`DeltaGroup`): an in-place update, a second backward or reentrant checkpointing of one
layer cannot break another's.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import kernels
from .factor import no_autocast

__all__ = [
    "TRANSFORMS",
    "Cayley",
    "CayleyNeumann",
    "DeltaGroup",
    "Exp",
    "Free",
    "Halves",
    "Magnitudes",
    "Transform",
    "get_transform",
    "in_backward",
    "skew",
    "steps",
]


_Places = Callable[[int, torch.device], Tensor]
_INDICES: dict[tuple[_Places, int, torch.device], Tensor] = {}


def _kept(places: _Places, r: int, like: Tensor) -> Tensor:
    """The places for rank r, on the device of `like`, found once."""
    # A fake tensor, of a tracing mode, mixes with no kept real one, nor may its own indices be kept.
    if torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return places(r, like.device)
    key = places, r, like.device
    if key not in _INDICES:
        # A kept index must not be born inside inference mode, or a later training step could not save it for backward.
        with torch.inference_mode(False):
            _INDICES[key] = places(r, like.device)
    return _INDICES[key]


def _strict_lower(r: int, device: torch.device) -> Tensor:
    """Of the strict lower triangle, row by row, in a flattened r x r matrix."""
    rows, cols = torch.tril_indices(r, r, -1, device=device)
    return rows * r + cols


def _between(r: int, device: torch.device) -> Tensor:
    """Of the last r//2 rows' first r - r//2 entries, row by row, in a strict lower triangle."""
    rows, cols = torch.arange(r - r // 2, r, device=device), torch.arange(r - r // 2, device=device)
    return (rows * (rows - 1) // 2).unsqueeze(1).add(cols).flatten()


def skew(theta: Tensor, r: int) -> Tensor:
    """The skew matrices A (..., r, r) whose strict lower triangles, row by row, are theta (..., r(r - 1)/2)."""
    lower = theta.new_zeros(*theta.shape[:-1], r * r).index_copy(-1, _kept(_strict_lower, r, theta), theta)
    lower = lower.unflatten(-1, (r, r))
    return lower - lower.mT


def _skew_gradient(h: Tensor) -> Tensor:
    """dL/dtheta = H_ij - H_ji for i > j, from H = dL/dA taken entry by entry."""
    return (h - h.mT).flatten(-2).index_select(-1, _kept(_strict_lower, h.shape[-1], h))


def _working_dtype(theta: Tensor) -> torch.dtype:
    # On a data-centre GPU a batched fp64 solve costs what fp32 does, and it makes T orthogonal to fp32's last bit.
    return torch.float32 if theta.device.type == "mps" else torch.float64


def _kept_dtype(theta: Tensor) -> torch.dtype:
    return torch.promote_types(theta.dtype, torch.float32)


class Transform(Protocol):
    """One parametrisation of T. `delta` and `gradient` work on a batch (of any number of leading dimensions) of equal ranks and run
    outside autograd."""

    name: str
    orthogonal: bool

    def parameter_shape(self, r: int) -> tuple[int, ...]:
        """Shape of theta for rank r."""

    def rank(self, shape: torch.Size) -> int:
        """r, from the shape of a theta or of a batch of them."""

    def delta(self, theta: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """(D, saved): D = T(theta) - I, (..., r, r), and what `gradient` needs, (..., *), in theta's dtype, at least float32."""

    def gradient(self, g: Tensor, saved: Tensor) -> Tensor:
        """dL/dtheta from g = dL/dD (..., r, r)."""


class _Skew:
    """Transforms of a skew generator, r(r - 1)/2 numbers."""

    def parameter_shape(self, r: int) -> tuple[int, ...]:
        return (r * (r - 1) // 2,)

    def rank(self, shape: torch.Size) -> int:
        return (1 + int((1 + 8 * shape[-1]) ** 0.5 + 0.5)) // 2


class Cayley(_Skew):
    """T = (I - A)(I + A)^{-1}. With Z = (I + A)^{-1}: D = -2 A Z and dL/dA = H = -2 Z^T g Z^T, as dD = -2 Z dA Z."""

    name = "cayley"
    orthogonal = True

    def delta(self, theta: Tensor, r: int) -> tuple[Tensor, Tensor]:
        if kernels.available(theta, r):
            found = kernels.cayley(theta.flatten(0, -2), r)
            return found[0].unflatten(0, theta.shape[:-1]), found[1].unflatten(0, theta.shape[:-1])
        a = skew(theta.to(_working_dtype(theta)), r)
        # inv_ex does not synchronise with the host to check for singularity, and I + A cannot be singular.
        z = torch.linalg.inv_ex(a + torch.eye(r, dtype=a.dtype, device=a.device)).inverse
        return (-2 * (a @ z)).to(_kept_dtype(theta)), z.to(_kept_dtype(theta))

    def gradient(self, g: Tensor, saved: Tensor) -> Tensor:
        zt = saved.mT
        return _skew_gradient(-2 * (zt @ g @ zt))


class Exp(_Skew):
    """T = exp(A). dL/dA = L(A^T, g), the Frechet derivative: the upper right block of exp([[A^T, g], [0, A^T]])."""

    name = "exp"
    orthogonal = True

    def delta(self, theta: Tensor, r: int) -> tuple[Tensor, Tensor]:
        a = skew(theta.to(_working_dtype(theta)), r)
        # exp(A) - I = integral of A exp(tA): the upper right block of exp([[A, A], [0, 0]]), with no cancellation.
        block = torch.cat([torch.cat([a, a], -1), torch.zeros_like(torch.cat([a, a], -1))], -2)
        return torch.linalg.matrix_exp(block)[..., :r, r:].to(_kept_dtype(theta)), a.to(_kept_dtype(theta))

    def gradient(self, g: Tensor, saved: Tensor) -> Tensor:
        r = saved.shape[-1]
        at, g64 = saved.mT.to(_working_dtype(saved)), g.to(_working_dtype(saved))
        block = torch.cat([torch.cat([at, g64], -1), torch.cat([torch.zeros_like(at), at], -1)], -2)
        return _skew_gradient(torch.linalg.matrix_exp(block)[..., :r, r:]).to(g.dtype)


class Free:
    """T = I + D with D unconstrained: not orthogonal once trained."""

    name = "free"
    orthogonal = False

    def parameter_shape(self, r: int) -> tuple[int, ...]:
        return (r, r)

    def rank(self, shape: torch.Size) -> int:
        return shape[-1]

    def delta(self, theta: Tensor, r: int) -> tuple[Tensor, Tensor]:
        return theta.to(_kept_dtype(theta), copy=True), theta.new_zeros(theta.shape[0])

    def gradient(self, g: Tensor, saved: Tensor) -> Tensor:
        return g


class CayleyNeumann(_Skew):
    """T = (I - A) sum_{k <= K} (-A)^k, so D = -2A + 2A^2 - ... + 2(-A)^K + (-A)^{K+1}.

    Its distance to Cayley is of order ||A||^{K+1}, and from ||A|| = 1 on it diverges.
    """

    orthogonal = False

    def __init__(self, terms: int):
        self.terms, self.name = terms, f"cayley_neumann:{terms}"

    def _series(self, a: Tensor) -> Tensor:
        power = -a
        d = 2 * power
        for _ in range(1, self.terms):
            power = -(power @ a)
            d = d + 2 * power
        return d - power @ a

    def delta(self, theta: Tensor, r: int) -> tuple[Tensor, Tensor]:
        a = skew(theta.to(_working_dtype(theta)), r)
        return self._series(a).to(_kept_dtype(theta)), a.to(_kept_dtype(theta))

    def gradient(self, g: Tensor, saved: Tensor) -> Tensor:
        """dA, from the last power back: p_1 = -A, p_{k+1} = -p_k A and D = 2 (p_1 + ... + p_K) + p_{K+1}."""
        a = saved.to(g.dtype)
        powers = [-a]
        for _ in range(1, self.terms):
            powers.append(-(powers[-1] @ a))
        h, upper = torch.zeros_like(a), g
        for power in reversed(powers):
            h = h - power.mT @ upper
            upper = 2 * g - upper @ a.mT
        return _skew_gradient(h - upper)


class Magnitudes:
    """diag(1 + b) T diag(1 + a) of a skew transform T (PSOFT). theta: T's own, then a (r), then b (r)."""

    orthogonal = False

    def __init__(self, inner: _Skew):
        self.inner, self.name = inner, f"{inner.name}+magnitudes"

    def parameter_shape(self, r: int) -> tuple[int, ...]:
        return (r * (r - 1) // 2 + 2 * r,)

    def rank(self, shape: torch.Size) -> int:
        return (int((9 + 8 * shape[-1]) ** 0.5 + 0.5) - 3) // 2

    def delta(self, theta: Tensor, r: int) -> tuple[Tensor, Tensor]:
        theta = theta.to(_kept_dtype(theta))
        generator, a, b = theta[..., : -2 * r], theta[..., -2 * r : -r], theta[..., -r:]
        d, saved = self.inner.delta(generator, r)
        scaled = (1 + b).unsqueeze(-1) * d * (1 + a).unsqueeze(-2) + torch.diag_embed(a + b + a * b)
        return scaled, torch.cat([saved, d, a.unsqueeze(-2), b.unsqueeze(-2)], -2)

    def gradient(self, g: Tensor, saved: Tensor) -> Tensor:
        r = saved.shape[-1]
        inner, d, a, b = saved.split([r, r, 1, 1], -2)
        right, left = 1 + a, (1 + b).mT
        gt = g * (d + torch.eye(r, dtype=d.dtype, device=d.device))
        generator = self.inner.gradient(g * left * right, inner)
        return torch.cat([generator, (gt * left).sum(-2), (gt * right).sum(-1)], -1)


class Halves:
    """T of an orthogonal skew transform whose A is [[0, -B^T], [B, 0]]. theta: B (r//2 x (r - r//2))."""

    orthogonal = True

    def __init__(self, inner: Cayley | Exp):
        self.inner, self.name = inner, f"{inner.name}+halves"

    def parameter_shape(self, r: int) -> tuple[int, ...]:
        return (r // 2, r - r // 2)

    def rank(self, shape: torch.Size) -> int:
        return shape[-2] + shape[-1]

    def delta(self, theta: Tensor, r: int) -> tuple[Tensor, Tensor]:
        generator = theta.new_zeros(*theta.shape[:-2], r * (r - 1) // 2)
        return self.inner.delta(generator.index_copy(-1, _kept(_between, r, theta), theta.flatten(-2)), r)

    def gradient(self, g: Tensor, saved: Tensor) -> Tensor:
        r = g.shape[-1]
        generator = self.inner.gradient(g, saved)
        return generator.index_select(-1, _kept(_between, r, generator)).unflatten(-1, self.parameter_shape(r))


TRANSFORMS: dict[str, Transform] = {t.name: t for t in (Cayley(), Exp(), Free())}


@functools.cache
def get_transform(name: str) -> Transform:
    """The transform called `name`, with `+magnitudes` or `+halves` where it says so; ValueError names the choices otherwise."""
    plain, plus, option = name.partition("+")
    kind, colon, terms = plain.partition(":")
    found = TRANSFORMS.get(plain)
    if kind == "cayley_neumann" and colon and terms.isdecimal() and int(terms) > 0:
        found = CayleyNeumann(int(terms))
    kinds = {"magnitudes": (Magnitudes, _Skew), "halves": (Halves, (Cayley, Exp))}
    if found is None or (plus and (option not in kinds or not isinstance(found, kinds[option][1]))):
        raise ValueError(
            f"transform must be one of {sorted(TRANSFORMS)}, the first two also with +magnitudes or +halves, got {name!r}"
        )
    return kinds[option][0](found) if plus else found


class _Solution:
    """One batched solve: E = C D C of every member, what the gradients need, and E in other dtypes."""

    __slots__ = ("_casts", "deltas", "folds", "saved", "transform")

    def __init__(self, transform: Transform, deltas: Tensor, saved: Tensor, folds: Tensor | None):
        self.transform, self.deltas, self.saved, self.folds = transform, deltas, saved, folds
        self._casts: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def cast(self, index: int, dtype: torch.dtype) -> Tensor:
        """E (r, r), or a stack of them, of one member in `dtype`, no gradient; all members are cast at once."""
        if dtype not in self._casts:
            self._casts[dtype] = self.deltas.to(dtype).unbind(0)
        return self._casts[dtype][index]

    def gradients(self, indices: list[int], grads: list[Tensor]) -> tuple[Tensor, ...]:
        """dL/dtheta of the members `indices` from their dL/dE."""
        saved, folds = self.saved, self.folds
        if len(indices) == 1:
            # Without the batch's dimension: batched products cost the host more, and a compiled model comes here layer by layer.
            (i,) = indices
            return (self._gradient(grads[0], saved[i], None if folds is None else folds[i]),)
        if len(indices) < len(saved):
            # Not by a list of indices, which would wait for its own copy to the device.
            saved, folds = (None if t is None else torch.stack([t[i] for i in indices]) for t in (saved, folds))
        return self._gradient(torch.stack(grads), saved, folds).unbind(0)

    def _gradient(self, g: Tensor, saved: Tensor, folds: Tensor | None) -> Tensor:
        with no_autocast(g.device.type):
            if folds is not None:
                g = folds @ g.to(folds.dtype) @ folds
            return self.transform.gradient(g, saved)


class _Deltas(torch.autograd.Function):
    """Attaches the gradients of several thetas to their E, so that one batched backward serves them all.

    What it needs lies on `ctx`, not among the saved tensors: parts of a model may be run backward one after the other, as reentrant
    checkpointing does, and each time it serves those whose gradient has arrived.
    """

    @staticmethod
    def forward(ctx, solution: _Solution, indices: list[int], *thetas: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.solution, ctx.indices, ctx.dtype = solution, indices, thetas[0].dtype
        return tuple(solution.deltas[i] for i in indices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None):
        given = [k for k, g in enumerate(grads) if g is not None]
        out: list[Tensor | None] = [None] * len(grads)
        if given:
            found = ctx.solution.gradients([ctx.indices[k] for k in given], [grads[k] for k in given])
            for k, gradient in zip(given, found, strict=True):
                out[k] = gradient.to(ctx.dtype)
        return None, None, *out


# Counts optimiser steps. Fused optimisers, the Trainer's default among them, update parameters without touching `_version`.
_steps = [0]


def _count_step(*_: object) -> None:
    _steps[0] += 1


register_optimizer_step_post_hook(_count_step)


def steps() -> int:
    """Optimiser steps so far in this process."""
    return _steps[0]


class _Entry:
    """One member's current value: which solve holds it, the parameter and C it was computed from and their version, whether E is
    known to be exactly zero, who used it, and E with its gradient attached."""

    __slots__ = ("attached", "fold", "identity", "index", "parameter", "solution", "theta", "used", "version")

    def __init__(self, solution: _Solution, index: int, parameter: Tensor, theta: Tensor, fold: Tensor | None):
        self.solution, self.index, self.parameter, self.theta, self.fold = solution, index, parameter, theta, fold
        self.version, self.identity = _version(parameter, fold), False
        self.used: set[int] = set()
        self.attached: Tensor | None = None

    def cast(self, dtype: torch.dtype) -> Tensor:
        """E (r, r) in `dtype`, without a gradient."""
        return self.solution.cast(self.index, dtype)


def _version(theta: Tensor, fold: Tensor | None) -> tuple:
    count = 0 if theta.is_inference() else theta._version
    return id(theta), theta.data_ptr(), count, id(fold), _steps[0]


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread, as when checkpointing computes again."""
    return torch._C._current_graph_task_id() != -1


class DeltaGroup:
    """E for every member of one transform, rank by rank, each rank in one batched solve and one batched backward.

    A member is `(layer, adapter)` where `layer.delta_source(adapter)` returns `(theta, fold)`: the raw parameter and the Gram
    root C (r x r) that a support rounded to half precision needs, or None. The value handed out is E = C D C.

    A value is used once by each of its users: asking for it again means a new forward pass, so the whole rank is computed anew, or,
    without gradients, compared and kept where no theta has changed. That costs at most one solve a pass, and sees what leaves no
    version behind: a fused optimiser's step, and an edit through `.data` (an averaging scheme's) between two passes. Such an edit goes
    unseen only in the middle of a pass, or of a layer that the last pass skipped and the next one starts with. What checkpointing
    computes again inside a backward pass gets the value that the forward pass had.
    """

    def __init__(self, transform: str):
        self.transform = get_transform(transform)
        self._members: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __reduce__(self):
        # A copied or unpickled model starts with an empty group, which its layers join at their first forward.
        return DeltaGroup, (self.transform.name,)

    def value(self, layer, adapter: str, user: object = None) -> Tensor:
        """E of one member (r, r), in theta's dtype, at least float32, with its gradient attached where theta requires one.

        user: whoever shares the member's parameter with others; default the member itself.
        """
        return self.attached(self.entry(layer, adapter, user))

    def entry(self, layer, adapter: str, user: object = None) -> _Entry:
        """The member's current value, marked as used; `value` without the gradient."""
        theta, fold = layer.delta_source(adapter)
        entries = self._members.setdefault(layer, {})
        entry, user = entries.get(adapter), id(layer if user is None else user)
        if entry is None:  # joins alone: the others may be in use in this very pass
            self._compute([(entries, adapter, theta, fold)])
        else:
            fresh = entry.version == _version(theta, fold)
            if not fresh or (user in entry.used and not in_backward()):
                entry.parameter, entry.fold = theta, fold
                members = self._alike(theta)
                if torch.is_grad_enabled() or not self._unchanged(members):
                    self._compute(members)
        entry = entries[adapter]
        entry.used.add(user)
        return entry

    def held(self, layer, adapter: str) -> _Entry | None:
        """The member's last value, where its parameter has not changed since."""
        entry = self._members.get(layer, {}).get(adapter)
        return None if entry is None or entry.version != _version(*layer.delta_source(adapter)) else entry

    def attached(self, entry: _Entry) -> Tensor:
        """E of an entry, with its gradient attached where its theta requires one."""
        if not (torch.is_grad_enabled() and entry.parameter.requires_grad):
            return entry.solution.deltas[entry.index]
        if in_backward():
            # Each checkpointed part runs its own backward; a node of its own runs in no other's.
            return _Deltas.apply(entry.solution, [entry.index], entry.parameter)[0]
        if entry.attached is None:
            # An entry may have been replaced since, by a solve that another layer of the same node needed: it is then alone.
            together = [e for e in self._entries() if e.solution is entry.solution and e.parameter.requires_grad] or [
                entry
            ]
            values = _Deltas.apply(entry.solution, [e.index for e in together], *[e.parameter for e in together])
            for e, value in zip(together, values, strict=True):
                e.attached = value
        return entry.attached

    def _entries(self) -> list[_Entry]:
        return [entry for entries in list(self._members.values()) for entry in entries.values()]

    def _alike(self, like: Tensor) -> list[tuple[dict, str, Tensor, Tensor | None]]:
        """(entries, adapter, theta, fold) of every member that one solve can serve with `like`, as they last were: whose parameter or
        C has been replaced is solved anew when it is asked for. Forgets deleted adapters."""
        found = []
        kind = (type(like), like.shape, like.device, like.dtype)
        for layer, entries in list(self._members.items()):
            for adapter, e in list(entries.items()):
                if not layer.has_adapter(adapter):
                    del entries[adapter]
                elif (type(e.parameter), e.parameter.shape, e.parameter.device, e.parameter.dtype) != kind:
                    continue
                # A sharded model frees the memory of what is not gathered at this moment.
                elif e.parameter.data_ptr() or not e.parameter.numel():
                    found.append((entries, adapter, e.parameter, e.fold))
        return found

    @staticmethod
    def _unchanged(members: list[tuple[dict, str, Tensor, Tensor | None]]) -> bool:
        """Whether every member's value still holds, by the numbers themselves; marks them unused then. Synchronises with the device,
        as generating a token does, so it is not for training."""
        if _capturing():
            return False
        pairs = [(entries[adapter], theta, fold) for entries, adapter, theta, fold in members]
        # A parameter that was replaced may have another shape, dtype or device than the one that the value was computed from.
        if any(
            e.version[3] != id(fold) or (e.theta.shape, e.theta.dtype, e.theta.device) != (t.shape, t.dtype, t.device)
            for e, t, fold in pairs
        ):
            return False
        if not torch.equal(torch.stack([e.theta for e, _, _ in pairs]), torch.stack([theta for _, theta, _ in pairs])):
            return False
        for e, theta, fold in pairs:
            e.parameter, e.version, e.attached = theta, _version(theta, fold), None
            e.used.clear()
        return True

    def _compute(self, members: list[tuple[dict, str, Tensor, Tensor | None]]) -> None:
        # Values outlive an evaluation under inference mode, so they must not be inference tensors.
        with torch.inference_mode(False):
            thetas = torch.stack([theta.detach() for _, _, theta, _ in members])
            solution = self.solve(thetas, [fold for *_, fold in members])
        identity = self._identities(members)
        for i, (entries, adapter, theta, fold) in enumerate(members):
            entries[adapter] = _Entry(solution, i, theta, thetas[i], fold)
            entries[adapter].identity = i in identity

    @staticmethod
    def _identities(members: list[tuple[dict, str, Tensor, Tensor | None]]) -> set[int]:
        """Which members are exactly the identity. Looking synchronises with the device, so only what was never looked at, or was
        the identity and has seen no optimiser step since, is looked at: training pays once."""
        if _capturing():
            return set()
        held = [entries.get(adapter) for entries, adapter, _, _ in members]
        open_ = [i for i, e in enumerate(held) if e is None or (e.identity and e.version[-1] == _steps[0])]
        if not open_:
            return set()
        moved = torch.stack([members[i][2].detach().flatten() != 0 for i in open_]).any(1).tolist()
        return {i for i, m in zip(open_, moved, strict=True) if not m}

    @torch.no_grad()
    def solve(self, thetas: Tensor, folds: list[Tensor | None]) -> _Solution:
        """E of parameters (B, ...) of one rank, with their Gram roots."""
        with torch.autocast(thetas.device.type, enabled=False):
            delta, saved = self.transform.delta(thetas, self.transform.rank(thetas.shape))
            if all(fold is None for fold in folds):
                return _Solution(self.transform, delta, saved, None)
            eye = torch.eye(delta.shape[-1], dtype=delta.dtype, device=delta.device)
            c = torch.stack([eye if fold is None else fold.to(delta.dtype) for fold in folds])
            return _Solution(self.transform, c @ delta @ c, saved, c)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
