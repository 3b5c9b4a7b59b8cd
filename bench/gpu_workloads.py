"""What the GPU benches share: the model shapes, the methods, one training step of each, and the
card's own ceilings.

Weights are random, the input requires a gradient, and the output is given one: so a frozen base has
a backward pass, and its step is the floor of every adapter's.
"""

from __future__ import annotations

import datetime
import functools
import gc
import importlib.metadata
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import peft
import peft.tuners.boft.layer
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, ViTConfig, ViTModel

from loft_rs import LoftConfig

# PEFT tries to build BOFT's CUDA kernel again in every layer where it failed in the first.
peft.tuners.boft.layer.get_fbd_cuda = functools.cache(peft.tuners.boft.layer.get_fbd_cuda)
PRECISION = {"bf16": torch.bfloat16, "fp32": torch.float32}
REENTRANT = {"non-reentrant": False, "reentrant": True}


@dataclass(frozen=True)
class Workload:
    """A base model of one shape and its batch. `tiny`: the same with toy sizes, to try a script on
    a CPU.
    """

    name: str  # 8b, encoder, vit
    precision: str
    device: str
    layers: int | None = None
    tokens: int = 8192
    tiny: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return PRECISION[self.precision]

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(self.device):
            model = {"8b": self._llama, "encoder": self._bert, "vit": self._vit}[self.name]()
            return model.to(self.dtype).requires_grad_(False)

    def _llama(self) -> nn.Module:
        sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
        if self.tiny:
            sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
        layers = self.layers or (2 if self.tiny else 4)
        return LlamaModel(
            LlamaConfig(vocab_size=1024, num_hidden_layers=layers, attn_implementation="sdpa", use_cache=False, **sizes)
        )

    def _bert(self) -> nn.Module:
        sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
        if self.tiny:
            sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
        layers = self.layers or (2 if self.tiny else 6)
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(num_hidden_layers=layers, attn_implementation="sdpa", **dropout, **sizes)
        return BertModel(config, add_pooling_layer=False)

    def _vit(self) -> nn.Module:
        sizes: dict[str, Any] = {}  # the default is ViT-B/16 at 224
        if self.tiny:
            sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "image_size": 32}
        layers = self.layers or (2 if self.tiny else 12)
        return ViTModel(
            ViTConfig(num_hidden_layers=layers, attn_implementation="sdpa", **sizes), add_pooling_layer=False
        )

    def batch(self) -> dict[str, Tensor]:
        """The model's keyword arguments; the one tensor among them requires a gradient."""
        generator = torch.Generator(self.device).manual_seed(1)

        def normal(*shape: int) -> Tensor:
            values = torch.randn(*shape, device=self.device, generator=generator)
            return values.to(self.dtype).requires_grad_()

        if self.name == "8b":
            length = 16 if self.tiny else 2048
            return {
                "inputs_embeds": normal(2 if self.tiny else self.tokens // length, length, 64 if self.tiny else 4096)
            }
        if self.name == "encoder":
            return {"inputs_embeds": normal(2, 8, 48) if self.tiny else normal(32, 128, 384)}
        return {"pixel_values": normal(2, 3, 32, 32) if self.tiny else normal(64, 3, 224, 224)}


def linears(model: nn.Module) -> list[str]:
    """The last parts of the linear layers' names: what `target_modules` takes, under any
    transformers' own naming.
    """
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})


@dataclass(frozen=True)
class Method:
    """One row: `config` makes the PEFT configuration for these target modules, None for the frozen
    base.

    half: the adapters stay in a half-precision base's dtype instead of PEFT's default, float32.
    """

    name: str
    config: Callable[[list[str]], Any] | None = None
    rank: int | None = None
    half: bool = False


BASE = Method("frozen base")


def has_tied() -> bool:
    return "tied" in LoftConfig.__dataclass_fields__


def loft(rank: int, tied: bool = False) -> Method:
    option = {"tied": tied} if has_tied() else {}

    def config(targets: list[str]) -> LoftConfig:
        return LoftConfig(r=rank, target_modules=targets, support="random", **option)

    return Method(f"LOFT{' tied' if tied else ''} r{rank}", config, rank)


def lora(rank: int, half: bool) -> Method:
    name = f"LoRA r{rank} {'bf16' if half else 'fp32'} adapters"
    return Method(name, lambda targets: peft.LoraConfig(r=rank, target_modules=targets), rank, half)


def psoft(rank: int, neumann: bool) -> Method:
    # The initial SVD has no part in a step; the exact one of 28 large matrices would take longer
    # than all of them.
    def config(targets: list[str]) -> Any:
        return peft.PsoftConfig(
            r=rank, psoft_alpha=rank, target_modules=targets, psoft_svd="lowrank", use_cayley_neumann=neumann
        )

    return Method(f"PSOFT r{rank} {'Neumann' if neumann else 'exact'}", config, rank)


