"""Whatever is done to a model and in whatever order: after each of it, the model computes what its
tensors say.

A hypothesis state machine over the model of exact.py with two adapters; the float64 twin is made
anew after every rule. `LOFT_RS_LONG=1` runs 400 sequences.
"""

import copy
import os

import pytest
import torch
from exact import KINDS, LINEARS, assert_exact, build, error, exact_twin, layers_of, net, trained
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import loft_rs
from loft_rs.layer.forward_pass import current

# float32 arithmetic over a few products of at most 48 terms, up to two adapters in a row, and a
# merged weight rounded once more. What a rule changes moves the output by 1e-3 and more.
TOLERANCE = 1e-5
SEEDS = st.integers(0, 1000)
NAMES = st.sampled_from([["default"], ["old"], ["default", "old"]])


def unmerged(machine: "Model") -> bool:
    return not any(layer.merged for layer in layers_of(machine.model))


class Model(RuleBasedStateMachine):
    """A PEFT model with the adapters "default" and "old", of one kind."""

    @initialize(kind=st.sampled_from(sorted(KINDS)), placement=st.sampled_from(["add", None, "rotate"]))
    def build(self, kind, placement):
        self.model = build(kind, placement=placement)
        self.model.add_adapter("old", KINDS[kind](target_modules=LINEARS, init_weights=False))
        self.saved = self.optimiser = None
        self.check()

    def inputs(self, seed: int = 1) -> torch.Tensor:
        return torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))

    def check(self, quiet_first: bool = False) -> None:
        """Output and gradients; of a merged model, whose parameters have none, the output."""
        x, twin = self.inputs(), exact_twin(self.model)
        if quiet_first or not unmerged(self):
            for grads in (False, True):
                with torch.set_grad_enabled(grads):
                    assert error(self.model(x), twin(x.double()).detach()) <= TOLERANCE
        if unmerged(self):
            assert_exact(self.model, x, TOLERANCE, twin)
        assert current() is None

    def adapters(self, name: str) -> list:
        """The adapters of that name that hold tensors themselves."""
        return [layer.adapters[name] for layer in layers_of(self.model) if layer.adapters[name].owner.layer is layer]

    def write_if_unmerged(self, times: float) -> None:
        """A merged weight is that of the parameters when it was merged."""
        for adapter in self.adapters("default") if unmerged(self) else []:
            adapter.theta.data.mul_(times)

    # -- passes -----------------------------------------------------------------------------------

    @precondition(unmerged)
    @rule(skip=st.booleans(), checkpointing=st.sampled_from([None, False, True]), seed=SEEDS)
    def train_a_step(self, skip, checkpointing, seed):
        network, x = net(self.model), self.inputs(seed)
        network.blocks[1].skip, network.checkpointing = skip, checkpointing
        if self.optimiser is None:
            everything = [p for name, p in self.model.named_parameters() if ".loft_" in name]
            self.optimiser = torch.optim.AdamW(everything, lr=0.05, weight_decay=0.1, fused=True)
        assert_exact(self.model, x, TOLERANCE)
        before = [(p, p.detach().clone()) for p in trained(self.model)]
        self.optimiser.zero_grad()
        self.model(x.requires_grad_()).square().mean().backward()
        self.optimiser.step()
        skipped = {id(p) for name in ("wide", "back") for p in getattr(network.blocks[1], name).parameters()}
        for p, was in before:
            assert torch.equal(p, was) == (skip and id(p) in skipped)
        network.blocks[1].skip = False
        self.check(quiet_first=True)

    @rule(seed=SEEDS, mode=st.sampled_from([torch.no_grad, torch.inference_mode]), times=st.integers(1, 3))
    def evaluate(self, seed, mode, times):
        x, twin = self.inputs(seed), exact_twin(self.model)
        for _ in range(times):
            with mode():
                assert error(self.model(x), twin(x.double())) <= TOLERANCE

    @rule(grads=st.booleans(), raised=st.sampled_from([RuntimeError, KeyboardInterrupt]), where=st.integers(0, 11))
    def break_off(self, grads, raised, where):
        def fail(*_):
            raise raised

        handle = layers_of(self.model)[where].register_forward_pre_hook(fail)
        with torch.set_grad_enabled(grads), pytest.raises(raised):
            self.model(self.inputs())
        handle.remove()
        self.write_if_unmerged(0.9)
        self.check(quiet_first=True)

    @rule(grads=st.booleans(), where=st.integers(0, 1))
    def call_a_block_alone(self, grads, where):
        block, x = net(self.model).blocks[where], self.inputs()
        with torch.set_grad_enabled(grads):
            assert error(block(x), exact_twin(block)(x.double()).detach()) <= TOLERANCE

    @rule(training=st.booleans())
    def switch_mode(self, training):
        self.model.train(training)
        self.check(quiet_first=True)

    # -- numbers ----------------------------------------------------------------------------------

    @precondition(unmerged)
    @rule(seed=SEEDS, name=st.sampled_from(["default", "old"]))
    def write_over_theta(self, seed, name):
        generator = torch.Generator().manual_seed(seed)
        for adapter in self.adapters(name):
            adapter.theta.data.add_(0.1 * torch.randn(adapter.theta.shape, generator=generator))
        self.check(quiet_first=True)

    @precondition(unmerged)
    @rule()
    def keep_old_in_step(self):
        for old, new in zip(self.adapters("old"), self.adapters("default"), strict=True):
            old.theta.data.copy_(new.theta.data)
        self.check(quiet_first=True)

    @precondition(unmerged)
    @rule(seed=SEEDS)
    def write_over_the_base(self, seed):
        with torch.no_grad():
            self.add_to_the_base(seed, lambda weight: weight)
        self.check(quiet_first=True)

    @precondition(unmerged)
    @rule(
        what=st.sampled_from(["base", "supports", "both"]),
        told=st.sampled_from(["training", "eval", "train", "base_changed", "merging"]),
        seed=SEEDS,
    )
    def write_over_what_is_frozen_silently(self, what, told, seed):
        if what != "supports":
            self.add_to_the_base(seed, lambda weight: weight.data)
        if what != "base":
            generator = torch.Generator().manual_seed(seed)
            for adapter in [*self.adapters("default"), *self.adapters("old")]:
                if adapter.kind.has_support:
                    columns = torch.randn(adapter.support.shape, generator=generator)
                    adapter.support.data.copy_(torch.linalg.qr(columns)[0])
        if told == "eval":
            self.model.eval()
        elif told == "train":
            self.model.train()
        elif told == "base_changed":
            loft_rs.base_changed(self.model)
        elif told == "merging":
            self.model.merge_adapter()
            self.model.unmerge_adapter()
        self.check(quiet_first=told != "training")

    def add_to_the_base(self, seed, of) -> None:
        generator = torch.Generator().manual_seed(seed)
        for layer in layers_of(self.model):
            weight = layer.base_layer.weight
            of(weight).add_(0.05 * torch.randn(weight.shape, generator=generator))

    @precondition(unmerged)
    @rule()
    def save(self):
        self.saved = {key: value.clone() for key, value in self.model.state_dict().items()}

    @precondition(lambda self: unmerged(self) and self.saved is not None)
    @rule(assign=st.booleans())
    def load(self, assign):
        state = {key: value.clone() for key, value in self.saved.items()}
        self.model.load_state_dict(state, assign=assign)
        self.optimiser = None if assign else self.optimiser
        self.check(quiet_first=True)

    # -- adapters ---------------------------------------------------------------------------------

    @precondition(unmerged)
    @rule(names=NAMES)
    def set_adapter(self, names):
        self.model.base_model.set_adapter(names)
        self.check(quiet_first=True)

    @precondition(unmerged)
    @rule(names=NAMES)
    def merge(self, names):
        before = [layer.base_layer.weight.detach().clone() for layer in layers_of(self.model)]
        self.model.merge_adapter(names)
        self.check()
        self.originals = before

    @precondition(lambda self: not unmerged(self))
    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()
        for layer, weight in zip(layers_of(self.model), self.originals, strict=True):
            assert torch.equal(layer.base_layer.weight, weight)
        self.check(quiet_first=True)

    @precondition(unmerged)
    @rule(grads=st.booleans())
    def disable(self, grads):
        x = self.inputs()
        with self.model.disable_adapter():
            twin = exact_twin(self.model)
            with torch.set_grad_enabled(grads):
                assert error(self.model(x), twin(x.double()).detach()) <= TOLERANCE
        self.check(quiet_first=True)

    @rule()
    def go_on_with_a_copy(self):
        self.model, self.optimiser = copy.deepcopy(self.model), None
        self.write_if_unmerged(1.1)
        self.check(quiet_first=True)


def test_after_anything_that_is_done_to_it_a_model_computes_what_its_tensors_say():
    examples = 400 if os.environ.get("LOFT_RS_LONG") else 30
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        Model,
        settings=settings(max_examples=examples, stateful_step_count=15, deadline=None, suppress_health_check=quiet),
    )
