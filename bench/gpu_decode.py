"""One generated token of LOFT beside the frozen base, LoRA and merged LOFT, in one run.

    1b      Llama-1B-shaped: 16 layers, 2048 wide, 32 heads, 8 of them for keys and values
    1b-half its first 8 layers, which compile in half the time
    small   SmolLM2-135M's widths in 12 layers, for a CPU:  --device cpu --shape small

Random weights, a vocabulary of 1024 so that the head is no large part of a token, adapters on all
seven linears, moved away from the identity. `eager` decodes with transformers' DynamicCache;
`compiled` with its StaticCache and one compiled step, the prompt's pass left eager, as `generate`
does it.

A token is one forward pass of one new token per sequence, its argmax, and the host's reading of
it, as a server reads it to stop and to send: so the host's own time counts, and wall clock is the
measure on a GPU too. The prompt's pass is not counted. `ms` is the median over tokens.

A round measures all methods beside each other, in alternating order, and a ratio is the median
over the rounds of the ratio inside one round. `differs` is the largest difference between the
logits and those of what it names, over the largest logit, on the same tokens: LOFT beside merged
LOFT, a compiled step beside the eager one. It is recorded, not judged. The compiled frozen base
beside the eager one shows what rounding alone makes of it, and so does `--precision fp32`.
`fastest_ms`, of a single token, tells on a shared CPU what other programs took from the median.

`--generate` also times `model.generate`: what it adds from the second token on, a token, so a
mean. Its host may run ahead of the device, its compiled step gets the mask from outside, and all
methods keep their graphs under one function, transformers' own.

`--out FILE` keeps the rows as JSON, rewritten whole after each; other sections in it stay.
`--show` prints the tables of such a file and measures nothing. `--device cpu --tiny` tries the
script without a card.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import FunctionType
from typing import Any

import peft
import torch
from common import Report, describe, print_table
from gpu_workloads import BASE, PRECISION, Card, Method, loft, loras
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

VOCABULARY = 1024
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
    "1b-half": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
    "small": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12}
    | {"num_attention_heads": 9, "num_key_value_heads": 3},
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
}
# transformers renamed the argument; the old name is translated anew in every pass.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
WARM_UP = 4
COMPARED = 8  # steps whose logits are compared


@dataclass(frozen=True)
class Merged(Method):
    """A method whose adapters are merged into the base weights before it decodes."""


def chosen(rank: int, precision: str) -> list[Method]:
    adapted = loft(rank)
    merged = Merged(f"merged {adapted.name}", adapted.config, rank)
    return [BASE, *loras(rank, precision), adapted, merged]


def build(shape: str, method: Method, precision: str, device: str) -> nn.Module:
    """The method's model, from the same seeds for all: LOFT and merged LOFT are one function."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,  # `generate` must not end early
        pad_token_id=0,
        **SHAPES[shape],
    )
    with torch.device(device):
        # As a checkpoint is loaded, which leaves the rotary frequencies in float32.
        model = AutoModelForCausalLM.from_config(config, dtype=PRECISION[precision]).requires_grad_(False)
    if method.config is not None:
        adapter = method.config(TARGETS)
        adapter.task_type = "CAUSAL_LM"
        model = peft.get_peft_model(model, adapter, autocast_adapter_dtype=not method.half)
        _move(model)
    if isinstance(method, Merged):
        model = model.merge_and_unload()
    return model.eval()


