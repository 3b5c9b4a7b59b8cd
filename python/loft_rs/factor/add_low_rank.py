"""AddLowRank: Y = X W^T + b + (X L) E^T Rt^T, for one layer or for several that read the same X
(arXiv 2605.11872).

The `add` placement of R = I + P E P^T. With z = X L (N x r):

    input side   W = W0 R    L = P         Rt = W0 P
    output side  W = R W0    L = W0^T P    Rt = P

The adapter's term is laid down first and the base product accumulates on it. What is kept for the
backward pass is z alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import HALF, LIBRARY, first_order, no_autocast, small_product
from .low_rank import LowRank

__all__ = [
    "AddInputs",
    "AddLowRank",
    "JoinedInputs",
    "accumulate",
    "add_low_rank_backward",
    "add_low_rank_evaluated",
    "add_low_rank_forward",
    "add_low_rank_plainly",
    "few_rows",
]


class AddInputs(NamedTuple):
    """What `AddLowRank` needs of one layer, all in the dtype of the product: W (m x n), b or None,
    left (n x r), right (m x r).
    """

    weight: Tensor
    bias: Tensor | None
    left: Tensor
    right: Tensor


class JoinedInputs(NamedTuple):
    """Layers that read one X: their inputs, all `left` side by side (n x sum r), and each layer's
    columns in it.

    Layers with one transform in common have the same columns.
    """

    layers: tuple[AddInputs, ...]
    left: Tensor
    columns: tuple[slice, ...]

    @classmethod
    def of(cls, layers: tuple[AddInputs, ...]) -> JoinedInputs:
        lefts: list[Tensor] = []
        columns: list[slice] = []
        width = 0
        for layer in layers:
            if any(layer.left is left for left in lefts):
                columns.append(columns[-1])
                continue
            lefts.append(layer.left)
            columns.append(slice(width, width + layer.left.shape[1]))
            width += layer.left.shape[1]
        return cls(layers, lefts[0] if len(lefts) == 1 else torch.cat(lefts, 1), tuple(columns))


def add_low_rank_plainly(x: Tensor, inputs: AddInputs, delta: Tensor) -> Tensor:
    """Y of `AddLowRank` for one layer by plain operations, in the same order."""
    rows = x.reshape(-1, x.shape[-1])
    term = ((rows @ inputs.left) @ delta.to(x.dtype).mT) @ inputs.right.mT
    term = term if inputs.bias is None else term + inputs.bias
    return torch.addmm(term, rows, inputs.weight.mT).view(*x.shape[:-1], -1)


def accumulate(y: Tensor, a: Tensor, b: Tensor) -> None:
    """Y += A B in place, summed in the matrix unit's float32.

    A compiler turns what is done in place into `addmm` of another result, which copies Y first; an
    operator it leaves alone.
    """
    if torch.compiler.is_compiling():
        torch.ops.loft_rs.accumulate_(y, a, b)
    else:
        y.addmm_(a, b)


def _accumulate(y: Tensor, a: Tensor, b: Tensor) -> None:
    y.addmm_(a, b)


LIBRARY.define("accumulate_(Tensor(a!) y, Tensor a, Tensor b) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("accumulate_", _accumulate, "CompositeExplicitAutograd")
torch.library.register_fake("loft_rs::accumulate_", lambda y, a, b: None, lib=LIBRARY)


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, factor: LowRank, side: str) -> Tensor:
    """Y (..., m) of X (..., n), a few rows: [X; (X P) E^T P^T] W^T in one product that reads W
    once, its two halves then added.

    Twice the rows cost less than W0 P as long as there are fewer rows than columns of P. Without a
    gradient.
    """
    rows, (p, e) = x.reshape(-1, x.shape[-1]), factor
    wide: dict[str, Any] = {"out_dtype": torch.float32} if x.is_cuda and x.dtype in HALF else {}
    if side == "input":
        y, turned = torch.mm(torch.cat([rows, ((rows @ p) @ e.mT) @ p.mT]), weight.mT, **wide).chunk(2)
    else:
        y = torch.mm(rows, weight.mT, **wide)
        turned = ((y.to(x.dtype) @ p) @ e.mT) @ p.mT
    y = y + turned if bias is None else y + turned + bias
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def add_low_rank_forward(
    x: Tensor, joined: JoinedInputs, casts: list[Tensor], identities: list[bool]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """(Y_i, z) of `AddLowRank`.

    The term is laid down first and the base product accumulates on it in the matrix unit's float32:
    adding a small term to a Y that is already rounded to bf16 loses most of it. Where E is known to
    be 0 (`identities`), the base layer's own product gives its own bits.
    """
    rows = x.reshape(-1, x.shape[-1])
    z = rows @ joined.left
    ys = []
    for layer, columns, e, identity in zip(joined.layers, joined.columns, casts, identities, strict=True):
        if identity:
            ys.append(torch.nn.functional.linear(x, layer.weight, layer.bias))
            continue
        y = x.new_empty(*x.shape[:-1], layer.weight.shape[0])
        flat = y.view(-1, y.shape[-1])
        t = (z if len(joined.layers) == 1 else z[:, columns]) @ e.mT
        if layer.bias is None:
            torch.mm(t, layer.right.mT, out=flat)
        else:
            torch.addmm(layer.bias, t, layer.right.mT, out=flat)
        accumulate(flat, rows, layer.weight.mT)
        ys.append(y)
    return tuple(ys), z


def add_low_rank_evaluated(x: Tensor, joined: JoinedInputs, turned: list[Tensor | None]) -> list[Tensor]:
    """`add_low_rank_forward` where E is multiplied into `right` already: right E (m x r), or None
    at the identity. Without a gradient.
    """
    rows = x.reshape(-1, x.shape[-1])
    z = rows @ joined.left
    ys = []
    for layer, columns, right in zip(joined.layers, joined.columns, turned, strict=True):
        if right is None:
            ys.append(torch.nn.functional.linear(x, layer.weight, layer.bias))
            continue
        t = z if len(turned) == 1 else z[:, columns]
        y = torch.mm(t, right.mT) if layer.bias is None else torch.addmm(layer.bias, t, right.mT)
        y.addmm_(rows, layer.weight.mT)
        ys.append(y.view(*x.shape[:-1], -1))
    return ys


def _small_gradients(given, z, joined, casts, needs, d_deltas) -> Tensor | None:
    """u (N x sum r), the blocks (dY_i right_i) E_i side by side; fills in dE_i. Layers with one
    transform share one block and one dE.
    """
    u = (torch.empty_like(z) if len(given) == len(d_deltas) else torch.zeros_like(z)) if needs[0] else None
    blocks: list[tuple[slice, int, Tensor]] = []
    for i, rows in given:
        right, columns = joined.layers[i].right, joined.columns[i]
        same = next((gr for block, _, gr in blocks if block == columns), None)
        if same is None:
            blocks.append((columns, i, rows @ right))
        else:
            same.addmm_(rows, right)
    for columns, i, gr in blocks:
        if needs[1 + i]:
            d_deltas[i] = small_product(gr, z[:, columns])
        if u is not None:
            torch.mm(gr, casts[i], out=u[:, columns])
    return u


def add_low_rank_backward(
    grads: tuple[Tensor | None, ...],
    z: Tensor,
    joined: JoinedInputs,
    casts: list[Tensor],
    needs: list[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(dX, dE_i) of `AddLowRank` from dY_i; `needs` says whether dX and each dE_i are wanted."""
    d_deltas: list[Tensor | None] = [None] * len(grads)
    given = [(i, g.reshape(-1, g.shape[-1])) for i, g in enumerate(grads) if g is not None]
    if not given:
        return None, d_deltas
    if len(grads) == 1:
        gr = given[0][1] @ joined.layers[0].right
        d_deltas[0] = small_product(gr, z) if needs[1] else None
        u = gr @ casts[0] if needs[0] else None
    else:
        u = _small_gradients(given, z, joined, casts, needs, d_deltas)
    if u is None:
        return None, d_deltas
    dx = u @ joined.left.mT
    for i, rows in given:
        accumulate(dx, rows, joined.layers[i].weight)
    shape = next(g for g in grads if g is not None).shape
    return dx.view(*shape[:-1], dx.shape[1]), d_deltas


