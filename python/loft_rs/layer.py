"""Layers: a frozen linear layer and its rotations, y = x (W0 R)^T + b or y = x (R W0)^T + b, in LOFT's own case R = I + P E P^T.

`AdaptedLinear` stores the factors of one layer by adapter name and holds its forward, merge, LoRA form and calibration tap; the PEFT
tuner (`tuner/layer.py`) and the plain-PyTorch `nn.LoftLinear` are both it, so there is one path to every result.

Two placements of the same factor, chosen by shape (`choose_placement`): `rotate` turns the activations of any base layer, `add` lays
the low-rank term down and accumulates the base product on it. Each exists for both sides (see `factor.py`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import compiled
from .base import dense_weight, feature_sizes, fusible_weight
from .factor import HALF, AddInputs, AddLowRank, Blocks, Frozen, Joined, LowRank, ScaleOutput, gram_root, no_autocast
from .kinds import Kind, Partition, Supported
from .siblings import Siblings
from .support import SIDES
from .transform import DeltaGroup, Halves

__all__ = ["AdaptedLinear", "choose_placement", "custom_basis"]


class TensorDict(nn.Module):
    """Persistent buffers by adapter name. Not PEFT's BufferDict, whose tensors PEFT casts to the base's or to float32."""

    def __getitem__(self, key: str) -> Tensor:
        return self._buffers[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.register_buffer(key, value)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]

    def __contains__(self, key: str) -> bool:
        return key in self._buffers

    def keys(self):
        return self._buffers.keys()


def choose_placement(in_features: int, out_features: int, side: str, dtype: torch.dtype) -> str:
    """`rotate` or `add` for a dense base.

    `rotate` reads and writes activations of the side's own width twice; `add` touches the other side's. In half precision rotating
    would round a small rotation away before the base product sees it, so there it is always `add`.
    """
    own, other = (in_features, out_features) if side == "input" else (out_features, in_features)
    return "rotate" if dtype not in HALF and other >= 2 * own else "add"


def _key(tensor: Tensor) -> tuple:
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def add_low_rank(x: Tensor, joined: Joined, members: list[tuple[AdaptedLinear, str]]):
    """`AddLowRank` at the current values of its members, in the dtype of their products."""
    x = x.to(joined.left.dtype)
    entries = [layer.loft_group[adapter].entry(layer.owner(adapter), adapter, layer) for layer, adapter in members]
    deltas = [layer.loft_group[adapter].attached(e) for (layer, adapter), e in zip(members, entries, strict=True)]
    frozen = [layer.frozen(adapter, x.dtype) for layer, adapter in members]
    with no_autocast(x.device.type):
        deltas = [d if f is None else f.times(d) for d, f in zip(deltas, frozen, strict=True)]
        casts = [
            e.cast(x.dtype) if f is None else d.detach().to(x.dtype)
            for e, d, f in zip(entries, deltas, frozen, strict=True)
        ]
        identities = [e.identity and f is None for e, f in zip(entries, frozen, strict=True)]
        return AddLowRank.apply(x, joined, casts, identities, *deltas)


_SUPPORTED = Supported()


class AdaptedLinear(nn.Module):
    """A frozen linear layer and its LOFT factors, by adapter name.

    State: `loft_theta` (trained, float32); where the adapter's kind has a support, `loft_support` (P, n x r; all zero until it is set) and
    `loft_energy` (captured fraction, NaN where unknown); where the output is scaled, `loft_scale` (m, trained, float32: the scale less 1);
    once the support was refreshed, `loft_frozen_basis` (P_f, n x r_f) and `loft_frozen_delta` (E_f, r_f x r_f), the rotation of the
    supports before it, both float32; where layers of one adapter may be on different sides, `loft_output_side` (1 on the output side, else
    0), which the shapes of a square layer do not tell. Everything else is derived from these and the base weight.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        base = base_layer
        while hasattr(base, "base_layer"):
            base = base.base_layer
        self.in_features, self.out_features = feature_sizes(base)
        self.base_layer = base_layer
        self.loft_theta = nn.ParameterDict()
        self.loft_scale = nn.ParameterDict()
        self.loft_support = TensorDict()
        self.loft_energy = TensorDict()
        self.loft_output_side = TensorDict()
        self.loft_frozen_basis = TensorDict()
        self.loft_frozen_delta = TensorDict()
        self.loft_kind: dict[str, Kind] = {}
        self.loft_group: dict[str, DeltaGroup] = {}
        self.loft_side: dict[str, str] = {}
        self.loft_ready: dict[str, bool] = {}
        # Layers with one support and one transform in common: all of them, the one that holds both first.
        self.loft_tied: dict[str, list[AdaptedLinear]] = {}
        self._derived: dict[tuple, tuple[tuple, Any, tuple]] = {}
        self._original: Tensor | None = None
        self.tap = None  # set by `calibrate` for the length of a pass
        self.placement: str | None = None  # None: by shape
        self.siblings: Siblings | None = None  # layers that may read the same input
        self.register_load_state_dict_post_hook(_mark_ready)
        compiled.LIVE.add(self)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        compiled.LIVE.add(self)

    # -- factors ---------------------------------------------------------------------------------------------------------

    def add_factor(
        self,
        adapter: str,
        rank: int,
        group: DeltaGroup | None,
        side: str = "input",
        *,
        kind: Kind = _SUPPORTED,
        output_scale: bool = False,
        movable: bool = False,
        seed: int = 0,
        identity: bool = True,
    ) -> None:
        """Add an adapter at the identity (or, for tests, at a small random rotation), its support, if it has one, unset.

        `group` computes D for all its members at once, and layers of one model share one; None for a kind without a transform.
        output_scale: with a trained factor for every output, W = diag(1 + s) W0 R. movable: `set_side` may change the side, so the state
        holds it. seed: of what starts at random.
        """
        if side not in SIDES:
            raise ValueError(f"side must be 'input' or 'output', got {side!r}")
        own, other = self.support_width(side), self.support_width("output" if side == "input" else "input")
        if rank < 1 or (fitted := kind.fit(rank, own, other)) != rank:
            nearest = "it must be at least 1" if rank < 1 else f"the nearest that does is {fitted}"
            raise ValueError(f"rank {rank} does not fit this layer of {own} by {other} features: {nearest}")
        device, dtype = self._support_device_dtype()
        theta_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        theta = kind.theta(None if group is None else group.transform, own, rank, seed, identity)
        self.loft_theta[adapter] = nn.Parameter(theta.to(device, theta_dtype))
        if output_scale:
            self.loft_scale[adapter] = nn.Parameter(torch.zeros(self.out_features, dtype=theta_dtype, device=device))
        if kind.has_support:
            self.loft_support[adapter] = torch.zeros(own, rank, dtype=dtype, device=device)
            self.loft_energy[adapter] = torch.full((), float("nan"), dtype=torch.float32, device=device)
        if movable:
            self.loft_output_side[adapter] = torch.tensor(float(side == "output"), device=device)
        if group is not None:
            self.loft_group[adapter] = group
        self.loft_kind[adapter], self.loft_side[adapter], self.loft_ready[adapter] = kind, side, not kind.has_support

    def largest_rank(self, adapter: str) -> int:
        """The largest rank that fits this layer and those it is tied to."""
        side, kind = self.loft_side[adapter], self.loft_kind[adapter]
        other = "output" if side == "input" else "input"
        sizes = [(each.support_width(side), each.support_width(other)) for each in self.tied(adapter)]
        return min(kind.fit(min(size), *size) for size in sizes)

    def resize(self, adapter: str, rank: int) -> None:
        """Give an untrained adapter another rank: theta anew, at the identity, and an unset support."""
        trained = self.loft_theta[adapter]
        theta, self.loft_support[adapter] = self.of_rank(adapter, rank)
        self.loft_theta[adapter] = nn.Parameter(theta.to(trained.device, trained.dtype), trained.requires_grad)
        self._forget(adapter)

    def set_side(self, adapter: str, side: str) -> None:
        """Move a `movable` adapter to a side: an unset support as wide as that is, and nothing frozen. theta, whose size is the rank's
        alone, stays."""
        if self.loft_side[adapter] == side:
            return
        held = self.loft_support[adapter]
        self.set_frozen(adapter, None)
        self.loft_support[adapter] = held.new_zeros(self.support_width(side), held.shape[1])
        self.loft_output_side[adapter] = torch.full_like(self.loft_output_side[adapter], side == "output")
        self.loft_side[adapter] = side
        self._forget(adapter)

    def _forget(self, adapter: str) -> None:
        """The support is unset: drop what was derived from it."""
        self.loft_ready[adapter] = False
        for layer in self.tied(adapter):
            for slot in [slot for slot in layer._derived if slot[1] == adapter]:
                del layer._derived[slot]

    def of_rank(self, adapter: str, rank: int) -> tuple[Tensor, Tensor]:
        """(theta at the identity, P unset (n x rank)) as an adapter of another rank has them."""
        held = self.loft_support[adapter]
        theta = self.loft_kind[adapter].theta(self.loft_group[adapter].transform, len(held), rank, 0, True)
        return theta, held.new_zeros(len(held), rank)

    def support_width(self, side: str) -> int:
        """The number of rows of P: n on the input side, m on the output side."""
        return self.in_features if side == "input" else self.out_features

    def set_basis(self, adapter: str, basis: np.ndarray | Tensor, energy: float = float("nan")) -> None:
        """Store P (n x r, orthonormal columns) for an adapter, in the base's own half precision where it has one."""
        held = self.loft_support[adapter]
        basis = torch.as_tensor(np.asarray(basis) if not isinstance(basis, Tensor) else basis)
        if basis.shape != held.shape:
            raise ValueError(f"support must have shape {tuple(held.shape)} here, got {tuple(basis.shape)}")
        with torch.no_grad():
            held.copy_(basis)
            self.loft_energy[adapter].fill_(energy)
        self.loft_ready[adapter] = True

    def tie(self, adapter: str, others: list[AdaptedLinear]) -> None:
        """Let `others`, which read the same input, use this layer's support and transform in place of their own."""
        members = [self, *others]
        for layer in others:
            for held in (layer.loft_theta, layer.loft_support, layer.loft_energy, layer.loft_ready):
                del held[adapter]
            if adapter in layer.loft_output_side:
                del layer.loft_output_side[adapter]
        for layer in members:
            layer.loft_tied[adapter] = members

    def tied(self, adapter: str) -> list[AdaptedLinear]:
        """The layers that share this one's support and transform, the one that holds them first; the layer alone if none does."""
        return self.loft_tied.get(adapter) or [self]

    def owner(self, adapter: str) -> AdaptedLinear:
        """The layer that holds the adapter's tensors: this one, or the first of those it is tied to."""
        return self.tied(adapter)[0]

    def theta(self, adapter: str) -> nn.Parameter:
        """The trained parameter, float32: of the transform (`Transform.parameter_shape`), or what else its kind trains."""
        # Not through `__getattr__`, here and below, which at this rate costs as much as the products of a small model.
        return self.owner(adapter)._modules["loft_theta"]._parameters[adapter]

    def support(self, adapter: str) -> Tensor:
        """P (n x r), all zero until it is set, of an adapter that has one."""
        return self.owner(adapter)._modules["loft_support"]._buffers[adapter]

    def energy(self, adapter: str) -> float:
        return float(self.owner(adapter).loft_energy[adapter])

    def ready(self, adapter: str) -> bool:
        """Whether the adapter has a support."""
        return self.owner(adapter).loft_ready[adapter]

    def rank(self, adapter: str) -> int:
        """r, or the size of the blocks of one without a support."""
        group = self.loft_group.get(adapter)
        return self.loft_kind[adapter].rank(self.theta(adapter), group and group.transform)

    def first_half(self, adapter: str) -> int | None:
        """Of a transform in halves the columns of P in the first one; None for any other."""
        transform = getattr(self.loft_group.get(adapter), "transform", None)
        return self.theta(adapter).shape[-1] if isinstance(transform, Halves) else None

    def has_adapter(self, adapter: str) -> bool:
        return adapter in self.loft_side

    def factor(self, adapter: str, dtype: torch.dtype | None = None) -> LowRank | Blocks:
        """This adapter's R at its current parameters, differentiable in them; of a refreshed one the product with what is frozen.

        dtype: of the activations that a refreshed one is to turn; None: as it is stored.
        """
        own = self.loft_kind[adapter].factor(self, adapter)
        frozen = self.frozen(adapter, dtype)
        if frozen is None:
            return own
        with no_autocast(own.delta.device.type):
            return LowRank(frozen.basis, frozen.times(own.delta))

    def frozen_factor(self, adapter: str) -> LowRank | None:
        """R_f = I + P_f E_f P_f^T, which `refresh` has kept of the supports before the present one; None where there is none."""
        modules = self.owner(adapter)._modules
        basis = modules["loft_frozen_basis"]._buffers.get(adapter)
        return None if basis is None else LowRank(basis, modules["loft_frozen_delta"]._buffers[adapter])

    def frozen_rank(self, adapter: str) -> int:
        """r_f, 0 where nothing is frozen."""
        factor = self.frozen_factor(adapter)
        return 0 if factor is None else factor.rank

    def set_frozen(self, adapter: str, factor: LowRank | None) -> None:
        """Hold R_f, in float32 or as wide as theta, in place of the frozen factor there is; None: hold none."""
        owner, device = self.owner(adapter), self.support(adapter).device
        dtype = torch.promote_types(self.theta(adapter).dtype, torch.float32)
        for held, value in zip((owner.loft_frozen_basis, owner.loft_frozen_delta), factor or (None, None), strict=True):
            if value is not None:
                held[adapter] = value.detach().to(device, dtype).contiguous()
            elif adapter in held:
                del held[adapter]

    def frozen(self, adapter: str, dtype: torch.dtype | None = None) -> Frozen | None:
        """What the frozen factor makes of this adapter's own, in `dtype`; None where there is none."""
        factor = self.frozen_factor(adapter)
        if factor is None:
            return None
        basis, side = self.support(adapter), self.loft_side[adapter]
        make = functools.partial(Frozen.of, factor, basis, side, dtype)
        return self.owner(adapter)._cached(("frozen", adapter, dtype), (*factor, basis), make)

    def delta_source(self, adapter: str) -> tuple[Tensor, Tensor | None]:
        """(theta, C): what `DeltaGroup` computes this adapter's E from."""
        theta = self.theta(adapter)
        if not self.loft_kind[adapter].has_support:
            return theta, None
        basis = self.support(adapter)
        return theta, self._cached(("fold", adapter), (basis,), lambda: gram_root(basis))

    def _cached(self, slot: tuple, sources: tuple[Tensor, ...], compute: Callable[[], Any]):
        """compute(), kept for as long as its sources keep their memory and their version: an edit through `.data` goes unseen."""
        key = tuple([_key(source) for source in sources])
        held = self._derived.get(slot)
        if held is None or held[0] != key:
            with torch.no_grad(), torch.inference_mode(False), torch.autocast(self.loft_device.type, enabled=False):
                # The sources are held too, so that no other tensor can come to have their identity.
                held = self._derived[slot] = key, compute(), sources
        return held[1]

    @property
    def loft_device(self) -> torch.device:
        return self._support_device_dtype()[0]

    def _support_device_dtype(self) -> tuple[torch.device, torch.dtype]:
        base = self.get_base_layer()
        weight = base.weight if getattr(base, "weight", None) is not None else next(base.parameters())
        dtype = getattr(base, "compute_dtype", None) or weight.dtype
        return weight.device, dtype if dtype in (*HALF, torch.float64) else torch.float32

    def get_base_layer(self) -> nn.Module:
        """The innermost wrapped layer."""
        base = self.base_layer
        while hasattr(base, "base_layer"):
            base = base.base_layer
        return base

    # -- forward ---------------------------------------------------------------------------------------------------------

    def adapted_forward(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with `adapters` applied as if merged one after the other: W0 R_1 R_2 ... (input), ... R_2 R_1 W0 (output)."""
        if self.tap is not None:
            return self.tap(self, x, *args, **kwargs)
        if torch.compiler.is_compiling() and any(self.frozen_factor(adapter) for adapter in adapters):
            # The operators of `compiled` know one factor a layer: a refreshed layer runs eagerly, between two graphs.
            return torch.compiler.disable(self.apply_factors)(x, adapters, *args, **kwargs)
        return self.apply_factors(x, adapters, *args, **kwargs)

    def at_identity(self, x: Tensor, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """The layer with the transform at the identity, as `calibrate` sees it: the base layer, and what `refresh` has frozen."""
        return self.apply_factors(x, [adapter] if self.frozen_rank(adapter) else [], *args, **kwargs)

    def apply_factors(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """`adapted_forward`, whether or not a tap is set."""
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        if len(adapters) == 1 and not args and not kwargs:
            y = self._fused_forward(x, adapters[0])
            if y is not None:
                return y
        for adapter in reversed([a for a in adapters if self.loft_side[a] == "input"]):
            x = self.factor(adapter, x.dtype).apply(x)
        y = self.base_layer(x, *args, **kwargs)
        after = [a for a in adapters if self.loft_side[a] == "output" or a in self.loft_scale]
        if after:
            bias = getattr(self.get_base_layer(), "bias", None)
            bias = None if bias is None else bias.to(y.dtype)
            y = y if bias is None else y - bias
            for adapter in after:
                if self.loft_side[adapter] == "output":
                    y = self.factor(adapter, y.dtype).apply(y)
                if adapter in self.loft_scale:
                    y = ScaleOutput.apply(y, self.loft_scale[adapter])
            y = y if bias is None else y + bias
        return y

    def _fused_forward(self, x: Tensor, adapter: str) -> Tensor | None:
        """The `add` placement, or None where the base layer or the shape asks for `rotate`."""
        if torch.compiler.is_compiling():
            weight, dtype = self._added(adapter, x)
            if weight is None:
                return None
            basis, side, bias = self.support(adapter), self.loft_side[adapter], self.base_layer.bias
            theta, transform = self.theta(adapter), self.loft_group[adapter].transform.name
            return compiled.add_low_rank(x.to(dtype), theta, weight, bias, basis, transform, side)
        siblings = self.siblings
        if siblings is not None and (y := siblings.take(self, adapter, x)) is not None:
            return y
        inputs = self.add_inputs(adapter, x)
        if inputs is None:
            return None
        if siblings is not None:
            return siblings.lead(self, adapter, x, inputs)
        return add_low_rank(x, Joined.of((inputs,)), [(self, adapter)])

    def _added(self, adapter: str, x: Tensor) -> tuple[Tensor | None, torch.dtype]:
        """(W, the dtype of the products for an input like x, as nn.Linear's), W None where the `add` placement does not apply."""
        weight = fusible_weight(self.base_layer) if self.loft_kind[adapter].has_support else None
        if weight is None:
            return None, x.dtype
        kind, dtype = x.device.type, weight.dtype
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        placement = self.placement or choose_placement(
            self.in_features, self.out_features, self.loft_side[adapter], dtype
        )
        return None if placement == "rotate" else weight, dtype

    def add_inputs(self, adapter: str, x: Tensor) -> AddInputs | None:
        """What `AddLowRank` takes of this layer for an input like x; None where the `add` placement does not apply."""
        weight, dtype = self._added(adapter, x)
        return None if weight is None else self.add_inputs_in(adapter, dtype)

    def add_inputs_in(self, adapter: str, dtype: torch.dtype) -> AddInputs:
        """`add_inputs` in the dtype of the products, of a layer that the `add` placement applies to."""
        base = self._modules["base_layer"]
        bias, weight = base._parameters["bias"], base._parameters["weight"]
        if weight.dtype != dtype:  # as nn.Linear under autocast: a copy for this pass only
            bias = None if bias is None else bias.to(dtype)
            return AddInputs(dense_weight(base).to(dtype), bias, *self.products(adapter, dtype))
        sources = (self.basis(adapter, dtype), weight) if bias is None else (self.basis(adapter, dtype), weight, bias)
        slot = ("inputs", adapter, dtype)
        return self._cached(slot, sources, lambda: AddInputs(dense_weight(base), bias, *self.products(adapter, dtype)))

    def products(self, adapter: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(left, right) of `AddLowRank`, kept until a tensor they come from changes."""
        base, basis, owner = self.base_layer, self.basis(adapter, dtype), self.owner(adapter)
        p = basis if basis.dtype == dtype else owner._cached(("P", adapter, dtype), (basis,), lambda: basis.to(dtype))
        side, slot = self.loft_side[adapter], ("image", adapter, dtype)
        image = self._cached(slot, (basis, base.weight), lambda: compiled.image(dense_weight(base), basis, side, dtype))
        return (p, image) if side == "input" else (image, p)

    def basis(self, adapter: str, dtype: torch.dtype) -> Tensor:
        """P (n x r) as it is stored; of a refreshed adapter [P_f, P] in `dtype`."""
        frozen = self.frozen(adapter, dtype)
        return self.support(adapter) if frozen is None else frozen.basis

    def joins(self, adapter: str, x: Tensor, inputs: AddInputs) -> AddInputs | None:
        """This layer's inputs where it may run along with a sibling that has `inputs`: `adapter` alone is active, dtypes agree."""
        own = self.add_inputs(adapter, x) if self.runs_alone(adapter) else None
        if own is None or own.left.dtype != inputs.left.dtype or own.left.device != inputs.left.device:
            return None
        return own

    def runs_alone(self, adapter: str) -> bool:
        """Whether `adapter`, and nothing else, is what a forward pass of this layer would apply now."""
        return self.tap is None and self._original is None and self.ready(adapter)

    # -- merge, LoRA form ------------------------------------------------------------------------------------------------

    def dense_or_raise(self, purpose: str) -> Tensor:
        weight = dense_weight(self.get_base_layer())
        if weight is None:
            raise TypeError(
                f"{purpose} needs a dense base weight, but this layer's base is {type(self.get_base_layer()).__name__}; "
                "load the base unquantised, or use loft_rs.export_lora where W0 P is enough"
            )
        return weight

    def original_weight(self, purpose: str) -> Tensor:
        """W0 (m x n), also where an adapter is merged into it now."""
        weight = self.dense_or_raise(purpose)
        return weight if self._original is None else self._original.to(weight.device)

    @torch.no_grad()
    def rotated_weight(self, adapters: list[str], weight: Tensor | None = None, *, safe: bool = False) -> Tensor:
        """W R_1 R_2 ... or ... R_2 R_1 W (m x n), in float32 (float64 for a float64 base), W being `weight`, or else the layer's as it is.
        safe: ValueError for NaN or Inf in it."""
        weight = self.dense_or_raise("merging") if weight is None else weight
        work = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for adapter in adapters:
            factor = self.factor(adapter)
            work = factor.adjoint(work) if self.loft_side[adapter] == "input" else factor.apply(work.mT).mT
            if adapter in self.loft_scale:
                work = torch.addcmul(work, work, self.loft_scale[adapter].to(work.dtype).unsqueeze(1))
        if safe and not bool(torch.isfinite(work).all()):
            raise ValueError(
                f"merging adapters {adapters} would write NaN or Inf into the base weight; nothing was changed"
            )
        return work

    @torch.no_grad()
    def merge_factors(self, adapters: list[str], *, safe: bool = False) -> None:
        """Replace W0 by the rotated weight, rounded once; the original bits are kept on the CPU for `unmerge_factors`."""
        weight = self.dense_or_raise("merging")
        rotated = self.rotated_weight(adapters, safe=safe)
        if self._original is None:
            self._original = weight.detach().to("cpu", copy=True)
        weight.copy_(rotated)

    @torch.no_grad()
    def unmerge_factors(self) -> None:
        """Put the original weight back, bit for bit."""
        if self._original is not None:
            self.dense_or_raise("unmerging").copy_(self._original)
            self._original = None

    def full_rank(self, adapter: str) -> bool:
        """Whether the adapter's change of the weight has no low-rank form."""
        return isinstance(self.loft_kind[adapter], Partition)

    @torch.no_grad()
    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """(A (r x n), B (m x r)) with W0 + B A equal to the rotated weight: exact. ValueError for one of full rank.

        Of a refreshed adapter the rank is that of all that is turned, up to r_f + r.
        """
        if self.full_rank(adapter):
            raise ValueError(
                f"adapter {adapter!r} rotates blocks of all coordinates, so its change of the weight has full rank and no exact LoRA form; "
                "merge it (merge_and_unload, loft-rs merge), or give export_lora an approximate_rank (loft-rs export-lora "
                "--approximate-rank) for the best LoRA of that rank"
            )
        weight = self.original_weight("the LoRA form")
        work = torch.promote_types(weight.dtype, torch.float32)
        factor, weight = self.factor(adapter), weight.to(work)
        if self.frozen_rank(adapter):
            # The two spans may overlap. A factor that turns nothing keeps a column, as a LoRA has at least one.
            least = factor.reduced(torch.finfo(work).eps / 2)
            factor = least if least.rank else LowRank(factor.basis[:, -1:], torch.zeros_like(factor.delta[-1:, -1:]))
        p, e = factor.basis.to(weight.device, work), factor.delta.to(weight.device, work)
        with torch.autocast(weight.device.type, enabled=False):
            if self.loft_side[adapter] == "input":
                return p.mT.contiguous(), weight @ p @ e
            return p.mT @ weight, p @ e

    # -- state -----------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._derived.clear()

    def refresh_ready(self) -> None:
        """Read from the supports themselves which adapters have one (an unset support is all zero). Needed where a loader fills the
        tensors one by one and runs no load_state_dict hook, as transformers' own does."""
        for adapter in self.loft_support.keys():
            basis = self.loft_support[adapter]
            self.loft_ready[adapter] = not basis.is_meta and bool(basis.any())


def _mark_ready(module: AdaptedLinear, incompatible_keys: Any) -> None:
    module.refresh_ready()


def custom_basis(support: Any) -> np.ndarray:
    """An orthonormal float32 basis (n, r) from a `Support` or the user's own (n, r) columns, same span, order kept.

    ValueError for NaN or Inf, more columns than rows, or columns that are linearly dependent.
    """
    from .linalg import orthonormalize

    if isinstance(support, Tensor):
        support = support.detach().double().cpu().numpy()
    basis = np.asarray(support, dtype=np.float64)
    if basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0]:
        raise ValueError(f"support must be (n, r) with 1 <= r <= n, got shape {basis.shape}")
    if not np.isfinite(basis).all():
        raise ValueError("support must be finite, but it holds NaN or Inf")
    norms = np.linalg.norm(basis, axis=0)
    if (norms == 0).any():
        raise ValueError(f"support column {int(np.argmin(norms))} is zero; give {basis.shape[1]} independent columns")
    spread = np.linalg.eigvalsh((basis / norms).T @ (basis / norms))
    if spread[0] < 1e-10 * spread[-1]:
        raise ValueError(
            f"support must have linearly independent columns (r = {basis.shape[1]}); give fewer or other columns"
        )
    if spread[-1] - spread[0] > 1e-3:
        warnings.warn("support is not orthonormal; its columns were orthonormalised in order", stacklevel=3)
    return orthonormalize(basis).astype(np.float32)
