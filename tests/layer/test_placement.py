"""Layers that read one input run as one node: same results, same gradients, fewer products, and
nothing breaks when the pattern does.
"""

import copy

import pytest
import torch
from one_input import blocks, build, passes, set_apart
from torch import nn

from loft_rs.factor import add_low_rank
from loft_rs.layer import placement
from loft_rs.layer.placement import named_groups


def runs(monkeypatch):
    """How many layers each call of the node serves."""
    seen = []

    def watched(original):
        return lambda x, joined, *rest: seen.append(len(joined.layers)) or original(x, joined, *rest)

    for module, name in (
        (add_low_rank, "add_low_rank_forward"),
        (placement, "add_low_rank_evaluated"),
    ):  # with gradients, and without
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return seen


def outputs(block, x):
    """(q, k, v) of one call of the block."""
    seen = {}
    hooks = [
        getattr(block, name).register_forward_hook(lambda module, args, y, name=name: seen.update({name: y}))
        for name in ("q", "k", "v")
    ]
    block(x)
    for hook in hooks:
        hook.remove()
    return seen["q"], seen["k"], seen["v"]


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("side", ["input", "output"])
def test_results_and_gradients_are_those_of_the_layers_alone(checkpointing, side):
    together, alone = (passes(build(checkpointing, side=side), joint=joint) for joint in (True, False))
    torch.testing.assert_close(together[0], alone[0])
    torch.testing.assert_close(together[1], alone[1])
    for a, b in zip(together[2], alone[2], strict=True):
        torch.testing.assert_close(a, b)


def test_what_reads_one_input_runs_together_from_the_first_pass_on_and_repeats_to_the_bit(monkeypatch):
    seen = runs(monkeypatch)
    model = build()
    first = passes(model, 1)
    assert seen == [3, 1] * 2
    for again in (passes(model, 1), passes(model, 1)):
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert all(map(torch.equal, first[2], again[2]))
    seen.clear()
    with torch.no_grad():
        model(torch.randn(5, 24, dtype=torch.float64))
    assert seen == [3, 1] * 2


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["q_proj", "k_proj", "v_proj", "o_proj"], [["q_proj", "k_proj", "v_proj"]]),
        (["gate_proj", "up_proj", "down_proj"], [["gate_proj", "up_proj"]]),
        (["query", "value"], [["query", "value"]]),
        (["fc1", "fc2"], []),
    ],
)
def test_groups_are_told_by_name(names, groups):
    parent = nn.Module()
    for name in names:
        setattr(parent, name, nn.Linear(8, 8))
    assert named_groups(parent, nn.Linear) == groups
    parent.q_proj, parent.k_proj = nn.Linear(8, 8), nn.Linear(4, 8)
    assert ["q_proj", "k_proj"] not in named_groups(parent, nn.Linear)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_keeps_them_together(checkpointing, monkeypatch):
    model = build(checkpointing)
    passes(model, 2)
    seen = runs(monkeypatch)
    passes(model, 1)
    assert set(seen) == {3, 1} and seen.count(3) == 4  # forward, and again in the backward pass


def test_what_reads_something_else_is_left_alone_and_never_wrong(monkeypatch):
    model, alone = build(), build()
    passes(model, 2)
    for each in (model, alone):
        for block in blocks(each):
            block.detour = lambda x: 2 * x
    expected = passes(alone, 1, joint=False)
    for count in range(3):
        seen = runs(monkeypatch)
        got = passes(model, 1)
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[2], expected[2])
        assert seen[0] == (3 if count == 0 else 2)
        monkeypatch.undo()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_left_alone_waits_for_a_step(checkpointing):
    # Two forward passes before their backward passes, and a pattern that changes between them.
    model, alone = build(checkpointing), build(checkpointing)
    set_apart(alone)
    for detour in (None, lambda x: 2 * x):
        for each in (model, alone):
            each.zero_grad()
            for block in blocks(each):
                block.detour = detour
            x = torch.ones(5, 24, dtype=torch.float64, requires_grad=True)
            losses = [each(x + i).square().sum() for i in range(3)]
            for loss in losses:
                loss.backward()
        for a, b in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        passes(model, 1)  # a step


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_changed_in_place_is_another_input(mode):
    together, alone = build(), build()
    set_apart(alone)
    x = torch.randn(5, 24, dtype=torch.float64)
    for change in (None, lambda x: x.mul_(2), None):
        with mode():
            for model in (together, alone):
                for block in blocks(model):
                    block.detour = change
            for one, other in zip(blocks(together), blocks(alone), strict=True):
                inner = x.clone()
                got = outputs(one, inner)
                torch.testing.assert_close(got, outputs(other, x.clone()))
                torch.testing.assert_close(got[2], other.v(inner))


