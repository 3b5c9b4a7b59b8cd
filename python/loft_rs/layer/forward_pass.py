"""A forward pass computes the values of its transforms once, where it begins, and hands them down.

    root     the module where a pass begins: a whole model, or a module whose layers read one input when it is called on its own
    scope    one call of a root in one thread: E of every layer below it, from the numbers that theta holds then
    alone    a layer outside any scope, or one whose theta was not there where the pass began, solves for itself

Nothing of a scope outlives it but this. A pass without gradients compares every theta, bit for bit, with those of the last solve,
and takes that solve where all are equal (`Root.solved`). Products of frozen tensors are kept inside one evaluation
(`Root.evaluation`). What a checkpoint computes again belongs to its backward pass and is dropped with it (`Root.recomputed`).
"""

from __future__ import annotations

import contextvars
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..autograd import compiles_next, in_backward, inlined_only, plain
from ..batch import Solution, attach, differentiable_delta, solve
from ..factor import HALF
from .adapter import LayerAdapter

__all__ = ["Root", "Scope", "Value", "current", "delta_of", "forget_products", "steps", "unwatch", "value_of", "watch"]


# Counts optimiser steps. It tells when a guess may be made anew, never that a value still holds.
_steps = [0]


def _count_step(*_: object) -> None:
    _steps[0] += 1


register_optimizer_step_post_hook(_count_step)


def steps() -> int:
    """Optimiser steps so far in this process."""
    return _steps[0]


class Value:
    """E of one adapter in one pass. attached: with its gradient, where the pass began with gradients. identity: whether E is known
    to be exactly zero."""

    __slots__ = ("attached", "identity", "index", "solution")

    def __init__(self, solution: Solution, index: int, attached: Tensor | None, identity: bool):
        self.solution, self.index, self.attached, self.identity = solution, index, attached, identity

    @property
    def delta(self) -> Tensor:
        """E (r, r), or D of all blocks, in theta's dtype, at least float32, with its gradient where the pass has gradients."""
        return self.solution.deltas[self.index] if self.attached is None else self.attached

    def cast(self, dtype: torch.dtype) -> Tensor:
        """E in `dtype`, without a gradient."""
        return self.solution.cast(self.index, dtype)


class Root:
    """A module where passes begin: the adapted layers below it, and what one pass without gradients may take from another.

    whole: a model, whose evaluations keep products of frozen tensors. groups: layers that read one input, by each of them.
    """

    def __init__(
        self, layers: Iterable[nn.Module], *, whole: bool = True, groups: Mapping[nn.Module, list] | None = None
    ):
        self.layers = list(layers)
        self.whole, self.groups = whole, dict(groups or {})
        self.apart: dict[tuple[nn.Module, nn.Module], int] = {}  # layers that read another input: `placement._claim`
        self.traced = False  # set and taken back inside a compiled region: whether E was handed down here
        self._clear()

    def _clear(self) -> None:
        self.evaluation: object | None = None
        self.solved: Solved | None = None
        self.recomputed: dict[int, dict[LayerAdapter, Value]] = {}
        if self.whole:
            for layer in self.layers:
                layer.root = weakref.ref(self)

    def __getstate__(self) -> dict:
        return {"layers": self.layers, "whole": self.whole, "groups": self.groups}

    def __setstate__(self, state: dict) -> None:  # a copy, deep or pickled: of the layers that were copied with it
        self.__init__(**state)

    def wanted(self) -> list[LayerAdapter]:
        """The adapters whose E a pass would take now, each tensor's owner once."""
        return list(
            dict.fromkeys(
                adapter.members[0]
                for layer in self.layers
                for adapter in layer.applied()
                if adapter.transform is not None
            )
        )


class Scope:
    """One call of a root: what its layers may take, and where the pass before it goes on afterwards."""

    __slots__ = ("again", "complete", "derived", "evaluation", "frame", "module", "outer", "root", "shared", "values")

    def __init__(self, module: nn.Module, root: Root, outer: Scope | None, frame: FrameType | None):
        self.module, self.root, self.outer, self.frame = module, root, outer, frame
        self.values: dict[LayerAdapter, Value] = {} if outer is None else outer.values
        self.again = in_backward() if outer is None else outer.again  # a checkpoint computes again
        self.evaluation = None if outer is None else outer.evaluation
        self.complete: Root | None = None if outer is None else outer.complete  # whose layers all have their values
        self.derived: dict[tuple, Any] = {} if outer is None else outer.derived  # of this pass alone
        self.shared: dict[nn.Module, tuple] = {}  # results that wait to be claimed: `placement._lead`


_CURRENT: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("loft_rs_scope", default=None)


