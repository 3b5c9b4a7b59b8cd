"""The recovered methods (OFT, BOFT, HRA, PSOFT): factors against float64 references, and as
adapters like any other.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from loft_rs.factor import scale as scale_module
from loft_rs.factor.blocks import Blocks, RotateBlocks
from loft_rs.factor.low_rank import householder
from loft_rs.factor.scale import ScaleOutput
from loft_rs.layer.kinds import BlocksKind, ReflectionsKind, butterfly
from loft_rs.layer.merging import factor_of

EPS = torch.finfo(torch.float64).eps


def blocks_reference(delta: torch.Tensor, permutations: torch.Tensor | None, n: int) -> torch.Tensor:
    """R = F_0 F_1 ... as dense float64 matrices."""
    b, rotation = delta.shape[-1], torch.eye(n, dtype=delta.dtype)
    for i, factor in enumerate(delta):
        turned = torch.block_diag(*[torch.eye(b, dtype=delta.dtype) + d for d in factor.expand(n // b, b, b)])
        if permutations is not None:
            p = torch.zeros(n, n, dtype=delta.dtype)
            p[permutations[i], torch.arange(n)] = 1
            turned = p @ turned @ p.mT
        rotation = rotation @ turned
    return rotation


def householder_reference(u: torch.Tensor, reflection: bool) -> torch.Tensor:
    n = len(u)
    if reflection:
        q = torch.linalg.qr(u)[0]
        return torch.eye(n, dtype=u.dtype) - 2 * q @ q.mT
    rotation = torch.eye(n, dtype=u.dtype)
    for column in u.unbind(1):
        rotation = rotation - 2 * (rotation @ torch.outer(column, column)) / column.square().sum()
    return rotation


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    b=st.sampled_from([2, 3, 4, 6, 8, 32, 40]),
    stretches=st.integers(1, 3),
    factors=st.integers(1, 3),
    share=st.booleans(),
    told=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_against_dense_float64(b, stretches, factors, share, told, seed):
    if factors > 1 and b % 2:
        factors = 1
    n = b * stretches * 2 ** (factors - 1)
    delta = random(factors, 1 if share else n // b, b, b, seed=seed).requires_grad_()
    permutations = None if factors == 1 else butterfly(n, b, factors, torch.device("cpu"))
    x, g = random(2, 3, n, seed=seed + 1).requires_grad_(), random(2, 3, n, seed=seed + 2)
    rotation = blocks_reference(delta, permutations, n)
    factor = Blocks(delta, permutations, b << (factors - 1) if told else None)
    y = factor.apply(x)
    found, wanted = (torch.autograd.grad(out, (x, delta), g) for out in (y, x @ rotation.mT))
    scale = float(rotation.detach().abs().sum(1).max()) * 100 * n
    torch.testing.assert_close(y, x @ rotation.mT, atol=EPS * scale, rtol=0)
    torch.testing.assert_close(factor.adjoint(x), x @ rotation, atol=EPS * scale, rtol=0)
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, atol=EPS * scale * (1 + float(expected.abs().max())), rtol=0)


@given(st.integers(1, 9), st.integers(9, 24), st.booleans(), st.integers(0, 99))
def test_householder_against_the_product_of_reflections(r, n, reflection, seed):
    u, x, g = (
        random(n, r, seed=seed).requires_grad_(),
        random(4, n, seed=seed + 1).requires_grad_(),
        random(4, n, seed=seed + 2),
    )
    rotation = householder_reference(u, reflection)
    factor = householder(u, reflection=reflection)
    y = factor.apply(x)
    # Nearly dependent columns make S ill conditioned, and QR's gradient more so.
    spread = float(torch.linalg.cond(u.detach() / u.detach().norm(dim=0))) ** 2
    tolerance = 1e3 * EPS * n * spread
    torch.testing.assert_close(y, x @ rotation.mT, atol=tolerance, rtol=0)
    assert factor.orthogonality_error() <= tolerance
    for got, expected in zip(*(torch.autograd.grad(out, (x, u), g) for out in (y, x @ rotation.mT)), strict=True):
        torch.testing.assert_close(got, expected, atol=tolerance * (1 + float(expected.abs().max())), rtol=0)


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 99))
def test_paired_vectors_are_the_identity_and_keep_small_rotations_in_bf16(pairs, extra, seed):
    n = 2 * pairs + extra
    u = ReflectionsKind().theta(None, n, 2 * pairs, seed, True)
    assert torch.equal(householder(u).apply(random(3, n)), random(3, n)) or torch.allclose(
        householder(u).apply(random(3, n)), random(3, n), atol=1e3 * EPS * n, rtol=0
    )
    moved = u + 1e-3 * u.abs().max() * random(*u.shape, seed=seed)
    exact = householder(moved)
    change = exact.basis @ exact.delta @ exact.basis.mT
    low = householder(moved.float())
    p, e = low.basis.bfloat16().double(), low.delta.bfloat16().double()
    assert torch.linalg.norm(p @ e @ p.mT - change) <= 3e-2 * torch.linalg.norm(change)


@pytest.mark.parametrize("b, factors", [(2, 1), (2, 2), (4, 2), (8, 3), (4, 4)])
def test_butterfly_is_a_permutation_that_mixes(b, factors):
    n = b * 2**factors
    orders = butterfly(n, b, factors, torch.device("cpu"))
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(n))
    # With the last factor every stretch of b 2^(m-1) coordinates is connected.
    reach = torch.eye(n)
    for order in orders:
        blocks = torch.zeros(n, n)
        for block in order.view(-1, b):
            blocks[block[:, None], block] = 1
        reach = ((blocks @ reach) > 0).float()
    assert int(reach.sum(0).min()) >= b * 2 ** (factors - 1) / 2


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_blocks_save_their_input_once(factors):
    n, b = 64, 8
    x = torch.randn(5, n, requires_grad=True)
    delta = torch.randn(factors, n // b, b, b, requires_grad=True)
    permutations = None if factors == 1 else butterfly(n, b, factors, x.device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        RotateBlocks.apply(x, delta, permutations)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


@pytest.mark.parametrize(
    "wanted, width, factors, fitted", [(32, 768, 1, 32), (7, 20, 1, 5), (64, 40, 1, 40), (8, 48, 2, 8), (10, 48, 3, 12)]
)
def test_blocks_that_do_not_divide_take_the_nearest_size_that_does(wanted, width, factors, fitted):
    assert BlocksKind(factors).fit(wanted, width, 1) == fitted


peft = pytest.importorskip("peft")
from loft_rs import Blocks as Turned  # noqa: E402
from loft_rs import LoftConfig, Reflections, calibrate, export_lora, lora_factors, orthogonality_error  # noqa: E402
from loft_rs.inspection import inspect_adapter, text_table  # noqa: E402


def gram_schmidt(r: int, **options) -> LoftConfig:
    with (
        pytest.warns(UserWarning, match="starts at a reflection")
        if options.get("init_weights", True)
        else nullcontext()
    ):
        return LoftConfig.hra(r, gram_schmidt=True, **options)


CONFIGS = {
    "oft": lambda **o: LoftConfig.oft(8, **o),
    "oft shared": lambda **o: LoftConfig.oft(8, share=True, **o),
    "oft neumann": lambda **o: LoftConfig.oft(4, neumann_terms=3, **o),
    "boft": lambda **o: LoftConfig.boft(4, 2, **o),
    "hra": lambda **o: LoftConfig.hra(6, **o),
    "hra gram-schmidt": lambda **o: gram_schmidt(4, **o),
    "psoft": lambda **o: LoftConfig.psoft(8, **o),
    "psoft neumann": lambda **o: LoftConfig.psoft(8, neumann_terms=2, **o),
}
ORTHOGONAL = {"oft", "oft shared", "boft", "hra", "hra gram-schmidt"}
FULL_RANK = {"oft", "oft shared", "oft neumann", "boft"}
X = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.out = nn.Linear(32, 64), nn.Linear(64, 48, bias=False), nn.Linear(48, 32)

    def forward(self, x):
        return self.out(torch.tanh(self.down(torch.tanh(self.up(x)))))


def build(name: str, base: nn.Module | None = None, **options):
    config = CONFIGS[name](target_modules=["up", "down", "out"], **options)
    return peft.get_peft_model(base or Net(), config)


def train(model, steps: int = 4, x: torch.Tensor = X) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        (model(x) - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", CONFIGS)
def test_trains_saves_loads_and_merges(name, tmp_path):
    base = Net()
    model = build(name, copy.deepcopy(base))
    if name != "hra gram-schmidt":
        torch.testing.assert_close(model(X), base(X), atol=1e-6, rtol=0)
    before = (model(X) - 1).square().sum().item()
    train(model)
    model.eval()
    y = model(X).detach()
    assert (y - 1).square().sum() < before
    if name in ORTHOGONAL:
        assert orthogonality_error(model) <= 3e-6
    model.save_pretrained(tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a"))
    assert torch.equal(loaded(X), y)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a"), is_trainable=True)
    train(again)
    assert not torch.equal(again(X), y)

    weights = [p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n]
    model.merge_adapter()
    torch.testing.assert_close(model(X), y, atol=2e-6, rtol=1e-6)
    model.unmerge_adapter()
    assert all(
        torch.equal(w, p)
        for w, p in zip(weights, (p for n, p in model.named_parameters() if "base_layer" in n), strict=True)
    )
    torch.testing.assert_close(model.merge_and_unload(safe_merge=True)(X), y, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_merged_weight(name):
    """In float64, through the whole model: theta's gradient by finite differences of the merged
    network.
    """
    model = build(name, Net().double(), init_weights=False)
    x = X.double()
    model(x).square().sum().backward()
    for trained in [p for p in model.parameters() if p.requires_grad]:
        direction = random(*trained.shape, seed=5)
        slope, step = float((trained.grad * direction).sum()), 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                trained.add_(direction, alpha=sign * step)
                model.merge_adapter()
                values.append(float(model(x).square().sum()))
                model.unmerge_adapter()
                trained.sub_(direction, alpha=sign * step)
        numeric = (values[0] - values[1]) / (2 * step)
        assert abs(slope - numeric) <= 1e-5 * max(1, abs(numeric))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_keep_their_parameters_in_float32(name, dtype):
    exact, low = build(name), build(name, Net().to(dtype))
    train(exact)
    low.load_state_dict(
        {k: v.to(dtype) if "loft_" not in k or "support" in k else v for k, v in exact.state_dict().items()}
    )
    assert all(p.dtype == torch.float32 for p in low.parameters() if p.requires_grad)
    y = exact(X).detach()
    assert torch.linalg.norm(low(X.to(dtype)).float() - y) <= 3e-2 * torch.linalg.norm(y)
    low(X.to(dtype)).float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in low.parameters() if p.requires_grad)


class Quantised(nn.Linear):
    """8-bit weights with a scale for each row, as a quantised layer of any package: no dense weight
    to read.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


