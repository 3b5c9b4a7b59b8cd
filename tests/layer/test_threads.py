"""One model served by several threads: each gets the answers and the gradients that it would get
alone.

Switches are made frequent by tiny sleeps inside the package, which change no result of code that is
safe. `LOFT_RS_LONG=1` runs 10^4 passes instead of a few hundred.
"""

import contextvars
import os
import random
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from exact import build, error, exact_twin, layers_of, net, trained
from torch import nn

import loft_rs
from loft_rs.layer.forward_pass import current

PACKAGE = str(Path(loft_rs.__file__).parent)
THREADS, ROUNDS = 8, 2
KINDS = ["cayley", "output", "tied", "boft", "hra"]
PASSES = 32 if os.environ.get("LOFT_RS_LONG") else 1  # of each thread in a round
# Two results of float32 arithmetic, each of which may be as far from the exact one as
# test_forward_pass.py says. A reentrant checkpoint adds up the gradients of all threads in any
# order: eight terms, or 256, whose partial sums are rounded as often.
TOLERANCE = 4e-6


@pytest.fixture(autouse=True)
def _frequent_switches():
    held = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(held)
    assert current() is None


def slowed(seed: int):
    """A trace function that sleeps now and then inside the package."""
    draw = random.Random(seed)

    def trace(frame, event, arg):
        if event == "call" and not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and draw.random() < 0.02:
            time.sleep(1e-5)
        return trace

    return trace


def at_once(works: list) -> list:
    """The results of `works`, each called in a thread of its own, all started together; or their
    first exception.
    """
    results, errors, gate = [None] * len(works), [], threading.Barrier(len(works))

    def run(i: int) -> None:
        gate.wait()
        sys.settrace(slowed(i))
        try:
            results[i] = works[i]()
            assert current() is None
        except BaseException as failure:
            errors.append(failure)
        finally:
            sys.settrace(None)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def inputs() -> list[torch.Tensor]:
    return list(torch.randn(THREADS, 5, 16, generator=torch.Generator().manual_seed(1)))


def quiet(module: nn.Module, x: torch.Tensor, mode=torch.no_grad) -> list[torch.Tensor]:
    with mode():
        return [module(x.clone())]


def with_gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of what is trained."""
    y = module(x.clone().requires_grad_())
    return [y.detach(), *torch.autograd.grad(y.square().sum(), trained(module))]


def accumulated(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output alone, the gradients on the parameters: a reentrant checkpoint refuses
    `autograd.grad`.
    """
    y = module(x.clone().requires_grad_())
    y.square().sum().backward()
    return [y.detach()]


def assert_same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert error(got[0], wanted[0]) <= TOLERANCE
    assert_same_gradients(got[1:], wanted[1:])


