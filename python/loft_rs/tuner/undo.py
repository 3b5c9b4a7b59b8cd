"""Undo: where something fails on its way, adapters and weights are put back as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .layer import Linear

__all__ = ["unchanged_on_failure"]


@contextmanager
def unchanged_on_failure(layers: Mapping[str, Linear], adapter: str) -> Iterator[list[Tensor]]:
    """Puts back an adapter's tensors in `layers`, to the bit, and what its config says of them,
    where the block fails.

    Yields a list for base weights that the block is about to change: it calls `append(weight)`
    before it does.
    """
    adapters = [layer.adapters[adapter] for layer in layers.values()]
    states = [each.state() for each in adapters]
    configs = {id(each.config): each.config for each in adapters if each.config is not None}
    noted = [(c, dict(c.rank_pattern), dict(c.side_pattern), dict(c.frozen_ranks)) for c in configs.values()]
    weights = _Weights()
    try:
        yield weights
    except BaseException:
        for each, state in zip(adapters, states, strict=True):
            each.restore(state)
        for config, ranks, sides, frozen in noted:
            config.rank_pattern, config.side_pattern, config.frozen_ranks = ranks, sides, frozen
        weights.restore()
        raise


class _Weights(list):
    """Base weights, each with a copy of its bits on the CPU from when it was appended."""

    def append(self, weight: Tensor) -> None:
        super().append((weight, weight.detach().to("cpu", copy=True)))

    @torch.no_grad()
    def restore(self) -> None:
        for weight, bits in self:
            weight.copy_(bits)
