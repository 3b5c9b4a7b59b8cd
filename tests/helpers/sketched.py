"""What the tests of single passes and saved sketches share."""

from __future__ import annotations

SUPPORTS = ("skewgrad", "gradsvd", "activation")


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}
