"""On a CUDA device: the function, its gradients and its start against float64 on the CPU. Skipped
without one.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from reference import basis_of, make_llama, token_batches
from torch.utils.checkpoint import checkpoint

import loft_rs
from loft_rs import LoftConfig
from loft_rs.layer.forward_pass import Root, watch
from loft_rs.layer.merging import factor_of
from loft_rs.nn import LoftLinear
from loft_rs.tuner.adapters import adapted_layers, owners

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Norm-wise: float32 arithmetic over 256 terms; bf16 carries 2^-9 in each of z, E, dY Q and the
# output.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

TRANSFORMS = ["cayley", "exp", "free", "cayley+halves", "exp+halves"]


# None, or `use_reentrant`.
CHECKPOINTING = pytest.mark.parametrize("reentrant", [None, False, True], ids=["whole", "non-reentrant", "reentrant"])


def rounding_bound(dtype, roundings: int, longest: int) -> float:
    """A norm-wise bound on the relative error after `roundings` products in a row, each of at most
    `longest` terms.

    A product adds half an eps of `dtype` for storing its result, and eps sqrt(longest) of float32,
    in which it is accumulated: sums of independent roundings grow with the root of their number
    (Higham and Mary 2019), and so do those of one product after the other. Factor 2: what the steps
    between them multiply an error by.
    """
    stored, accumulated = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps * longest**0.5
    return 2 * roundings**0.5 * (stored + accumulated)


def on_gpu(layer, dtype):
    twin = copy.deepcopy(layer).to("cuda")
    twin.base_layer.to(dtype)
    twin.loft_support["default"] = twin.loft_support["default"].to(dtype)
    twin.loft_theta["default"].data = twin.loft_theta["default"].data.float()
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("placement", ["rotate", "add"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_output_and_gradients_against_float64_on_the_cpu(dtype, side, placement, transform):
    torch.manual_seed(0)
    base = torch.nn.Linear(256, 192).to(dtype).double()
    layer = LoftLinear(base, basis_of(256 if side == "input" else 192, 16), transform, side)
    with torch.no_grad():
        layer.loft_theta["default"].normal_(std=0.1)
    layer.placement = placement
    twin = on_gpu(layer, dtype)
    x = torch.randn(64, 256).to(dtype)
    grad = torch.randn(64, 192).to(dtype)
    pairs = []
    for module, value, weight in ((layer, x.double(), grad.double()), (twin, x.cuda(), grad.cuda())):
        value.requires_grad_()
        y = module(value)
        y.backward(weight)
        pairs.append([t.detach().double().cpu() for t in (y, value.grad, module.loft_theta["default"].grad)])
    for wanted, got in zip(*pairs, strict=True):
        assert torch.linalg.norm(got - wanted) <= TOLERANCE[dtype] * torch.linalg.norm(wanted)


class Block(torch.nn.Module):
    """Two adapted layers of one root with an activation between them, run under checkpointing or
    not.
    """

    def __init__(self, dtype, placement, side, transform):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList()
        for n, m in ((128, 192), (192, 128)):
            layer = LoftLinear(
                torch.nn.Linear(n, m).to(dtype).double(), basis_of(n if side == "input" else m, 16, n), transform, side
            )
            layer.placement = placement
            with torch.no_grad():
                layer.loft_theta["default"].normal_(std=0.1)
            self.layers.append(layer)
        watch(self, Root(self.layers))
        self.reentrant = None

    def body(self, x):
        first, second = self.layers
        return second(torch.nn.functional.gelu(first(x)))

    def forward(self, x):
        return self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)

    def on(self, device, dtype):
        twin = copy.deepcopy(self).to(device)
        for layer in twin.layers:
            layer.base_layer.to(dtype)
            layer.loft_support["default"] = layer.loft_support["default"].to(dtype)
            layer.loft_theta["default"].data = layer.loft_theta["default"].data.float()
        return twin

    def gradients(self, x, weight):
        """Of the input and of each theta, after two steps' worth of backward: the second adds to
        what the first gave.
        """
        for scale in (1.0, 0.5):
            self(x).backward(scale * weight)
        return [x.grad, *(layer.loft_theta["default"].grad for layer in self.layers)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("placement", ["rotate", "add"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@CHECKPOINTING
def test_gradients_of_a_block_against_float64_on_the_cpu(dtype, side, placement, transform, reentrant):
    block = Block(dtype, placement, side, transform)
    twin = block.on("cuda", dtype)
    # P in the twin's precision, W and X too: what is compared is the arithmetic.
    for layer, other in zip(block.layers, twin.layers, strict=True):
        layer.loft_support["default"] = other.loft_support["default"].double().cpu()
        layer.loft_theta["default"].data = other.loft_theta["default"].data.double().cpu()
    twin.reentrant = reentrant
    x, weight = torch.randn(96, 128).to(dtype), torch.randn(96, 128).to(dtype)
    wanted = block.gradients(x.double().requires_grad_(), weight.double())
    got = twin.gradients(x.cuda().requires_grad_(), weight.cuda())
    # Forward, a layer: z, z E, Y; the activation; backward: dY Q, (dY Q) E, dX or dE, each twice;
    # the accumulation of two gradients.
    bound = rounding_bound(dtype, 2 * (3 + 3) + 2 + 1, 192)
    for a, b in zip(wanted, got, strict=True):
        assert torch.linalg.norm(b.double().cpu() - a) <= bound * torch.linalg.norm(a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["input", "output"])
@CHECKPOINTING
def test_gradients_of_a_peft_model_against_float64_on_the_cpu(dtype, side, reentrant):
    config = LoftConfig(r=8, target_modules="all-linear", support="random", side=side, init_weights=False)
    base = make_llama(attn_implementation="eager").to(dtype)
    reference = peft.get_peft_model(copy.deepcopy(base).double(), copy.deepcopy(config)).train()
    model = peft.get_peft_model(base.cuda(), config).train()
    for layer, other in zip(_loft_layers(reference), _loft_layers(model), strict=True):
        layer.loft_support["default"] = other.loft_support["default"].double().cpu()
        layer.loft_theta["default"].data = other.loft_theta["default"].data.double().cpu()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    batch = token_batches(1)[0]
    gradients = []
    for each, device in ((reference, "cpu"), (model, "cuda")):
        each(**{key: value.to(device) for key, value in batch.items()}).loss.backward()
        gradients.append(torch.cat([layer.loft_theta["default"].grad.double().cpu() for layer in _loft_layers(each)]))
    # A gradient passes two blocks forward and back: about 6 products a linear of the 4 in a row,
    # and 12 other operations, a block.
    bound = rounding_bound(dtype, 2 * (6 * 4 + 12), 80)
    assert torch.linalg.norm(gradients[1] - gradients[0]) <= bound * torch.linalg.norm(gradients[0])


def _loft_layers(model):
    return [module for module in model.modules() if isinstance(module, loft_rs.layer.AdaptedLinear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 256, 192), (1000, 1024, 4096), (1000, 4096, 1024), (7, 33, 65)])
def test_step_zero_is_the_base_layer_on_cuda(dtype, side, bias, shape):
    tokens, n, m = shape
    torch.manual_seed(0)
    base = torch.nn.Linear(n, m, bias=bias).to("cuda", dtype)
    layer = LoftLinear(base, basis_of(n if side == "input" else m, 16), side=side)
    x = torch.randn(tokens, n, device="cuda", dtype=dtype)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("placement", ["rotate", "add"])
def test_autocast_on_cuda_follows_nn_linear(dtype, x_dtype, side, placement):
    torch.manual_seed(0)
    base = torch.nn.Linear(256, 192).to(dtype).double()
    layer = LoftLinear(base, basis_of(256 if side == "input" else 192, 16), side=side)
    twin = on_gpu(layer, dtype)
    x, weight = torch.randn(4, 16, 256).to(x_dtype), torch.randn(4, 16, 192).bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(twin(x.cuda()), twin.base_layer(x.cuda()))
    with torch.no_grad():
        layer.loft_theta["default"].normal_(std=0.1)
        twin.loft_theta["default"].copy_(layer.loft_theta["default"])
    layer(x.double()).mul(0.5).backward(weight.double())
    with torch.autocast("cuda", torch.bfloat16):
        y = twin(x.cuda())
        assert y.dtype == twin.base_layer(x.cuda()).dtype == torch.bfloat16
        y.mul_(0.5).backward(weight.cuda())  # inside autocast, and of an output that was changed in place
    wanted, got = layer.loft_theta["default"].grad, twin.loft_theta["default"].grad.double().cpu()
    assert torch.linalg.norm(got - wanted) <= TOLERANCE[torch.bfloat16] * torch.linalg.norm(wanted)


@pytest.mark.parametrize("support", ["skewgrad", "pilot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibrate_train_save_load_and_export(tmp_path, dtype, support):
    base = make_llama(dtype).cuda()
    batches = [{k: v.cuda() for k, v in batch.items()} for batch in token_batches(4)]
    model = peft.get_peft_model(base, LoftConfig(r=8, target_modules="all-linear", support=support))
    report = loft_rs.calibrate(model, batches)
    assert all(0 < s.energy <= 1 for s in report.supports.values())
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, fused=True)
    model.train()
    losses = []
    for _ in range(10):
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and loft_rs.orthogonality_error(model) <= 1e-6
    with torch.no_grad():
        wanted = model.eval()(**batches[0]).logits
    model.save_pretrained(tmp_path / "loft")
    loaded = peft.PeftModel.from_pretrained(make_llama(dtype).cuda(), str(tmp_path / "loft")).eval()
    loft_rs.export_lora(model, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(make_llama(dtype).cuda(), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batches[0]).logits, wanted)
        difference = (lora(**batches[0]).logits - wanted).abs().max()
    assert difference <= (1e-5 if dtype == torch.float32 else 0.05)


def test_select_support_takes_cuda_tensors():
    g = torch.randn(96, 64, device="cuda", dtype=torch.bfloat16)
    support, reference = loft_rs.select_support(g, 8), loft_rs.select_support(g.cpu(), 8)
    assert (support.basis == reference.basis).all()


def test_peak_memory_holds_nothing_of_the_size_of_x():
    tokens, n, r = 8192, 2048, 16
    base = torch.nn.Linear(n, n, bias=False).to("cuda", torch.bfloat16).requires_grad_(False)
    layer = LoftLinear(base, basis_of(n, r))
    layer(torch.randn(8, n, device="cuda", dtype=torch.bfloat16).requires_grad_()).sum().backward()
    x = torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16).requires_grad_()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    held = torch.cuda.memory_allocated() - before - y.numel() * 2
    assert held <= 4 * tokens * r  # z in bf16, and the allocator's rounding


RECOVERED = {
    "oft": lambda **o: LoftConfig.oft(8, **o),
    "oft b32": lambda **o: LoftConfig.oft(32, **o),
    "oft shared": lambda **o: LoftConfig.oft(8, share=True, **o),
    "boft": lambda **o: LoftConfig.boft(4, 3, **o),
    "hra": lambda **o: LoftConfig.hra(6, **o),
    "psoft": lambda **o: LoftConfig.psoft(16, **o),
    "psoft neumann": lambda **o: LoftConfig.psoft(16, neumann_terms=3, **o),
}


@CHECKPOINTING
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", RECOVERED)
def test_recovered_methods_against_float64_on_the_cpu(method, dtype, reentrant):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(256, 192)).to(dtype)
    config = RECOVERED[method](target_modules=["0"], init_weights=False)
    low = peft.get_peft_model(copy.deepcopy(base), config)
    layer = low.base_model.model[0]
    exact = copy.deepcopy(low).double()
    low.cuda()
    assert all(p.dtype == torch.float32 for p in low.parameters() if p.requires_grad)
    x, grad = torch.randn(64, 256).to(dtype), torch.randn(64, 192).to(dtype)
    pairs = []
    for model, value, weight in ((exact, x.double(), grad.double()), (low, x.cuda(), grad.cuda())):
        value.requires_grad_()
        y = model(value) if reentrant is None or model is exact else checkpoint(model, value, use_reentrant=reentrant)
        y.backward(weight)
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        pairs.append([t.detach().double().cpu() for t in (y, value.grad, *trained)])
    for wanted, got in zip(*pairs, strict=True):
        assert torch.linalg.norm(got - wanted) <= TOLERANCE[dtype] * torch.linalg.norm(wanted)
    assert factor_of(layer.adapters["default"]).orthogonality_error() <= 1e-5 or "psoft" in method


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "transform", ["cayley", "free", "cayley_neumann:3", "cayley+halves"]
)  # torch's matrix_exp cannot be captured
def test_a_step_captured_in_a_cuda_graph_trains_as_the_eager_one(tied, transform):
    def make():
        torch.manual_seed(0)
        halves = transform.endswith("+halves")
        if halves:  # for supports that are set
            options = {"support": loft_rs.Pilot(halves=True)}
        else:
            options = {"support": "random", "init_weights": False, "transform": transform}
        config = LoftConfig(r=8, target_modules="all-linear", tied=tied, **options)
        model = peft.get_peft_model(make_llama(), config)
        if halves:
            layers = owners(adapted_layers(model)[1], "default")
            loft_rs.set_support(model, {name: basis_of(layer.in_features, 8) for name, layer in layers.items()})
            for layer in layers.values():
                torch.nn.init.normal_(layer.adapters["default"].theta, std=0.1 / 8**0.5)
        model = model.to("cuda").train()
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, trained, torch.optim.AdamW(trained, lr=1e-2, fused=True, capturable=True)

    # Without the mask, at which transformers would look from the host.
    batches = [{k: v.to("cuda") for k, v in batch.items() if k != "attention_mask"} for batch in token_batches(8)]

    def step(made, batch):
        model, _, optimiser = made
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    eager, captured = make(), make()
    static = {k: v.clone() for k, v in batches[0].items()}
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            step(captured, static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(captured, static)
    for _ in range(3):
        step(eager, batches[0])
    for batch in batches[1:]:
        for key, value in batch.items():
            static[key].copy_(value)
        graph.replay()
        torch.testing.assert_close(loss, step(eager, batch), atol=0, rtol=1e-5)
    moved = 0.0
    for a, b in zip(captured[1], eager[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
        moved = max(moved, float(b.detach().abs().max()))
    assert moved > 1e-2


@pytest.mark.parametrize("config", [LoftConfig.oft(8), LoftConfig.boft(8, 2), LoftConfig.hra(8), LoftConfig.psoft(8)])
def test_recovered_methods_take_no_rows_and_changes_in_place(config):
    config = copy.deepcopy(config)
    config.target_modules, config.init_weights = ["0"], False
    base = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False)).cuda()
    model = peft.get_peft_model(base, config)
    x = torch.randn(16, 64, device="cuda")
    grads = []
    for follow in (lambda y: y.add_(1).relu_(), lambda y: (y + 1).relu()):
        follow(model(x)).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    model(x[:0]).sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)
