"""`calibrate` at scale: any model, base and precision, several processes, faults."""

from __future__ import annotations

import importlib.util
import os
from datetime import timedelta

import numpy as np
import peft
import pytest
import torch
from calibrated import build, dense_gradients, skew_of, span_energy
from memory import assert_same, bases
from reference import make_llama, token_batches, untouched
from torch import nn

import loft_rs
from loft_rs import LoftConfig, NonFiniteError, calibrate
from loft_rs.sketch.plan import OVERSAMPLING
from loft_rs.tuner.adapters import adapted_layers

SUPPORTS = ["skewgrad", "gradsvd", "activation", "principal"]


# -- any model -----------------------------------------------------------------------------------


def captured(report, weights, gradients, side="input"):
    """||P^T S P||^2 over the most that the rank allows, by layer, where the sketch is exact."""
    found = {}
    for name, support in report.supports.items():
        if (
            len(support.basis) <= support.rank + OVERSAMPLING
        ):  # the sketch is as wide as the layer: nothing is left to chance
            s = skew_of(weights[name], gradients[name], side)
            best = float((torch.linalg.svdvals(s)[: support.rank] ** 2).sum())
            found[name] = span_energy(torch.from_numpy(support.basis).double(), s) / best
    return found


# float16 keeps 11 bits of a number, bfloat16 8: a gradient that went through two blocks of it is
# off by a few parts of 2^-11 or 2^-8, and a captured energy, stationary at the optimum, by the
# square of that over the gap of the spectrum.
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.999), (torch.float16, 0.998), (torch.bfloat16, 0.97)])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_half_precision_and_checkpointing_against_dense_float64(dtype, least, checkpointing):
    batches = token_batches(3)
    model = build(make_llama(dtype, attention_dropout=0.5), support="skewgrad", r=16)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.train()
    blocks = model.base_model.model.model.layers
    calls = []
    blocks[0].mlp.up_proj.base_layer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    report = calibrate(model, batches)
    # Once to see the shapes; then twice a batch and pass where the block is checkpointed.
    assert len(calls) == 1 + 2 * 3 * (1 if checkpointing is None else 2)
    weights, gradients, *_ = dense_gradients(batches)
    found = captured(report, weights, gradients)
    assert len(found) == 12 and min(found.values()) >= least
    assert all(module.training for module in model.modules())
    assert all(
        "evaluated" not in str(block._gradient_checkpointing_func) for block in blocks if checkpointing is not None
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointed_blocks_run_without_dropout(checkpointing):
    from transformers import BertConfig, BertForSequenceClassification

    def made(dropout, checkpointing=None):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
        )
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        model = build(BertForSequenceClassification(config), support="skewgrad", target_modules=["query", "dense"])
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        return model.train()

    batches = token_batches(2, classes=True)
    wanted = calibrate(made(0.0), batches)
    assert_same(calibrate(made(0.9, checkpointing), batches), wanted, atol=1e-4)


def test_one_module_in_two_places_and_an_input_without_gradient():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.last = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 3)
            self.second.weight = self.first.weight  # two modules, one weight

        def forward(self, x):
            h = self.first(x).tanh()
            h = self.second(self.first(h).tanh()).tanh()
            return {"loss": self.last(h).square().sum()}

    x = torch.randn(30, 20, generator=torch.Generator().manual_seed(2))
    assert not x.requires_grad
    model = peft.get_peft_model(
        Shared(), LoftConfig(r=6, target_modules=["first", "second", "last"], support="skewgrad")
    )
    report = calibrate(model, [{"x": x}])
    plain = Shared().double()
    plain.second.weight = nn.Parameter(plain.first.weight.detach().clone())
    plain(x.double())["loss"].backward()
    named = {name: getattr(plain, name).weight for name in ("first", "second", "last")}
    found = captured(report, {n: w.detach() for n, w in named.items()}, {n: w.grad for n, w in named.items()})
    assert min(found.values()) >= 0.9999


def test_packed_sequences_count_as_sequences_apart():
    rows = token_batches(1, size=4, length=12)[0]["input_ids"]
    labels = rows.clone()
    labels[:, 0] = -100  # what a sequence starts with follows nothing
    apart = calibrate(build(make_llama(torch.float64), support="skewgrad"), [{"input_ids": rows, "labels": labels}])
    packed = {
        "input_ids": rows.reshape(1, -1),
        "labels": labels.reshape(1, -1),
        "position_ids": torch.arange(12).repeat(4)[None],
    }
    together = calibrate(build(make_llama(torch.float64), support="skewgrad"), [packed])
    assert_same(together, apart, atol=1e-5)
    blind = calibrate(
        build(make_llama(torch.float64), support="skewgrad"), [{k: packed[k] for k in ("input_ids", "labels")}]
    )
    assert max(np.abs(blind.supports[n].basis - b).max() for n, b in bases(apart).items()) > 0.01


