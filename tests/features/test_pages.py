"""The pages' numbers: every block is what its rows say, no table of numbers stands outside of one,
and what the blocks compute is right.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from loft_rs import LoftConfig, advice

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
MARKED = re.compile(r"^<!-- begin:([\w-]+) -->\n.*?<!-- end:\1 -->$", re.S | re.M)
TABLE = re.compile(r"(?:^\|.*\n)+", re.M)
DECIMAL = re.compile(r"(?<![\w.])\d*\.\d+(?![\w.]*\.)")
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
# The tables of numbers that no rows fill: (page, the beginning of the table) -> why
BY_HAND = {
    (
        "bench/GPU.md",
        "| figure, r = 64 | aim | reached |",
    ): "three runs of the first version, of which the last has rows",
    (
        "bench/CALIBRATION.md",
        "| change | product of a 4096-wide layer",
    ): "changes that were tried and not kept; no rows",
    ("docs/calibration.md", "| column | meaning | act on it |"): "its only number is a column's name",
    ("docs/architecture.md", "| operator | why it is one |"): "one duration, of a copy that the compiler made; no rows",
}
FRONT = ("choose", "headline", "against", "disk")  # the README's blocks
PLAIN = ("docs/results.md", "bench/quality/FINDINGS.md")


@pytest.fixture(scope="module")
def pages():
    before = list(sys.path)
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("pages")
    sys.path[:] = before


@pytest.fixture(scope="module")
def rates(pages):
    return importlib.import_module("rates")


@pytest.fixture(scope="module")
def runs(pages):
    return importlib.import_module("blocks.sources").runs()


def hand_tables(path: Path) -> list[str]:
    """The first lines of tables with decimals outside of blocks."""
    text = MARKED.sub("", path.read_text(encoding="utf-8"))
    return [found.splitlines()[0] for found in TABLE.findall(text) if DECIMAL.search(ARXIV.sub("", found))]


def test_every_block_is_what_its_rows_say():
    done = subprocess.run([sys.executable, BENCH / "pages.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_changed_number_is_named_and_mended(pages):
    text = "before\n<!-- begin:headline -->\n| LOFT | 1.00 |\n<!-- end:headline -->\nafter\n"
    mended, changed = pages.filled(text, "page")
    assert changed == ["headline"]
    assert pages.filled(mended, "page") == (mended, [])
    assert mended.startswith("before\n") and mended.endswith("\nafter\n")


def test_check_writes_nothing_and_names_what_differs(pages, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- begin:disk -->\n| 1.0 |\n<!-- end:disk -->\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "pages", lambda: [page])
    monkeypatch.setattr(sys, "argv", ["pages.py", "--check"])
    with pytest.raises(SystemExit) as stopped:
        pages.main()
    assert (stopped.value.code, capsys.readouterr().out) == (1, "page.md: disk differ\n")
    assert "| 1.0 |" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["pages.py"])
    pages.main()
    assert pages.BLOCKS["disk"]() in page.read_text()
    monkeypatch.setattr(sys, "argv", ["pages.py", "--check"])
    pages.main()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- begin:nothing -->\n<!-- end:nothing -->", "no block is called 'nothing'"),
        ("<!-- begin:headline -->\n", "opened and not closed"),
        ("<!-- begin:headline -->\n<!-- end:against -->", "opened and not closed"),
    ],
)
def test_a_wrong_mark_is_an_error(pages, text, said):
    with pytest.raises(ValueError, match=said):
        pages.filled(text, "page")


def test_no_table_of_numbers_is_written_by_hand(pages):
    found = {(str(path.relative_to(ROOT)), line) for path in pages.pages() for line in hand_tables(path)}
    if "<!-- begin:" not in (ROOT / "README.md").read_text(encoding="utf-8"):
        found = {(page, line) for page, line in found if page != "README.md"}  # the README of before the blocks
    named = {key: [each for each in found if each[0] == key[0] and each[1].startswith(key[1])] for key in BY_HAND}
    assert all(named.values()), f"no such table any more: {[key for key, mine in named.items() if not mine]}"
    assert found == {each for mine in named.values() for each in mine}


def test_the_readmes_blocks_fit_a_hundred_columns(pages):
    for name in FRONT:
        assert max(map(len, pages.BLOCKS[name]().splitlines())) <= 100, name


@pytest.mark.parametrize("page", PLAIN)
def test_tables_and_lines_of_a_plain_page_are_narrow(page):
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    assert max(line.count("|") - 1 for line in lines) <= 6
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []


def test_the_page_of_results_says_when_to_read_it():
    opening = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split("\n\n")[1]
    assert "When to read this" in opening


def test_every_block_is_on_a_page_or_is_the_readmes(pages):
    shown = {name for path in pages.pages() for name in MARKED.findall(path.read_text(encoding="utf-8"))}
    assert pages.BLOCKS.keys() - shown <= set(FRONT)


def test_the_bench_page_names_every_script():
    text = (BENCH / "README.md").read_text(encoding="utf-8")
    for path in [*BENCH.glob("*.py"), *(BENCH / "quality").glob("*.py")]:
        assert f"{path.name}`" in text, path.name


# lr * r of the best single rate and its mean loss over the tasks, worked out by hand from the same
# runs before `rates.py`
@pytest.mark.parametrize(
    ("name", "tasks", "rate", "loss"),
    [
        ("LOFT principal", 13, 0.06, 0.016),
        ("LOFT pilot", 13, 0.15, 0.010),
        ("LOFT gradsvd", 13, 0.06, 0.010),
        ("LOFT skewgrad", 13, 0.024, 0.010),
        ("LOFT pilot, halves", 8, 0.12, 0.013),
        ("PSOFT", 11, 0.06, 0.012),
        ("LoRA r=1", 13, 0.0025, 0.008),
        ("LoRA r=8", 13, 0.0015, 0.014),
    ],
)
def test_one_rate_for_all_tasks(rates, runs, name, tasks, rate, loss):
    trials = rates.trials(runs, name)
    assert len(trials) == tasks
    best = rates.one_rate(trials, name)[0]
    assert best.rate == pytest.approx(rate, rel=0.03)
    assert best.loss == pytest.approx(loss, abs=5e-4)


def test_losses_beside_and_above_the_best_rate(rates):
    trials = {
        "a": {0.1: 0.5, 0.25: 0.9, 0.6: 0.6},
        "b": {0.1: 0.8, 0.25: 0.71, 0.6: -math.inf},
        "c": {0.1: 0.3, 0.25: 0.4, 0.6: 0.4},
    }
    assert rates.falls(trials) == (1, 3, pytest.approx(0.09))  # .3 on a, .09 on b, 0 on c
    mean, _ = rates.beside(trials)
    assert mean == pytest.approx((0.4 + 0.3 + 0.09 + 0.1 + 0.0) / 5)


def test_the_librarys_rates_and_costs_are_those_of_the_runs(rates, runs):
    for support, c in advice.RATES.items():
        best = rates.one_rate(rates.trials(runs, f"LOFT {support}"), f"LOFT {support}")[0]
        assert c == pytest.approx(best.rate, rel=0.1)  # the grid's step, named by a round number
        assert advice.COSTS[support] == pytest.approx(best.loss, abs=5e-4)


@pytest.mark.parametrize(("kind", "width"), [("float32", 4), ("bfloat16", 2)])
def test_an_adapter_on_disk_weighs_what_the_block_says(pages, tmp_path, kind, width):
    block = importlib.import_module("blocks.advice")
    shapes = [(96, 64), (64, 96)]  # (outputs, inputs)

    def saved(config, folder: Path) -> tuple[int, int]:
        base = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).to(getattr(torch, kind))
        model = get_peft_model(base, config)
        model.save_pretrained(folder)
        held = load_file(folder / "adapter_model.safetensors")
        trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
        return trained, sum(each.nbytes for each in held.values())

    assert saved(LoftConfig(r=8, target_modules=["0", "1"]), tmp_path / "loft") == block.loft_sizes(8, shapes, width)
    lora = block.lora_numbers(8, shapes)  # which PEFT keeps in float32
    assert saved(LoraConfig(r=8, target_modules=["0", "1"]), tmp_path / "lora") == (lora, 4 * lora)


def test_the_disk_block_is_of_llamas_own_shapes(pages):
    rows = [row.split("|")[1:-1] for row in pages.BLOCKS["disk"]().splitlines()[2:]]
    at = {int(row[0]): [int(cell.replace(",", "")) for cell in row[1:]] for row in rows}
    # Four such layers are what the bench of a step trains.
    steps = json.loads((BENCH / "results" / "gpu_step_h100.json").read_text(encoding="utf-8"))["8b"]["rows"]
    trained = {row["method"]: row["trained"] for row in steps}
    assert at[64][:2] == [8 * trained["LOFT r64"], 8 * trained["LoRA r64 bf16 adapters"]]
    assert at[64][3:] == [round(4 * at[64][1] / 1e6), round(2 * at[64][1] / 1e6)]


def test_the_picture_draws_numbers_that_exist(pages):
    overview = importlib.import_module("overview")
    quality = overview.quality()
    assert quality.keys() == overview.POINTS.keys()
    assert all(1e4 < trained < 4e8 and 0.6 < nll < 0.8 for trained, nll in quality.values())  # within the axes
    for field in ("over_base", "activations_over_base"):
        cost = overview.cost(field)
        assert cost.keys() == set(overview.BARS.values())
        assert all(1 <= value <= 2.1 for value in cost.values())
    assert overview.OUT.is_file()