# PSOFT takes its support from a dense weight.
@pytest.mark.parametrize("name", [name for name in CONFIGS if "psoft" not in name])
def test_quantised_bases_are_turned_as_dense_ones(name):
    quantised, dense = Net(), Net()
    for module in ("up", "down", "out"):
        layer = Quantised(getattr(quantised, module))
        getattr(dense, module).weight.data = layer.weight * layer.scale
        setattr(quantised, module, layer)
    pair = [build(name, base, init_weights=False) for base in (quantised, dense)]
    pair[0].load_state_dict({k: v for k, v in pair[1].state_dict().items() if "loft_" in k}, strict=False)
    for model in pair:
        train(model)
    torch.testing.assert_close(pair[0](X), pair[1](X), atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="dense base weight"):
        pair[0].merge_adapter()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_follows_may_change_the_output_in_place(name):
    class InPlace(Net):
        def forward(self, x):
            return self.out(torch.tanh(self.down(self.up(x).mul_(0.5)).add_(1).relu_()))

    grads = []
    for _ in range(2):
        model = build(name, InPlace().double(), init_weights=False)  # the same start: Net sets the seed
        if grads:  # the second copies what the layers give, and so has nothing to protect
            for module in ("up", "down", "out"):
                getattr(model.base_model.model, module).register_forward_hook(lambda m, a, y: y.clone())
        model(X.double()).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_leaves_the_rotation_in_float32(name):
    """Under autocast a float32 base layer multiplies in bf16, and the small matrices are computed
    as without it.
    """
    model = build(name, init_weights=False)
    layer = model.base_model.model.up
    whole = factor_of(layer.adapters["default"]).apply(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(factor_of(layer.adapters["default"]).apply(X), whole)
        y = model(X)
        y.float().square().sum().backward()
    exact = model(X).detach()
    assert torch.linalg.norm(y.float() - exact) <= 3e-2 * torch.linalg.norm(exact)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_rows_at_all(name):
    model = build(name, init_weights=False)
    y = model(X[:0])
    assert y.shape == (0, 32)
    y.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)


