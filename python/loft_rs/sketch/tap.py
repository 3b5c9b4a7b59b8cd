"""The tap in a layer's forward, through which calibration sees an activation and its gradient
(`sketch.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..layer import AdaptedLinear
    from .base import Sketch

__all__ = ["LayerTap", "output_product"]


class _Tap(torch.autograd.Function):
    """The identity on `value`; its backward hands what was kept in the forward, and dL/dvalue, to a
    sketch.
    """

    @staticmethod
    def forward(ctx, value: Tensor, kept: Tensor | None, anchor: Tensor, sketch: Sketch, part: int) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.sketch, ctx.part = sketch, part
        # What follows the layer may change its output in place, which neither a view nor the output
        # that was kept would survive.
        return value.view_as(value) if sketch.tap_input else value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        with torch.autocast(gradient.device.type, enabled=False):
            ctx.sketch.on_backward(ctx.saved_tensors[0], gradient, ctx.part)
        return gradient, None, None, None, None


class LayerTap:
    """What a layer runs in place of its adapted forward during a pass: the same at the identity,
    tapped. After `refresh` that is the base layer with the frozen factor, W_cur = W0 R_f, and X, Y0
    and their gradients are those of W_cur. within: another tap of the layer, for its other side,
    which runs inside this one.

    The tap sees an activation and its own gradient together, whatever comes after the layer,
    however often it runs, and under checkpointing. Its anchor makes autograd reach the layers of a
    model in which nothing else requires a gradient.
    """

    def __init__(self, sketch: Sketch, adapter: str, part: int = 0, within: LayerTap | None = None):
        self.sketch, self.adapter, self.part, self.within = sketch, adapter, part, within

    def __call__(self, layer: AdaptedLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sketch, watched = self.sketch, torch.is_grad_enabled()
        if sketch.backward and not watched:  # the first of the two forward passes of a checkpointed block
            return self._run(layer, x, *args, **kwargs)
        sketch.note_run(watched)
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        if sketch.tap_input:
            kept = self._keep(x, None)
            x = _Tap.apply(x, kept, anchor, sketch, self.part) if watched else x
            return self._run(layer, x, *args, **kwargs)
        y = self._run(layer, x, *args, **kwargs)
        kept = self._keep(x, output_product(layer, y.detach()))
        return _Tap.apply(y, kept, anchor, sketch, self.part) if watched else y

    def _run(self, layer: AdaptedLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.within is None:
            return layer.at_identity(x, self.adapter, *args, **kwargs)
        return self.within(layer, x, *args, **kwargs)

    def _keep(self, x: Tensor, y0: Tensor | None) -> Tensor | None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return self.sketch.on_forward(x.detach(), None if y0 is None else y0.detach())


def output_product(layer: AdaptedLinear, y: Tensor) -> Tensor:
    """Y0 = Y - b (N x m)."""
    bias = getattr(layer.get_base_layer(), "bias", None)
    return y if bias is None else y - bias.detach()
