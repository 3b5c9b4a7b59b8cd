"""Tied layers: one support and one transform for what reads one input, through every part of the
package.
"""

import peft
import pytest
import torch
from one_input import Model, blocks, passes
from safetensors.torch import load_file

import loft_rs
from loft_rs import LoftConfig
from loft_rs.layer.merging import factor_of


def build(tied=True, *, base=None, dtype=torch.float64, checkpointing=None, placement="add", **options):
    torch.manual_seed(0)
    base = Model(checkpointing).to(dtype) if base is None else base
    options = {"r": 6, "target_modules": ["q", "k", "v", "o"], "support": "random", "init_weights": False} | options
    model = peft.get_peft_model(base, LoftConfig(tied=tied, **options))
    for layer in model.modules():
        if hasattr(layer, "placement"):
            layer.placement = placement
    return model


def rotation(layer):
    return factor_of(layer.adapters["default"]).adjoint(torch.eye(layer.in_features, dtype=torch.float64)).detach()


def test_a_third_of_the_parameters_and_one_rotation():
    model, apart = build(), build(tied=False)
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, apart)]
    assert trained == [2 * 2 * 15, 2 * 4 * 15]
    block = blocks(model)[0]
    assert torch.equal(rotation(block.q), rotation(block.k)) and torch.equal(rotation(block.q), rotation(block.v))
    assert not torch.equal(rotation(block.q), rotation(block.o))


