"""Sketches: what is summed of one layer over the batches, and the support solved from it. Knows no
PEFT.

base.py                                        Sketch: the passes, the sums, the equations
skewgrad.py gradsvd.py activation.py order.py  one sketch a file
plan.py                                        which sketch a layer needs, and how wide
tap.py                                         through which a sketch sees a layer
products.py                                    large times skinny; Omega
small.py                                       the small dense problems
split_half.py                                  how far a support is the task's
files.py                                       sketches in files
"""

from .base import Plan, Sketch
from .files import supports_from_sketches
from .plan import SKETCHES, plan_for, sketch_for
from .split_half import SplitHalf

__all__ = ["SKETCHES", "Plan", "Sketch", "SplitHalf", "plan_for", "sketch_for", "supports_from_sketches"]
