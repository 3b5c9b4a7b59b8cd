"""What pages of the documents find before their first block: small models and data, named in `<!-- setup: NAME -->`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import make_llama, token_batches
from transformers import Trainer, TrainingArguments

__all__ = ["DEFAULTS", "SETUPS"]


def matrices() -> dict[str, Any]:
    """A gradient and a weight, and a mapping of each."""
    draw = np.random.default_rng(0)
    G, W0 = draw.standard_normal((2, 96, 64), dtype=np.float32)
    return {"G": G, "W0": W0, "G1": G, "G2": G[::2], "grads": {"q_proj": G, "k_proj": G[::2]}}


def causal_lm() -> dict[str, Any]:
    """A Llama of two layers that is also in the folder `base`, rows and batches for it, and a Trainer's arguments."""
    base = make_llama()
    base.save_pretrained("base")
    base.config._name_or_path = "base"
    batches = token_batches(4)
    rows = [{name: values[i] for name, values in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))]
    arguments = TrainingArguments(
        "runs", max_steps=3, per_device_train_batch_size=4, learning_rate=0.01, use_cpu=True, report_to=[],
        save_steps=2, logging_steps=100, disable_tqdm=True,
    )  # fmt: skip
    return {"base": base, "data": rows, "dataloader": batches, "arguments": arguments, "Trainer": Trainer}


def plain_model() -> dict[str, Any]:
    """A small network of plain PyTorch with inputs and labels."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 3))
    return {"network": network, "x": torch.randn(32, 64), "labels": torch.randint(3, (32,))}


def peft_oft() -> dict[str, Any]:
    """A folder `peft-oft-adapter` that PEFT's own OFT has written."""
    from peft import OFTConfig, get_peft_model

    get_peft_model(make_llama(), OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"])).save_pretrained("peft-oft-adapter")
    assert Path("peft-oft-adapter/adapter_config.json").is_file()
    return {}


SETUPS = {each.__name__: each for each in (matrices, causal_lm, plain_model, peft_oft)}
# Of pages that name none in a comment.
DEFAULTS = {"README.md": ["matrices", "causal_lm", "peft_oft"]}