class AddLowRank(torch.autograd.Function):
    """Y_i = X W_i^T + b_i + z_i E_i^T right_i^T with z = X left, for the frozen W_i (m_i x n) and
    b_i of layers that read one X.

    Input side (W = W0 R): left = P, right = W0 P. Output side (W = R W0): left = W0^T P, right = P.
    dE_i = (dY_i right_i)^T z_i;  dX = sum_i (dY_i right_i) E_i left_i^T, and each dY_i W_i is accumulated onto it, which spares the
    additions of one dX a layer.

    casts: each E_i in X's dtype; deltas: the same with a gradient. Returns one Y, or a tuple of
    them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, joined: JoinedInputs, casts: list[Tensor], identities: list[bool], *deltas: Tensor):
        ys, z = add_low_rank_forward(x, joined, casts, identities)
        # Only z is saved; what is frozen or r x r lies on ctx.
        ctx.save_for_backward(z)
        ctx.set_materialize_grads(False)
        ctx.joined, ctx.casts, ctx.dtypes = joined, casts, [delta.dtype for delta in deltas]
        return ys[0] if len(ys) == 1 else ys

    @staticmethod
    @first_order
    def backward(ctx, *grads: Tensor | None):
        (z,) = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
        with no_autocast(z.device.type):
            dx, d_deltas = add_low_rank_backward(grads, z, ctx.joined, ctx.casts, needs)
        d_deltas = [None if d is None else d.to(dtype) for d, dtype in zip(d_deltas, ctx.dtypes, strict=True)]
        return dx, None, None, None, *d_deltas
