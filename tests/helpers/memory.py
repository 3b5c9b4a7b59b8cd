"""What the tests of memory measure: live bytes of a step, and supports compared."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def bases(report):
    return {name: support.basis for name, support in report.supports.items()}


def assert_same(report, wanted, atol=0.0):
    assert list(report.supports) == list(wanted.supports)
    for name, basis in bases(wanted).items():
        np.testing.assert_allclose(report.supports[name].basis, basis, atol=atol, rtol=0)
        np.testing.assert_allclose(
            report.supports[name].energy, wanted.supports[name].energy, rtol=1e-6 if atol == 0 else 1e-3
        )


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages made under it that are alive, and their peak."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        held = [*model.parameters(), *model.buffers()]
        self.known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key, size):
        self.known.discard(key)
        self.now -= size


def frozen_peak(model, batch):
    """Live bytes at most in a forward and backward pass of the model, its adapters off and its
    input with a gradient.
    """
    embed = model.get_input_embeddings()
    handle = embed.register_forward_hook(lambda module, args, y: y.requires_grad_())
    with LiveBytes(model) as live, model.disable_adapter():
        model(**batch).loss.backward()
    handle.remove()
    return live.peak
