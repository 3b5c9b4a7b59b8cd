"""Factors: R on activations, and what each keeps for the backward pass.

low_rank.py       LowRank, R = I + P E P^T; RotateActivations keeps z = X P
blocks.py         Blocks, rotations of disjoint coordinates; RotateBlocks keeps X
add_low_rank.py   AddLowRank, the term laid down before the base product; keeps z
scale.py          ScaleOutput, a factor for every output; keeps Y
kernels.py        block rotations on a GPU
"""

from .blocks import Blocks
from .low_rank import Frozen, LowRank, gram_root, householder

__all__ = ["Blocks", "Frozen", "LowRank", "gram_root", "householder"]