@pytest.mark.parametrize("side", ["input", "output"])
def test_conv1d_of_gpt2_against_dense_float64(side):
    from transformers import GPT2Config, GPT2LMHeadModel

    def made():
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
            )
        )

    batches = token_batches(2)
    model = build(
        made(), support="skewgrad", side=side, target_modules=["c_attn", "c_proj", "c_fc"], r=16, fan_in_fan_out=True
    )
    report = calibrate(model, batches)
    plain = made().double()
    for batch in batches:
        plain(**batch).loss.backward()
    modules = dict(plain.named_modules())
    weights = {name: modules[name].weight.detach().mT for name in report.supports}
    gradients = {name: modules[name].weight.grad.mT for name in report.supports}
    found = captured(report, weights, gradients, side)
    assert len(found) == (6 if side == "input" else 4) and min(found.values()) >= 0.9999


# -- any base ------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Four linear layers, a mean loss, an input without gradient."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 24))
        self.to(dtype)

    def forward(self, x):
        h = self.a(x).tanh()
        h = self.c(self.b(h).tanh()).tanh()
        return {"loss": (self.d(h).float() - 1).square().mean()}


def torchao(config):
    from torchao import quantization

    def quantise(model):
        quantization.quantize_(model.requires_grad_(False), config(quantization))
        return {name: layer.weight.dequantize().double() for name, layer in model.named_children()}

    return quantise


