"""The ways to choose a support, by name, and the words that go with them."""

from __future__ import annotations

__all__ = ["METHODS", "ORDERS", "SIDES", "STORED_METHODS"]


METHODS = ("gradsvd", "skewgrad", "principal", "random", "coordinate")
SIDES = ("input", "output")
ORDERS = ("natural", "input_pca")
STORED_METHODS = (*METHODS, "activation", "pilot", "custom")