def test_a_support_written_over_in_place_is_seen():
    together, alone = build(), build()
    passes(together)
    for model in (together, alone):
        for block in blocks(model):
            for layer in (block.q, block.k, block.v, block.o):
                layer.adapters["default"].set_basis(layer.adapters["default"].support.flip(0))
    for a, b in zip(passes(together), passes(alone, joint=False), strict=True):
        torch.testing.assert_close(a, b)


def test_a_disabled_or_merged_follower_is_left_out(monkeypatch):
    model = build()
    passes(model, 2)
    block = blocks(model)[0]
    x = torch.randn(5, 24, dtype=torch.float64)
    seen = runs(monkeypatch)
    rotated = outputs(block, x)
    assert seen == [3, 1]
    block.k.enable_adapters(False)
    disabled = outputs(block, x)
    torch.testing.assert_close(disabled[1], block.k.base_layer(x))
    block.k.enable_adapters(True)
    block.k.merge()
    merged = outputs(block, x)
    assert seen == [3, 1, 2, 1, 2, 1]
    torch.testing.assert_close(merged[1], rotated[1])
    for got in (disabled, merged):
        torch.testing.assert_close((got[0], got[2]), (rotated[0], rotated[2]))
    assert not torch.allclose(disabled[1], rotated[1])


def test_a_copy_shares_nothing(monkeypatch):
    model = build()
    passes(model, 2)
    twin = copy.deepcopy(model)
    for block in blocks(twin):
        members = [block.q, block.k, block.v]
        assert block._loft_root.groups == dict.fromkeys(members, members)
    seen = runs(monkeypatch)
    for got, wanted in zip(passes(twin), passes(model), strict=True):
        torch.testing.assert_close(got, wanted)
    assert seen == [3, 1] * 12


def test_one_result_without_a_gradient_leaves_the_others_theirs(monkeypatch):
    model = build()
    passes(model, 2)
    block = blocks(model)[0]
    block.k.register_forward_hook(lambda module, args, y: y.detach())
    for joint in (True, False):
        model.zero_grad()
        if not joint:
            set_apart(model)
        x = torch.ones(5, 24, dtype=torch.float64, requires_grad=True)
        seen = runs(monkeypatch)
        block(x).square().sum().backward()
        assert seen == ([3, 1] if joint else [1] * 4)
        monkeypatch.undo()
        grads = [layer.loft_theta["default"].grad for layer in (block.q, block.k, block.v)]
        assert grads[1] is None
        if joint:
            kept = x.grad, grads[0].clone(), grads[2].clone()
    torch.testing.assert_close((x.grad, grads[0], grads[2]), kept)


@pytest.mark.parametrize("placement", ["add", "rotate"])
def test_a_whole_model_compiles_without_a_break_and_gives_the_eager_gradients(placement):
    model = build(dtype=torch.float32)
    for layer in model.modules():
        if hasattr(layer, "placement"):
            layer.placement = placement
    x = torch.randn(5, 24, requires_grad=True)
    expected = model(x)
    expected.square().sum().backward()
    grads, dx = [p.grad.clone() for p in model.parameters() if p.requires_grad], x.grad.clone()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        x.grad = None
        y = compiled(x)
        y.square().sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(x.grad, dx)
        torch.testing.assert_close([p.grad for p in model.parameters() if p.requires_grad], grads)


def test_a_compiled_model_sees_a_step():
    model = build(dtype=torch.float32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    x = torch.randn(5, 24)
    before = compiled(x)
    before.square().sum().backward()
    optimiser.step()
    after = compiled(x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, model(x))