def _move(model: nn.Module) -> None:
    """The adapters away from the identity, which some methods skip and which multiplies by zero."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "loft_theta" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)


def compiled_step(model: nn.Module, mode: str, fullgraph: bool) -> Callable[[Tensor, Any], Tensor]:
    """(tokens, cache) -> logits of one decode step, under torch.compile."""

    def step(tokens: Tensor, cache: Any) -> Tensor:
        return model(input_ids=tokens, use_cache=True, **{CACHE: cache}).logits

    # Dynamo keeps its graphs by code object. With one for all models, those compiled last would
    # have the guards of the others checked first, and all would share one recompile limit.
    own = FunctionType(step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__)
    return torch.compile(own, mode=mode, fullgraph=fullgraph, dynamic=False)


class Decoder:
    """One method's model and its greedy loop."""

    def __init__(self, model: nn.Module, prompt: Tensor, tokens: int):
        self.model, self.prompt, self.tokens = model, prompt, tokens
        self.length = prompt.shape[1] + tokens + 1
        self.step, self.static = self.eager, None

    def eager(self, tokens: Tensor, cache: Any) -> Tensor:
        return self.model(input_ids=tokens, use_cache=True, **{CACHE: cache}).logits

    def compile(self, mode: str, fullgraph: bool) -> None:
        self.step = compiled_step(self.model, mode, fullgraph)
        self.static = StaticCache(config=self.model.config, max_cache_len=self.length)

    def prefill(self, static: Any) -> tuple[Any, Tensor]:
        """A cache that holds the prompt, and the logits after it."""
        if static is None:
            cache = DynamicCache(config=self.model.config)
        else:
            cache = static
            cache.reset()  # the same tensors again: a graph knows their addresses
        return cache, self.eager(self.prompt, cache)[:, -1:]

    @torch.no_grad()
    def times(self, count: int | None = None) -> list[float]:
        """Milliseconds of each token after the first, which the prompt's pass gives."""
        cache, logits = self.prefill(self.static)
        tokens = logits.argmax(-1)
        tokens.tolist()
        marks = [time.perf_counter()]
        for _ in range(count or self.tokens):
            tokens = self.step(tokens, cache)[:, -1:].argmax(-1)
            tokens.tolist()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(marks)]

    @torch.no_grad()
    def logits(self, given: Tensor | None = None, eager: bool = False) -> Tensor:
        """Logits after the prompt and some tokens: the given ones (batch, steps), else its own."""
        cache, logits = self.prefill(None if eager else self.static)
        step = self.eager if eager else self.step
        found = [logits.float()]
        for index in range(min(COMPARED, self.tokens)):
            # Contiguous, as in the loop, or a compiled step is compiled again; and a copy of the
            # logits, as a replayed graph writes the next ones over them.
            tokens = found[-1].argmax(-1) if given is None else given[:, index : index + 1].contiguous()
            found.append(step(tokens, cache).float().clone())
        return torch.cat(found, dim=1)

    def generate_time(self, mode: str | None) -> float:
        """Milliseconds a token of `model.generate`, beyond the prompt's pass and the first
        token.
        """
        options: dict[str, Any] = {"do_sample": False, "attention_mask": torch.ones_like(self.prompt)}
        if mode is not None:
            compile_config = CompileConfig(mode=mode, fullgraph=True)
            compile_config._compile_all_devices = True  # else it compiles on a GPU alone
            options |= {"cache_implementation": "static", "compile_config": compile_config}

        def seconds(new: int) -> float:
            begun = time.perf_counter()
            self.model.generate(self.prompt, max_new_tokens=new, **options).tolist()
            return time.perf_counter() - begun

        return 1e3 * (seconds(self.tokens + 1) - seconds(1)) / self.tokens