def current() -> Scope | None:
    """The innermost pass that runs in this thread."""
    if torch.compiler.is_compiling():
        return None
    scope = _CURRENT.get()
    # torch runs no hook after a KeyboardInterrupt. A pass whose frame has ended is over, whether or not anybody said so.
    while scope is not None and not _runs(scope.frame):
        scope = scope.outer
        _CURRENT.set(scope)
    return scope


def _runs(frame: FrameType) -> bool:
    try:
        frame.clear()
    except RuntimeError:  # "cannot clear an executing frame"
        return True
    return False


# -- the hooks of a root: they read nothing but the module that they are called with ------------------------------------------


def watch(module: nn.Module, root: Root, *, solves: bool = True) -> None:
    """Let passes begin at `module`, whose root takes the place of the one it may have.

    solves: whether a graph that holds a call of this module solves here for all its layers; of a whole model one module does.
    """
    if "_loft_root" not in module.__dict__:  # a PEFT model answers for the model inside it
        handles = (
            module.register_forward_pre_hook(_enter, with_kwargs=True),
            module.register_forward_hook(_leave, always_call=True),
        )
        module._loft_hooks = tuple(handle.id for handle in handles)
    module._loft_root, module._loft_solves = root, solves and root.whole


def unwatch(module: nn.Module) -> None:
    """Undo `watch`."""
    if "_loft_root" in module.__dict__:
        before, after = module._loft_hooks
        for hooks, key in (
            (module._forward_pre_hooks, before),
            (module._forward_pre_hooks_with_kwargs, before),
            (module._forward_hooks, after),
            (module._forward_hooks_always_called, after),
        ):
            hooks.pop(key, None)
        del module._loft_root, module._loft_solves, module._loft_hooks


@inlined_only
def _enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
    root = module._loft_root
    if torch.compiler.is_compiling():
        if module._loft_solves:
            _enter_traced(root)
        return
    if compiles_next():  # the module's forward is a graph, and takes nothing from outside
        return
    if getattr(module, "_is_replica", False):
        root = _of_replica(module)
    outer = current()
    scope = Scope(module, root, outer, sys._getframe(1))
    if not plain():
        _begin_values(scope, kwargs)
    _CURRENT.set(scope)


def _begin_values(scope: Scope, kwargs: Mapping[str, Any]) -> None:
    """Compute what the pass needs that an outer one has not computed already."""
    root, outer = scope.root, scope.outer
    if scope.again:
        return  # `_recomputed` is asked by each layer
    if scope.complete is not None and root.layers and root.layers[0].root is not None:
        if root.layers[0].root() is scope.complete:
            return
    missing = root.wanted()
    if outer is not None:
        missing = [adapter for adapter in missing if adapter not in outer.values]
        if missing:
            scope.values = {**outer.values, **solve_all(missing)}
        return
    scope.evaluation = _evaluation(root, kwargs)
    if missing:
        scope.values = _solved(root, missing)
        if root.whole and len(scope.values) == len(missing):
            scope.complete = root


def _solved(root: Root, adapters: list[LayerAdapter]) -> dict[LayerAdapter, Value]:
    if torch.is_grad_enabled() or _capturing():
        return solve_all(adapters)
    held = root.solved  # read once: another thread may put its own there
    if held is None or not held.stands(adapters):
        held = root.solved = Solved.of(adapters, solve_all(adapters))
    return held.values


@inlined_only
def _leave(module: nn.Module, args: tuple, output: Any) -> None:
    if torch.compiler.is_compiling():
        if module._loft_solves:
            _leave_traced(module._loft_root)
        return
    scope = _CURRENT.get()
    while scope is not None and scope.module is not module:
        scope = scope.outer
    if scope is not None:
        # Without an output the pass broke off, and a checkpoint that computes again may stop early: neither tells anything.
        if scope.shared and output is not None and not in_backward():
            for layer, (leader, *_) in scope.shared.items():
                scope.root.apart.setdefault((leader, layer), steps())
        _CURRENT.set(scope.outer)


def _of_replica(module: nn.Module) -> Root:
    """The root of an `nn.DataParallel` replica, which torch makes anew for every pass and whose attributes are its original's."""
    layers = {layer.replica_of: layer for layer in module.modules() if getattr(layer, "replica_of", None) is not None}
    for layer in layers.values():
        for adapter in layer.adapters.values():
            adapter.members = [layers[m.layer].adapters[m.name] if m.layer in layers else m for m in adapter.members]
    return Root(layers.values(), whole=False)


# -- under torch.compile -------------------------------------------------------------------------------------------------------


def _enter_traced(root: Root) -> None:
    """One solve for the layers of a graph that holds a call of the module.

    In any other region each layer solves for itself. What a pass outside has solved is not taken, as blocks of one kind run one graph,
    which would hold one block's values.
    """
    if plain() or len(root.layers) == 1:
        return
    # Anew, whatever there is: a pass with a graph break that Ctrl-C broke off may have left what it handed down.
    missing = root.wanted()
    if missing:
        root.traced = True
        for together in _alike(missing).values():
            for adapter, value in _values_traced(together).items():
                adapter.handed = value