@given(st.integers(1, 7), st.integers(1, 9), st.sampled_from([(), (3,), (2, 3)]), st.integers(0, 99))
def test_output_scale_against_float64(rows, m, leading, seed):
    shape = (*leading, rows, m) if leading else (m,)
    y, scale, g = random(*shape, seed=seed), random(m, seed=seed + 1), random(*shape, seed=seed + 2)
    scale[0] = -1  # a factor of 0
    inputs = y.requires_grad_(), scale.requires_grad_()
    wanted = torch.autograd.grad(y * (1 + scale), inputs, g)
    for got, expected in zip(torch.autograd.grad(ScaleOutput.apply(y, scale), inputs, g), wanted, strict=True):
        torch.testing.assert_close(got, expected, atol=EPS * 100, rtol=0)


def test_output_scale_sums_half_precision_in_float32(monkeypatch):
    monkeypatch.setattr(scale_module, "_SUMMED", 64)  # several pieces
    y, g = (1e-4 * random(40, 8, seed=s).to(torch.float16) for s in (0, 1))  # whose products float16 takes for 0
    scale = torch.zeros(8, requires_grad=True)
    ScaleOutput.apply(y, scale).backward(g)
    exact = (y.double() * g.double()).sum(0)
    assert float((scale.grad - exact).abs().max()) <= 40 * torch.finfo(torch.float32).eps * float(
        (y.double() * g.double()).abs().sum(0).max()
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_changes_nothing(name, reentrant):
    model = build(name, init_weights=False)
    x = X.clone().requires_grad_()
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CONFIGS)
def test_several_adapters_compose_and_ranks_may_differ(name):
    model = build(name, init_weights=False, rank_pattern={"down": 2})
    assert model.base_model.model.down.adapters["default"].rank == 2
    model.add_adapter("second", LoftConfig(r=4, target_modules=["up"], support="random", init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    y = model(X).detach()
    model.merge_adapter(["default", "second"])
    torch.testing.assert_close(model(X), y, atol=2e-6, rtol=1e-6)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert not any(".default" in key for key in model.state_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_lora_export_is_exact_or_says_what_it_loses(name, tmp_path):
    base = Net()
    model = build(name, copy.deepcopy(base))
    train(model)
    model.eval()
    y = model(X).detach()
    if name not in FULL_RANK:
        assert set(export_lora(model, tmp_path / "lora").values()) == {0.0}
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora"))
        torch.testing.assert_close(loaded(X), y, atol=5e-6, rtol=1e-5)
        return
    for call in (lambda: lora_factors(model), lambda: export_lora(model, tmp_path / "lora")):
        with pytest.raises(ValueError, match="merge_and_unload.*approximate_rank"):
            call()
    assert not (tmp_path / "lora").exists()
    with pytest.warns(UserWarning, match="approximate"):
        errors = export_lora(model, tmp_path / "lora", approximate_rank=4)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora"))
    turned = copy.deepcopy(model).merge_and_unload()
    served = loaded.merge_and_unload()
    for module in ("up", "down", "out"):
        w0, w, lora = (getattr(m, module).weight.detach() for m in (base, turned, served))
        assert errors[module] == pytest.approx(float(torch.linalg.norm(w - lora) / torch.linalg.norm(w - w0)), rel=1e-3)
    with pytest.warns(UserWarning, match="approximate|max-lora-rank"):
        assert max(export_lora(model, tmp_path / "whole", approximate_rank=64).values()) < 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_inspect_reads_what_the_layer_computes(name, tmp_path):
    model = build(name)
    train(model)
    model.save_pretrained(tmp_path)
    reports = {report.name.rpartition(".")[2]: report for report in inspect_adapter(tmp_path)}
    for module, report in reports.items():
        layer = getattr(model.base_model.model, module)
        eye = torch.eye(layer.in_features, dtype=torch.float64)
        r = factor_of(layer.adapters["default"]).adjoint(eye.float()).detach().double()
        largest = np.degrees(np.abs(np.angle(np.linalg.eigvals(r.numpy()))).max())
        if name != "boft":  # the angles of single factors are not the product's
            assert report.largest_angle == pytest.approx(largest, abs=1e-2)
        error = float(torch.linalg.matrix_norm(r.mT @ r - eye, 2))
        assert report.orthogonality_error == pytest.approx(error, abs=3e-6)
        assert report.rank == layer.adapters["default"].rank
    assert "3 modules" in text_table(list(reports.values()))


@pytest.mark.parametrize("name", CONFIGS)
def test_compiles_without_a_break(name):
    model = build(name, init_weights=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (model, compiled):
        y = run(X)
        y.square().sum().backward()
        grads.append([y.detach(), *[p.grad.clone() for p in model.parameters() if p.requires_grad]])
        model.zero_grad()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_parameter_counts_are_the_papers():
    def count(config):
        model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 48)), config)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    target = {"target_modules": ["0"]}
    assert count(LoftConfig.oft(8, **target)) == 8 * 28
    assert count(LoftConfig.oft(8, share=True, **target)) == 28
    assert count(LoftConfig.boft(8, 2, **target)) == 2 * 8 * 28 + 48
    assert count(LoftConfig.boft(8, 2, output_scale=False, **target)) == 2 * 8 * 28
    assert count(LoftConfig.hra(8, **target)) == 64 * 8
    assert count(LoftConfig.psoft(8, **target)) == 28 + 16
    assert count(LoftConfig(r=8, **target)) == 28


@pytest.mark.parametrize("name", sorted(FULL_RANK | {"hra"}))
def test_what_chooses_supports_refuses_adapters_without_one(name):
    model = build(name)
    with pytest.raises(ValueError, match="has none"):
        calibrate(model, [])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"support": "blocks", "side": "output"}, "side='input'"),
        ({"support": Reflections(), "side_pattern": {"up": "output"}}, "support='reflections' needs side='input'"),
        ({"support": "trained"}, r"are support=loft_rs.Reflections\(\)"),
        ({"transform": "householder"}, r"are support=loft_rs.Reflections\(\)"),
        ({"transform": "reflection"}, r"are support=loft_rs.Reflections\(\)"),
        ({"support": "blocks", "transform": "householder"}, r"are support=loft_rs.Reflections\(\)"),
        ({"transform": "cayley_neumann"}, "'cayley_neumann' needs its number of terms"),
        ({"transform": "cayley:3"}, "no other has one; got 'cayley:3'"),
        ({"transform": "cayley_neumann:0"}, "transform must be as in .*, got 'cayley_neumann:0'"),
        ({"transform": "cayley_neumann:"}, "transform must be as in .*, got 'cayley_neumann:'"),
        ({"transform": "free+magnitudes"}, "magnitudes needs"),
        ({"support": "blocks", "transform": "cayley+magnitudes"}, "magnitudes needs"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LoftConfig(r=4, **options)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Turned(factors=0), "factors must be a positive integer, got 0"),
        (lambda: Turned(factors=True), "factors must be a positive integer, got True"),
        (lambda: Turned(share=1), "share must be True or False, got 1"),
        (lambda: Turned(output_scale=None), "output_scale must be True or False, got None"),
        (lambda: Reflections(gram_schmidt="yes"), "gram_schmidt must be True or False, got 'yes'"),
    ],
)
def test_options_of_a_kind_are_checked_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_the_methods_set_and_the_names_say_is_one_thing():
    for name, made, written in (
        ("oft", LoftConfig.oft(8), LoftConfig(r=8, support="blocks")),
        ("oft shared", LoftConfig.oft(8, share=True), LoftConfig(r=8, support=Turned(share=True))),
        (
            "oft neumann",
            LoftConfig.oft(4, neumann_terms=3),
            LoftConfig(r=4, support="blocks", transform="cayley_neumann:3"),
        ),
        ("boft", LoftConfig.boft(4, 2), LoftConfig(r=4, support=Turned(factors=2, output_scale=True))),
        ("hra", LoftConfig.hra(6), LoftConfig(r=6, support="reflections")),
        ("psoft", LoftConfig.psoft(8), LoftConfig(r=8, transform="cayley+magnitudes", order="natural")),
        (
            "psoft neumann",
            LoftConfig.psoft(8, neumann_terms=2),
            LoftConfig(r=8, transform="cayley_neumann:2+magnitudes", order="natural"),
        ),
    ):
        for what in ("r", "options", "method", "transform_name", "output_scale", "order"):
            assert getattr(made, what) == getattr(written, what), (name, what)
        assert type(made.kind) is type(written.kind) and vars(made.kind) == vars(written.kind), name


