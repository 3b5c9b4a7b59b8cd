"""`loft_rs.nn`: LOFT layers for plain PyTorch, without PEFT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .layer import AdaptedLinear, custom_basis
from .support import SIDES
from .transform import DeltaGroup, get_transform

__all__ = ["LoftLinear"]


class LoftLinear(AdaptedLinear):
    """A frozen `nn.Linear` rotated inside a fixed support, for plain PyTorch.

    base_layer: the linear layer (m x n); its parameters are frozen here.
    support: a `loft_rs.Support`, or an array or tensor (n, r) on the input side, (m, r) on the output side, which is re-orthonormalised.
    transform: `cayley`, `exp` or `free`, the first two also with `+magnitudes` or `+halves`. side: `input` (W0 R) or `output` (R W0); a
    `Support` knows its own.

    The output equals the base layer's exactly until the transform is trained. TypeError or ValueError name a bad argument.
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
        self.add_factor(self.ADAPTER, basis.shape[1], DeltaGroup(transform), side)
        self.set_basis(self.ADAPTER, basis, energy)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> (..., m)."""
        return self.adapted_forward(x, [] if self._original is not None else [self.ADAPTER])

    def merge(self) -> nn.Module:
        """Merge in place, once, and return the base layer, whose weight is now the rotated one."""
        if self._original is None:
            self.merge_factors([self.ADAPTER])
        return self.base_layer

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        self.unmerge_factors()

    def extra_repr(self) -> str:
        group = self.loft_group[self.ADAPTER]
        return f"rank={self.rank(self.ADAPTER)}, transform={group.transform.name}, side={self.loft_side[self.ADAPTER]}"
