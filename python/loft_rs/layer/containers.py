"""The containers in which a layer holds the tensors of its adapters, where torch and PEFT find
them; what is kept that was made of them.
"""

from __future__ import annotations

from collections.abc import KeysView
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["BufferSlot", "Kept", "ParameterSlot"]


class BufferSlot(nn.Module):
    """Persistent buffers by adapter name. Not PEFT's BufferDict, whose tensors PEFT casts to the
    base's or to float32.
    """

    _buffers: dict[str, Tensor]  # type: ignore[assignment]  # torch allows None among them; here there is none

    def __getitem__(self, key: str) -> Tensor:
        return self._buffers[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.register_buffer(key, value)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]

    def __contains__(self, key: str) -> bool:
        return key in self._buffers

    def keys(self) -> KeysView[str]:
        return self._buffers.keys()

    def forward(self, key: str) -> Tensor:
        """The tensor, by a call: accelerate's offloading brings the tensors of modules that are
        called.
        """
        return self._buffers[key]


class ParameterSlot(nn.ParameterDict):
    """Trained parameters by adapter name."""

    def __call__(self, key: str) -> Tensor:  # torch refuses to call a ParameterDict
        return nn.Module.__call__(self, key)

    def forward(self, key: str) -> Tensor:
        """The parameter, by a call, as of `BufferSlot`."""
        return self[key]


class Kept(NamedTuple):
    """A value made of frozen tensors. It is dropped when one of them is another tensor, has another
    version or lies elsewhere.
    """

    sources: tuple[Tensor, ...]
    marks: list[tuple[int, int]]
    evaluation: object
    value: Any

    @classmethod
    def of(cls, sources: tuple[Tensor, ...], evaluation: object, value: Any) -> Kept | None:
        """None where a source does not count its versions, as those that inference mode made."""
        if any(source.is_inference() for source in sources):
            return None
        return cls(sources, [(source._version, source.data_ptr()) for source in sources], evaluation, value)

    def stands(self, sources: tuple[Tensor, ...], evaluation: object) -> bool:
        if self.evaluation is not evaluation or len(sources) != len(self.sources):
            return False
        for source, held, (version, address) in zip(sources, self.sources, self.marks, strict=True):
            if source is not held or source._version != version or source.data_ptr() != address:
                return False
        return True
