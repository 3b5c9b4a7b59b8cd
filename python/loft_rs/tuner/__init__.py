"""LOFT as a PEFT method: `config` (what), `selection` (supports without data), `layer` and `model`
(how).
"""

from .._registration import register
from .config import LoftConfig
from .layer import Linear, LoftLayer
from .model import LoftModel

__all__ = ["Linear", "LoftConfig", "LoftLayer", "LoftModel"]

register()
