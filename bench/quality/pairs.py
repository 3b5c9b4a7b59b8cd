"""What a rotation in a support makes of the change that a short low-rank training finds (`loft_rs.pairs`), by support and layer.

    python bench/quality/pairs.py --packed PACKED        (SmolLM2-135M on GSM8K's answers, about 5 minutes on two cores)

BA is W - W0 after 32 steps of a LoRA of rank 64 (A from zero) in float32, 4 rows of at most 192 tokens a step. The table has the part of
it that the best W0 P A P^T makes (A skew, r = 46), as the layer's own inputs see it: with C = E x x^T

    1 - min ||(W0 P A P^T - BA) C^1/2||_F^2 / ||BA C^1/2||_F^2       (output side: P A P^T W0)

mean and least to most over the layers of a kind in three blocks.
"""

from __future__ import annotations

import argparse
import functools
from collections import defaultdict
from pathlib import Path

import numpy as np
import peft
import torch
from methods import targets
from tasks import TASKS, base_model, split
from train import take

from loft_rs.pairs import paired_basis, preimages, rotation_makes

RANK, STEPS, ROWS, TOKENS, SEEN, SEED = 46, 32, 4, 192, 64, 0
TALL = ("gate_proj", "up_proj")
BLOCKS = ("4", "14", "24")  # looked at, of 30 that are trained


def changes(packed: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Layer -> W0 (m x n), B (m x k), A (k x n), C (n x n), float64."""
    task = TASKS["gsm8k"]
    base = base_model(packed, task, SEED, "cpu").float()
    names = targets(task, base)
    data = split(packed, task, "train", "cpu")
    answered = torch.arange(data["labels"].shape[1]).expand_as(data["labels"]).where(data["labels"] != -100, 0)
    short = (answered.amax(1) < TOKENS).nonzero().flatten()
    generator = torch.Generator().manual_seed(SEED)
    order = short[torch.randperm(len(short), generator=generator)]
    moments: dict[str, torch.Tensor] = {}

    def see(name: str, _: torch.nn.Module, inputs: tuple[torch.Tensor], __: torch.Tensor) -> None:
        x = inputs[0].flatten(0, -2)
        moments[name] = moments.get(name, 0) + (x.mT @ x).double()

    hooks = [base.get_submodule(name).register_forward_hook(functools.partial(see, name)) for name in names]
    with torch.no_grad():
        for start in range(0, SEEN, ROWS):
            base(take(data, order[start : start + ROWS])["input_ids"][:, :TOKENS])
    for hook in hooks:
        hook.remove()
    model = peft.get_peft_model(base, peft.LoraConfig(r=64, lora_alpha=64, target_modules=names))
    layers = {name: model.base_model.model.get_submodule(name) for name in names}
    for layer in layers.values():
        with torch.no_grad():
            layer.lora_A["default"].weight.zero_()
            layer.lora_B["default"].weight.normal_(0, 64**-0.5, generator=generator)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    for step in range(STEPS):
        rows = take(data, order[step * ROWS : (step + 1) * ROWS])
        model(**{key: value[:, :TOKENS] for key, value in rows.items()}).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    def wide(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().double().numpy()

    return {
        name: (
            wide(layer.base_layer.weight),
            wide(layer.lora_B["default"].weight),
            wide(layer.lora_A["default"].weight),
            wide(moments[name]),
        )
        for name, layer in layers.items()
        if name.split(".")[2] in BLOCKS
    }


def pairs_of(w: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    half = RANK // 2
    y = preimages([torch.from_numpy(w)], [torch.from_numpy(np.ascontiguousarray(u[:, :half]))]).numpy()
    return paired_basis(v[:, :half], y, RANK)


def part(w: np.ndarray, d: np.ndarray, c: np.ndarray, p: np.ndarray) -> float:
    """Of D (m x n): what W0 P A P^T makes of it in C's measure. H A K + K A H = S - S^T in the basis where H and K are diagonal."""
    h, k, s = p.T @ w.T @ w @ p, p.T @ c @ p, p.T @ w.T @ d @ c @ p
    values, q = np.linalg.eigh(k)
    root = q / np.sqrt(np.maximum(values, 1e-12 * values[-1]))
    turned, v = np.linalg.eigh(root.T @ h @ root)
    t = root @ v
    skew = t.T @ (s - s.T) @ t
    sums = np.maximum(turned[:, None] + turned, 1e-12 * turned[-1])
    return float(np.sum(skew**2 / sums) / 2 / np.sum((d @ c) * d))


def made(w: np.ndarray, b: np.ndarray, a: np.ndarray, c: np.ndarray) -> dict[str, float]:
    """By support: the part of BA."""
    (qb, rb), (qa, ra) = np.linalg.qr(b), np.linalg.qr(a.T)
    u, _, vt = np.linalg.svd(rb @ ra.T)
    u, v, d = qb @ u, qa @ vt.T, b @ a
    skew = w.T @ d
    drawn = np.random.default_rng(SEED).normal(size=(w.shape[1], RANK))
    supports = {
        "random": np.linalg.qr(drawn)[0],
        "principal": np.linalg.svd(w, full_matrices=False)[2][:RANK].T,
        "v_1 ... v_46": v[:, :RANK],
        "planes of Skew(W0^T BA)": np.linalg.eigh((skew - skew.T) @ (skew - skew.T).T)[1][:, -RANK:],
        "pairs": pairs_of(w, u, v),
        "the whole space": np.eye(w.shape[1]),
    }
    found = {name: part(w, d, c, p) for name, p in supports.items()}
    root = np.linalg.cholesky(c + 1e-9 * np.trace(c) / len(c) * np.eye(len(c)))  # C = L L^T
    p = pairs_of(w.T, v, u)
    images, change = (w @ root).T @ p, (d @ root).T @ p
    return found | {"pairs, output side": rotation_makes(images, change) / float(np.sum((d @ root) ** 2))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=Path, required=True, help="as prepare.py wrote it")
    found: dict[str, dict[bool, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, change in changes(parser.parse_args().packed).items():
        for support, share in made(*change).items():
            found[support][name.endswith(TALL)].append(share)
    print("| support | q, k, v, o, down | gate, up |\n|---|---:|---:|")
    for support, parts in found.items():
        cells = [f"{np.mean(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in (parts[False], parts[True])]
        print(f"| {support} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