def bitsandbytes(bits):
    import bitsandbytes as bnb

    def quantise(model):
        weights = {}
        for name, layer in list(model.named_children()):
            n, m = layer.in_features, layer.out_features
            if bits == 4:
                new = bnb.nn.Linear4bit(n, m, compute_dtype=layer.weight.dtype, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(n, m, has_fp16_weights=False)
            new.load_state_dict(layer.state_dict())
            new = new.to("cpu").requires_grad_(False)
            setattr(model, name, new)
            if bits == 4:
                weights[name] = bnb.functional.dequantize_4bit(new.weight.data, new.weight.quant_state).double()
            else:
                new(torch.zeros(1, n, dtype=layer.weight.dtype))  # which moves the scales to where they stay
                weights[name] = new.weight.data.double() * new.state.SCB[:, None].double() / 127
        return weights

    return quantise


BASES = {
    "torchao int8": ("torchao", lambda: torchao(lambda q: q.Int8WeightOnlyConfig())),
    "torchao int4": (
        "torchao",
        lambda: torchao(lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32))),
    ),
    "bitsandbytes 4-bit": ("bitsandbytes", lambda: bitsandbytes(4)),
    "bitsandbytes 8-bit": ("bitsandbytes", lambda: bitsandbytes(8)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("support", ["skewgrad", "gradsvd"])
@pytest.mark.parametrize("kind", BASES)
def test_quantised_bases_against_the_dequantised_dense_gradient(kind, support, dtype):
    package, make = BASES[kind]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    base = Stack(dtype)
    weights = make()(base)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    model = peft.get_peft_model(base, LoftConfig(r=16, target_modules=["a", "b", "c", "d"], support=support))
    report = calibrate(model, [{"x": x}])
    plain = Stack(torch.float64)
    for name, layer in plain.named_children():
        layer.bias.data.copy_(getattr(base, name).base_layer.bias.double())
        layer.weight.data.copy_(weights[name])
    plain(x.double())["loss"].backward()
    # The 8-bit base of bitsandbytes rounds its activations to 8 bits too.
    least = 0.95 if kind == "bitsandbytes 8-bit" or dtype == torch.bfloat16 else 0.995
    for name, layer in plain.named_children():
        p, g = torch.from_numpy(report.supports[name].basis).double(), layer.weight.grad
        if support == "skewgrad":
            s = skew_of(weights[name], g, "input")
            share = span_energy(p, s) / float((torch.linalg.svdvals(s)[:16] ** 2).sum())
        else:
            share = float((g @ p).square().sum() / (torch.linalg.svdvals(g)[:16] ** 2).sum())
        assert share >= least, (name, share)
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    before = float(model(x)["loss"])
    for _ in range(3):
        model(x)["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert float(model(x)["loss"]) < before


def test_skewgrad_never_touches_the_weight():
    closed = []

    class Sealed(nn.Module):
        """A linear layer whose weight is out of reach but in its own forward."""

        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features, self.inside = linear.in_features, linear.out_features, not closed
            self.packed, self.bias = nn.Parameter(linear.weight.detach(), requires_grad=False), linear.bias

        @property
        def weight(self):
            if closed:
                raise RuntimeError("the weight was touched")
            return self.packed

        def forward(self, x):
            return nn.functional.linear(x, self.packed, self.bias)

    def made(sealed):
        base = Stack(torch.float32)
        if sealed:
            for name, layer in list(base.named_children()):
                setattr(base, name, Sealed(layer))
        model = peft.get_peft_model(
            Stack(torch.float32), LoftConfig(r=16, target_modules=["a", "b", "c", "d"], support="skewgrad")
        )
        if sealed:
            for name, layer in adapted_layers(model)[1].items():
                layer.base_layer = getattr(base, name)
        return model

    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    wanted, model = calibrate(made(False), [{"x": x}]), made(True)
    closed.append(True)
    assert_same(calibrate(model, [{"x": x}]), wanted)


# -- faults --------------------------------------------------------------------------------------


class NanBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def test_a_batch_whose_gradient_is_nan_is_named():
    """The loss is finite, so only the layers see it."""
    model = build(support="skewgrad")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = token_batches(4)
    seen = []

    def hook(module, args, y):
        seen.append(True)
        return NanBackward.apply(y) if len(seen) == 4 else y  # the shapes, then batch 2

    handle = model.base_model.model.model.norm.register_forward_hook(hook)
    with pytest.raises(
        NonFiniteError, match=r"layer model\.layers\.\S+ saw NaN or Inf in calibration pass 1, batch 2 \(sketch\)"
    ):
        calibrate(model, batches)
    assert len(seen) == 4
    handle.remove()
    untouched(model, before)


def test_a_batch_whose_loss_is_nan_is_named():
    model = build(support="gradsvd")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = token_batches(3)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(batches[2]["input_ids"]).clone()
    embeds[1, 3] = float("inf")
    batches[2] = {"inputs_embeds": embeds, "labels": batches[2]["labels"]}
    with pytest.raises(NonFiniteError, match="batch 2 of the dataloader has a loss that is nan; nothing was changed"):
        calibrate(model, batches)
    untouched(model, before)


@pytest.mark.parametrize("how", ["detached", "elsewhere"])
def test_a_batch_without_gradient_is_named(how):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, odd=False):
            y = self.a(x)
            if odd:
                y = y.detach() if how == "detached" else x.clone().requires_grad_()
            return {"loss": y.square().mean()}

    x = torch.randn(5, 8)
    model = peft.get_peft_model(Model(), LoftConfig(r=2, target_modules=["a"], support="skewgrad"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match="calibration pass 1, batch 1: no adapted layer received a gradient; check that its loss"
    ):
        calibrate(model, [{"x": x}, {"x": x, "odd": True}])
    untouched(model, before)


def forward_hooks(model):
    return {name: (list(m._forward_pre_hooks), list(m._forward_hooks)) for name, m in model.named_modules()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("checkpointing", [None, False])
def test_an_interrupt_in_the_second_pass_leaves_everything_as_it_was(error, checkpointing):
    model = build(support="skewgrad")
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.train()
    hooks = forward_hooks(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.full_like(p, 3.0)
    held = [p.grad for p in trained]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def step():
        calls.append(None)
        model(**token_batches(1)[0]).loss.backward()
        if len(calls) == 2:
            raise error("stop")

    with pytest.raises(error, match="stop"):
        calibrate(model, train_step=step)
    assert len(calls) == 2 and all(module.training for module in model.modules())
    assert all(p.grad is g and bool((g == 3).all()) for p, g in zip(trained, held, strict=True))
    assert hooks == forward_hooks(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True, atol=0, rtol=0)
    assert all(layer.tap is None and not layer.adapters["default"].ready for layer in adapted_layers(model)[1].values())
    calibrate(model, token_batches(1))  # and it can be done again
    model(**token_batches(1)[0]).loss.backward()
    assert all(bool(p.grad.any()) for p in trained)


def test_wrapped_models_are_refused_with_what_to_do(tmp_path):
    model = build(support="skewgrad")
    with pytest.raises(ValueError, match=r"calibrate needs an eager model: call it before torch\.compile"):
        calibrate(torch.compile(model), token_batches(1))
    inside = build(support="skewgrad")
    inside.base_model.model.model.layers[0].compile()
    for call in (calibrate, loft_rs.refresh):
        with pytest.raises(ValueError, match=f"{call.__name__} needs an eager model"):
            call(inside, token_batches(1))
    with pytest.raises(ValueError, match=r"not DataParallel: pass model\.module"):
        calibrate(nn.DataParallel(model), token_batches(1))
    next(iter(model.parameters())).ds_id = 0  # what DeepSpeed marks a partitioned weight with
    with pytest.raises(ValueError, match=r"ZeRO-3 has partitioned: call it before deepspeed\.initialize"):
        calibrate(model, token_batches(1))


# -- several processes ---------------------------------------------------------------------------

DEGREES = {"support": "skewgrad", "r": 8}


def wide():
    return make_llama(torch.float64)


def calibrate_on_rank(rank, size, folder):
    """One of `size` processes, each with its share of four batches: plain, sharded by FSDP2,
    wrapped in DDP afterwards, and failing.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    from torch.distributed.fsdp import fully_shard

    share = token_batches(4)[rank * 4 // size : (rank + 1) * 4 // size]
    found = {}
    plain = build(wide(), **DEGREES)
    found["plain"] = bases(report := calibrate(plain, share, memory="250KiB"))
    found["batches"], found["groups"] = report.batches, report.memory.groups
    found["offloaded"] = bases(calibrate(build(wide(), **DEGREES), share, offload=True))

    sharded = build(wide(), **DEGREES)
    for block in sharded.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(sharded)
    found["fsdp2"] = bases(calibrate(sharded, share))
    sharded.train()(**share[0]).loss.backward()
    found["fsdp2 trains"] = all(bool(p.grad.full_tensor().any()) for p in sharded.parameters() if p.requires_grad)

    wrapped = nn.parallel.DistributedDataParallel(plain.train())
    try:
        calibrate(wrapped, share)
    except ValueError as error:
        found["wrapped"] = str(error)
    wrapped(**share[0]).loss.backward()
    found["gradients"] = [p.grad for p in plain.parameters() if p.requires_grad]

    before = {name: value.clone() for name, value in sharded.state_dict().items()}
    for what, batches, model in (
        ("uneven", share[: 0 if rank else 1] or token_batches(3), sharded),
        ("failing", share if rank else [{"input_ids": share[0]["input_ids"]}], build(wide(), **DEGREES)),
    ):
        try:
            calibrate(model, batches)
        except Exception as error:
            found[what] = f"{type(error).__name__}: {error}"
    local = lambda t: t.to_local() if hasattr(t, "to_local") else t  # noqa: E731
    found["kept"] = all(torch.equal(local(v), local(before[n])) for n, v in sharded.state_dict().items())
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort a closing interpreter


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("size", [2, 4])
def test_processes_get_the_supports_of_one_with_all_the_batches(size, tmp_path):
    torch.multiprocessing.spawn(calibrate_on_rank, (size, str(tmp_path)), nprocs=size)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(size)]
    wanted = bases(calibrate(build(wide(), **DEGREES), token_batches(4)))
    for found in ranks:
        assert found["batches"] == 4 and found["groups"] > 1
        for kind in ("plain", "offloaded", "fsdp2"):
            assert list(found[kind]) == list(wanted)
            for name, basis in found[kind].items():
                # float64 sums in another order, stored in float32
                np.testing.assert_allclose(basis, wanted[name], atol=1e-6, rtol=0)
                np.testing.assert_array_equal(basis, ranks[0][kind][name])
        assert found["fsdp2 trains"] and found["kept"]
        assert "pass model.module (accelerate: accelerator.unwrap_model(model)) in every process" in found["wrapped"]
        for one, other in zip(found["gradients"], ranks[0]["gradients"], strict=True):
            assert bool(one.any()) and torch.equal(one, other)
    assert any("equally many batches under FSDP2" in found["uneven"] for found in ranks)
    assert all(found["uneven"].startswith(("ValueError", "RuntimeError: rank")) for found in ranks)
    assert ranks[0]["failing"].startswith("ValueError: dataloader batches gave no loss")
    assert all(found["failing"].startswith("RuntimeError: rank 0 failed") for found in ranks[1:])
