"""What the processes of one `torch.distributed` run do together; in a process that runs alone each
of these does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Processes"]

T = TypeVar("T")


class Processes:
    """The default process group. Every process must make the same calls in the same order.

    device: where flags and counts are exchanged; the model's, which the group's backend can reach.
    """

    def __init__(self, device: torch.device):
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.device = device

    @contextmanager
    def stage(self) -> Iterator[None]:
        """Work that one process may fail in: at its end all raise where one has, so that none waits
        for ever.

        RuntimeError names the first process that failed; that one raises its own error. The work
        itself may not communicate.
        """
        error = None
        try:
            yield
        except Exception as raised:
            if self.size == 1:
                raise
            error = raised
        if self.size == 1:
            return
        failed = torch.tensor(self.size if error is None else self.rank, device=self.device)
        dist.all_reduce(failed, op=dist.ReduceOp.MIN)
        if error is not None:
            raise error
        if int(failed) < self.size:
            raise RuntimeError(f"rank {int(failed)} failed, and its own error says why; nothing was changed")

    def add_up(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over the processes."""
        if self.size > 1:
            shared = tensor.to(self.device)
            dist.all_reduce(shared)
            if shared is not tensor:
                tensor.copy_(shared)

    def total(self, count: int) -> int:
        counts = torch.tensor(count, device=self.device)
        self.add_up(counts)
        return int(counts)

    def largest(self, count: int) -> int:
        counts = torch.tensor(count, device=self.device)
        if self.size > 1:
            dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        return int(counts)

    def copy_first(self, tensor: Tensor) -> None:
        """Replace `tensor` by what rank 0 holds."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def first(self, value: T) -> T:
        """What rank 0 gives."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]
