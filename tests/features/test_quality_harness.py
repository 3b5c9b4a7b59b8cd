"""The quality bench's pure parts: which runs are due, the tuned rate, intervals, ranks at a budget,
and the report's tables.
"""

from __future__ import annotations

import gzip
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_outputs import SequenceClassifierOutput

HERE = Path(__file__).parents[2] / "bench" / "quality"


@pytest.fixture(scope="module", autouse=True)
def bench_path():
    sys.path.insert(0, str(HERE))
    yield
    sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def protocol(bench_path):
    return importlib.import_module("protocol")


@pytest.fixture(scope="module")
def methods(bench_path):
    return importlib.import_module("methods")


@pytest.fixture(scope="module")
def report(bench_path):
    return importlib.import_module("report")


def line(spec, score):
    return {"task": spec.task, "method": spec.method, "phase": spec.phase, "rate": spec.rate, "seed": spec.seed,
            "steps": spec.steps, "score": score}  # fmt: skip


def run_all(protocol, cells, score, limit=1000):
    """Writes a line for whatever is due until nothing is; the lines."""
    lines = []
    while due := protocol.due(lines, cells):
        assert len(lines) < limit
        lines.append(line(due[0], score(due[0])))
    return lines


def cell(protocol, name="a", rate_of=None):
    return protocol.Cell("t", name, (1e-4, 1e-3, 1e-2), 10.0, 300, rate_of)


def test_every_rate_has_its_trials_before_a_run_is_scored(protocol):
    cells = [cell(protocol)]
    due = protocol.due([], cells)
    assert [spec.phase for spec in due] == ["tune"] * 3 * len(protocol.TUNE_SEEDS)
    lines = [line(spec, 0.5) for spec in due[:-1]]
    assert [spec.phase for spec in protocol.due(lines, cells)] == ["tune"]
    assert protocol.tuned_rate(lines, cells[0]) is None


def test_the_seeds_that_tune_never_score(protocol):
    assert not set(protocol.TUNE_SEEDS) & set(protocol.SEEDS)
    lines = run_all(protocol, [cell(protocol)], lambda spec: -abs(math.log10(spec.rate / 1e-3)))
    scored = [each for each in lines if each["phase"] == "score"]
    assert sorted(each["seed"] for each in scored) == list(protocol.SEEDS)
    assert {each["rate"] for each in scored} == {1e-3}
    assert len(lines) == 3 * len(protocol.TUNE_SEEDS) + len(protocol.SEEDS)


@pytest.mark.parametrize(("better", "chosen"), [(1, 1.0), (-1, 1e-6)])
def test_an_edge_that_wins_is_passed_a_bounded_number_of_times(protocol, better, chosen):
    lines = run_all(protocol, [cell(protocol)], lambda spec: better * math.log10(spec.rate))
    tried = {each["rate"] for each in lines if each["phase"] == "tune"}
    assert len(tried) == 3 + protocol.EXTENSIONS
    assert sorted({each["rate"] for each in lines if each["phase"] == "score"}) == [pytest.approx(chosen)]


def test_a_diverged_trial_loses_and_equal_rates_go_to_the_lower(protocol):
    lines = run_all(protocol, [cell(protocol)], lambda spec: None if spec.rate > 5e-3 else 0.5)
    # 1e-4 and 1e-3 are level, so the lower one wins, as the rates beyond that edge do after it.
    assert sorted({each["rate"] for each in lines if each["phase"] == "score"}) == [pytest.approx(1e-6)]


def test_a_borrowed_rate_needs_no_trials(protocol):
    cells = [cell(protocol), cell(protocol, "a refresh", rate_of="a")]
    lines = run_all(protocol, cells, lambda spec: -abs(math.log10(spec.rate / 1e-3)))
    mine = [each for each in lines if each["method"] == "a refresh"]
    assert [each["phase"] for each in mine] == ["score"] * len(protocol.SEEDS)
    assert {each["rate"] for each in mine} == {1e-3}


def test_nothing_written_is_due_again_and_a_cut_line_is_left_out(protocol, tmp_path):
    spec = protocol.due([], [cell(protocol)])[0]
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(line(spec, 0.1)) + "\n" + json.dumps(line(spec, 0.2))[:-9])
    lines = protocol.read_lines(path)
    assert [each["score"] for each in lines] == [0.1]
    assert protocol.key(spec) not in {protocol.key(each) for each in protocol.due(lines, [cell(protocol)])}
    assert protocol.read_lines(tmp_path / "none.jsonl") == []


def test_students_quantiles(protocol):
    for freedom, value in enumerate(protocol.STUDENT):
        if freedom:
            assert value == pytest.approx(scipy.stats.t.ppf(0.975, freedom), abs=5.1e-5)


