"""The tasks: a pretrained model with a fresh head, packed data on the device, and a score that is better when higher.

Every model takes a batch as keywords and gives `.loss` and `.logits`, as `loft_rs.calibrate` and any trainer expect. No dropout.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutput

MINILM = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EVALUATED = 256  # rows a batch


@dataclass(frozen=True)
class Task:
    """`steps` of `batch` rows train; `head` is trained beside every adapter. `tied`: as `LoftConfig.tied`."""

    name: str
    family: str
    model: str
    metric: str
    classes: int = 0
    steps: int = 300
    batch: int = 32
    length: int = 0
    head: str | None = None
    tied: bool | tuple[tuple[str, ...], ...] = True
    evaluated: int = EVALUATED


BERT_TIES = (("query", "key", "value"),)
TASKS = {
    task.name: task
    for task in (
        Task("mrpc", "understanding", "minilm", "accuracy", 2, length=96, head="head", tied=BERT_TIES),
        Task("cola", "understanding", "minilm", "matthews", 2, length=32, head="head", tied=BERT_TIES),
        Task("sst2", "understanding", "minilm", "accuracy", 2, length=48, head="head", tied=BERT_TIES),
        Task("gtsrb", "vision", "vit", "accuracy", 43, batch=48, head="classifier"),
        Task("flowers17", "vision", "vit", "accuracy", 17, batch=48, head="classifier"),
        Task("blood_cells", "vision", "vit", "accuracy", 4, batch=48, head="classifier"),
        Task("emnist_letters", "vision", "vit", "accuracy", 26, batch=48, head="classifier"),
        Task("gsm8k", "mathematics", "smollm2", "nll", steps=240, batch=16, evaluated=32),
        Task("sib200", "multilingual", "minilm", "accuracy", 7, length=64, head="head", tied=BERT_TIES),
    )
}


class Classifier(nn.Module):
    """An encoder, the mean over real tokens, and a linear head: what MiniLM was trained to be read by."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        mask = attention_mask[:, None, None, :].expand(-1, 1, input_ids.shape[1], -1).bool()
        hidden = self.encoder(input_ids=input_ids, attention_mask=mask, token_type_ids=token_type_ids).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.head((hidden * weight).sum(1) / weight.sum(1))
        return SequenceClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


def _minilm(folder: Path, task: Task) -> nn.Module:
    from safetensors.torch import load_file
    from transformers import AutoConfig, BertModel

    config = AutoConfig.from_pretrained(folder, attn_implementation="sdpa")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    encoder = BertModel(config, add_pooling_layer=False)
    encoder.load_state_dict(load_file(folder / "model.safetensors"))
    return Classifier(encoder.float(), task.classes)


def _vit(folder: Path, task: Task) -> nn.Module:
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(
        folder, num_labels=task.classes, ignore_mismatched_sizes=True, dtype=torch.float32
    )


def _smollm2(folder: Path, task: Task) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.bfloat16)
    model.config.use_cache = False
    return model


@functools.lru_cache(maxsize=2)
def _pretrained(packed: Path, task: Task, device: str) -> nn.Module:
    made = {"minilm": _minilm, "vit": _vit, "smollm2": _smollm2}[task.model](packed / task.model, task)
    return made.to(device).requires_grad_(False).eval()


def base_model(packed: Path, task: Task, seed: int, device: str) -> nn.Module:
    """The frozen pretrained model, its head fresh: normal with deviation .02, as transformers starts heads, and zero bias."""
    model = copy.deepcopy(_pretrained(packed, task, device))
    if task.head:
        head = model.get_submodule(task.head)
        drawn = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            head.weight.copy_(0.02 * drawn)
            head.bias.zero_()
    return model


@functools.lru_cache(maxsize=24)
def split(packed: Path, task: Task, name: str, device: str) -> dict[str, Tensor]:
    """The model's keywords for every row of a split, on the device."""
    with np.load(packed / f"{task.name}.npz") as held:
        arrays = {key.removeprefix(f"{name}_"): held[key] for key in held.files if key.startswith(f"{name}_")}
    tensors = {}
    for key, array in arrays.items():
        if key == "pixel_values":  # [-1, 1], as the model was trained
            tensors[key] = torch.from_numpy(array).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        else:
            tensors[key] = torch.from_numpy(array.astype(np.int64)).to(device)
    return tensors


def rows(data: dict[str, Tensor]) -> int:
    return len(data["labels"])


def slices(data: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, rows(data), size):
        yield {key: value[start : start + size] for key, value in data.items()}


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Matthews' correlation of two 0/1 vectors; 0 where either is constant."""
    p, y = predicted.double(), labels.double()
    product = p.var(correction=0) * y.var(correction=0)
    return 0.0 if float(product) == 0 else float(((p * y).mean() - p.mean() * y.mean()) / product.sqrt())


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, data: dict[str, Tensor]) -> dict[str, float]:
    """`score` (higher is better: accuracy, Matthews' correlation, or minus the NLL a token) and `nll`."""
    model.eval()
    nll, count, right, guesses = 0.0, 0, 0, []
    for batch in slices(data, task.evaluated):
        labels = batch["labels"]
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()
        if task.metric == "nll":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        nll += float(cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
        count += int((labels != -100).sum())
        if task.metric != "nll":
            guesses.append(logits.argmax(1))
            right += int((guesses[-1] == labels).sum())
    nll /= count
    if task.metric == "nll":
        return {"score": -nll, "nll": nll}
    score = right / count if task.metric == "accuracy" else matthews(torch.cat(guesses), data["labels"])
    return {"score": score, "nll": nll}