OFT = Method("OFT b32", lambda targets: peft.OFTConfig(r=0, oft_block_size=32, target_modules=targets))
BOFT = Method(
    "BOFT b8 m2",
    lambda targets: peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules=targets),
)
HRA = Method("HRA r8", lambda targets: peft.HRAConfig(r=8, target_modules=targets), 8)


# The recovered methods as LOFT runs them.
RECOVERED = [
    Method("LOFT as OFT b32", lambda targets: LoftConfig.oft(32, target_modules=targets)),
    Method("LOFT as BOFT b8 m1", lambda targets: LoftConfig.boft(8, 1, target_modules=targets)),
    Method("LOFT as BOFT b8 m2", lambda targets: LoftConfig.boft(8, 2, target_modules=targets)),
    Method("LOFT as HRA r8", lambda targets: LoftConfig.hra(8, target_modules=targets), 8),
    # The support has no part in a step, as the initial SVD has none in PSOFT's.
    Method(
        "LOFT as PSOFT r64",
        lambda targets: LoftConfig(r=64, support="random", transform="cayley+magnitudes", target_modules=targets),
        64,
    ),
]


def loras(rank: int, precision: str) -> list[Method]:
    return [lora(rank, half) for half in ((True, False) if precision == "bf16" else (False,))]


def lofts(rank: int) -> list[Method]:
    return [loft(rank), *([loft(rank, tied=True)] if has_tied() else [])]


class Step:
    """One method's model with its optimiser; `run()` is a whole training step.

    `mode`: "eager"; "compiled", under torch.compile; "captured", as one CUDA graph that is
    replayed. The last two keep the eager step beside it: `run(eager=True)`, of the same parameters.
    """

    def __init__(self, workload: Workload, method: Method, *, mode: str = "eager", checkpointing: str | None = None):
        model = base = workload.base()
        self.notes: list[str] = []
        if method.config is not None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                config = method.config(linears(base))
                model = peft.get_peft_model(base, config, autocast_adapter_dtype=not method.half)
            self.notes = [
                _line(w.message) for w in caught if "CUDA extension" in str(w.message) or "butterfly" in str(w.message)
            ]
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": REENTRANT[checkpointing]})
        self.model = model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        fused = workload.device == "cuda"
        capturable = {"capturable": mode == "captured"}
        self.optimiser = torch.optim.AdamW(self.trained, lr=1e-4, fused=fused, **capturable) if self.trained else None
        self.batch = workload.batch()
        self.mode = mode
        self.forward = torch.compile(model) if mode == "compiled" else model
        with torch.no_grad():
            self.grad = torch.randn_like(model(**self.batch).last_hidden_state)
        self.graph = self._capture() if mode == "captured" else None

    def _capture(self) -> torch.cuda.CUDAGraph:
        aside = torch.cuda.Stream()
        with torch.cuda.stream(aside):
            for _ in range(3):  # what is made once, as the optimiser's state is, must not be made in the graph
                self.run(eager=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(eager=True)
        return graph

    def run(self, eager: bool = False) -> None:
        if self.mode == "captured" and not eager:
            self.graph.replay()
            return
        (self.model if eager else self.forward)(**self.batch).last_hidden_state.backward(self.grad)
        for value in self.batch.values():
            value.grad = None
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad()


def _line(message: object) -> str:
    return (str(message).splitlines() or [""])[0][:200]


class Card:
    """The device: its clock, its memory, its ceilings."""

    def __init__(self, device: str):
        self.device = device
        self.cuda = device == "cuda"

    def times(self, call: Callable[[], None], count: int) -> list[float]:
        """Milliseconds of each of `count` calls in a row after one that is not counted: a queue
        that never runs dry, as in training.
        """
        call()
        if not self.cuda:
            marks = [time.perf_counter()]
            for _ in range(count):
                call()
                marks.append(time.perf_counter())
            return [1e3 * (b - a) for a, b in pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)]

    def held(self) -> int | None:
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def peak(self, call: Callable[[], None]) -> int | None:
        """Bytes by which the allocated memory rises, at most, while `call` runs."""
        held = self.held()
        if held is None:
            return None
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held

    def clear(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name() if self.cuda else platform.processor() or platform.machine()
        versions = {name: importlib.metadata.version(name) for name in ("torch", "peft", "transformers")}
        return {
            "device": name,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            **versions,
            "fp32_matmul": torch.get_float32_matmul_precision(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }

    def copy_gb_s(self, size: int) -> float:
        """A device-to-device copy of `size` bytes, bytes read and written."""
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / (1e6 * median(self.times(lambda: target.copy_(source), 10)))

    def gemm_tflop_s(self, m: int, k: int, n: int, dtype: torch.dtype) -> float:
        """X (m x k) times W^T (k x n), as a linear layer's forward pass has them, on normal random
        numbers.
        """
        x = torch.randn(m, k, device=self.device, dtype=dtype)
        weight = torch.randn(n, k, device=self.device, dtype=dtype)
        out = torch.empty(m, n, device=self.device, dtype=dtype)
        return 2 * m * k * n / (1e9 * median(self.times(lambda: torch.mm(x, weight.mT, out=out), 20)))
