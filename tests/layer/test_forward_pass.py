"""A pass computes with the numbers that the parameters hold when it begins, whoever wrote them and
however, and hands nothing on.
"""

import copy
import gc
import pickle
import threading
import weakref

import peft
import pytest
import torch
from exact import KINDS, LINEARS, Net, assert_exact, build, error, exact_twin, layers_of, net, results, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

import loft_rs
from loft_rs import LoftConfig
from loft_rs.layer import values
from loft_rs.layer.forward_pass import current

# float32 arithmetic over a few products of at most 48 terms; bf16 carries 2^-9 in each of some ten
# roundings in a row. A support is orthonormal to float32's rounding whatever the base is.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float64: 1e-6}
PLACEMENTS = ("add", "rotate")


def inputs(seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adam(model, **options):
    return torch.optim.AdamW(trained(model), lr=0.05, **options)


@pytest.fixture(autouse=True)
def _no_pass_is_left():
    yield
    assert current() is None


def solves(monkeypatch) -> list[int]:
    """How many thetas each solve takes from here on."""
    seen, original = [], values.solve
    monkeypatch.setattr(
        values, "solve", lambda t, thetas, roots: seen.append(len(thetas)) or original(t, thetas, roots)
    )
    return seen


# -- every way to change a number ----------------------------------------------------------------


def _fused_step(model):
    adam(model, fused=True).step()


def _data(model):
    for p in trained(model):
        p.data.copy_(p.data + 0.1 * torch.randn_like(p))


def _data_assigned(model):
    for p in trained(model):
        p.data = p.data + 0.1 * torch.randn_like(p)


def _no_grad_copy(model):
    with torch.no_grad():
        for p in trained(model):
            p.copy_(p + 0.1 * torch.randn_like(p))


def _numpy(model):
    for p in trained(model):
        p.detach().numpy()[...] *= 1.1


def _swapped(model):
    for p in trained(model):  # as averaged or schedule-free weights are put in and taken out
        other = nn.Parameter(p.detach() * 0.9)
        p.data, other.data = other.data, p.data


def _loaded(model):
    state = {key: value * 0.9 if "loft_theta" in key else value for key, value in model.state_dict().items()}
    model.load_state_dict(state)


def _loaded_by_assignment(model):
    state = {key: value * 0.9 if "loft_theta" in key else value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _loaded_in_place(model):  # as torch.distributed.checkpoint does
    for key, value in model.state_dict().items():
        if "loft_theta" in key:
            value.detach().mul_(0.9)


CHANGES = [_fused_step, _data, _data_assigned, _no_grad_copy, _numpy, _swapped, _loaded, _loaded_by_assignment]
CHANGES += [_loaded_in_place]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_change_what_is_trained_is_seen_at_once(kind, placement):
    model, x = build(kind, placement=placement), inputs()
    assert_exact(model, x, TOLERANCE[torch.float32])
    for change in CHANGES:
        results(model, x)
        with torch.no_grad():
            model(x)
        change(model)
        with torch.no_grad():  # first without gradients, where a solve may be taken again
            assert error(model(x), exact_twin(model)(x.double())) <= TOLERANCE[torch.float32], change.__name__
        change(model) if change not in (_fused_step,) else None
        assert_exact(model, x, TOLERANCE[torch.float32])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("what", ["weight", "bias", "support"])
def test_silent_writes_to_frozen_tensors_are_seen_by_training(what, placement):
    for kind in ("cayley", "output", "tied", "hra", "oft"):
        model, x = build(kind, placement=placement), inputs()
        for _ in range(3):
            assert_exact(model, x, TOLERANCE[torch.float32])  # and the evaluation pass after it
            _write(model, what)


def _write(model, what):
    for layer in layers_of(model):
        base = layer.base_layer
        if what == "weight":
            base.weight.data.mul_(1.1)
        elif what == "bias" and base.bias is not None:
            base.bias.data.add_(0.1)
        elif what == "support":
            for adapter in layer.adapters.values():
                if adapter.kind.has_support and adapter.owner is adapter:
                    adapter.support.data.copy_(torch.linalg.qr(torch.randn_like(adapter.support))[0])


def _version(model):
    with torch.no_grad():
        for layer in layers_of(model):
            layer.base_layer.weight.mul_(1.1)


def _replaced(model):
    for layer in layers_of(model):
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach() * 1.1, requires_grad=False)


def _base_loaded(model):
    model.load_state_dict({k: v * 1.1 if "base_layer.weight" in k else v for k, v in model.state_dict().items()})


def _told(how):
    def change(model):
        _write(model, "weight")
        _write(model, "support")
        how(model)

    return change


def _trained_on(model):
    results(model, inputs(2))


BASE_CHANGES = {
    "version": _version,
    "replaced": _replaced,
    "loaded": _base_loaded,
    "base_changed": _told(loft_rs.base_changed),
    "eval": _told(lambda model: model.eval()),
    "train": _told(lambda model: model.train()),
    "after training": _told(_trained_on),
    "merged and unmerged": _told(lambda model: (model.merge_adapter(), model.unmerge_adapter())),
    "data assigned": lambda model: [
        setattr(la.base_layer.weight, "data", la.base_layer.weight * 1.1) for la in layers_of(model)
    ],
    "moved": lambda model: (_write(model, "weight"), model.to(torch.float64), model.to(torch.float32)),
}


@pytest.mark.parametrize("how", BASE_CHANGES)
@pytest.mark.parametrize("kind", ["cayley", "output", "tied"])
def test_between_two_passes_of_an_evaluation_a_changed_base_is_seen(kind, how):
    model, x = build(kind, placement="add"), inputs()
    for inference in (torch.no_grad, torch.inference_mode):
        with inference():
            model(x), model(x)
        BASE_CHANGES[how](model)
        with torch.no_grad():
            assert error(model(x), exact_twin(model)(x.double())) <= TOLERANCE[torch.float32]


def test_the_one_write_that_may_go_unseen_and_how_it_is_told():
    model, x = build(placement="add"), inputs()
    with torch.no_grad():
        model(x)
        _write(model, "weight")
        model(x)  # may be of the old W0 P: the documented exception
        loft_rs.base_changed(model)
        assert error(model(x), exact_twin(model)(x.double())) <= TOLERANCE[torch.float32]
    with pytest.raises(ValueError, match="no LOFT layers"):
        loft_rs.base_changed(nn.Linear(2, 2))


@pytest.mark.parametrize("native", [False, True])
def test_generation_starts_with_the_base_as_it_is(native):
    from reference import make_llama

    model = make_llama()
    config = LoftConfig(r=4, target_modules="all-linear", support="random", init_weights=False)
    if native:
        peft.inject_adapter_in_model(config, model)
    else:
        model = peft.get_peft_model(model, config)
    ids = torch.arange(5)[None]
    model.eval()

    def generated():
        with torch.no_grad():
            options = {
                "max_new_tokens": 4,
                "min_new_tokens": 4,
                "do_sample": False,
                "output_logits": True,
                "return_dict_in_generate": True,
            }
            return torch.stack(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits)

    before = generated()
    for layer in layers_of(model):
        layer.base_layer.weight.data.mul_(1.2)
    after = generated()
    loft_rs.base_changed(model)
    torch.testing.assert_close(after, generated(), atol=0, rtol=0)
    assert not torch.allclose(before, after)


# -- passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_a_pass_is_one_solve_and_a_backward_pass_at_most_one_more(checkpointing, monkeypatch):
    model, x = build("exp", placement="add"), inputs().requires_grad_()
    net(model).checkpointing = checkpointing
    results(model, x)
    seen = solves(monkeypatch)
    for _ in range(2):
        results(model, x)
    # A checkpoint that does not reenter solves for its own forward pass as the rest does, and once
    # when it computes again.
    assert seen == [12] * (2 if checkpointing is None else 4)
    assert not net(model)._loft_root.recomputed


def test_without_gradients_a_solve_is_taken_again_only_where_all_bits_are_the_same(monkeypatch):
    model, x = build(placement="add"), inputs()
    seen = solves(monkeypatch)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        assert seen == [12]
        trained(model)[0].data[0] += 1e-6
        model(x)
        assert seen == [12, 12]


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["cayley", "tied", "boft", "hra"])
def test_a_layer_that_a_pass_skips_has_no_gradient_and_does_not_move(kind, placement, checkpointing):
    model, x = build(kind, placement=placement), inputs()
    net(model).checkpointing = checkpointing
    optimiser = adam(model, weight_decay=0.1)
    for skip in (False, True, True, False):
        net(model).blocks[1].skip = skip
        before = [p.detach().clone() for p in trained(model)]
        assert_exact(model, x, TOLERANCE[torch.float32])
        optimiser.zero_grad()
        model(x.requires_grad_()).square().sum().backward()
        optimiser.step()
        skipped = {id(p) for name in ("wide", "back") for p in getattr(net(model).blocks[1], name).parameters()}
        for p, was in zip(trained(model), before, strict=True):
            assert torch.equal(p, was) == (skip and id(p) in skipped)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_checkpoints_save_alike_with_and_without_a_root(alone, reentrant):
    model, x = build(placement="add"), inputs().requires_grad_()
    block = net(model).blocks[0]
    run = block if alone else model
    if not alone:
        net(model).checkpointing = reentrant
        assert_exact(model, x.detach(), TOLERANCE[torch.float32])
        return
    wanted = results(block, x)
    for p in trained(model):
        p.grad = None
    y = checkpoint(run, x, use_reentrant=reentrant)
    y.square().sum().backward()
    torch.testing.assert_close(y.detach(), wanted[0])
    for p, want in zip(trained(block), wanted[1], strict=True):
        torch.testing.assert_close(p.grad, want)


