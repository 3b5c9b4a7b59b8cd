"""A forward pass computes the values of its transforms once, where it begins, and hands them down.

    root     the module where a pass begins: a whole model, or a module whose layers read one input when it is called on its own
    scope    one call of a root in one thread: E of every layer below it, from the numbers that theta holds then
    alone    a layer outside any scope, or one whose theta was not there where the pass began, solves for itself

Nothing of a scope outlives it but this. A pass without gradients compares every theta, bit for bit,
with those of the last solve, and takes that solve where all are equal (`Root.solved`). Products of
frozen tensors are kept inside one evaluation (`Root.evaluation`). What a checkpoint computes again
belongs to its backward pass and is dropped with it (`Root.recomputed`).
"""

from __future__ import annotations

import contextvars
import sys
import weakref
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._torch import compiles_next, in_backward, inlined_only, plain
from ..transform.batch import attach, differentiable_delta
from .adapter import AdapterHolder, LayerAdapter
from .values import Solved, Value, alike, capturing, solve_all, steps, values_in_graph

__all__ = ["Root", "Scope", "current", "delta_of", "forget_products", "unwatch", "value_of", "watch"]


class Root:
    """A module where passes begin: the adapted layers below it, and what one pass without gradients
    may take from another.

    whole: a model, whose evaluations keep products of frozen tensors. groups: layers that read one
    input, by each of them.
    """

    def __init__(
        self, layers: Iterable[AdapterHolder], *, whole: bool = True, groups: Mapping[nn.Module, list] | None = None
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
        Root.__init__(self, **state)

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
    """One call of a root: what its layers may take, and where the pass before it goes on
    afterwards.
    """

    __slots__ = ("again", "complete", "derived", "evaluation", "frame", "module", "outer", "root", "shared", "values")

    def __init__(self, module: nn.Module, root: Root, outer: Scope | None, frame: FrameType):
        self.module, self.root, self.outer, self.frame = module, root, outer, frame
        self.values: dict[LayerAdapter, Value] = {} if outer is None else outer.values
        self.again: bool = in_backward() if outer is None else outer.again  # a checkpoint computes again
        self.evaluation: object | None = None if outer is None else outer.evaluation
        self.complete: Root | None = None if outer is None else outer.complete  # whose layers all have their values
        self.derived: dict[tuple, Any] = {} if outer is None else outer.derived  # of this pass alone
        self.shared: dict[nn.Module, tuple] = {}  # results that wait to be claimed: `placement._lead`


_CURRENT: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("loft_rs_scope", default=None)


def current() -> Scope | None:
    """The innermost pass that runs in this thread."""
    if torch.compiler.is_compiling():
        return None
    scope = _CURRENT.get()
    # torch runs no hook after a KeyboardInterrupt. A pass whose frame has ended is over, whether or
    # not anybody said so.
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


# -- the hooks of a root: they read nothing but the module that they are called with -------------


class Watched(nn.Module):
    """What `watch` makes of any module: its root, the ids of its hooks, and whether a graph solves
    here.
    """

    _loft_root: Root
    _loft_hooks: tuple[int, int]
    _loft_solves: bool


def watch(module: nn.Module, root: Root, *, solves: bool = True) -> None:
    """Let passes begin at `module`, whose root takes the place of the one it may have.

    solves: whether a graph that holds a call of this module solves here for all its layers; of a
    whole model one module does.
    """
    watched = cast(Watched, module)
    if "_loft_root" not in module.__dict__:  # a PEFT model answers for the model inside it
        before = watched.register_forward_pre_hook(_enter, with_kwargs=True)
        after = watched.register_forward_hook(_leave, always_call=True)
        watched._loft_hooks = before.id, after.id
    watched._loft_root, watched._loft_solves = root, solves and root.whole


def unwatch(module: nn.Module) -> None:
    """Undo `watch`."""
    if "_loft_root" in module.__dict__:
        watched = cast(Watched, module)
        before, after = watched._loft_hooks
        for hooks, key in (
            (module._forward_pre_hooks, before),
            (module._forward_pre_hooks_with_kwargs, before),
            (module._forward_hooks, after),
            (module._forward_hooks_always_called, after),
        ):
            hooks.pop(key, None)
        del watched._loft_root, watched._loft_solves, watched._loft_hooks


@inlined_only
def _enter(module: Watched, args: tuple, kwargs: dict) -> None:
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
    if torch.is_grad_enabled() or capturing():
        return solve_all(adapters)
    held = root.solved  # read once: another thread may put its own there
    if held is None or not held.stands(adapters):
        held = root.solved = Solved.of(adapters, solve_all(adapters))
    return held.values


@inlined_only
def _leave(module: Watched, args: tuple, output: Any) -> None:
    if torch.compiler.is_compiling():
        if module._loft_solves:
            _leave_traced(module._loft_root)
        return
    scope = _CURRENT.get()
    while scope is not None and scope.module is not module:
        scope = scope.outer
    if scope is not None:
        # Without an output the pass broke off, and a checkpoint that computes again may stop early:
        # neither tells anything.
        if scope.shared and output is not None and not in_backward():
            for layer, (leader, *_) in scope.shared.items():
                scope.root.apart.setdefault((leader, layer), steps())
        _CURRENT.set(scope.outer)


def _of_replica(module: nn.Module) -> Root:
    """The root of an `nn.DataParallel` replica, which torch makes anew for every pass and whose
    attributes are its original's.
    """
    replicas = [layer for layer in module.modules() if isinstance(layer, AdapterHolder)]
    layers = {layer.replica_of: layer for layer in replicas if layer.replica_of is not None}
    for layer in layers.values():
        for adapter in layer.adapters.values():
            adapter.members = [layers[m.layer].adapters[m.name] if m.layer in layers else m for m in adapter.members]
    return Root(layers.values(), whole=False)


# -- under torch.compile -------------------------------------------------------------------------


def _enter_traced(root: Root) -> None:
    """One solve for the layers of a graph that holds a call of the module.

    In any other region each layer solves for itself. What a pass outside has solved is not taken,
    as blocks of one kind run one graph, which would hold one block's values.
    """
    if plain() or len(root.layers) == 1:
        return
    # Anew, whatever there is: a pass with a graph break that Ctrl-C broke off may have left what it
    # handed down.
    missing = root.wanted()
    if missing:
        root.traced = True
        for together in alike(missing).values():
            for adapter, value in values_in_graph(together).items():
                adapter.handed = value


def _leave_traced(root: Root) -> None:
    if root.traced:
        for adapter in root.wanted():
            adapter.handed = None
        root.traced = False


# -- evaluations ---------------------------------------------------------------------------------


def forget_products(layers: Iterable[AdapterHolder]) -> None:
    """From here on, products of these layers' frozen tensors are made anew."""
    for layer in layers:
        for adapter in layer.adapters.values():
            adapter.forget_products()


def _evaluation(root: Root, kwargs: Mapping[str, Any]) -> object | None:
    """What tells this pass's evaluation from others: None in a pass with gradients, which keeps
    nothing.
    """
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


# -- values --------------------------------------------------------------------------------------


def value_of(adapter: LayerAdapter, scope: Scope | None) -> Value:
    """E of an adapter with a transform in the pass that runs now, or of the layer alone."""
    owner = adapter.members[0]
    if torch.compiler.is_compiling():
        return values_in_graph([owner])[owner] if owner.handed is None else owner.handed
    if scope is not None and (value := scope.values.get(owner)) is not None:
        # A pass that began without gradients may have a part with them.
        if value.attached is not None or not (torch.is_grad_enabled() and owner.theta.requires_grad):
            return value
    elif in_backward() if scope is None else scope.again:
        return _recomputed(owner)
    return solve_all([owner])[owner]


def delta_of(adapter: LayerAdapter, scope: Scope | None = None) -> Tensor | None:
    """E of an adapter with its gradient, however this pass computes it; None for a kind without a
    transform.
    """
    if adapter.transform is None:
        return None
    owner = adapter.members[0]
    if plain():
        assert owner.transform is not None
        return differentiable_delta(owner.transform, owner.present("theta", owner.theta), owner.gram_root())
    return value_of(adapter, scope).delta


def _values_of_task(root: Root, task: int) -> dict[LayerAdapter, Value]:
    """What a backward pass has solved below this root; dropped when it ends."""
    values = root.recomputed.get(task)
    if values is None:
        values = root.recomputed[task] = {}
        # A backward pass that fails runs no callback.
        for old in sorted(root.recomputed)[:-8]:
            root.recomputed.pop(old, None)
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: root.recomputed.pop(task, None))  # type: ignore[arg-type]  # what it returns is dropped
    return values


def _recomputed(owner: LayerAdapter) -> Value:
    """E for what a checkpoint computes again, from the numbers of theta now: one solve a backward
    pass.
    """
    root = None if owner.layer.root is None else owner.layer.root()
    task = torch._C._current_graph_task_id()
    values = {} if root is None else _values_of_task(root, task)
    if owner not in values:
        wanted = [] if root is None else [adapter for adapter in root.wanted() if adapter not in values]
        values |= solve_all(wanted if owner in wanted else [owner], attaching=False)
    value = values[owner]
    if torch.is_grad_enabled() and owner.theta.requires_grad:
        # Each checkpointed part runs its own backward; a node of its own runs in no other's.
        attached = attach(value.solution, [value.index], [owner.present("theta", owner.theta)])[0]
        return Value(value.solution, value.index, attached, value.identity)
    return value
