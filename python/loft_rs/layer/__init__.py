"""A frozen linear layer and its adapters; knows no PEFT.

| file              | holds                                                                     |
|-------------------|---------------------------------------------------------------------------|
| `base_layer.py`   | which modules are linear, which have a dense weight that may be fused      |
| `kinds.py`        | what an adapter consists of, and the factor it makes: pure                 |
| `containers.py`   | where a layer holds its adapters' tensors, by adapter name                 |
| `adapter.py`      | `LayerAdapter`: tensors by the table `SLOTS`, what follows from them       |
| `forward_pass.py` | where a pass begins, and the values that it hands down                     |
| `placement.py`    | rotate or add; layers that read one input run together                     |
| `merging.py`      | merge, unmerge, the LoRA form                                              |
| `linear.py`       | `AdaptedLinear`: adapters added and removed, device, dtype and state       |
"""

from .adapter import LayerAdapter
from .linear import AdaptedLinear

__all__ = ["AdaptedLinear", "LayerAdapter"]
