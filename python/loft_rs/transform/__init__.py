"""Transforms: T (r x r, orthogonal) and D = T - I from the trained theta.

skew.py         triangles and skew matrices
transforms.py   Cayley, Exp, Free, CayleyNeumann, Magnitudes, Halves: T, D and the gradient of each
batch.py        one solve and one backward pass for all layers of a rank
kernels.py      the solve on a GPU
"""

from .skew import skew
from .transforms import TRANSFORMS, Cayley, CayleyNeumann, Exp, Free, Halves, Magnitudes, Transform, get_transform

__all__ = [
    "TRANSFORMS",
    "Cayley",
    "CayleyNeumann",
    "Exp",
    "Free",
    "Halves",
    "Magnitudes",
    "Transform",
    "get_transform",
    "skew",
]
