"""What a `CalibrationReport` says: advice, groups, the table, and all of it in 100 columns."""

import math
from dataclasses import replace

import numpy as np
import pytest

from loft_rs import CalibrationReport, Pilot, SplitHalf, select_support
from loft_rs._grid import kind_and_depth
from loft_rs.calibration.summary import thirds

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.a_rather_long_name_for_the_module_that_is_down_proj")


def halves(agreement, batches=8, dominance=0.5):
    return SplitHalf(agreement, agreement, np.zeros(4), 0.2, np.ones(2), batches, 0.1, dominance)


def a_report(agreement=None, blocks=30, dominance=0.5, **fields):
    support = select_support(np.random.default_rng(0).standard_normal((12, 10)), 4)
    names = [f"base_model.model.model.layers.{i}.{kind}" for i in range(blocks) for kind in KINDS]
    supports = {n: replace(support, energy=0.2 + 0.001 * k, energy_stderr=0.01) for k, n in enumerate(names)}
    evidence = {} if agreement is None else {name: halves(agreement, dominance=dominance) for name in names}
    start = {"method": "gradsvd", "order": "input_pca", "passes": 2, "batches": 8, "head_steps": 0, "seconds": 1.25}
    return CalibrationReport(**start | {"supports": supports, "evidence": evidence} | fields)


def test_the_summary_of_many_layers_is_short_and_narrow():
    report = a_report(0.35)
    text = str(report)
    lines = text.splitlines()
    assert lines[0] == "gradsvd, input_pca order: 90 layers, 2 passes over 8 batches, 1.2 s"
    assert lines[1].startswith("mean energy 0.244; least in base_model.model.model.layers.0.self_attn.q_proj 0.200,")
    assert "Agreement 0.35, poor: " in text and "More batches would help: yes, at least 167 for 0.9" in " ".join(
        text.split()
    )
    assert len(lines) < 20 and max(map(len, (*lines, *report.table().splitlines()))) <= 100
    (row,) = [line for line in lines if line.startswith("self_attn.q_proj")]
    # Mean over 30 blocks, its standard error, three thirds of ten blocks each, agreement.
    assert row.split() == ["self_attn.q_proj", "30", "4", "0.244", "0.0100", "0.214", "0.244", "0.274", "0.350"]
    assert "at 0-9" in text and "at 20-29" in text
    for word in ("energy: the part of the squared gradient", "+-: its standard error", "agreement: of the support"):
        assert word in " ".join(text.split())


def test_the_table_tells_every_layer_in_100_columns():
    report = a_report(0.35)
    sided = a_report(0.35, sides={name: {"input": 1.0, "output": 2.0} for name in report.supports})
    for each in (report, sided):
        lines = each.table().splitlines()
        rows = [line for line in lines if "q_proj" in line or "k_proj" in line or "down_proj" in line]
        assert len({line.split()[0] for line in rows}) == len(rows) == 90 and max(map(len, lines)) <= 100
    assert sided.table().splitlines()[4].startswith("…1.self_attn.q_proj ") and "2.00e+00" in sided.table()
    plain = replace(report, supports=dict(list(report.supports.items())[:2]), evidence={}).table().splitlines()
    assert plain[1].startswith("base_model.model.model.layers.0.self_attn.q_proj  ")


@pytest.mark.parametrize(
    ("agreement", "fields", "said"),
    [
        (0.95, {}, "Agreement 0.95, good: other batches give nearly the same support. More batches would help: no"),
        (0.7, {}, "Agreement 0.70, fair: other batches give a part of it. More batches would help: yes, at least"),
        (math.nan, {}, "too few batches to tell. More batches would help: yes"),
        (0.1, {}, "More batches would help: yes, but no number follows from these"),
        (None, {"method": "principal"}, "More batches would help: no, the batches only order this support"),
        (None, {"method": "pilot", "pilot": Pilot(steps=1)}, "More batches would help: not known"),
    ],
)
def test_the_advice(agreement, fields, said):
    assert said in " ".join(str(a_report(agreement, **fields)).split())


def test_counts_are_in_the_right_number():
    report = a_report(None, blocks=1, method="pilot", pilot=Pilot(steps=1), passes=1, batches=1, head_steps=1)
    assert "pilot of 1 step, input_pca order: 3 layers, 1 pass over 1 batch, head warmed up for 1 step, " in str(report)
    assert "in 3 layers one half of the batches" in str(a_report(0.5, blocks=1, dominance=0.99))


def test_the_repr_has_energies_and_rows_make_a_frame():
    report = a_report(0.35)
    assert repr(report) == (
        "CalibrationReport(gradsvd, 90 layers, energy 0.244 (0.200 to 0.289), agreement 0.35, 2 passes over 8 batches)"
    )
    rows = report.rows()
    assert len(rows) == 90 and rows[1]["layer"].endswith("layers.0.self_attn.k_proj")
    assert rows[1] | {"layer": ""} == rows[1] | {"layer": "", "rank": 4, "energy": 0.201, "+-": 0.01, "agreement": 0.35}
    assert {len(row) for row in rows} == {10} and math.isnan(rows[0]["on input"])


def test_kinds_and_depths():
    assert kind_and_depth("encoder.layer.3.attention.self.query") == ("attention.self.query", 3)
    assert kind_and_depth("pooler.dense") == ("pooler.dense", None) and kind_and_depth("net.0") == ("net.0", None)
    assert thirds([4, 0, 1, 2, 3, 0]) == [[0, 1], [2, 3], [4]] and thirds([0, 1]) == []
