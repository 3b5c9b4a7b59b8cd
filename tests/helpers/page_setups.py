"""What pages of the documents find before their first block: small models and data, named in
`<!-- setup: NAME -->`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import OFTConfig, get_peft_model
from reference import make_llama, token_batches
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments

import loft_rs
from loft_rs import LoftConfig

__all__ = ["DEFAULTS", "SETUPS"]


def matrices() -> dict[str, Any]:
    """A gradient and a weight, and a mapping of each."""
    draw = np.random.default_rng(0)
    G, W0 = draw.standard_normal((2, 96, 64), dtype=np.float32)
    return {"G": G, "W0": W0, "G1": G, "G2": G[::2], "grads": {"q_proj": G, "k_proj": G[::2]}}


def causal_lm() -> dict[str, Any]:
    """A Llama of two layers in the folder `base`, with rows and batches for it, and a Trainer's
    arguments.
    """
    make_llama().save_pretrained("base")

    def load_base() -> Any:
        return AutoModelForCausalLM.from_pretrained("base")

    batches = token_batches(4)
    rows = [
        {name: values[i] for name, values in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))
    ]

    def arguments(**options: Any) -> TrainingArguments:
        quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
        return TrainingArguments("runs", max_steps=4, per_device_train_batch_size=4, **quiet, **options)

    return {"base": load_base(), "load_base": load_base, "data": rows, "dataloader": batches, "arguments": arguments}


def adapted() -> dict[str, Any]:
    """A model with LOFT layers, its input `x`, and the library."""
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoftConfig(r=4, target_modules=["0"]))
    return {"model": model, "x": torch.randn(2, 8), "loft_rs": loft_rs}


def plain_model() -> dict[str, Any]:
    """A small network of plain PyTorch with inputs and labels."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 3))
    return {"network": network, "x": torch.randn(32, 64), "labels": torch.randint(3, (32,))}


def peft_oft() -> dict[str, Any]:
    """A folder `peft-oft-adapter` that PEFT's own OFT has written."""
    get_peft_model(make_llama(), OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"])).save_pretrained(
        "peft-oft-adapter"
    )
    assert Path("peft-oft-adapter/adapter_config.json").is_file()
    return {}


def small_smollm() -> dict[str, Any]:
    """A Llama of two layers that reads bytes, in a folder with the name of the model that the
    README loads.
    """
    bytes_alone = Tokenizer(models.BPE())
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    bytes_alone.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    folder = "HuggingFaceTB/SmolLM2-135M-Instruct"
    PreTrainedTokenizerFast(tokenizer_object=bytes_alone, pad_token="<end>", eos_token="<end>").save_pretrained(folder)
    make_llama(vocab_size=257, hidden_size=64, bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    return {}


SETUPS = {each.__name__: each for each in (matrices, causal_lm, adapted, plain_model, peft_oft, small_smollm)}
# Of pages that name none in a comment.
DEFAULTS = {"README.md": ["matrices", "small_smollm", "peft_oft"]}
