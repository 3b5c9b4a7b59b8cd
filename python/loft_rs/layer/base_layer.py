"""Frozen base layers: which modules are linear, of what sizes, and which have a dense weight that
may be read or fused.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor, nn

__all__ = ["dense_weight", "feature_sizes", "fusible_weight", "innermost", "is_conv1d"]


def innermost(layer: nn.Module) -> nn.Module:
    """The layer inside all wrappers."""
    inner: Any = layer
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
    return inner


def is_conv1d(base: nn.Module) -> bool:
    """Whether `base` is transformers' Conv1D, whose weight is stored (in, out)."""
    return type(base).__name__ == "Conv1D" and hasattr(base, "nf")


def feature_sizes(base: Any) -> tuple[int, int]:
    """(n, m) = (in, out) features of a linear layer; TypeError for anything else."""
    if is_conv1d(base):
        return base.weight.shape[0], base.weight.shape[1]
    if hasattr(base, "in_features") and hasattr(base, "out_features"):
        return base.in_features, base.out_features
    raise TypeError(
        f"base_layer must be a linear layer (nn.Linear, Conv1D or a quantised linear), got {type(base).__name__}"
    )


def dense_weight(base: nn.Module) -> Tensor | None:
    """W (m x n) of an ordinary dense linear layer, without a copy; None where the weight is
    quantised, sharded or a subclass.
    """
    weight: Any = getattr(base, "weight", None)
    if type(weight) not in (nn.Parameter, Tensor) or not weight.dtype.is_floating_point or weight.dim() != 2:
        return None
    if not (isinstance(base, nn.Linear) or is_conv1d(base)):
        return None
    return weight.mT if is_conv1d(base) else weight


def _is_dense(weight: Tensor | None) -> TypeGuard[Tensor]:
    """Whether this is torch's own tensor, or what stands for one while a model is exported;
    subclasses are quantised or sharded.
    """
    return type(weight) in (nn.Parameter, Tensor) or type(weight).__name__ == "FakeTensor"


def fusible_weight(base: nn.Module) -> Tensor | None:
    """The dense W where y = x W^T + b is all that `base` does, and frozen: no hooks, no replaced
    forward, no gradient to W or b.
    """
    if (
        type(base) is not nn.Linear
        and type(base) is not nn.modules.linear.NonDynamicallyQuantizableLinear
        and not is_conv1d(base)
    ):
        return None
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if weight is None:  # a DataParallel replica has plain attributes
        weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
    if not _is_dense(weight) or not weight.dtype.is_floating_point or weight.dim() != 2 or "forward" in vars(base):
        return None
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    return weight if type(base) is nn.Linear else dense_weight(base)