def test_passes_that_overlap_keep_their_own_numbers():
    model, x = build(placement="add"), inputs()
    first = model(x)
    wanted = torch.autograd.grad(exact_twin(model)(x.double()).square().sum(), trained(model))
    _data(model)
    second = model(x)
    assert error(second, exact_twin(model)(x.double()).detach()) <= TOLERANCE[torch.float32]
    for got, want in zip(torch.autograd.grad(first.square().sum(), trained(model)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_block_or_a_layer_called_on_its_own(placement):
    model, x = build(placement=placement), inputs()
    block = net(model).blocks[0]
    for module in (block, block.q, block.wide):
        for _ in range(2):
            assert_exact(module, x, TOLERANCE[torch.float32])
            _data(model)
            _write(model, "weight")
    y = block.q.forward(x)  # runs no hook
    assert error(y, exact_twin(block.q)(x.double())) <= TOLERANCE[torch.float32]


def test_a_part_with_gradients_inside_a_pass_without():
    model, x = build(placement="add"), inputs()
    block, seen = net(model).blocks[1], {}

    def with_gradients(module, args):
        with torch.enable_grad():
            seen["y"] = module.q(args[0])

    block.register_forward_pre_hook(with_gradients)
    with torch.no_grad():
        model(x)
    (slope,) = torch.autograd.grad(seen["y"].square().sum(), [block.q.adapters["default"].theta])
    assert bool(slope.any())


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("grads", [False, True])
def test_nothing_is_left_of_a_pass_that_broke_off(raised, grads):
    model, x = build(placement="add"), inputs()
    block = net(model).blocks[0]

    def fail(*_):
        raise raised

    hook = net(model).blocks[1].wide.register_forward_pre_hook(fail)
    with torch.set_grad_enabled(grads), pytest.raises(raised):
        model(x)
    hook.remove()
    _data(model)
    _write(model, "weight")
    assert current() is None
    assert_exact(block, x, TOLERANCE[torch.float32])
    assert_exact(model, x, TOLERANCE[torch.float32])


def test_a_pass_holds_its_input_no_longer_than_it_runs():
    model = build(placement="add")
    for grads in (False, True):
        x = inputs()
        alive = weakref.ref(x)
        with torch.set_grad_enabled(grads):
            model(x).sum()
        del x
        gc.collect()
        assert alive() is None


def test_two_adapters_one_kept_in_step_with_the_other():
    model, x = build(placement="add"), inputs()
    model.add_adapter("old", KINDS["cayley"](target_modules=LINEARS))
    for layer in layers_of(model):
        layer.adapters["old"].set_basis(layer.adapters["default"].support)
    optimiser = adam(model)
    for _ in range(3):
        model.set_adapter("default")
        results(model, x)
        optimiser.step()
        with torch.no_grad():
            policy = model(x)
            for layer in layers_of(model):
                layer.adapters["old"].theta.data.copy_(layer.adapters["default"].theta.data)
            model.set_adapter("old")
            assert torch.equal(model(x), policy)
    model.base_model.set_adapter(["default", "old"])
    with torch.no_grad():
        assert error(model(x), exact_twin(model)(x.double())) <= TOLERANCE[torch.float32]


def test_a_model_in_a_models_pass_takes_its_own_numbers():
    inner, outer, x = build(placement="add"), build("exp", placement="add"), inputs()
    block = net(inner).blocks[0]
    net(outer).blocks[0].register_forward_hook(lambda module, args, y: y + block(y) + inner(y))
    twins = [exact_twin(each) for each in (inner, block)]
    with torch.no_grad():
        got = outer(x)
        middle = {}
        handle = net(outer).blocks[1].register_forward_pre_hook(lambda module, args: middle.update(x=args[0]))
        outer(x)
        handle.remove()
    net(outer).blocks[0]._forward_hooks.clear()
    with torch.no_grad():
        first = net(outer).blocks[0](x)
        wanted = first.double() + twins[1](first.double()) + twins[0](first.double())
        assert error(middle["x"], wanted) <= TOLERANCE[torch.float32]
    assert got.shape == x.shape


# -- copies, replicas, threads -------------------------------------------------------------------


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("how", [copy.deepcopy, _pickled])
@pytest.mark.parametrize("kind", ["cayley", "tied", "boft", "hra"])
def test_a_copy_shares_nothing(kind, how, monkeypatch):
    model, x = build(kind, placement="add"), inputs()
    results(model, x)
    with torch.no_grad():
        before = model(x)
        part = how(net(model).blocks[0])
    twin = how(model)
    _data(twin)
    _data(part)
    for module in (twin, part):
        assert_exact(module, x, TOLERANCE[torch.float32])
    net(twin).checkpointing = False
    assert_exact(twin, x, TOLERANCE[torch.float32])
    if kind == "cayley":
        seen = solves(monkeypatch)
        results(twin, x)
        assert seen == [12, 12]
    with torch.no_grad():
        assert torch.equal(model(x), before)


def test_a_copy_of_a_block_does_not_copy_the_model():
    model = build()
    part = copy.deepcopy(net(model).blocks[0])
    originals = {id(layer) for layer in layers_of(model)}
    reachable, seen = [part], set()
    while reachable:
        each = reachable.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        assert id(each) not in originals
        held = vars(each) if hasattr(each, "__dict__") and not isinstance(each, type) else {}
        reachable += [v for v in held.values() if not callable(v) or isinstance(v, nn.Module)]
        if isinstance(each, (list, tuple)):
            reachable += each
        elif isinstance(each, dict):
            reachable += [*each.keys(), *each.values()]
    assert len([layer for layer in layers_of(part)]) == 6


@pytest.fixture
def replicas(monkeypatch):
    """torch's own code of `nn.DataParallel`'s replicas, with only the broadcast replaced by clones
    on the CPU.
    """
    import importlib

    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t if detach else t.clone() for t in tensors] for _ in devices],
    )
    return lambda model: replicate.replicate(model, [0, 0])


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["cayley", "output", "tied", "boft", "hra"])
def test_replicas_compute_what_the_model_does_and_their_gradients_reach_it(kind, placement, checkpointing, replicas):
    model, x = build(kind, placement=placement), inputs()
    net(model).checkpointing = checkpointing
    wanted = results(model, x)
    for p in trained(model):
        p.grad = None
    outputs, errors = [None, None], []

    def run(i, replica):
        try:
            outputs[i] = replica(x.clone().requires_grad_())
        except Exception as failure:
            errors.append(failure)

    threads = [threading.Thread(target=run, args=each) for each in enumerate(replicas(model))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    sum(y.square().sum() for y in outputs).backward()
    for y in outputs:
        torch.testing.assert_close(y, wanted[0])
    for p, want in zip(trained(model), wanted[1], strict=True):
        torch.testing.assert_close(p.grad, 2 * want, rtol=1e-4, atol=1e-5)
    for layer in layers_of(model):
        for adapter in layer.adapters.values():
            assert adapter.layer is layer and all(m.layer.replica_of is None for m in adapter.members)


def test_a_replica_in_half_precision_keeps_small_rotations(replicas, monkeypatch):
    model, x = build(placement="add", dtype=torch.bfloat16), inputs(dtype=torch.bfloat16)
    for p in trained(model):
        p.data.mul_(0.02)
    with torch.no_grad():
        wanted = model(x)
        monkeypatch.setattr("loft_rs.layer.adapter.gram_root", None)  # a replica decomposes nothing
        assert all(torch.equal(replica(x), wanted) for replica in replicas(model))


def test_the_identity_is_left_for_good_and_costs_training_no_look(monkeypatch):
    model, x = build(), inputs()
    for p in trained(model):
        nn.init.zeros_(p)
    for layer in layers_of(model):
        layer.settle()
    base = copy.deepcopy(net(model))
    for block in base.blocks:
        for name in LINEARS:
            setattr(block, name, getattr(block, name).base_layer)
    for grads in (True, False, True):
        with torch.set_grad_enabled(grads):
            assert torch.equal(model(x), base(x))
    optimiser = adam(model)
    results(model, x)
    optimiser.step()
    looks, original = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: looks.append(1) or original(self))
    for _ in range(3):
        results(model, x)
        optimiser.step()
    assert not looks
    assert_exact(model, x, TOLERANCE[torch.float32])