def _values_traced(adapters: Sequence[LayerAdapter]) -> dict[LayerAdapter, Value]:
    """E of adapters that one solve can serve."""
    thetas = [adapter.theta for adapter in adapters]
    stored = [adapter.support.dtype for adapter in adapters if adapter.kind.has_support]
    half = next((dtype for dtype in stored if dtype in HALF), None)
    solution = solve(adapters[0].transform, torch.stack([t.detach() for t in thetas]), _roots(adapters), half)
    attached = attach(solution, range(len(thetas)), thetas)
    return {adapter: Value(solution, i, attached[i], False) for i, adapter in enumerate(adapters)}


def _leave_traced(root: Root) -> None:
    if root.traced:
        for adapter in root.wanted():
            adapter.handed = None
        root.traced = False


# -- evaluations -----------------------------------------------------------------------------------------------------------------


def forget_products(layers: Iterable[nn.Module]) -> None:
    """From here on, products of these layers' frozen tensors are made anew."""
    for layer in layers:
        for adapter in layer.adapters.values():
            adapter.forget_products()


def _evaluation(root: Root, kwargs: Mapping[str, Any]) -> object | None:
    """What tells this pass's evaluation from others: None in a pass with gradients, which keeps nothing."""
    if not root.whole:
        return None
    if torch.is_grad_enabled():
        if root.evaluation is not None:  # it is over, and what it kept takes memory
            root.evaluation = None
            root.solved = None
            forget_products(root.layers)
        return None
    evaluation = root.evaluation
    if evaluation is None or _starts_a_sequence(kwargs):
        evaluation = root.evaluation = object()
    return evaluation


def _starts_a_sequence(kwargs: Mapping[str, Any]) -> bool:
    """Whether a pass fills a key-value cache from its start, as the first of `generate`."""
    cache = kwargs.get("past_key_values", kwargs.get("cache"))  # as transformers has called it
    if cache is None:
        return False
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if isinstance(tokens, Tensor) and tokens.dim() > 1 and tokens.shape[1] > 1:
        return True
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else None
    return isinstance(length, int) and length == 0  # a static cache's length is on the device


# -- values ----------------------------------------------------------------------------------------------------------------------


def value_of(adapter: LayerAdapter, scope: Scope | None) -> Value:
    """E of an adapter with a transform in the pass that runs now, or of the layer alone."""
    owner = adapter.members[0]
    if torch.compiler.is_compiling():
        return _values_traced([owner])[owner] if owner.handed is None else owner.handed
    if scope is not None and (value := scope.values.get(owner)) is not None:
        # A pass that began without gradients may have a part with them.
        if value.attached is not None or not (torch.is_grad_enabled() and owner.theta.requires_grad):
            return value
    elif in_backward() if scope is None else scope.again:
        return _recomputed(owner)
    return solve_all([owner])[owner]


def delta_of(adapter: LayerAdapter, scope: Scope | None = None) -> Tensor | None:
    """E of an adapter with its gradient, however this pass computes it; None for a kind without a transform."""
    if adapter.transform is None:
        return None
    owner = adapter.members[0]
    if plain():
        return differentiable_delta(owner.transform, owner.present("theta", owner.theta), owner.gram_root())
    return value_of(adapter, scope).delta


def _recomputed(owner: LayerAdapter) -> Value:
    """E for what a checkpoint computes again, from the numbers of theta now: one solve a backward pass."""
    root = None if owner.layer.root is None else owner.layer.root()
    task = torch._C._current_graph_task_id()
    values = {} if root is None else root.recomputed.get(task)
    if values is None:
        values = root.recomputed[task] = {}
        # A backward pass that fails runs no callback.
        for old in sorted(root.recomputed)[:-8]:
            root.recomputed.pop(old, None)
        torch.autograd.Variable._execution_engine.queue_callback(lambda: root.recomputed.pop(task, None))
    if owner not in values:
        wanted = [] if root is None else [adapter for adapter in root.wanted() if adapter not in values]
        values |= solve_all(wanted if owner in wanted else [owner], attaching=False)
    value = values[owner]
    if torch.is_grad_enabled() and owner.theta.requires_grad:
        # Each checkpointed part runs its own backward; a node of its own runs in no other's.
        attached = attach(value.solution, [value.index], [owner.present("theta", owner.theta)])[0]
        return Value(value.solution, value.index, attached, value.identity)
    return value


def _alike(adapters: Iterable[LayerAdapter]) -> dict[tuple, list[LayerAdapter]]:
    """The adapters that one solve can serve."""
    found: dict[tuple, list[LayerAdapter]] = {}
    for adapter in adapters:
        theta = adapter.theta
        if _is_there(theta):
            key = adapter.transform.name, theta.shape, theta.device, theta.dtype
            found.setdefault(key, []).append(adapter)
    return found