class Section:
    """The methods in one mode with one batch, all of them alive."""

    def __init__(self, models: dict[str, nn.Module], mode: str, batch: int, arguments: argparse.Namespace):
        self.mode, self.arguments = mode, arguments
        device = arguments.device
        generator = torch.Generator(device).manual_seed(1)
        prompt = torch.randint(VOCABULARY, (batch, arguments.prompt), device=device, generator=generator)
        self.decoders = {name: Decoder(model, prompt, arguments.tokens) for name, model in models.items()}
        self.rows: dict[str, dict[str, Any]] = {name: {} for name in models}
        self.timed: list[str] = []

    def measure(self) -> dict[str, dict[str, Any]]:
        if self.mode == "compiled":
            torch._dynamo.reset()
        for name in self.decoders:
            self._guarded(name, self._warm)
        self._compare()
        self._rounds("ms", Decoder.times)
        if self.arguments.generate:
            for name in list(self.timed):
                self._guarded(name, self._generate)
            self._rounds("generate_ms", self._generate)
        return self.rows

    def _guarded(self, name: str, call: Callable[[Decoder], Any]) -> Any:
        """What the call returns; a method that fails leaves its error and takes no further part."""
        try:
            found = call(self.decoders[name])
        except Exception as error:
            self.rows[name]["error"] = describe(error)
            self.timed = [each for each in self.timed if each != name]
            return None
        if isinstance(found, dict):
            self.rows[name] |= found
        if name not in self.timed:
            self.timed.append(name)
        return found

    def _warm(self, decoder: Decoder) -> dict[str, Any]:
        """The first tokens; of a compiled step also what Dynamo counts, and why it is no one
        graph.
        """
        if self.mode != "compiled":
            decoder.times(WARM_UP)
            return {}
        from torch._dynamo.exc import TorchDynamoException
        from torch._dynamo.utils import counters

        counters.clear()
        begun, found = time.perf_counter(), {}
        try:
            decoder.compile(self.arguments.compile_mode, fullgraph=True)
            decoder.times(WARM_UP)
        except TorchDynamoException as error:
            found["no_full_graph"] = describe(error)
            counters.clear()
            decoder.compile(self.arguments.compile_mode, fullgraph=False)
            decoder.times(WARM_UP)
        reasons = counters["graph_break"]
        found |= {"compile_s": time.perf_counter() - begun, "graphs": _graphs()}
        found["graph_breaks"] = sum(reasons.values())
        if self.arguments.compile_mode == "reduce-overhead":
            found["without_cuda_graph"] = counters["inductor"]["cudagraph_skips"]
        if reasons:
            found["why"] = "; ".join(_line(reason) for reason, _ in reasons.most_common(3))
        return found

    def _compare(self) -> None:
        """Logits on the tokens that the frozen base chooses, so that all methods get the same
        ones.
        """
        if BASE.name not in self.timed:
            return
        given = self.decoders[BASE.name].logits(eager=True).argmax(-1)
        logits: dict[str, Tensor] = {}
        for name in list(self.timed):

            def both(decoder: Decoder, name: str = name) -> dict[str, Any]:
                logits[name] = decoder.logits(given)
                if self.mode != "compiled":
                    return {}
                return {"differs_from_eager": _differs(logits[name], decoder.logits(given, eager=True))}

            self._guarded(name, both)
        for name, own in logits.items():
            merged = logits.get(f"merged {name}")
            if merged is not None:
                same = (own.argmax(-1) == merged.argmax(-1)).double().mean()
                self.rows[name] |= {"differs_from_merged": _differs(own, merged), "tokens_as_merged": float(same)}
            if name != BASE.name and BASE.name in logits:
                self.rows[name]["differs_from_base"] = _differs(own, logits[BASE.name])

    def _generate(self, decoder: Decoder) -> list[float]:
        mode = self.arguments.compile_mode if self.mode == "compiled" else None
        return [decoder.generate_time(mode)]

    def _rounds(self, key: str, call: Callable[[Decoder], list[float]]) -> None:
        """Rounds of all methods: median times, and ratios to the references from within the
        rounds.
        """
        times: dict[str, list[list[float]]] = {name: [] for name in self.timed}
        graphs = _graphs()
        for index in range(self.arguments.rounds):
            for name in self.timed[:: -1 if index % 2 else 1]:
                found = self._guarded(name, call)
                if found is not None:
                    times[name].append(found)
        prefix = key.removesuffix("ms")
        for name in self.timed:
            row, own = self.rows[name], [median(each) for each in times[name]]
            row[key] = median(t for each in times[name] for t in each)
            row[f"{prefix}fastest_ms"] = min(t for each in times[name] for t in each)
            for label, reference in _references(self.timed).items():
                other = [median(each) for each in times[reference]]
                ratios = [a / b for a, b in zip(own, other, strict=True)]
                row[f"{prefix}{label}"] = median(ratios)
                row[f"{prefix}{label}_rounds"] = [round(ratio, 4) for ratio in ratios]
            if key == "ms":
                row["tokens"] = sum(map(len, times[name]))
            if self.mode == "compiled":
                row[f"{prefix}graphs_while_timed"] = _graphs() - graphs  # of all methods together


