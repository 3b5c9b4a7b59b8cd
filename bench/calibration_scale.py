"""What calibration costs at size: time and memory above the frozen step, against what was known
beforehand and against full gradients.

    --cpu    a 1B-shaped Llama (16 layers, 2048 wide, mlp 8192), bf16, on this machine: the resident set's peak
    --cost   four Llama-3.1-8B-shaped layers, 8192 tokens, bf16, r = 64 (k = 80), on a CUDA device: a batch of pass 1 and of pass 2, with
             the check for NaN that follows it, and a batch with weight gradients, over the frozen
             forward and backward pass
    --pilot  four such layers under a language model's loss, 2048 tokens a batch: `support="pilot"` and skewgrad, over PEFT's LoRA
    --big    32 such layers with 4-bit weights on one CUDA device, calibrated for all linear layers at once and in groups

Weights are random. The times of --cost are medians of CUDA events in rounds that alternate with the
frozen step; a ratio is the median over the rounds of the ratio inside one. Memory is the
allocator's peak during a step above what is held before it, less the same of the frozen step.
`--out FILE` keeps the rows as JSON. `--tiny` tries --cost, --pilot and --big on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
from common import Report, machine, peak_extra
from gpu_workloads import Card, Workload, linears
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import loft_rs
from loft_rs.calibration.memory import MemorySurvey
from loft_rs.calibration.passes import require_finite
from loft_rs.sketch.base import Sketch
from loft_rs.sketch.plan import OVERSAMPLING, plan_for, sketch_for
from loft_rs.sketch.tap import LayerTap
from loft_rs.tuner.adapters import adapted_layers

RANK = 64
SHAPE_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPE_TINY = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
MIB = 2**20


class _Int4Product(torch.autograd.Function):
    """X W^T, the weight made anew in the backward pass, as bitsandbytes does it."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Int4Linear) -> Tensor:
        ctx.layer = layer
        return x @ layer.dense().mT

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient @ ctx.layer.dense(), None