def _is_there(theta: Tensor) -> bool:
    """Whether a theta can be read now: offloading leaves it on the meta device, FSDP2 sharded, FSDP1 and ZeRO-3 empty."""
    if theta.is_meta or type(theta) not in (Tensor, nn.Parameter):
        return False
    return torch.compiler.is_compiling() or bool(theta.untyped_storage().size()) or not theta.numel()


def _roots(adapters: Sequence[LayerAdapter]) -> Tensor | None:
    """The Gram roots of adapters of one rank (B, r, r); None where none needs one."""
    return _stacked([adapter.gram_root() for adapter in adapters])


def _stacked(roots: list[Tensor | None]) -> Tensor | None:
    some = next((root for root in roots if root is not None), None)
    if some is None:
        return None
    eye = torch.eye(some.shape[-1], dtype=some.dtype, device=some.device)
    return torch.stack([eye if root is None else root for root in roots])


def solve_all(adapters: Sequence[LayerAdapter], *, attaching: bool = True) -> dict[LayerAdapter, Value]:
    """E of these owners of tensors, as many at once as can be; of several, those whose theta is not there are left out.

    attaching: with gradients, where the pass has them.
    """
    if len(adapters) == 1:
        theta = adapters[0].present("theta", adapters[0].theta)
        return _solve_alike(adapters, [theta], attaching)
    found: dict[LayerAdapter, Value] = {}
    for together in _alike(adapters).values():
        found |= _solve_alike(together, [adapter.theta for adapter in together], attaching)
    return found


def _solve_alike(adapters: Sequence[LayerAdapter], thetas: list[Tensor], attaching: bool) -> dict[LayerAdapter, Value]:
    roots, grads = _roots(adapters), torch.is_grad_enabled()
    # Values outlive an evaluation under inference mode, so they must not be inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        solution = solve(adapters[0].transform, torch.stack([theta.detach() for theta in thetas]), roots)
        identity = _identities(adapters, solution.thetas, grads)
    attached: dict[int, Tensor] = {}
    if grads and attaching:
        trained = [i for i, theta in enumerate(thetas) if theta.requires_grad]
        if trained:
            attached = dict(zip(trained, attach(solution, trained, [thetas[i] for i in trained]), strict=True))
    return {a: Value(solution, i, attached.get(i), i in identity) for i, a in enumerate(adapters)}


class Solved(NamedTuple):
    """A solve of a pass without gradients. `groups`: by solution its adapters, in their order there, and their Gram roots."""

    adapters: list[LayerAdapter]
    values: dict[LayerAdapter, Value]
    groups: list[tuple[Solution, list[LayerAdapter], list[Tensor | None]]]

    @classmethod
    def of(cls, adapters: list[LayerAdapter], values: dict[LayerAdapter, Value]) -> Solved:
        together: dict[Solution, list[LayerAdapter]] = {}
        for adapter, value in values.items():
            together.setdefault(value.solution, []).append(adapter)
        groups = [(solution, each, [a.gram_root() for a in each]) for solution, each in together.items()]
        return cls(adapters, values, groups)

    def stands(self, adapters: list[LayerAdapter]) -> bool:
        """Whether the same adapters hold the same bits. Looking synchronises with the device, as a token does anyway."""
        if adapters != self.adapters:
            return False
        for solution, together, roots in self.groups:
            held = solution.thetas
            thetas = [adapter.theta.detach() for adapter in together]
            if any([t.shape != held.shape[1:] or t.dtype != held.dtype or t.device != held.device for t in thetas]):
                return False
            if any([adapter.gram_root() is not root for adapter, root in zip(together, roots, strict=True)]):
                return False
            if not torch.equal(torch.stack(thetas), held):
                return False
        return True


def _identities(adapters: Sequence[LayerAdapter], stack: Tensor, grads: bool) -> set[int]:
    """Which of these are exactly the identity, so that the layer's output can be the base layer's, to the bit.

    Looking synchronises with the device. Training looks until the first optimiser step, other passes until theta was seen to be
    other than zero; what was not looked at is computed like any rotation.
    """
    if _capturing():
        return set()
    open_ = [
        i
        for i, a in enumerate(adapters)
        if not a.moved and not (grads and a.looked_at is not None and a.looked_at < _steps[0])
    ]
    if not open_:
        return set()
    looked = stack if len(open_) == len(adapters) else torch.stack([stack[i] for i in open_])
    moved = (looked.flatten(1) != 0).any(1).tolist()
    for i, is_moved in zip(open_, moved, strict=True):
        adapters[i].moved, adapters[i].looked_at = is_moved, _steps[0]
    return {i for i, is_moved in zip(open_, moved, strict=True) if not is_moved}


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
