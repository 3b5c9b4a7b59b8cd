"""The products that calibration makes of a layer's large matrices, and the test matrices Omega that
it makes them with.

A and B (tokens x features) are large, and what a pass costs is reading them: products are in
float32 or wider, with half precision as it is on a GPU, and layers that read one X and have one
Omega have one X Omega.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = [
    "as_it_is",
    "forget_products",
    "gaussian",
    "gram_image",
    "inner_product",
    "product",
    "shared_skinny_product",
    "skinny_product",
]

# Omega depends on its size, the seed and the device alone: layers of one width hold one between
# them.
_GAUSSIANS: weakref.WeakValueDictionary[tuple, Tensor] = weakref.WeakValueDictionary()
# (which A and Omega, A Omega), the last there was: the q, k and v projections take it in turn.
_LAST: list[tuple[tuple, Tensor] | None] = [None]


def gaussian(rows: int, columns: int, seed: int, home: torch.device = torch.device("cpu")) -> Tensor:  # noqa: B008
    """Omega (rows x columns), whose entries depend on the three numbers alone."""
    key = rows, columns, seed, home
    if (held := _GAUSSIANS.get(key)) is None:
        on_meta = home.type == "meta"
        generator = None if on_meta else torch.Generator().manual_seed(seed)
        held = torch.randn(rows, columns, generator=generator, device="meta" if on_meta else "cpu").to(home)
        _GAUSSIANS[key] = held
    return held


def as_it_is(*tensors: Tensor) -> bool:
    """Whether products of these large tensors take them as they are: bfloat16 on a GPU, summed in
    float32.
    """
    return all(each.is_cuda and each.dtype == torch.bfloat16 for each in tensors)


def product(a: Tensor, b: Tensor) -> Tensor:
    """A B of a large A and a skinny B, in float32 or wider: half-precision products are slow on a
    CPU, and float16 could overflow.

    B comes to A's device. bfloat16 on a GPU is multiplied as it is, B rounded to it, and summed in
    float32.
    """
    if as_it_is(a):
        return torch.mm(a, b.to(a.device, a.dtype), out_dtype=torch.float32)
    work = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(work) @ b.to(a.device, work)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    return product(a.mT, b)


def skinny_product(b: Tensor, test: Tensor, rounded: bool) -> Tensor:
    """B T of a large B and a skinny T, to be multiplied with a large A^T; rounded: to B's dtype, as
    it is made.
    """
    return torch.mm(b, test.to(b.device, b.dtype)) if rounded else product(b, test)


def shared_skinny_product(a: Tensor, omega: Tensor, rounded: bool) -> Tensor:
    """`narrow`, made once for all that ask for the same A and Omega one after another; not under
    inference mode, where an A that was written over does not show it."""
    if a.is_inference():
        return skinny_product(a, omega, rounded)
    storages = tuple(StorageWeakRef(each.untyped_storage()) for each in (a, omega))
    which = (*storages, a._version, a.storage_offset(), a.shape, a.stride(), a.dtype, rounded)
    held = _LAST[0]
    if held is None or held[0] != which:
        held = _LAST[0] = None  # not two of them at a time
        held = _LAST[0] = which, skinny_product(a, omega, rounded)
    return held[1]


def forget_products() -> None:
    """Let go of what `shared_skinny_product` holds."""
    _LAST[0] = None


def gram_image(a: Tensor, test: Tensor) -> Tensor:
    """A^T (A T)."""
    return inner_product(a, shared_skinny_product(a, test, as_it_is(a)))
