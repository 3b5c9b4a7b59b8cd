"""`loft_rs.nn`: LOFT layers for plain PyTorch, without PEFT."""

from .layer import LoftLinear

__all__ = ["LoftLinear"]
