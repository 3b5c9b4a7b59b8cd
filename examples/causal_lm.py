"""Fine-tunes a causal language model with a pilot's support, and exports it as a LoRA that loads
without loft_rs.

    python examples/causal_lm.py                            a Llama of two layers with random weights, made here: seconds
    python examples/causal_lm.py --model FOLDER --file TEXT   a model of your own, on the lines of a text file

No weights can be downloaded here by `pip`, so the small model knows nothing: the run shows the
calls, not a result. Needs `pip install ".[train]" accelerate`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from loft_rs import LoftCalibrationCallback, LoftConfig, Pilot, export_lora, suggest_lr

LENGTH = 64


def bytes_of(text: str) -> list[int]:
    """Token ids where there is no tokenizer."""
    return list(text.encode("utf-8"))


def make_small_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def windows(ids: list[int]) -> list[dict[str, Any]]:
    """Rows of LENGTH tokens, each its own label."""
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model with its tokenizer")
    parser.add_argument("--file", type=Path, default=Path(__file__), help="text to train on (default: this program)")
    parser.add_argument(
        "--out", type=Path, default=Path("causal-lm-example"), help="folder for everything that is written"
    )
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    folder = options.model or options.out / "base"
    if options.model is None:
        make_small_model(folder)
    encode = bytes_of if options.model is None else AutoTokenizer.from_pretrained(folder).encode
    rows = windows(encode(options.file.read_text(encoding="utf-8")))

    config = LoftConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=32, support=Pilot(steps=16))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    model.print_trainable_parameters()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(options.out / "checkpoints"),
            max_steps=options.steps,
            learning_rate=suggest_lr(config),
            per_device_train_batch_size=8,
            logging_steps=10,
            disable_tqdm=True,
            report_to=[],
            seed=0,
        ),
        train_dataset=rows,
        callbacks=[LoftCalibrationCallback()],
    )
    trainer.train()

    model.save_pretrained(options.out / "adapter")
    export_lora(model, options.out / "adapter-lora")  # its warning names vLLM's --max-lora-rank
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), options.out / "adapter-lora")
    with torch.no_grad():
        prompt = rows[0]["input_ids"][None, :16].to(model.device)
        difference = (lora.to(model.device).eval()(prompt).logits - model.eval()(prompt).logits).abs().max()
    print(
        f"{options.out / 'adapter-lora'}: a LoRA of rank {lora.peft_config['default'].r}; logits differ by {difference:.1e}"
    )


if __name__ == "__main__":
    main()
