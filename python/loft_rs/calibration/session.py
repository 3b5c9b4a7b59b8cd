"""The model while it is calibrated, and everything put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..sketch.products import forget_products
from ..tuner.layer import Linear
from .memory import checkpointed_blocks

__all__ = ["calibrating"]


def _evaluate(module: nn.Module, *_: Any) -> None:
    module.training = False


def _train(module: nn.Module, *_: Any) -> None:
    module.training = True


def _evaluating(block: Any) -> tuple[Callable[..., None], Callable[..., Any]]:
    """(forward pre-hook, checkpoint function) with which a block is checkpointed, as transformers
    does in training mode alone, and yet runs in evaluation mode."""
    checkpoint = block._gradient_checkpointing_func
    running: list[bool] = []

    def hook(*_: Any) -> None:
        block.training = torch.is_grad_enabled() and not running

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def evaluated(*inner: Any) -> Any:
            running.append(True)
            block.training = False
            try:
                return function(*inner)
            finally:
                running.pop()
                block.training = True

        return checkpoint(evaluated, *args, **kwargs)

    return hook, run


@contextmanager
def calibrating(model: nn.Module, layers: Mapping[str, Linear], head: list[nn.Parameter]):
    """Dropout off whatever a train_step says, no cache, no parameter with a gradient; at the end
    all is put back, after an error the head too."""
    training = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    weights = [p.detach().clone() for p in head]
    blocks = checkpointed_blocks(model)
    # A quantised layer may take another way in evaluation mode, without a backward pass
    # (bitsandbytes on a CPU).
    bases = {module for layer in layers.values() for module in layer.base_layer.modules()}
    hooks = [
        module.register_forward_pre_hook(_train if module in bases else _evaluate)
        for module in model.modules()
        if module not in blocks
    ]
    held: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in held if getattr(config, "use_cache", False)}
    for config in configs.values():  # with a cache transformers does not see that sequences are packed
        config.use_cache = False
    model.eval()
    checkpoints = [(block, block._gradient_checkpointing_func) for block in blocks]
    for block in blocks:
        evaluate, block._gradient_checkpointing_func = _evaluating(block)
        hooks.append(block.register_forward_pre_hook(evaluate))
    for parameter, _ in gradients:  # backward would add to it in place
        parameter.grad = None
    try:
        yield
    except BaseException:
        for parameter, weight in zip(head, weights, strict=True):
            parameter.data.copy_(weight)
        raise
    finally:
        forget_products()
        for layer in layers.values():
            layer.tap = None
        for hook in hooks:
            hook.remove()
        for block, checkpoint in checkpoints:
            block._gradient_checkpointing_func = checkpoint
        for config in configs.values():
            config.use_cache = True
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, mode in training:
            module.training = mode
