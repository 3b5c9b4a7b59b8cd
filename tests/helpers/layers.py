"""One adapted layer of every transform, side and placement."""

from __future__ import annotations

import torch
from reference import basis_of

from loft_rs.nn import LoftLinear
from loft_rs.transform.transforms import TRANSFORMS

SIDES, PLACEMENTS, NAMES = ["input", "output"], ["rotate", "add"], [*sorted(TRANSFORMS), "cayley+halves"]


def make_layer(
    n=20, m=12, r=4, *, side="input", transform="cayley", bias=True, dtype=torch.float64, norm=0.3, placement=None
):
    torch.manual_seed(0)
    base = torch.nn.Linear(n, m, bias=bias).to(dtype)
    layer = LoftLinear(base, basis_of(n if side == "input" else m, r), transform, side)
    with torch.no_grad():
        layer.loft_theta["default"].normal_(std=norm)
    layer.placement = placement
    return layer