@given(values=st.lists(st.floats(-1, 1), min_size=2, max_size=8), shift=st.floats(-1, 1))
def test_a_paired_difference_forgets_what_both_share(protocol, values, shift):
    a = dict(enumerate(values))
    value, half, count = protocol.paired({seed: each + shift for seed, each in a.items()}, {**a, 99: 0.0})
    assert count == len(values)
    assert value == pytest.approx(shift, abs=1e-12)
    assert half == pytest.approx(0, abs=1e-11)


def test_an_interval_covers_the_mean_as_often_as_it_says(protocol):
    draws = np.random.default_rng(0).normal(size=(4000, 5))
    covered = [abs(value) <= half for value, half in (protocol.interval(list(row)) for row in draws)]
    # A binomial share of 0.95 over 4000 has a standard deviation of 0.0034.
    assert np.mean(covered) == pytest.approx(0.95, abs=4 * 0.0034)


MINILM = [(384, 384)] * 4 + [(384, 1536), (1536, 384)]


def test_matched_methods_train_no_more_than_lora_of_rank_one(methods):
    shapes = MINILM * 6
    budget = sum(n + m for n, m in shapes)
    for method in methods.METHODS.values():
        if method.size is None or method.rank is not None:
            continue
        rank = method.rank_at(shapes)
        assert method.size(rank, shapes) <= method.share * budget < method.size(rank + method.step, shapes), method.name


@pytest.mark.parametrize(
    "name",
    [
        "LOFT principal",
        "LOFT coordinate tied",
        "PSOFT",
        "OFT b4",
        "BOFT b2 m2",
        "HRA",
        "LoRA-XS",
        "LoRA-XS pilot r32",
        "LOFT halves",
        "LOFT pilot 64 r46",
        "LOFT skewgrad budget r46",
        "LoRA r1",
    ],
)
def test_a_method_trains_what_its_size_says_and_starts_at_the_base(methods, name):
    tasks = importlib.import_module("tasks")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Tanh(), torch.nn.Linear(24, 48))
    task = tasks.Task("t", "f", "vit", "accuracy", tied=True)
    names = methods.targets(task, model)
    assert names == ["0", "2"]
    shapes = methods.shapes_of(model, names)
    method = methods.METHODS.get(name) or methods.Method(name, methods._loft("coordinate"), 0.06, methods._planes)
    rank = 8 if name.endswith((" r32", " r46")) else method.rank_at(shapes)
    x = torch.randn(5, 24)
    with torch.no_grad():
        before = model(x)

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x):
            y = self.body(x)
            return SequenceClassifierOutput(loss=y.square().mean(), logits=y)

    whole = Loss().requires_grad_(False)
    setup = methods.Setup(task, [f"body.{each}" for each in names], [{"x": x}, {"x": torch.randn(5, 24)}], 0)
    adapted = method.adapt(whole, rank, setup)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    # BOFT trains a scale of every output as well; OFT and BOFT turn blocks of all inputs.
    expected = {
        "OFT b4": sum(n // 4 * 6 for n, _ in shapes),
        "BOFT b2 m2": sum(2 * n // 2 + m for n, m in shapes),
        "LoRA r1": sum(n + m for n, m in shapes),
        "LoRA-XS pilot r32": 2 * rank**2,
    }
    size = expected[name] if name in expected else method.size(rank, shapes)
    assert size / 2 < trained <= size if "budget" in name else trained == size
    with torch.no_grad():
        after = adapted(x=x)["logits"]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_halved_batches_are_the_halves_of_those_given(methods, monkeypatch):
    given, seen = [{"x": torch.arange(6)}, {"x": torch.arange(6, 11)}], []
    monkeypatch.setattr(methods, "_calibrate", lambda model, setup, **_: seen.extend(setup.batches))
    task = importlib.import_module("tasks").Task("t", "f", "vit", "accuracy")
    setup = methods.Setup(task, ["0"], given, 0)
    methods._loft("pilot", halved=True)(torch.nn.Sequential(torch.nn.Linear(4, 4)), 2, setup)
    assert [each["x"].tolist() for each in seen] == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9]]


def test_no_rank_within_a_budget_is_an_error(methods):
    with pytest.raises(ValueError, match="no rank trains at most 5 parameters"):
        methods.METHODS["LoRA-XS"].rank_at([(1, 4)])


def test_problems_that_several_sets_share_are_taken_once(bench_path, tmp_path):
    prepare = importlib.import_module("prepare")
    problem = (
        "Joan found {} seashells on the beach{} She gave Sam some. She has 27 left. How many did she give to Sam{}"
    )
    sets = {
        "addsub": [(problem.format(70, " .", " ?"), 43.0), ("Ann has 2 pens , and buys 3 .", 5.0)],
        "singleeq": [(problem.format(70, ".", "?"), 43.0), (problem.format(71, ".", "?"), 44.0)],
        "multiarith": [("A cake costs 1.5 dollars. Three cost how much?", 4.5)],
        "singleop": [],
    }
    (tmp_path / "mawps").mkdir()
    for name, rows in sets.items():
        with gzip.open(tmp_path / "mawps" / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"input": asked, "target": told}) + "\n" for asked, told in rows)
    splits = prepare.mawps(tmp_path)
    rows = [row for split in splits.values() for row in split]
    assert sorted(told for _, told in rows) == ["#### 4.5", "#### 43", "#### 44", "#### 5"]
    assert ("Ann has 2 pens, and buys 3.", "#### 5") in rows


