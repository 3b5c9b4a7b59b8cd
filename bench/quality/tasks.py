"""The tasks: a pretrained model with a fresh head, packed data on the device, and a score that is
better when higher.

Every model takes a batch as keywords and gives `.loss` and `.logits`, as `loft_rs.calibrate` and
any trainer expect. No dropout.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertModel, MPNetModel
from transformers.modeling_outputs import SequenceClassifierOutput

MINILM = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
MPNET = ("attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense")
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EVALUATED = 256  # rows a batch


@dataclass(frozen=True)
class Task:
    """`steps` of `batch` rows train; `head` is trained beside every adapter. `tied`: as
    `LoftConfig.tied`.

    `answer`: the most tokens of an answer, which scored runs of the first `answer_seeds` seeds
    generate; `traces`: how often a scored run measures, on its way, the tuning split beside the
    text outside the task.
    """

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
    answer: int = 0
    answer_seeds: int = 5
    traces: int = 0


BERT = {"family": "understanding", "model": "minilm", "head": "head", "classes": 2}
BERT |= {"tied": (("query", "key", "value"),)}
LARGER = BERT | {"model": "mpnet", "tied": (("q", "k", "v"),)}
PROBLEMS = {"family": "mathematics", "model": "smollm2", "metric": "nll", "steps": 240, "batch": 16, "traces": 4}
TASKS = {
    task.name: task
    for task in (
        Task("mrpc", **BERT, metric="accuracy", length=96),
        Task("cola", **BERT, metric="matthews", length=32),
        Task("sst2", **BERT, metric="accuracy", length=48),
        Task("mrpc_mpnet", **LARGER, metric="accuracy", length=96),
        Task("rte_mpnet", **LARGER, metric="accuracy", length=128),
        Task("gtsrb", "vision", "vit", "accuracy", 43, batch=48, head="classifier"),
        Task("flowers17", "vision", "vit", "accuracy", 17, batch=48, head="classifier"),
        Task("blood_cells", "vision", "vit", "accuracy", 4, batch=48, head="classifier"),
        Task("emnist_letters", "vision", "vit", "accuracy", 26, batch=48, head="classifier"),
        Task("gsm8k", **PROBLEMS, length=320, evaluated=32, answer=200, answer_seeds=2),
        Task("asdiv", **PROBLEMS, length=112, evaluated=96, answer=40),
        Task("mawps", **PROBLEMS, length=112, evaluated=96, answer=12),
        Task("sib200", "multilingual", "gemma", "accuracy", 7, length=64, head="head"),
    )
}


class Classifier(nn.Module):
    """An encoder or decoder, the mean over real tokens, and a linear head: what MiniLM was trained
    to be read by.
    """

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.causal = not isinstance(encoder, (BertModel, MPNetModel))
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        if self.causal:  # padding comes last: no real token sees it
            hidden = self.encoder(input_ids=input_ids, use_cache=False).last_hidden_state.float()
        else:
            mask, types = attention_mask, {}
            if token_type_ids is not None:  # BERT, which takes a mask as attention does
                mask = attention_mask[:, None, None, :].expand(-1, 1, input_ids.shape[1], -1).bool()
                types = {"token_type_ids": token_type_ids}
            hidden = self.encoder(input_ids=input_ids, attention_mask=mask, **types).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.head((hidden * weight).sum(1) / weight.sum(1))
        return SequenceClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


def _encoder(folder: Path, task: Task) -> nn.Module:
    from safetensors.torch import load_file
    from transformers import AutoConfig

    kind, options = {"minilm": (BertModel, {"attn_implementation": "sdpa"}), "mpnet": (MPNetModel, {})}[task.model]
    config = AutoConfig.from_pretrained(folder, **options)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    encoder = kind(config, add_pooling_layer=False)
    encoder.load_state_dict(load_file(folder / "model.safetensors"))
    return Classifier(encoder.float(), task.classes)


def _vit(folder: Path, task: Task) -> nn.Module:
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(
        folder, num_labels=task.classes, ignore_mismatched_sizes=True, dtype=torch.float32
    )


def _smollm2(folder: Path, task: Task) -> nn.Module:
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.bfloat16)
    config = read.config  # a model from a GGUF file may call itself quantised, though it was dequantised: build it anew
    config.quantization_config, config.use_cache = None, False
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    return model


# The names of Gemma 3's tensors in a GGUF file.
GEMMA = {"token_embd": "embed_tokens", "output_norm": "norm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
         "attn_k_norm": "self_attn.k_norm", "attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm",
         "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}  # fmt: skip


def _gemma(folder: Path, task: Task) -> nn.Module:
    """Dequantised to bf16. `model.npz`: a GGUF file's tensors as they lie there,
    `<type>|<name>`.
    """
    import gguf
    from transformers import Gemma3TextConfig, Gemma3TextModel

    state = {}
    with np.load(folder / "model.npz") as held:
        for key in held.files:
            kind, name = key.split("|")
            value = torch.from_numpy(gguf.dequantize(held[key], gguf.GGMLQuantizationType[kind]).astype(np.float32))
            parts = name.removesuffix(".weight").split(".")
            if GEMMA[parts[-1]].endswith("norm"):
                value = value - 1  # transformers adds the one
            prefix = f"layers.{parts[1]}." if parts[0] == "blk" else ""
            state[f"{prefix}{GEMMA[parts[-1]]}.weight"] = value
    model = Gemma3TextModel(Gemma3TextConfig.from_pretrained(folder))
    model.load_state_dict(state)
    return Classifier(model.to(torch.bfloat16), task.classes)


@functools.lru_cache(maxsize=2)
def _pretrained(packed: Path, task: Task, device: str) -> nn.Module:
    made = {"minilm": _encoder, "mpnet": _encoder, "vit": _vit, "smollm2": _smollm2, "gemma": _gemma}[task.model](
        packed / task.model, task
    )
    return made.to(device).requires_grad_(False).eval()


def base_model(packed: Path, task: Task, seed: int, device: str) -> nn.Module:
    """The frozen pretrained model, its head fresh: normal with deviation .02, as transformers
    starts heads, and zero bias.
    """
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
    """The model's keywords for every row of a split, on the device, and `group`, each row's number,
    where rows are grouped.
    """
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
def evaluate(model: nn.Module, task: Task, data: dict[str, Tensor]) -> dict[str, Any]:
    """`score` (higher is better: accuracy, Matthews' correlation, or minus the NLL a token) and
    `nll`; with groups `by_group`, theirs.
    """
    model.eval()
    nll, count, guesses = 0.0, 0, []
    for batch in slices(data, task.evaluated):
        labels = batch["labels"]
        logits = model(**{key: value for key, value in batch.items() if key not in ("labels", "group")}).logits.float()
        if task.metric == "nll":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        else:
            guesses.append(logits.argmax(1))
        nll += float(cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
        count += int((labels != -100).sum())
    nll /= count
    if task.metric == "nll":
        return {"score": -nll, "nll": nll}
    guessed, labels = torch.cat(guesses), data["labels"]
    right = (guessed == labels).double()
    found = {"score": float(right.mean()) if task.metric == "accuracy" else matthews(guessed, labels), "nll": nll}
    if "group" in data:
        found["by_group"] = [
            float(right[data["group"] == group].mean()) for group in range(int(data["group"].max()) + 1)
        ]
    return found


def last_number(text: str) -> float | None:
    """The number after the last "####", as GSM8K marks an answer."""
    found = re.findall(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    return float(found[-1].replace(",", "")) if found else None


@functools.cache
def _tokenizer(packed: Path, task: Task) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(packed / task.model, gguf_file="model.gguf")


@torch.no_grad()
def exact_match(model: nn.Module, packed: Path, task: Task, data: dict[str, Tensor], size: int = 700) -> float:
    """The part of a split's questions whose greedily generated answer ends in the right number."""
    model.eval()
    tokenizer = _tokenizer(packed, task)
    pad, right = tokenizer.eos_token_id, 0
    for batch in slices(data, size):
        starts = (batch["labels"] != -100).int().argmax(1)
        longest = int(starts.max())
        place = torch.arange(longest, device=starts.device) - (longest - starts)[:, None]
        mask = place >= 0
        prompt = torch.where(mask, batch["input_ids"].gather(1, place.clamp(min=0)), pad)
        made = model.generate(
            input_ids=prompt,
            attention_mask=mask.long(),
            max_new_tokens=task.answer,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
        )[:, longest:]
        said = tokenizer.batch_decode(made, skip_special_tokens=True)
        true = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        right += sum(last_number(a) == last_number(b) is not None for a, b in zip(said, true, strict=True))
    return right / rows(data)