def assert_same_gradients(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    scale = max((float(g.norm()) for g in wanted), default=0.0)
    for g, w in zip(got, wanted, strict=True):
        assert float((g - w).norm()) <= TOLERANCE * max(float(w.norm()), 0.1 * scale)


def write_over(model: nn.Module) -> None:
    """Every number another, silently, between two rounds."""
    for p in trained(model):
        p.data.copy_(p + 0.1 * torch.randn_like(p))
    for layer in layers_of(model):
        layer.base_layer.weight.data.mul_(1.02)
    loft_rs.base_changed(model)


def served(model: nn.Module, calls: list) -> None:
    """In every round `calls`, each of a function, a module and an input, one after the other and
    then all at once.
    """
    for _ in range(ROUNDS):
        write_over(model)
        wanted = [function(module, x) for function, module, x in calls]
        twins = {module: exact_twin(module) for _, module, _ in calls}
        for (_, module, x), (y, *_) in zip(calls, wanted, strict=True):
            assert error(y, twins[module](x.double())) <= TOLERANCE / 2
        held = [p.detach().clone() for p in trained(model)]
        works = [lambda call=call: [call[0](*call[1:]) for _ in range(PASSES)] for call in calls]
        for answers, want in zip(at_once(works), wanted, strict=True):
            for answer in answers:
                assert_same(answer, want)
        assert all(map(torch.equal, trained(model), held))


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_every_thread_gets_its_own_answer(kind):
    model = build(kind, placement="add")
    served(model, [(quiet, model, x) for x in inputs()])


@pytest.mark.parametrize("checkpointing", [None, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_thread_gets_its_own_gradients(kind, checkpointing):
    model = build(kind, placement="add")
    net(model).checkpointing = checkpointing
    served(model, [(with_gradients, model, x) for x in inputs()])


@pytest.mark.parametrize("kind", KINDS)
def test_reentrant_checkpoints_of_all_threads_add_up(kind):
    model, xs = build(kind, placement="add"), inputs()
    for _ in range(ROUNDS):
        write_over(model)
        net(model).checkpointing = None
        wanted = [with_gradients(model, x) for x in xs]
        net(model).checkpointing = True
        model.zero_grad()
        works = [lambda x=x: [accumulated(model, x) for _ in range(PASSES)] for x in xs]
        for answers, (y, *_) in zip(at_once(works), wanted, strict=True):
            for answer in answers:
                assert_same(answer, [y])
        sums = [PASSES * sum(each) for each in zip(*[grads for _, *grads in wanted], strict=True)]
        assert_same_gradients([p.grad for p in trained(model)], sums)


@pytest.mark.parametrize(
    "kind, placement", [*((kind, "add") for kind in KINDS), ("cayley", "rotate"), ("output", "rotate")]
)
def test_some_threads_evaluate_while_others_compute_gradients(kind, placement):
    model, xs = build(kind, placement=placement), inputs()
    block = net(model).blocks[0]
    net(model).checkpointing = False
    calls = [
        (quiet, model),
        (with_gradients, model),
        (lambda module, x: quiet(module, x, torch.inference_mode), model),
        (with_gradients, block),
        (quiet, block),
        (with_gradients, block.q),
        (quiet, block.wide),
        (with_gradients, model),
    ]
    served(model, [(*call, x) for call, x in zip(calls, xs, strict=True)])


@pytest.mark.parametrize("grads", [False, True])
def test_a_pass_that_runs_a_part_in_another_thread_and_its_context(grads):
    """As `asyncio.to_thread` does: the part belongs to the pass that started it, or to none, and is
    right.
    """
    model, xs, function = build(placement="add"), inputs(), with_gradients if grads else quiet
    wanted = [function(model, x) for x in xs]
    second = net(model).blocks[1]
    forward = second.forward

    def elsewhere(x: torch.Tensor) -> torch.Tensor:
        context, found = contextvars.copy_context(), []

        def run() -> None:
            with torch.set_grad_enabled(grads):
                found.append(forward(x))

        thread = threading.Thread(target=context.run, args=(run,))
        thread.start()
        thread.join()
        return found[0]

    second.forward = elsewhere
    for got, want in zip(at_once([lambda x=x: function(model, x) for x in xs]), wanted, strict=True):
        assert_same(got, want)


def test_a_thread_that_outlives_the_pass_it_came_from_computes_with_the_numbers_of_its_own_time():
    model, (x, *_) = build(placement="add"), inputs()
    block, contexts = net(model).blocks[0], []
    handle = block.register_forward_pre_hook(lambda *_: contexts.append(contextvars.copy_context()))
    quiet(model, x)
    handle.remove()
    write_over(model)
    found = []
    thread = threading.Thread(target=lambda: found.append(contexts[0].run(quiet, block, x)[0]))
    thread.start()
    thread.join()
    assert error(found[0], exact_twin(block)(x.double())) <= TOLERANCE / 2


def test_threads_that_fail_leave_nothing_to_the_others():
    model, xs = build(placement="add"), inputs()
    wanted = [with_gradients(model, x) for x in xs]
    broken = threading.local()

    def fail(*_):
        if getattr(broken, "now", False):
            raise RuntimeError("this thread's pass breaks off")

    net(model).blocks[1].wide.register_forward_pre_hook(fail)

    def work(i: int) -> list[torch.Tensor]:
        for _ in range(3):
            broken.now = i % 2 == 0
            if broken.now:
                with pytest.raises(RuntimeError, match="breaks off"):
                    model(xs[i])
                assert current() is None
            broken.now = False
            answer = with_gradients(model, xs[i])
        return answer

    for got, want in zip(at_once([lambda i=i: work(i) for i in range(THREADS)]), wanted, strict=True):
        assert_same(got, want)