def test_outputs_are_turned_and_scaled_in_the_order_of_merging():
    """A scale and an output rotation do not commute."""
    model = build("boft", init_weights=False)
    with torch.no_grad():
        model.base_model.model.up.loft_scale["default"].copy_(torch.linspace(-0.5, 0.5, 64))
    other = LoftConfig(r=4, target_modules=["up"], support="random", side="output", init_weights=False)
    model.add_adapter("second", other)
    for order in (["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(order)
        y = model(X).detach()
        model.merge_adapter(order)
        torch.testing.assert_close(model(X), y, atol=2e-6, rtol=1e-6)
        model.unmerge_adapter()


@pytest.mark.parametrize(
    "make, what",
    [
        (lambda: LoftConfig.hra(3), "r = 3 is odd"),
        (lambda: LoftConfig.hra(4, rank_pattern={"up": 5}), r"rank_pattern\['up'\] = 5 is odd"),
        (lambda: LoftConfig.hra(4, gram_schmidt=True), "starts at a reflection"),
    ],
)
def test_vectors_that_do_not_start_at_the_base_model_warn(make, what, recwarn):
    with pytest.warns(UserWarning, match=what):
        make()
    recwarn.clear()
    LoftConfig.hra(4)
    assert not recwarn


@pytest.mark.parametrize("fields", [{"r": 7}, {"r": 5, "support": Reflections()}])
def test_a_warning_is_of_the_line_that_makes_the_config(fields):
    with pytest.warns(UserWarning, match="is odd") as told:
        LoftConfig(**fields)
    assert [each.filename for each in told] == [__file__]


def test_fields_that_a_method_sets_are_named():
    with pytest.raises(TypeError, match=r"LoftConfig\.oft sets r itself"):
        LoftConfig.oft(32, r=8)
    with pytest.raises(ValueError, match=r"r \(the block size\) must be a positive integer"):
        LoftConfig.oft(0)


def test_a_width_without_a_block_size_is_named():
    with pytest.raises(ValueError, match="0: no block size near 8 divides a layer 37 wide; leave it out"):
        peft.get_peft_model(nn.Sequential(nn.Linear(37, 8)), LoftConfig.oft(8, target_modules=["0"]))
    assert BlocksKind().fit(2, 7 * 11, 8) == 7


def test_a_zero_vector_is_refused_when_loaded(tmp_path):
    model = build("hra")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    key = next(key for key in state if "loft_theta" in key)
    state[key][:, 1] = 0
    before = model(X)
    with pytest.raises(ValueError, match="holds a zero vector"):
        model.load_state_dict(state)
    assert torch.equal(model(X), before)


def test_factors_beyond_the_width_are_named():
    with pytest.raises(ValueError, match="factors=4 is more than"):
        peft.get_peft_model(nn.Sequential(nn.Linear(12, 8)), LoftConfig.boft(2, 4, target_modules=["0"]))