def test_matthews_correlation(bench_path):
    tasks = importlib.import_module("tasks")
    predicted, labels = torch.tensor([1, 1, 0, 0, 1, 0]), torch.tensor([1, 0, 0, 1, 1, 0])
    # tp 2, tn 2, fp 1, fn 1: (4 - 1) / sqrt(3 * 3 * 3 * 3)
    assert tasks.matthews(predicted, labels) == pytest.approx(1 / 3)
    assert tasks.matthews(torch.zeros(4), torch.tensor([0, 1, 0, 1])) == 0.0


def test_batches_are_epochs_in_order_and_the_same_for_every_method(bench_path):
    train, tasks = importlib.import_module("train"), importlib.import_module("tasks")
    task = tasks.Task("t", "f", "vit", "accuracy", batch=4)
    order = train.order_of(task, 10, 5, seed=3)
    assert order.shape == (5, 4)
    assert sorted(order.flatten()[:10].tolist()) == list(range(10))
    assert torch.equal(order, train.order_of(task, 10, 5, seed=3))
    assert not torch.equal(order, train.order_of(task, 10, 5, seed=4))
    factors = train.schedule(40)
    assert float(factors.max()) == 1.0
    assert float(factors[0]) == pytest.approx(0.25)
    assert 0 < float(factors[-1]) < 0.05


def test_a_wave_holds_runs_of_one_task_that_nobody_has(protocol):
    sweep = importlib.import_module("sweep")
    specs = [protocol.Spec(task, "a", "tune", rate, 0, 3) for rate in (1e-3, 1e-2) for task in ("t", "u")]
    taken = {protocol.key(specs[0])}
    assert sweep.next_wave(specs, taken, 3) == [specs[1], specs[3]]
    assert sweep.next_wave(specs, set(map(protocol.key, specs)), 3) == []


def test_the_report_keeps_losers_and_says_what_is_missing(protocol, tmp_path, report):
    base = {"task": "t", "steps": 3, "family": "f", "metric": "accuracy", "matmul": "fp32", "device": "card", "rank": 2}
    lines = []
    for method, trained, level in (
        ("LoRA r1", 10, 0.7),
        ("LOFT principal", 9, 0.6),
        ("LOFT principal refresh", 9, 0.65),
    ):
        lines += [
            base | {"method": method, "trained": trained, "phase": "tune", "rate": r, "seed": 100, "score": 0.1}
            for r in (0.1, 0.2)
        ]
        lines += [
            base
            | {"method": method, "trained": trained, "phase": "score", "rate": 0.1, "seed": s, "score": level + s / 100}
            for s in range(3)
        ]
    lines += [
        base | {"method": "LOFT principal", "trained": 9, "phase": "score", "rate": 0.1, "seed": 3, "score": None}
    ]
    lines += [base | {"method": "HRA", "trained": 8, "phase": "tune", "rate": 0.1, "seed": 100, "score": 0.1}]
    for method, trained in (("LOFT principal tied r9", 9), ("LOFT principal large r9", 90)):
        lines += [
            base | {"method": method, "trained": trained, "phase": "score", "rate": 0.1, "seed": s, "score": s / 100}
            for s in range(3)
        ]
    trial = {"method": "LOFT pilot wide r9", "trained": 9, "phase": "trial", "rate": 0.1, "seed": 100, "score": 0.125}
    lines += [
        base | trial,
        base | {"method": "OFT b4", "trained": 9, "phase": "score", "rate": 0.1, "seed": 0, "score": 0.3},
    ]
    page = report.tables(lines, [])
    row = next(each for each in page.splitlines() if each.startswith("| LOFT principal |"))
    assert "| OFT b4 | 2 | 9 | 0.1 | - | 1 | 0.3000 | -0.4000 (n=1) |" in page and "nan" not in page
    assert "3 (1 diverged)" in row and "-0.1000 ± 0.0000 *" in row and "0.1 (edge)" in row
    assert "| t | LOFT principal refresh | LOFT principal | +0.0500 ± 0.0000 * |" in page
    assert "| t | LOFT principal tied r9 | LOFT principal | -0.6000 ± 0.0000 * |" in page
    assert "| t | LOFT principal large r9 |" not in page
    assert page.count("| t | LOFT pilot wide r9 | 9 | 0.1 | 0.1250 |") == 1
    assert "Tried at some rates and not scored: HRA on t." in page