@pytest.mark.parametrize("placement", ["add", "rotate"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_the_gradient_is_the_sum_over_the_layers(checkpointing, placement):
    model, apart = build(checkpointing=checkpointing, placement=placement), build(tied=False, placement=placement)
    for mine, theirs in zip(blocks(model), blocks(apart), strict=True):
        for name in ("q", "k", "v", "o"):
            layer, other = getattr(mine, name), getattr(theirs, name)
            other.adapters["default"].set_basis(layer.adapters["default"].support)
            other.loft_theta["default"].data.copy_(layer.adapters["default"].theta)
    y, dx, grads = passes(model)
    expected = passes(apart)
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(dx, expected[1])
    summed = []
    for block in blocks(apart):
        summed.append(sum(layer.loft_theta["default"].grad for layer in (block.q, block.k, block.v)))
        summed.append(block.o.loft_theta["default"].grad)
    torch.testing.assert_close(grads, summed)


@pytest.mark.parametrize("support", ["skewgrad", "gradsvd", "activation"])
def test_calibration_chooses_the_best_support_of_the_sum(support):
    model = build(support=support, init_weights=True, r=8)
    data = [
        {"x": torch.randn(40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(i))} for i in range(2)
    ]
    seen: dict = {}

    def record(name):
        def hook(module, inputs, output):
            if output.requires_grad:
                output.register_hook(lambda g: seen.setdefault(name, []).append((inputs[0].detach(), g)))

        return hook

    def step():
        for batch in data:
            (model(batch["x"].requires_grad_()) ** 2).sum().backward()

    handles = [getattr(blocks(model)[0], n).base_layer.register_forward_hook(record(n)) for n in ("q", "k", "v")]
    report = loft_rs.calibrate(model, train_step=step)
    for handle in handles:
        handle.remove()
    assert list(report.supports) == ["blocks.0.q", "blocks.0.o", "blocks.1.q", "blocks.1.o"]
    block = blocks(model)[0]
    p = block.q.adapters["default"].support
    gradients = {n: sum(g.T @ x for x, g in pairs) / 2 for n, pairs in seen.items()}  # two passes
    if support == "activation":
        whole = torch.linalg.eigvalsh(sum(b["x"].T @ b["x"] for b in data)).flip(0).detach()
        kept = torch.cat([b["x"] for b in data]).detach() @ p
        best, got = whole[:8].sum(), kept.square().sum()
    elif support == "gradsvd":
        g = torch.cat(list(gradients.values()))
        best, got = torch.linalg.svdvals(g)[:8].square().sum(), (g @ p).square().sum()
    else:
        s = sum(getattr(block, n).base_layer.weight.T @ g for n, g in gradients.items()).detach()
        s = (s - s.T) / 2
        best, got = torch.linalg.svdvals(s)[:8].square().sum(), (p.T @ s @ p).square().sum()
    # A layer as wide as the sketch is calibrated exactly.
    assert got >= 0.9999 * best
    assert block.k.adapters["default"].ready and block.k.adapters["default"].support is p


def test_principal_is_that_of_the_stacked_weights():
    block = blocks(build(support="principal", r=4))[0]
    stacked = torch.cat([layer.base_layer.weight for layer in (block.q, block.k, block.v)]).detach()
    p = block.v.adapters["default"].support
    assert (stacked @ p).square().sum() >= 0.9999 * torch.linalg.svdvals(stacked)[:4].square().sum()


def test_saved_once_loaded_exactly_exported_and_merged(tmp_path):
    model = build(dtype=torch.float32)
    x = torch.randn(3, 24)
    y = model(x)
    model.save_pretrained(tmp_path / "loft")
    tensors = load_file(tmp_path / "loft" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 3 and not any(".k." in key or ".v." in key for key in tensors)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Model(), tmp_path / "loft")
    for layer in again.modules():
        if hasattr(layer, "placement"):
            layer.placement = "add"
    assert torch.equal(again(x), y)
    loft_rs.export_lora(model, tmp_path / "lora")
    torch.manual_seed(0)
    lora = peft.PeftModel.from_pretrained(Model(), tmp_path / "lora")
    torch.testing.assert_close(lora(x), y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(x), y, atol=1e-5, rtol=1e-5)


def test_supports_from_a_file_serve_tied_layers(tmp_path):
    model = build(support="gradsvd", init_weights=True)
    x = torch.randn(40, 24, dtype=torch.float64)
    report = loft_rs.calibrate(model, train_step=lambda: (model(x) ** 2).sum().backward())
    loft_rs.save_supports(tmp_path / "supports.safetensors", report.supports)
    again = build(support=str(tmp_path / "supports.safetensors"))
    assert blocks(again)[1].k.adapters["default"].ready
    torch.testing.assert_close(
        blocks(again)[1].k.adapters["default"].support,
        blocks(model)[1].q.adapters["default"].support,
        atol=1e-6,
        rtol=0,
    )
    fresh = build(support="gradsvd", init_weights=True)
    loft_rs.set_support(fresh, report.supports)
    assert blocks(fresh)[0].v.adapters["default"].ready


def test_a_second_adapter_and_its_deletion():
    model = build()
    model.add_adapter("other", LoftConfig(r=4, target_modules=["q", "k"], support="random", tied=[["q", "k"]]))
    block = blocks(model)[0]
    assert block.k.adapters["other"].owner.layer is block.q and block.v.adapters["default"].owner.layer is block.q
    model.set_adapter("other")
    model.delete_adapter("default")
    assert not block.k.has_adapter("default") and block.k.adapters["other"].tied_layers == [block.q, block.k]
    assert not any(key.endswith(".default") for key in model.state_dict() if ".loft_" in key)
    assert torch.isfinite(model(torch.randn(2, 24, dtype=torch.float64))).all()


def test_a_compiled_tied_model_gives_the_eager_result():
    model = build(dtype=torch.float32)
    x = torch.randn(5, 24)
    y = model(x)
    y.square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    z = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    z.square().sum().backward()
    torch.testing.assert_close(z, y)
    torch.testing.assert_close([p.grad for p in model.parameters() if p.requires_grad], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": "output"}, "tied needs side='input'"),
        ({"tied": "q"}, "tied must be True, False or a list of lists"),
        ({"tied": [["q"]]}, "tied must be True, False or a list of lists"),
        ({"tied": [["x", "y"]]}, "matches no two adapted modules"),
        ({"rank_pattern": {"k": 4}}, "tied modules must have one rank"),
    ],
)
def test_bad_arguments_are_named_and_leave_the_model_alone(options, message):
    base = Model()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        build(**({"base": base} | options))
    assert [name for name, _ in base.named_modules()] == before
