"""A compiled pass computes what the eager one does, at one solve, with the numbers that the tensors
hold when it begins.

Compiled by `aot_eager`, which traces as every backend does and runs the operations as they are; one
test goes through inductor. `LOFT_RS_LONG=1` compiles every kind in every way.
"""

import copy
import os
import sys
import threading

import peft
import pytest
import torch
from exact import KINDS, Block, Net, assert_exact, error, exact_twin, layers_of, net, trained
from reference import make_llama
from torch import nn
from torch._dynamo.utils import counters

from loft_rs.layer.forward_pass import current

CASES = ["cayley", "output", "tied", "oft", "hra", "magnitudes"]
# As in test_forward_pass.py: float32 arithmetic over a few products of at most 48 terms, and 2^-9
# for each of some ten roundings.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    assert current() is None


def inputs(rows: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


def small(kind: str = "cayley", blocks: int = 1, targets: tuple[str, ...] = ("q", "k"), base: nn.Module | None = None):
    """A PEFT model whose layers take the placements in turn: of q and k, which read one input, each
    has its own.
    """
    torch.manual_seed(0)
    base = Net() if base is None else base
    base.blocks = nn.ModuleList(Block() for _ in range(blocks))
    model = peft.get_peft_model(base, KINDS[kind](target_modules=list(targets), init_weights=False))
    for i, layer in enumerate(layers_of(model)):
        layer.placement = ("add", "rotate")[i % 2]
        for adapter in layer.adapters.values():
            if adapter.scale is not None:
                nn.init.normal_(adapter.scale, std=0.1)
    return model


def compiled(module, **options):
    return torch.compile(module, backend="aot_eager", fullgraph=True, **options)


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


# -- what is compiled ----------------------------------------------------------------------------


def the_peft_model(model):
    return compiled(model)


def the_base_model(model):
    return compiled(model.base_model.model)


def its_forward(model):
    model.forward = compiled(model.forward)
    return model


def the_bases_forward(model):
    model.base_model.model.forward = compiled(model.base_model.model.forward)
    return model


def every_block(model):
    for block in net(model).blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    return model


WAYS = [the_peft_model, the_base_model, its_forward, the_bases_forward, every_block]


def write(model, what: str) -> None:
    """Silently, as torch counts no such write."""
    for layer in layers_of(model):
        if what == "weight":
            layer.base_layer.weight.data.mul_(1.1)
        elif layer.base_layer.bias is not None:
            layer.base_layer.bias.data.add_(0.1)


def step(model) -> None:
    torch.optim.AdamW(trained(model), lr=0.05, fused=True).step()


def theta_data(model) -> None:
    for p in trained(model):
        p.data.copy_(p + 0.1 * torch.randn_like(p))


PAIRS = [(kind, the_peft_model) for kind in CASES]
PAIRS += [("cayley", the_base_model), ("tied", its_forward), ("output", the_bases_forward)]
PAIRS += [("cayley", every_block), ("magnitudes", every_block)]
if os.environ.get("LOFT_RS_LONG"):
    PAIRS = [(kind, way) for kind in CASES for way in WAYS]


@pytest.mark.parametrize("kind, way", PAIRS)
def test_passes_and_gradients_are_exact_whatever_was_written_since(kind, way):
    model, x = small(kind), inputs()
    twin = exact_twin(model)  # of the eager model; it reads the adapted layers' tensors anew in every pass
    run = way(model)
    assert_exact(run, x, TOLERANCE[torch.float32], twin)
    made = graphs()
    if way is not every_block:  # of which each may take a graph of its own
        assert made == 2  # to train and to evaluate
    for change in (theta_data, step, lambda m: write(m, "weight"), lambda m: write(m, "bias")):
        change(model)
        assert_exact(run, x, TOLERANCE[torch.float32], twin)
    assert graphs() == made


@pytest.mark.parametrize("kind", ["cayley", "tied"])
def test_a_new_support_is_seen(kind):
    model, x = small(kind), inputs()
    run, twin = the_peft_model(model), exact_twin(model)
    for _ in range(2):
        with torch.no_grad():
            assert error(run(x), twin(x.double())) <= TOLERANCE[torch.float32]
        for adapter in {layer.adapters["default"].owner for layer in layers_of(model)}:
            adapter.set_basis(torch.linalg.qr(torch.randn_like(adapter.support))[0])  # which may compile again
    model.get_submodule("base_model.model.blocks.0.q").adapters["default"].support.data.neg_()
    with torch.no_grad():
        assert error(run(x), twin(x.double())) <= TOLERANCE[torch.float32]
    graphs()


@pytest.mark.parametrize("kind, placement", [("cayley", "add"), ("output", "rotate")])
def test_layers_of_one_input_in_one_placement(kind, placement):
    """Which run as one node in an eager pass."""
    model, x = small(kind, targets=("q", "k", "v")), inputs()
    for layer in layers_of(model):
        layer.placement = placement
    assert_exact(the_peft_model(model), x, TOLERANCE[torch.float32], exact_twin(model))
    assert graphs() == 2


@pytest.mark.parametrize("kind", ["cayley", "output", "tied", "hra"])
def test_blocks_that_could_share_a_graph_take_their_own_values(kind):
    model, x = small(kind, blocks=4), inputs()
    run, twin = every_block(model), exact_twin(model)
    for change in (lambda m: None, theta_data):
        change(model)
        assert_exact(run, x, TOLERANCE[torch.float32], twin)
    graphs()


def test_a_compiled_block_with_and_without_a_root_around_it():
    model, x = every_block(small()), inputs()
    twin = exact_twin(model)
    for _ in range(2):
        assert_exact(net(model).blocks[0], x, TOLERANCE[torch.float32], net(twin).blocks[0])
        assert_exact(model, x, TOLERANCE[torch.float32], twin)
        theta_data(model)


@pytest.mark.parametrize("compiles", [lambda model: model, lambda model: model.base_model.model], ids=["peft", "base"])
def test_a_compiled_model_solves_once(compiles):
    """The base model's own hooks are outside its graph, but not those of the module inside it that
    holds all the layers.
    """
    config = KINDS["cayley"](target_modules=["q_proj", "down_proj"], init_weights=False)
    model, solves = peft.get_peft_model(make_llama(num_hidden_layers=2), config), []
    ids = torch.arange(6)[None]

    def counting(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        solves.append(sum("loft_rs.solve" in str(node.target) for node in graph.graph.nodes))
        return graph

    run = torch.compile(compiles(model), backend=counting, fullgraph=True)
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            torch.testing.assert_close(run(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert solves == [1, 1]  # to train and to evaluate


@pytest.mark.parametrize("kind", ["cayley", "hra"])
def test_a_graph_of_any_batch(kind):
    model = small(kind)
    run, twin = compiled(model, dynamic=True), exact_twin(model)
    for rows in (5, 9, 6):
        assert_exact(run, inputs(rows), TOLERANCE[torch.float32], twin)
    assert graphs() == 2


@pytest.mark.parametrize("kind", ["cayley", "output", "tied", "hra"])
def test_fewer_rows_than_the_rank_without_gradients(kind):
    model = small(kind)
    for layer in layers_of(model):
        layer.placement = "add"
    run, twin = the_peft_model(model), exact_twin(model)
    for change in (lambda m: None, theta_data, lambda m: write(m, "weight")):
        change(model)
        with torch.no_grad():
            assert error(run(inputs(2)), twin(inputs(2).double())) <= TOLERANCE[torch.float32]
    assert graphs() == 1


@pytest.mark.parametrize("kind", ["cayley", "output", "hra"])
def test_under_autocast(kind):
    model, x = small(kind), inputs()
    twin = exact_twin(model)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(x)
    run = the_peft_model(model)
    for change in (lambda m: None, theta_data):
        change(model)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            wanted, found = model(x), run(x)
        assert found.dtype == wanted.dtype
        exact = twin(x.double())
        for y in (wanted, found):
            assert error(y, exact.detach()) <= TOLERANCE[torch.bfloat16]
        slopes = torch.autograd.grad(found.float().square().sum(), trained(model))
        for got, want in zip(slopes, torch.autograd.grad(exact.square().sum(), trained(model)), strict=True):
            assert error(got, want.double()) <= TOLERANCE[torch.bfloat16]
    assert graphs() == 1


@pytest.mark.parametrize("kind, way", [("cayley", every_block), ("hra", the_peft_model)])
def test_a_layer_that_the_traced_pass_skips_has_no_gradient(kind, way):
    model, x = small(kind, targets=("q", "wide")), inputs()
    net(model).blocks[0].skip = True
    twin = exact_twin(model)
    assert_exact(way(model), x, TOLERANCE[torch.float32], twin)
    missing = [p.grad is None for p in trained(model)]
    assert any(missing) and not all(missing)


def test_two_adapters_take_turns_and_join():
    model, x = small(), inputs()
    model.add_adapter("old", KINDS["cayley"](target_modules=["q", "k"], init_weights=False))
    twin, run = exact_twin(model), the_peft_model(model)
    for names in (["default"], ["old"], ["default", "old"], ["default"]):
        model.base_model.set_adapter(names)
        for layer in layers_of(model):
            layer.adapters["old"].theta.data.mul_(1.1)
        with torch.no_grad():
            assert error(run(x), twin(x.double())) <= TOLERANCE[torch.float32]
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(run(x), model(x))
    model.merge_adapter()
    with torch.no_grad():
        assert error(run(x), twin(x.double())) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("way", [the_peft_model, every_block])
def test_checkpointed_blocks_of_a_compiled_model_and_compiled_blocks_in_checkpoints(way):
    model, x = small(blocks=2), inputs()
    twin = exact_twin(model)
    net(model).checkpointing = False
    run = way(model)
    for change in (lambda m: None, theta_data):
        change(model)
        assert_exact(run, x, TOLERANCE[torch.float32], twin)


def test_a_copy_of_a_compiled_model_has_numbers_of_its_own():
    model, x = small(), inputs()
    run = every_block(model)
    assert_exact(run, x, TOLERANCE[torch.float32], exact_twin(model))
    twin = copy.deepcopy(model)
    theta_data(twin)
    for each in (twin, model):
        assert_exact(each, x, TOLERANCE[torch.float32], exact_twin(each))


# -- a pass that breaks off, and passes at once --------------------------------------------------

BROKEN: list[type[BaseException]] = []


@torch.library.custom_op("loft_rs_tests::may_fail", mutates_args=())
def may_fail(x: torch.Tensor) -> torch.Tensor:
    if BROKEN:
        raise BROKEN[0]("this pass breaks off")
    return x.clone()


may_fail.register_fake(torch.empty_like)


class Breaking(Net):
    def forward(self, x):
        return may_fail(super().forward(x))


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("way", [the_peft_model, the_base_model, every_block])
def test_nothing_is_left_of_a_compiled_pass_that_broke_off(way, raised):
    model, x = small(base=Breaking()), inputs()
    run, twin = way(model), exact_twin(model)
    with torch.no_grad():
        run(x)
        BROKEN.append(raised)
        try:
            with pytest.raises(raised, match="breaks off"):
                run(x)
        finally:
            BROKEN.clear()
        theta_data(model)
        assert error(run(x), twin(x.double())) <= TOLERANCE[torch.float32]
    assert all(adapter.handed is None for layer in layers_of(model) for adapter in layer.adapters.values())


class BreakingBlock(Block):
    def forward(self, x):
        return may_fail(super().forward(x))


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_compiled_block_that_broke_off(raised):
    model, x = small(), inputs()
    net(model).blocks[0].__class__ = BreakingBlock
    run, twin = every_block(model), exact_twin(model)
    with torch.no_grad():
        run(x)
        BROKEN.append(raised)
        try:
            with pytest.raises(raised, match="breaks off"):
                run(x)
        finally:
            BROKEN.clear()
        theta_data(model)
        assert error(run(x), twin(x.double())) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "kind, way",
    [(kind, way) for kind in ("cayley", "hra") for way in (the_peft_model, the_base_model, its_forward, every_block)],
)
def test_threads_that_run_one_compiled_model(kind, way):
    held = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        _serve(small(kind), way)
    finally:
        sys.setswitchinterval(held)


def _serve(model, way):
    xs = [inputs(seed=seed) for seed in range(6)]
    wanted = [(y.detach(), torch.autograd.grad(y.square().sum(), trained(model))) for y in map(model, xs)]
    run, errors, gate = way(model), [], threading.Barrier(len(xs))
    run(xs[0])

    def serve(i: int) -> None:
        try:
            gate.wait()
            for _ in range(100):
                y = run(xs[i])
                assert error(y, wanted[i][0].double()) <= 2 * TOLERANCE[torch.float32]
                slopes = torch.autograd.grad(y.square().sum(), trained(model))
                for got, want in zip(slopes, wanted[i][1], strict=True):
                    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        except BaseException as failure:
            errors.append(failure)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# -- whole programs ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cayley", "hra"])
def test_generate_with_a_static_cache_compiles_and_gives_the_same_logits(kind):
    from transformers import CompileConfig

    config = KINDS[kind](target_modules=["q_proj", "k_proj", "up_proj"], init_weights=False)
    model = peft.get_peft_model(make_llama(num_hidden_layers=1), config).eval()
    ids = torch.arange(6)[None]
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "min_new_tokens": 5}
    options |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def generated(**more) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack(model.generate(**options, **more).logits)

    compile_config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True  # else transformers compiles on a GPU alone
    for _ in range(2):
        wanted, found = generated(), generated(cache_implementation="static", compile_config=compile_config)
        assert error(found, wanted.double()) <= 2 * TOLERANCE[torch.float32]
        theta_data(model)
        write(model, "weight")
    assert graphs() == 1


def test_inductor_fuses_what_it_likes_and_computes_the_same():
    model, x = small("cayley"), inputs()
    run, twin = torch.compile(model, fullgraph=True), exact_twin(model)
    for change in (lambda m: None, theta_data):
        change(model)
        assert_exact(run, x, TOLERANCE[torch.float32], twin)
    assert graphs() == 2
