"""500 bf16 steps of a small real model on a GPU: LOFT against LoRA, how orthogonal T stays, and
whether a seed repeats bit for bit.

MiniLM-L6 (BERT, 22 M parameters, pretrained; weights in bf16) on SST-2: batches of 32 sentences,
mean pooling and a linear head in float32. The head is trained alone for a few steps first, the same
for every method; then head and adapter together, fused AdamW without decay, linear warm-up and
decay. Adapters are float32 (PEFT's default), no dropout, and the same batches in the same order for
all.

The machine with the card may have no network, so the run reads one folder that is packed elsewhere:

    python bench/gpu_finetune.py --pack FOLDER --data SST2_FOLDER     # MiniLM in bf16 (45 MB) and the tokenised sentences
    python bench/gpu_finetune.py --folder FOLDER --out curves.jsonl   # the runs

`--out` holds JSON lines, written as they come: every ten steps the mean loss of the ten and the
largest ||T^T T - I||_2 over the layers at that moment (measured as R^T R from the stored P, in
float64); then one summary a run. Each method runs twice with one seed.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import random
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from blocks.text import table
from common import describe
from gpu_workloads import PRECISION, Card
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import loft_rs
from loft_rs import LoftConfig

LENGTH = 48
BATCH = 32
EVERY = 10
HEAD_STEPS = 50
HEAD_RATE = 1e-3
WARM_UP = 0.1
CALIBRATION = 8  # batches
RATE_TIMES_RANK = {"principal": 0.2, "skewgrad": 0.06, "gradsvd": 0.1}
LORA_RANK, LORA_RATE = 8, 4e-3


def pack(folder: Path, data: Path, steps: int) -> None:
    """MiniLM's weights in bf16, the base's own precision in the run, and SST-2 as token ids."""
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoTokenizer

    from loft_rs.demo.encoder import model_directory

    source = model_directory(None)
    model = AutoModel.from_pretrained(source, dtype=torch.bfloat16, add_pooling_layer=False)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    arrays: dict[str, np.ndarray] = {}
    for split, count in (("train", (steps + CALIBRATION + HEAD_STEPS) * BATCH), ("dev", None)):
        with gzip.open(data / f"{split}.tsv.gz", "rt", encoding="utf-8") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        rows = [row for row in rows if row[0] in ("0", "1")]
        random.Random(0).shuffle(rows)
        rows = rows[:count]
        tokens = tokenizer([row[1] for row in rows], truncation=True, max_length=LENGTH, padding="max_length")
        arrays[f"{split}_ids"] = np.array(tokens["input_ids"], dtype=np.uint16)
        arrays[f"{split}_mask"] = np.array(tokens["attention_mask"], dtype=np.uint8)
        arrays[f"{split}_labels"] = np.array([int(row[0]) for row in rows], dtype=np.uint8)
    np.savez_compressed(folder / "sst2.npz", **arrays)
    size = sum(each.stat().st_size for each in folder.iterdir()) / 2**20
    print(
        f"{folder}: {size:.1f} MiB, {len(arrays['train_labels'])} training sentences, {len(arrays['dev_labels'])} held out"
    )


def load_model(folder: Path, device: str, dtype: torch.dtype) -> nn.Module:
    from safetensors.torch import load_file
    from transformers import AutoConfig, BertModel

    config = AutoConfig.from_pretrained(folder, attn_implementation="sdpa")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = BertModel(config, add_pooling_layer=False).to(dtype)
    missing, extra = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if [name for name in missing if not name.endswith("position_ids")] or extra:
        raise ValueError(f"{folder} does not fit this model: missing {missing}, extra {extra}")
    return model.requires_grad_(False).to(device)


class Sentences:
    """Token ids, masks and labels on the device."""

    def __init__(self, folder: Path, split: str, device: str):
        with np.load(folder / "sst2.npz") as held:
            ids, mask, labels = (held[f"{split}_{name}"].astype(np.int64) for name in ("ids", "mask", "labels"))
        self.ids, self.mask, self.labels = (torch.from_numpy(each).to(device) for each in (ids, mask, labels))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: int, size: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
        rows = slice(index * size, (index + 1) * size)
        return self.ids[rows], self.mask[rows], self.labels[rows]


class Classifier(nn.Module):
    """The encoder, mean pooling over real tokens and a float32 head."""

    def __init__(self, encoder: nn.Module, width: int, device: str):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2, device=device)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weight = mask.unsqueeze(-1).float()
        return self.head((hidden * weight).sum(1) / weight.sum(1))

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return cross_entropy(self(*batch[:2]), batch[2])


@torch.no_grad()
def accuracy(model: Classifier, data: Sentences) -> float:
    model.eval()
    right = sum((model(ids, mask).argmax(1) == labels).sum() for ids, mask, labels in _all(data))
    return float(right) / len(data)


def _all(data: Sentences) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [data.batch(index, 218) for index in range(-(-len(data) // 218))]


def adapt(name: str, rank: int, encoder: nn.Module) -> nn.Module:
    if name == "lora":
        return peft.get_peft_model(encoder, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    return peft.get_peft_model(encoder, LoftConfig(r=rank, support=name, target_modules="all-linear"))


def train(name: str, rank: int, rate: float, arguments: argparse.Namespace, write: Any) -> dict[str, Any]:
    """One run; its summary, with every step's loss in `losses`."""
    torch.manual_seed(arguments.seed)
    card, data = Card(arguments.device), Sentences(arguments.folder, "train", arguments.device)
    encoder = load_model(arguments.folder, arguments.device, PRECISION[arguments.precision])
    width = encoder.config.hidden_size
    model = Classifier(encoder, width, arguments.device)
    fused = {"fused": card.cuda, "weight_decay": 0.0}
    warm = torch.optim.AdamW(model.head.parameters(), lr=HEAD_RATE, **fused)
    for index in range(HEAD_STEPS):
        model.loss(data.batch(arguments.steps + CALIBRATION + index)).backward()
        warm.step()
        warm.zero_grad()
    model.encoder = adapt(name, rank, encoder)

    def calibration() -> None:
        for index in range(CALIBRATION):
            model.loss(data.batch(arguments.steps + index)).backward()

    begun = time.perf_counter()
    if name != "lora":
        loft_rs.calibrate(model.encoder, train_step=calibration, progress=False)
    prepared = time.perf_counter() - begun
    model.head.zero_grad()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        [{"params": [p for p in model.encoder.parameters() if p.requires_grad], "lr": rate},
         {"params": list(model.head.parameters()), "lr": HEAD_RATE}], **fused
    )  # fmt: skip
    warm_up = max(1, round(WARM_UP * arguments.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm_up, (arguments.steps - step) / max(1, arguments.steps - warm_up))
    )
    model.train()
    if card.cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, kept, worst, begun = [], [], 0.0, time.perf_counter()
    for step in range(arguments.steps):
        loss = model.loss(data.batch(step))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        kept.append(loss.detach())  # read every ten steps, so that a step never waits for the host
        if len(kept) == EVERY or step + 1 == arguments.steps:
            ten = torch.stack(kept).tolist()
            losses, kept = losses + ten, []
            apart = None
            if name != "lora":
                with torch.no_grad():
                    apart = loft_rs.orthogonality_error(model.encoder)
                worst = max(worst, apart)
            write(step=step + 1, loss=sum(ten) / len(ten), orthogonality_error=apart)
    seconds = time.perf_counter() - begun
    digest = hashlib.sha256()
    for parameter in trained:
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return {
        "rate": rate,
        "first_loss": sum(losses[:EVERY]) / len(losses[:EVERY]),
        "last_loss": sum(losses[-50:]) / len(losses[-50:]),
        "accuracy": accuracy(model, Sentences(arguments.folder, "dev", arguments.device)),
        "largest_orthogonality_error": worst if name != "lora" else None,
        "trained": sum(p.numel() for p in model.encoder.parameters() if p.requires_grad),
        "seconds": seconds,
        "calibration_seconds": prepared,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if card.cuda else None,
        "dtypes": sorted({str(p.dtype) for p in trained}),
        "weights_sha256": digest.hexdigest(),
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="write what the runs read, and stop")
    parser.add_argument("--data", type=Path, help="with --pack: folder of SST-2's train.tsv.gz and dev.tsv.gz")
    parser.add_argument("--folder", type=Path, help="as packed")
    parser.add_argument(
        "--methods", nargs="+", default=["skewgrad", "principal", "lora"], choices=[*RATE_TIMES_RANK, "lora"]
    )
    parser.add_argument("--rank", type=int, default=64, help="of LOFT; LoRA's is 8")
    parser.add_argument("--rate-scale", type=float, default=1.0, help="multiplies every adapter's learning rate")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--runs", type=int, default=2, help="of each method, all with the same seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deterministic", action="store_true", help="torch.use_deterministic_algorithms")
    parser.add_argument("--precision", choices=list(PRECISION), default="bf16", help="of the base")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("gpu_finetune.jsonl"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.pack:
        if not arguments.data:
            parser.error("--pack needs --data")
        pack(arguments.pack, arguments.data, arguments.steps)
        return
    if not arguments.folder:
        parser.error("--folder is missing: pack one with --pack")
    if arguments.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    machine = Card(arguments.device).describe()
    summaries: list[dict[str, Any]] = []
    with arguments.out.open("w") as file:
        _write(
            file,
            machine
            | {
                "steps": arguments.steps,
                "seed": arguments.seed,
                "deterministic": arguments.deterministic,
                "precision": arguments.precision,
            },
        )
        for name in arguments.methods:
            rank, rate = (
                (LORA_RANK, LORA_RATE) if name == "lora" else (arguments.rank, RATE_TIMES_RANK[name] / arguments.rank)
            )
            curves = []
            for run in range(arguments.runs):
                key = {"method": f"{'LoRA' if name == 'lora' else f'LOFT {name}'} r{rank}", "run": run}
                try:
                    found = train(
                        name,
                        rank,
                        rate * arguments.rate_scale,
                        arguments,
                        lambda key=key, **row: _write(file, key | row),
                    )
                except Exception as error:
                    print(f"{key['method']}: {describe(error)}")
                    _write(file, {"summary": True, **key, "error": describe(error)})
                    break
                curves.append((found.pop("losses"), found["weights_sha256"]))
                found["same_losses_as_first"] = curves[0][0] == curves[-1][0] if run else None
                found["same_weights_as_first"] = curves[0][1] == curves[-1][1] if run else None
                if run and curves[0][0] != curves[-1][0]:
                    found["first_difference"] = next(
                        i for i, (a, b) in enumerate(zip(curves[0][0], curves[-1][0], strict=True)) if a != b
                    )
                summaries.append(key | found)
                _write(file, {"summary": True, **key, **found})
    print_table(machine, arguments, summaries)


def print_table(machine: dict[str, Any], arguments: argparse.Namespace, summaries: list[dict[str, Any]]) -> None:
    print(
        f"{machine['device']}, torch {machine['torch']}, peft {machine['peft']}, {arguments.steps} steps, seed {arguments.seed}\n"
    )
    names = ["method", "run", "first ten", "last fifty", "accuracy", "largest error", "trained", "s", "same bits"]
    rows = []
    for row in summaries:
        apart = row["largest_orthogonality_error"]
        first = f"no, from step {row.get('first_difference')}"
        same = {None: "", True: "yes", False: first}[row["same_losses_as_first"]]
        rows.append(
            [row["method"], row["run"], f"{row['first_loss']:.4f}", f"{row['last_loss']:.4f}", f"{row['accuracy']:.4f}",
             "" if apart is None else f"{apart:.1e}", f"{row['trained']:,}", f"{row['seconds']:.1f}", same]
        )  # fmt: skip
    print(table(names, rows))


def _write(file: io.TextIOBase, row: dict[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


if __name__ == "__main__":
    main()
