"""One training step of LOFT beside the frozen base and PEFT's methods, on one CUDA device, in one run.

Four Llama-3.1-8B-shaped layers, random weights, bf16, all seven linears: forward, backward, fused AdamW. Prints a table of median step
time, activation memory (peak during the step minus what is held before it) and trained parameters; `--out FILE` keeps it as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import warnings
from pathlib import Path

import peft
import torch
from transformers import LlamaConfig, LlamaModel

from loft_rs import LoftConfig

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(layers: int) -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("cuda"):
        return LlamaModel(config).to(torch.bfloat16).requires_grad_(False)


def methods(rank: int) -> dict:
    """name -> (PEFT config or None for the frozen base, keep adapters in the base's bf16)."""
    return {
        "frozen base": (None, False),
        f"LOFT random r{rank}": (LoftConfig(r=rank, target_modules=LINEAR, support="random"), False),
        f"LoRA r{rank} bf16": (peft.LoraConfig(r=rank, target_modules=LINEAR), True),
        f"LoRA r{rank} fp32": (peft.LoraConfig(r=rank, target_modules=LINEAR), False),
        "OFT b32": (peft.OFTConfig(r=0, oft_block_size=32, target_modules=LINEAR), False),
    }


def measure(config, half: bool, tokens: int, layers: int, repeats: int) -> dict:
    model = base_model(layers)
    if config is not None:
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=not half)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    x = torch.randn(tokens // 2048, 2048, 4096, device="cuda", dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn_like(x)

    def step() -> None:
        model(inputs_embeds=x, use_cache=False).last_hidden_state.backward(grad)
        x.grad = None
        if optimiser is not None:
            optimiser.step()
            optimiser.zero_grad()

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return {
        "ms": statistics.median(times),
        "activations_gib": (torch.cuda.max_memory_allocated() - held) / 2**30,
        "trained": sum(p.numel() for p in trained),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: dict[str, dict] = {}
    for rank in arguments.ranks:
        for name, (config, half) in methods(rank).items():
            if name not in rows:
                rows[name] = measure(config, half, arguments.tokens, arguments.layers, arguments.repeats)
                gc.collect()
                torch.cuda.empty_cache()
    floor = rows["frozen base"]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, peft {peft.__version__}")
    print(
        "| method | ms a step | over the base | activations GiB | over the base | trained |\n|---|---:|---:|---:|---:|---:|"
    )
    for name, row in rows.items():
        time, memory = row["ms"] / floor["ms"], row["activations_gib"] / floor["activations_gib"]
        print(
            f"| {name} | {row['ms']:.1f} | {time:.3f} | {row['activations_gib']:.2f} | {memory:.3f} | {row['trained']:,} |"
        )
    if arguments.out:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "peft": peft.__version__}
        arguments.out.write_text(json.dumps({**machine, "tokens": arguments.tokens, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
