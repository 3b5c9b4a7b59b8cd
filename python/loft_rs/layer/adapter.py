"""One adapter of a layer: its tensors, by the table `SLOTS`, its kind, what follows from them.

The layer's containers (`loft_theta`, `loft_support`, ...) hold the tensors, so that torch and PEFT
find them; `LayerAdapter` is where everything else about an adapter is. Layers that are tied share
the tensors of the first of them, its owner.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._format import SLOTS, UNKNOWN_ENERGY, Slot, slots_of
from .._torch import no_autocast
from ..factor.blocks import Blocks
from ..factor.low_rank import Frozen, LowRank, gram_root, gram_root_in_graph
from ..transform.transforms import Halves, Transform
from .base_layer import innermost
from .containers import BufferSlot, Kept, ParameterSlot
from .kinds import BlocksKind, Kind

__all__ = ["AdapterHolder", "LayerAdapter"]


class AdapterHolder(nn.Module):
    """What a layer is to its adapters: containers of their tensors, one a slot, and its sizes.

    original: W0's bits, on the CPU, while an adapter is merged. tap: set by `calibrate` for the
    length of a pass. placement: None: by shape. root: of the model, for what a checkpoint computes
    again.
    """

    in_features: int
    out_features: int
    base_layer: nn.Module
    adapters: dict[str, LayerAdapter]
    original: Tensor | None
    tap: Any
    placement: str | None
    root: weakref.ref | None
    replica_of: AdapterHolder | None

    loft_theta: ParameterSlot
    loft_scale: ParameterSlot
    loft_support: BufferSlot
    loft_energy: BufferSlot
    loft_output_side: BufferSlot
    loft_frozen_basis: BufferSlot
    loft_frozen_delta: BufferSlot

    def applied(self) -> list[LayerAdapter]:
        """The adapters that a forward pass would apply now."""
        raise AssertionError("each kind of layer says which of its adapters are active")

    def support_width(self, side: str) -> int:
        """The number of rows of P: n on the input side, m on the output side."""
        return self.in_features if side == "input" else self.out_features

    def get_base_layer(self) -> nn.Module:
        """The innermost wrapped layer."""
        return innermost(self.base_layer)


class LayerAdapter:
    """An adapter of a layer, `layer.adapters[name]`.

    layer: the one that holds its tensors. kind: what it consists of (`kinds.py`). transform: of
    theta; None for a kind without one. side: "input" (W0 R) or "output" (R W0).
    config: the tuner's, saved with it. loadable_ranks: others that a checkpoint may bring.
    has_own_support: whether P is set, or the kind has none.
    """

    def __init__(self, layer: AdapterHolder, name: str, kind: Kind, transform: Transform | None, side: str):
        self.layer, self.name, self.kind, self.transform, self.side = layer, name, kind, transform, side
        self.members: list[LayerAdapter] = [self]
        self.config: Any = None
        self.loadable_ranks: set[int] = set()
        self.has_own_support = not kind.has_support
        # Whether theta was ever seen to be other than zero, and the optimiser step at which it was
        # last looked at. Until then the layer is the base layer, to the bit; afterwards nothing
        # depends on it.
        self.moved = False
        self.looked_at: int | None = None
        # The `Value` that a compiled pass hands down: set and taken back inside the compiled
        # region, None everywhere else.
        self.handed: Any = None
        self.forget()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": {}, "handed": None}

    def __repr__(self) -> str:
        return f"LayerAdapter({self.name!r}, {type(self.kind).__name__}, side={self.side!r})"

    # -- tensors ----------------------------------------------------------------------------------

    @property
    def owner(self) -> LayerAdapter:
        """The adapter that holds the tensors: this one, or the first of those it is tied to."""
        return self.members[0]

    @property
    def tied_layers(self) -> list[AdapterHolder]:
        """The layers that share this one's support and transform, the owner's first."""
        return [member.layer for member in self.members]

    def tie(self, others: list[LayerAdapter]) -> None:
        """Let `others`, whose layers read the same input, use this support and transform."""
        for other in others:
            for slot in SLOTS:
                container = other.container(slot)
                if slot.name != "scale" and other.name in container:
                    del container[other.name]
        for member in (members := [self, *others]):
            member.members = members

    def container(self, slot: Slot) -> BufferSlot | ParameterSlot:
        """The layer's own container of a slot."""
        return getattr(self.layer, slot.key)

    def _parameter(self, layer: AdapterHolder, key: str) -> Tensor:
        # Not through `__getattr__`, here and below, which at this rate costs as much as the
        # products of a small model.
        modules: dict[str, Any] = layer._modules
        container = modules[key]
        held = container._parameters.get(self.name)
        return getattr(container, self.name) if held is None else held  # a DataParallel replica has plain attributes

    @property
    def theta(self) -> Tensor:
        """The trained parameter, float32: the transform's, or what else its kind trains."""
        return self._parameter(self.members[0].layer, "loft_theta")

    @property
    def scale(self) -> Tensor | None:
        """The trained factor of every output, less 1 (m,); None where there is none."""
        return self._parameter(self.layer, "loft_scale") if self.name in self.layer.loft_scale else None

    @property
    def support(self) -> Tensor:
        """P (n x r), all zero until it is set, of an adapter that has one."""
        modules: dict[str, Any] = self.members[0].layer._modules
        return modules["loft_support"]._buffers[self.name]

    @property
    def energy(self) -> float:
        """The fraction of its matrix that the support captures; NaN where nobody measured it."""
        energy = float(self.members[0].layer.loft_energy[self.name])
        return float("nan") if energy == UNKNOWN_ENERGY else energy

    @property
    def traits(self) -> set[str]:
        """What decides which slots it has."""
        owner = self.owner
        traits = {"supported"} if self.kind.has_support else set()
        for trait, held in (
            ("scaled", self.layer.loft_scale),
            ("movable", owner.layer.loft_output_side),
            ("refreshed", owner.layer.loft_frozen_basis),
        ):
            if self.name in held:
                traits.add(trait)
        return traits

    def tensors(self) -> dict[Slot, Tensor]:
        """The tensors that this layer itself holds."""
        held = ((slot, self.container(slot)) for slot in slots_of(self.traits))
        return {slot: container[self.name] for slot, container in held if self.name in container}

    def present(self, slot: str, tensor: Tensor) -> Tensor:
        """The tensor. accelerate's offloading brings those of a module that is called."""
        if not tensor.is_meta:
            return tensor
        holder = self if slot == "scale" else self.owner  # a scale is each layer's own
        modules: dict[str, Any] = holder.layer._modules
        return modules[f"loft_{slot}"](self.name)

    # -- what it is -------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the adapter has a support, or needs none."""
        return self.members[0].has_own_support

    @property
    def rank(self) -> int:
        """r, or the size of the blocks of one without a support."""
        return self.kind.rank(self.theta, self.transform)

    @property
    def width(self) -> int:
        """The number of features of its side: rows of P."""
        return self.layer.support_width(self.side)

    @property
    def first_half(self) -> int | None:
        """Of a transform in halves the columns of P in the first one; None for any other."""
        return self.theta.shape[-1] if isinstance(self.transform, Halves) else None

    @property
    def full_rank(self) -> bool:
        """Whether the adapter's change of the weight has no low-rank form."""
        return isinstance(self.kind, BlocksKind)

    @property
    def largest_rank(self) -> int:
        """The largest rank that fits this layer and those it is tied to."""
        other = "output" if self.side == "input" else "input"
        sizes = [(each.support_width(self.side), each.support_width(other)) for each in self.tied_layers]
        return min(self.kind.fit(min(size), *size) for size in sizes)

    @property
    def frozen_factor(self) -> LowRank | None:
        """R_f = I + P_f E_f P_f^T, which `refresh` has kept of earlier supports, or None."""
        modules: dict[str, Any] = self.members[0].layer._modules
        basis = modules["loft_frozen_basis"]._buffers.get(self.name)
        return None if basis is None else LowRank(basis, modules["loft_frozen_delta"]._buffers[self.name])

    @property
    def frozen_rank(self) -> int:
        """r_f, 0 where nothing is frozen."""
        factor = self.frozen_factor
        return 0 if factor is None else factor.rank

    # -- changing it ------------------------------------------------------------------------------

    def of_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """(theta at the identity, P unset (n x rank)) as an adapter of another rank has them."""
        held = self.support
        return self.kind.theta(self.transform, len(held), rank, 0, True), held.new_zeros(len(held), rank)

    def resize(self, rank: int) -> None:
        """Give an untrained adapter another rank: theta at the identity, P unset."""
        trained, layer = self.theta, self.owner.layer
        theta, layer.loft_support[self.name] = self.of_rank(rank)
        layer.loft_theta[self.name] = nn.Parameter(theta.to(trained.device, trained.dtype), trained.requires_grad)
        self._unset()

    def set_side(self, side: str) -> None:
        """Move a movable adapter to a side: an unset support as wide as that is, and nothing
        frozen. theta, whose size is the rank's alone, stays."""
        if self.side == side:
            return
        held, layer = self.support, self.layer
        self.set_frozen(None)
        layer.loft_support[self.name] = held.new_zeros(layer.support_width(side), held.shape[1])
        layer.loft_output_side[self.name] = torch.full_like(layer.loft_output_side[self.name], side == "output")
        self.side = side
        self._unset()

    def _unset(self) -> None:
        self.owner.has_own_support = False
        for member in self.members:
            member.forget()

    def set_basis(self, basis: np.ndarray | Tensor, energy: float = float("nan")) -> None:
        """Store P (n x r, orthonormal columns), in the base's half precision where it has one."""
        held = self.support
        basis = torch.as_tensor(np.asarray(basis) if not isinstance(basis, Tensor) else basis)
        if basis.shape != held.shape:
            raise ValueError(f"support must have shape {tuple(held.shape)} here, got {tuple(basis.shape)}")
        with torch.no_grad():
            held.copy_(basis)
            self.owner.layer.loft_energy[self.name].fill_(UNKNOWN_ENERGY if np.isnan(energy) else energy)
        self.settle()

    def set_frozen(self, factor: LowRank | None) -> None:
        """Hold R_f, in float32 or as wide as theta; None: hold none."""
        layer, device = self.owner.layer, self.support.device
        dtype = torch.promote_types(self.theta.dtype, torch.float32)
        containers = layer.loft_frozen_basis, layer.loft_frozen_delta
        for container, value in zip(containers, factor or (None, None), strict=True):
            if value is not None:
                container[self.name] = value.detach().to(device, dtype).contiguous()
            elif self.name in container:
                del container[self.name]
        for member in self.members:
            member.forget_products()

    def settle(self) -> None:
        """Read from P whether it is set (else it is zero), and drop what was made of another."""
        owner = self.owner
        if owner.kind.has_support:
            basis = owner.support
            owner.has_own_support = not basis.is_meta and bool(basis.any())
        for member in self.members:
            member.forget()
            member.moved, member.looked_at = False, None
        if owner.has_own_support and owner.kind.has_support:
            owner.gram_root()

    def forget(self) -> None:
        """Drop everything that was made of the adapter's and the layer's frozen tensors."""
        self._root: Kept | None = None
        self.forget_products()

    def moved_elsewhere(self) -> None:
        """Tensors have moved or changed their dtype: make what is best made before a graph."""
        self.forget()
        if self.owner is self and self.ready and self.kind.has_support and not self.support.is_meta:
            with contextlib.suppress(
                torch.linalg.LinAlgError
            ):  # memory that nobody has filled yet, as after `to_empty`
                self.gram_root()

    def forget_products(self) -> None:
        """Drop what an evaluation has kept: from here on it is made anew."""
        self._kept: dict[tuple, Kept] = {}

    # -- what follows from the tensors ------------------------------------------------------------

    def gram_root(self) -> Tensor | None:
        """C = (P^T P)^{-1/2} (r x r) where P was ever rounded to half precision, else None."""
        owner = self.members[0]
        if not owner.kind.has_support:
            return None
        if (original := owner.layer.replica_of) is not None:  # a DataParallel replica is made anew for every pass
            root = original.adapters[owner.name].gram_root()
            return None if root is None else root.to(owner.support.device)
        held = owner._root
        if torch.compiler.is_compiling():  # made before, as a rule: a decomposition has no place in a graph
            return gram_root_in_graph(owner.support) if held is None else held.value
        basis = owner.present("support", owner.support)
        if held is None or not held.stands((basis,), None):
            with torch.no_grad(), torch.inference_mode(False), no_autocast(basis.device.type):
                root = gram_root(basis)
            owner._root = held = Kept.of((basis,), None, root)
            return root
        return held.value

    def kept(self, slot: tuple, evaluation: object, sources: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
        """make(), of frozen tensors; inside one evaluation what it made the last time, unless a
        source was changed or replaced.

        evaluation: what tells one evaluation from the next; None: make it anew, as every pass with
            gradients does.
        """
        if evaluation is None:
            return make()
        held = self._kept.get(slot)
        if held is None or not held.stands(sources, evaluation):
            with torch.no_grad(), torch.inference_mode(False), no_autocast(sources[0].device.type):
                value = make()
            held = Kept.of(sources, evaluation, value)
            if held is None:
                return value
            self._kept = {**self._kept, slot: held}  # replaced, not written to: another thread may be reading it
        return held.value

    def frozen(self, dtype: torch.dtype | None) -> Frozen | None:
        """What the frozen factor makes of this adapter's own, in `dtype`, or None."""
        factor = self.frozen_factor
        if factor is None:
            return None
        factor = LowRank(self.present("frozen_basis", factor.basis), self.present("frozen_delta", factor.delta))
        return Frozen.of(factor, self.present("support", self.support), self.side, dtype)

    def factor(self, delta: Tensor | None, dtype: torch.dtype | None = None) -> LowRank | Blocks:
        """R, differentiable in E and, where the kind has no transform, in theta; of a refreshed one
        the product with what is frozen.

        delta: E, or D of all blocks; None for a kind without a transform. dtype: of the activations
            that a refreshed one is to turn;
        None: as it is stored.
        """
        basis = self.present("support", self.support) if self.kind.has_support else None
        theta = self.present("theta", self.theta) if delta is None else None
        own = self.kind.factor(theta, basis, delta, self.width)
        if basis is None or self.frozen_factor is None:
            return own
        with no_autocast(own.delta.device.type):
            frozen = self.frozen(dtype)
            assert frozen is not None
            return LowRank(frozen.basis, frozen.times(own.delta))

    # -- state ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What `restore` puts back: the layer's own tensors, copies of them, side and support."""
        tensors = {slot: (tensor, tensor.detach().clone()) for slot, tensor in self.tensors().items()}
        return {"tensors": tensors, "side": self.side, "ready": self.has_own_support}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        for slot in SLOTS:
            container, held = self.container(slot), state["tensors"].get(slot)
            if held is not None:
                tensor, value = held
                tensor.copy_(value)
                container[self.name] = tensor
            elif self.name in container:
                del container[self.name]
        self.side, self.has_own_support = state["side"], state["ready"]
        self.forget()