def test_the_same_bits_again_and_again():
    model, x = build(placement="add"), inputs()
    first, second = results(model, x), results(model, x)
    assert torch.equal(first[0], second[0])
    assert all(map(torch.equal, first[1], second[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["cayley", "output", "tied", "oft"])
def test_other_precisions(kind, dtype):
    model, x = build(kind, dtype=dtype), inputs(dtype=dtype)
    for _ in range(2):
        assert_exact(model, x, TOLERANCE[dtype])
        _data(model)


def test_a_narrowed_adapter_goes_through_the_same_passes():
    model, x = build(placement="add"), inputs()
    loft_rs.narrow(model, 2)
    for change in (_data, lambda model: _write(model, "weight"), _fused_step):
        results(model, x)
        change(model)
        assert_exact(model, x, TOLERANCE[torch.float32])


def test_plain_layers_are_roots_of_their_own():
    torch.manual_seed(0)
    linear = loft_rs.nn.LoftLinear(nn.Linear(16, 12), torch.linalg.qr(torch.randn(16, 4))[0])
    model, x = nn.Sequential(linear, nn.Tanh()), inputs()
    for change in (lambda: nn.init.normal_(linear.adapters["default"].theta, std=0.2), lambda: _data(model)):
        change()
        assert_exact(model, x, TOLERANCE[torch.float32])
    with torch.no_grad():
        model(x)
        linear.base_layer.weight.mul_(1.1)
        assert error(model(x), exact_twin(model)(x.double())) <= TOLERANCE[torch.float32]


def test_hooks_go_with_the_adapter():
    model = Net()
    before = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    adapted = peft.get_peft_model(model, KINDS["cayley"](target_modules=LINEARS))
    plain = adapted.merge_and_unload()
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in plain.named_modules()} == before
    assert not any("_loft_root" in vars(module) for module in plain.modules())
