"""`loft_rs.nn`: LOFT layers for plain PyTorch, without PEFT."""

from __future__ import annotations

from typing import Any

from ._words import how_to_install

try:
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"loft_rs.nn needs torch: {how_to_install('train')}", name=error.name) from error

from .layer import AdaptedLinear, LayerAdapter
from .layer.forward_pass import Root, watch
from .layer.merging import merge, unmerge
from .layer.placement import run
from .support.custom import custom_basis
from .support.methods import SIDES
from .transform.transforms import get_transform

__all__ = ["LoftLinear"]


class LoftLinear(AdaptedLinear):
    """A frozen `nn.Linear` rotated inside a fixed support, for plain PyTorch.

    base_layer: the linear layer (m x n); its parameters are frozen here.
    support: a `loft_rs.Support`, or an array or tensor (n, r) on the input side, (m, r) on the
    output side, which is re-orthonormalised.
    transform: `cayley`, `exp` or `free`, the first two also with `+magnitudes` or `+halves`. side:
    `input` (W0 R) or `output` (R W0); a `Support` knows its own.

    The output equals the base layer's exactly until the transform is trained. TypeError or
    ValueError name a bad argument.
    """

    ADAPTER = "default"

    def __init__(self, base_layer: nn.Linear, support: Any, transform: str = "cayley", side: str | None = None):
        get_transform(transform)
        super().__init__(base_layer)
        own = getattr(support, "side", None)
        if side and own and side != own:
            raise ValueError(f"side is {side!r}, but the support was chosen for the {own} side")
        side = side or own or "input"
        basis, energy = custom_basis(support), float(getattr(support, "energy", float("nan")))
        if side in SIDES and basis.shape[0] != self.support_width(side):
            raise ValueError(
                f"support has {basis.shape[0]} rows, but the {side} side of this layer has {self.support_width(side)} features"
            )
        base_layer.requires_grad_(False)
        self.add_adapter(self.ADAPTER, basis.shape[1], get_transform(transform), side).set_basis(basis, energy)
        watch(self, Root([self]))

    def applied(self) -> list[LayerAdapter]:
        return [] if self.original is not None else [self.adapters[self.ADAPTER]]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> (..., m)."""
        return run(self, self.applied(), x)

    def merge(self) -> nn.Module:
        """Merge in place, once, and return the base layer, whose weight is now the rotated one."""
        if self.original is None:
            merge(self, [self.adapters[self.ADAPTER]])
        return self.base_layer

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        unmerge(self)

    def extra_repr(self) -> str:
        adapter = self.adapters[self.ADAPTER]
        assert adapter.transform is not None
        return f"rank={adapter.rank}, transform={adapter.transform.name}, side={adapter.side}"
