"""How the layers' own autograd functions and torch's other ways to run a model get along.

The fast functions have closed-form first derivatives and keep little for them. Higher derivatives,
`torch.func`, tracing and export need a graph of plain operations instead: `plain` says when one is
built, `higher_derivatives` asks for it.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "HALF",
    "LIBRARY",
    "compiles_next",
    "first_order",
    "higher_derivatives",
    "in_backward",
    "inlined_only",
    "no_autocast",
    "plain",
    "small_product",
]

HALF = (torch.bfloat16, torch.float16)
# Part of the process for good: an operator is known to torch by its name alone.
LIBRARY = torch.library.Library("loft_rs", "FRAGMENT")

_HIGHER: contextvars.ContextVar[bool] = contextvars.ContextVar("loft_rs_higher_derivatives", default=False)


@contextmanager
def higher_derivatives() -> Iterator[None]:
    """Forward passes inside compute by plain operations, which can be differentiated any number of
    times.

    For Hessian-vector products, `create_graph=True` and gradient penalties. Such a pass keeps its
    inputs and is slower. `torch.func` transforms, `torch.jit.trace` and `torch.export` take this
    way by themselves.

    >>> import torch, loft_rs
    >>> layer = loft_rs.nn.LoftLinear(torch.nn.Linear(8, 4), torch.eye(8)[:, :2])
    >>> with loft_rs.higher_derivatives():
    ...     loss = layer(torch.ones(1, 8)).square().sum()
    >>> (slope,) = torch.autograd.grad(loss, [*layer.loft_theta.parameters()], create_graph=True)
    """
    token = _HIGHER.set(True)
    try:
        yield
    finally:
        _HIGHER.reset(token)


def plain() -> bool:
    """Whether the pass that runs now must be a graph of plain operations."""
    if torch.compiler.is_compiling():  # a compiled graph has first derivatives alone
        # Not `is_exporting()`, which is true of everything that Dynamo traces.
        return getattr(torch.compiler, "_is_exporting_flag", False)
    return (
        _HIGHER.get()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def inlined_only(hook: Callable) -> Callable:
    """A hook that a graph may take in with the call it belongs to, and that is no graph of its own.

    torch compiles the hooks of the outermost module as graphs apart from its forward: what they
    hand down would wait on a module between two graphs, where a second thread finds it.
    """
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):
        action = frames._FrameAction
        frames.set_code_exec_strategy(hook.__code__, frames._FrameExecStrategy(action.SKIP, action.DEFAULT))
        return hook
    if hasattr(frames, "skip_code"):  # as torch called it before 2.6
        frames.skip_code(hook.__code__)
        return hook
    return torch.compiler.disable(hook)  # right as well; a compiled model breaks its graph here


@inlined_only
def compiles_next() -> bool:
    """Whether this code, which runs as it is, was called where torch compiles each function that it
    meets.
    """
    return callable(torch._C._dynamo.eval_frame.get_eval_frame_callback())


def first_order(backward: Callable) -> Callable:
    """A backward pass outside autograd that refuses to be differentiated itself, when it runs and
    not when its result is used.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True needs a forward pass of plain operations: run it under `with loft_rs.higher_derivatives():`, or "
                "merge the adapter first"
            )
        return backward(ctx, *grads)

    return checked


def no_autocast(device_type: str) -> AbstractContextManager[torch.dtype | None]:
    """Autocast switched off, at no cost where it is off already; enters with the dtype that it
    casts to outside, None for none.
    """
    # In a compiled graph always, since its backward pass is traced where autocast may be on again.
    if not torch.is_autocast_enabled(device_type) and (plain() or not torch.compiler.is_compiling()):
        return _OFF
    return _switched_off(device_type)


_OFF = nullcontext(None)


@contextmanager
def _switched_off(device_type: str) -> Iterator[torch.dtype | None]:
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    with torch.autocast(device_type, enabled=False):
        yield dtype


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread, as when checkpointing computes
    again.
    """
    return torch._C._current_graph_task_id() != -1


def small_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b (r x r), accumulated over the tokens and kept in float32: a half-precision result would
    round the gradient.
    """
    if a.dtype in HALF and a.is_cuda:
        return torch.mm(a.mT, b, out_dtype=torch.float32)
    return a.mT @ b