def _references(names: list[str]) -> dict[str, str]:
    """Name of the ratio -> method."""
    found = {"over_base": BASE.name}
    for name in names:
        if match := re.match(r"LoRA r\d+ (\w+) adapters", name):
            found[f"over_lora_{match[1]}"] = name
    return {label: name for label, name in found.items() if name in names}


def _differs(own: Tensor, other: Tensor) -> float:
    return float((own - other).abs().max() / other.abs().max())


def _line(reason: object) -> str:
    return (str(reason).splitlines() or ["?"])[0][:100]


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def table(section: str, rows: list[dict[str, Any]]) -> None:
    ratios = {"over_base": "over the base", "over_lora_bf16": "over LoRA bf16", "over_lora_fp32": "over LoRA fp32"}
    shown = {"ms": ("ms a token", "{:.3f}")}
    shown |= {key: (name, "{:.3f}") for key, name in ratios.items()}
    shown |= {"fastest_ms": ("fastest token", "{:.3f}")}
    shown |= {"generate_ms": ("generate, ms a token", "{:.3f}")}
    shown |= {f"generate_{key}": (f"generate {name}", "{:.3f}") for key, name in ratios.items()}
    shown |= {
        "graph_breaks": ("graph breaks", "{}"),
        "graphs_while_timed": ("graphs while timed", "{}"),
        "without_cuda_graph": ("without a CUDA graph", "{}"),
        "compile_s": ("compile s", "{:.1f}"),
        "differs_from_merged": ("differs from merged", "{:.1e}"),
        "differs_from_eager": ("differs from eager", "{:.1e}"),
        "differs_from_base": ("differs from the base", "{:.1e}"),
    }
    print_table(section, rows, shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="timed tokens a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, help="default: 64 (8 of the tiny shape)")
    parser.add_argument("--methods", default="", help="regular expression of the methods beside the frozen base")
    parser.add_argument("--compile-mode", choices=("default", "reduce-overhead"), default="default")
    parser.add_argument("--generate", action="store_true", help="time model.generate too")
    parser.add_argument("--precision", choices=list(PRECISION), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="the tiny shape, to try the script")
    parser.add_argument("--out", type=Path, default=Path("gpu_decode.json"))
    parser.add_argument("--show", action="store_true", help="measure nothing: the tables of the rows in --out")
    arguments = parser.parse_args()
    if arguments.show:
        for section, part in json.loads(arguments.out.read_text()).items():
            table(section, part["rows"])
        return
    warnings.simplefilter("ignore")
    shape = "tiny" if arguments.tiny else arguments.shape
    rank = arguments.rank or (8 if shape == "tiny" else 64)
    precision = arguments.precision or ("bf16" if arguments.device == "cuda" else "fp32")
    machine = Card(arguments.device).describe()
    report = Report(arguments.out, machine)
    models, failed = {}, {}
    for method in chosen(rank, precision):
        if method is BASE or re.search(arguments.methods, method.name):
            try:
                models[method.name] = build(shape, method, precision, arguments.device)
            except Exception as error:
                failed[method.name] = {"error": describe(error)}
    for mode in arguments.modes:
        for batch in arguments.batches:
            section = f"{shape} {precision} {mode} batch {batch}"
            if mode == "compiled" and arguments.compile_mode != "default":
                section += f" {arguments.compile_mode}"
            report.open(section)
            for name, row in (Section(models, mode, batch, arguments).measure() | failed).items():
                report.add(method=name, device=machine["device"], date=machine["date"], **row)
            report.close(section)
            table(f"{section}, {machine['device']}, torch {machine['torch']}, peft {machine['peft']}", report.rows)


if __name__ == "__main__":
    main()