class Int4Linear(nn.Module):
    """y = x W^T with W (m x n) of random 4-bit integers, two a byte, and a bf16 scale for every 64
    of a row.
    """

    GROUP = 64
    compute_dtype = torch.bfloat16

    def __init__(self, in_features: int, out_features: int, device: str):
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, None
        packed = torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        # The standard deviation of 0 .. 15 is 4.6; that of the weight is to be 0.02.
        scale = torch.full((out_features, in_features // self.GROUP, 1), 0.02 / 4.6, device=device)
        self.register_buffer("scale", scale.to(self.compute_dtype))

    def dense(self) -> Tensor:
        pairs = torch.stack([self.weight & 15, self.weight >> 4], -1).flatten(1).unflatten(1, (-1, self.GROUP))
        return ((pairs.to(self.compute_dtype) - 7.5) * self.scale).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return _Int4Product.apply(x, self)


def llama(device: str, int4: bool, **sizes: int) -> LlamaForCausalLM:
    """Random weights, made where they are to be: nothing larger than one of them exists besides."""
    config = LlamaConfig(attn_implementation="sdpa", use_cache=False, tie_word_embeddings=True, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if int4:
        for module in list(model.model.layers.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int4Linear(child.in_features, child.out_features, device))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                made = made.fill_(1.0) if parameter.dim() == 1 else made.normal_(0, 0.02)
                setattr(module, name, nn.Parameter(made, requires_grad=False))
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    return model


def batches(count: int, tokens: int, vocabulary: int, device: str) -> list[dict[str, Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    ids = [torch.randint(0, vocabulary, (1, tokens), generator=generator, device=device) for _ in range(count)]
    return [{"input_ids": each, "labels": each} for each in ids]


def adapted(base: nn.Module, targets: list[str]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, loft_rs.LoftConfig(r=RANK, target_modules=targets, support="skewgrad"))


def weights_of(model: nn.Module) -> int:
    """Entries of the adapted layers' weights: what a full gradient has."""
    return sum(layer.in_features * layer.out_features for layer in adapted_layers(model)[1].values())


def of_report(report: loft_rs.CalibrationReport) -> dict[str, Any]:
    held = report.memory
    return {
        "layers": len(report.supports),
        "groups": held.groups,
        "known_mib": held.total / MIB,
        "sketches_mib": held.sketches / MIB,
        "activations_mib": (held.activations or 0) / MIB,
        "workspace_mib": (held.workspace or 0) / MIB,
        "energy": sum(s.energy for s in report.supports.values()) / len(report.supports),
    }


def cpu(report: Report) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000}
    base = llama("cpu", False, num_attention_heads=32, num_key_value_heads=8, **sizes)
    targets = linears(base.model)
    given = batches(2, 64, 32000, "cpu")

    def step() -> None:
        embeds = base.get_input_embeddings()(given[0]["input_ids"]).requires_grad_()
        base(inputs_embeds=embeds, labels=given[0]["labels"]).loss.backward()

    step()
    _, frozen, taken = peak_extra(step)
    model = adapted(base, targets)
    held = sum(p.nbytes for p in model.parameters())
    full = {
        "full_gradients_fp32_mib": 4 * weights_of(model) / MIB,
        "full_gradients_bf16_mib": 2 * weights_of(model) / MIB,
    }
    common = {
        "weights_mib": held / MIB,
        "tokens": 64,
        "batches": 2,
        "frozen_step_mib": frozen / MIB,
        "frozen_step_s": taken,
    }
    for options in ({}, {"memory": "128MiB"}):
        found, extra, seconds = peak_extra(
            lambda options=options: loft_rs.calibrate(model, given, progress=False, **options)
        )
        extra_row = {"peak_mib": extra / MIB, "above_frozen_mib": (extra - frozen) / MIB, "s": seconds}
        report.add(memory=options.get("memory", "-"), **common, **extra_row, **of_report(found), **full)
        print(found.memory, flush=True)


class Tapped:
    """A model whose taps feed one pass's sketches."""

    def __init__(self, model: nn.Module, run: Callable[[], None]):
        self.run = run
        self.adapter, self.layers = adapted_layers(model)
        options = {"order": "input_pca", "seed": 0}
        self.plans = {n: plan_for("skewgrad", each, self.adapter, **options) for n, each in self.layers.items()}
        self.survey = MemorySurvey(self.plans, model, self.layers, self.adapter, False, {})
        for name, layer in self.layers.items():
            layer.tap = self.survey.tap([name], self.adapter)
        self.sketches: dict[str, Sketch] = {}

    def start(self, number: int) -> None:
        self.sketches = {n: sketch_for(self.plans[n], layer, self.adapter) for n, layer in self.layers.items()}
        for name, layer in self.layers.items():
            sketch = self.sketches[name]
            if number == 2:
                sketch.start_second_pass(torch.linalg.qr(sketch.omega[:, : sketch.columns])[0].contiguous())
            layer.tap = LayerTap(sketch, self.adapter)

    def batch(self) -> None:
        self.run()
        require_finite(self.sketches, "the bench")


def cost(report: Report, card: Card, tiny: bool, rounds: int) -> None:
    work = Workload("8b", "bf16", card.device, tiny=tiny)
    base = work.base().eval()
    inputs = work.batch()
    with torch.no_grad():
        gradient = torch.randn_like(base(**inputs).last_hidden_state)

    def run() -> None:
        base(**inputs).last_hidden_state.backward(gradient)
        inputs["inputs_embeds"].grad = None

    def trained(on: bool) -> None:
        for module in base.modules():
            if hasattr(module, "in_features"):
                module.weight.requires_grad_(on)
                module.weight.grad = None

    def full() -> None:
        trained(True)
        run()
        trained(False)

    def ratio(call: Callable[[], None]) -> tuple[list[float], list[float]]:
        for each in (run, call):
            card.times(each, 3)
        pairs = [(median(card.times(run, 6)), median(card.times(call, 6))) for _ in range(rounds)]
        return [a for a, _ in pairs], [b / a for a, b in pairs]

    # Weight gradients first, on the bare model; a second batch would add to them, which costs more.
    frozen = card.peak(run)
    steps, ratios = ratio(full)
    extra = None if frozen is None else (card.peak(full) - frozen) / MIB
    entries = sum(m.weight.numel() for m in base.modules() if hasattr(m, "in_features"))
    row = {"frozen_ms": median(steps), "over_frozen": median(ratios), "ratios": ratios, "extra_mib": extra}
    report.add(step="full gradients", **row, known_mib=2 * entries / MIB)

    model = adapted(base, linears(base))
    tapped = Tapped(model, run)
    with torch.no_grad():
        base(**inputs)
    names = list(tapped.layers)
    for number in (1, 2):
        known = tapped.survey._of_pass(number - 1, names)
        before = card.held()
        tapped.start(number)
        held = None if before is None else card.held() - before
        for layer in tapped.layers.values():
            layer.tap, layer.held_tap = None, layer.tap

        def switched(call: Callable[[], None] = tapped.batch) -> None:
            for layer in tapped.layers.values():
                layer.tap = layer.held_tap
            call()
            for layer in tapped.layers.values():
                layer.tap = None

        with model.disable_adapter():
            frozen = card.peak(run)
            steps, ratios = ratio(switched)
            extra = None if frozen is None else (held + card.peak(switched) - frozen) / MIB
        row = {"frozen_ms": median(steps), "over_frozen": median(ratios), "ratios": ratios, "extra_mib": extra}
        parts = {"sketches_mib": known.sketches / MIB, "activations_mib": known.activations / MIB}
        parts |= {"workspace_mib": known.workspace / MIB, "held_mib": None if held is None else held / MIB}
        report.add(step=f"pass {number}", k=RANK + OVERSAMPLING, **row, known_mib=known.total / MIB, **parts)


def pilot(report: Report, card: Card, tiny: bool, rounds: int) -> None:
    steps, tokens = 32, 2048
    sizes = SHAPE_8B | {"num_hidden_layers": 4, "vocab_size": 32000}
    if tiny:
        steps, tokens, sizes = 4, 16, SHAPE_TINY | {"num_hidden_layers": 2, "vocab_size": 64}
    base = llama(card.device, False, **sizes)
    targets = linears(base.model)
    given = batches(steps, tokens, sizes["vocab_size"], card.device)

    def lora(model: nn.Module) -> None:
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
        for batch in given:
            model(**batch).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    def supports(count: int) -> Callable[[nn.Module], object]:
        return lambda model: loft_rs.calibrate(model, given, max_batches=count, progress=False)

    def loft(support: str) -> loft_rs.LoftConfig:
        return loft_rs.LoftConfig(r=RANK, support=support, target_modules=targets)

    plain = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    ways: dict[str, tuple[peft.PeftConfig, Callable[[nn.Module], object], bool]] = {
        f"PEFT's LoRA r=64, fp32 adapters, {steps} steps": (plain, lora, True),
        f"PEFT's LoRA r=64, bf16 adapters, {steps} steps": (plain, lora, False),
        f"pilot, {steps} steps": (loft("pilot"), supports(steps), True),
        f"skewgrad, two passes over {min(8, steps)} batches": (loft("skewgrad"), supports(min(8, steps)), True),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (config, call, fp32) in ways.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = peft.get_peft_model(base, config, autocast_adapter_dtype=fp32)
            taken[name] += [ms / 1e3 for ms in card.times(lambda model=model, call=call: call(model), 1)]
            base = model.unload()
            del model
            gc.collect()
    first = next(iter(taken.values()))
    for name, each in taken.items():
        ratios = [mine / other for mine, other in zip(each, first, strict=True)]
        report.add(way=name, tokens=tokens, s=median(each), over_lora=median(ratios), ratios=ratios)


def big(report: Report, card: Card, tiny: bool) -> None:
    sizes = SHAPE_8B | {"num_hidden_layers": 32, "vocab_size": 32000}
    tokens = 2048
    if tiny:
        sizes, tokens = SHAPE_TINY | {"num_hidden_layers": 2, "vocab_size": 64}, 16
    base = llama(card.device, True, **sizes)
    given = batches(4, tokens, sizes["vocab_size"], card.device)
    weights = sum(t.nbytes for t in [*base.parameters(), *base.buffers()])

    def step() -> None:
        embeds = base.get_input_embeddings()(given[0]["input_ids"]).requires_grad_()
        base(inputs_embeds=embeds, labels=given[0]["labels"]).loss.backward()

    step()
    frozen, step_ms = card.peak(step), median(card.times(step, 5))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = adapted(base, targets)
    entries = weights_of(model)
    found: list[loft_rs.CalibrationReport] = []
    for options in ({}, {"memory": "1GiB"}, {"offload": True}):
        options = {"memory": "700KiB"} if tiny and "memory" in options else options
        begun = time.perf_counter()
        extra = card.peak(
            lambda options=options: found.append(loft_rs.calibrate(model, given, progress=False, **options))
        )
        seconds = time.perf_counter() - begun
        if extra is None:
            found.append(loft_rs.calibrate(model, given, progress=False, **options))
        peaks = (
            {}
            if extra is None
            else {
                "frozen_step_mib": frozen / MIB,
                "above_frozen_mib": (extra - frozen) / MIB,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            }
        )
        alike = max(abs(found[-1].supports[n].basis - s.basis).max() for n, s in found[0].supports.items())
        row = {"weights_gib": weights / 2**30, "tokens": tokens, "batches": 4, "frozen_step_ms": step_ms, "s": seconds}
        full = {"dense_bf16_weights_gib": 2 * entries / 2**30, "full_gradients_bf16_gib": 2 * entries / 2**30}
        full |= {"full_gradients_fp32_gib": 4 * entries / 2**30}
        name = " ".join(f"{key}={value}" for key, value in options.items()) or "at once"
        report.add(run=name, **row, **peaks, **of_report(found[-1]), apart_from_first=float(alike), **full)
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cpu", "cost", "pilot", "big"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("calibration_scale.json"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    card = Card("cpu" if arguments.tiny or arguments.cpu else "cuda")
    described = machine(arguments.threads, ["torch", "peft", "transformers"]) if arguments.cpu else card.describe()
    report = Report(arguments.out, described)
    for name, call in (
        ("cpu", lambda: cpu(report)),
        ("cost", lambda: cost(report, card, arguments.tiny, arguments.rounds)),
        ("pilot", lambda: pilot(report, card, arguments.tiny, arguments.rounds)),
        ("big", lambda: big(report, card, arguments.tiny)),
    ):
        if getattr(arguments, name):
            report.open(name)
            call()
            report.close(name)
            report.table(name)


if __name__ == "__main__":
    main()
