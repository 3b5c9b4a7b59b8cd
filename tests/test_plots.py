"""Pictures: no label over another, in any layout; written whole; and what a notebook shows."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from loft_rs import CalibrationReport, SplitHalf, select_support
from loft_rs._grid import Grid
from loft_rs.inspection import AdapterReport, ModuleReport
from loft_rs.plots import draw_methods, finish

LLAMA = [
    f"base_model.model.model.layers.{i}.{kind}"
    for i in range(30)
    for kind in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                 "mlp.up_proj", "mlp.down_proj")
]  # fmt: skip
MINILM = [f"encoder.layer.{i}.{kind}" for i in range(6) for kind in ("attention.self.query", "output.dense")]
TOWERS = [f"{tower}.layers.{i}.q_proj" for tower in ("encoder", "decoder") for i in range(4)]
NAMES = {"llama": LLAMA, "minilm": MINILM, "towers": TOWERS, "one": ["q_proj"], "flat": ["first", "second", "head"]}


def a_support(energy=0.5):
    return replace(select_support(np.random.default_rng(0).standard_normal((40, 24)), 8), energy=energy)


def a_report(names, evidence=True, ranks=False):
    draw = np.random.default_rng(1)
    supports = {name: a_support(float(draw.random())) for name in names}
    if ranks:
        supports[names[0]] = select_support(np.eye(24, dtype=np.float32), 4)
    halves = {n: SplitHalf(a := float(draw.random()), a, np.zeros(4), 0.2, np.ones(2), 8, 0.1, 0.5) for n in names}
    return CalibrationReport("gradsvd", "input_pca", 2, 8, 0, 1.25, supports, halves if evidence else {})


def an_adapter(names, energy=0.5):
    draw = np.random.default_rng(2)
    angles = [np.sort(draw.random(8) * 20)[::-1] for _ in names]
    return AdapterReport(
        ModuleReport(n, 24, 16, "cayley", "input", energy, 1e-7, a) for n, a in zip(names, angles, strict=True)
    )


def texts(figure):
    """Every visible text of the drawn figure, with its box."""
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    hidden = set()
    for axis in (axis for axes in figure.findobj(Axes) for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        hidden |= {label for tick in ticks if not low <= tick.get_loc() <= high for label in (tick.label1, tick.label2)}
    drawn = [e for e in figure.findobj(Text) if e.get_visible() and e.get_text().strip() and e not in hidden]
    return [(each.get_text(), each.get_window_extent(canvas.get_renderer())) for each in drawn]


def assert_readable(figure):
    found, (width, height) = texts(figure), figure.get_size_inches() * figure.dpi
    for text, box in found:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, f"{text} is cut off"
    for (one, a), (other, b) in combinations(found, 2):
        over = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(over) <= 1, f"{one!r} and {other!r} lie over each other"


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_no_label_lies_over_another_or_is_cut_off(names):
    for figure in (
        a_report(names).plot(),
        a_report(names, evidence=False).plot(),
        an_adapter(names).plot(title="an adapter"),
    ):
        assert_readable(figure)


def test_ranks_and_unknown_energies():
    report = a_report(LLAMA, ranks=True)
    assert "rank" in [text for text, _ in texts(report.plot())]
    assert_readable(report.plot())
    drawn = an_adapter(MINILM, energy=float("nan")).plot()
    assert "captured energy" not in [text for text, _ in texts(drawn)]
    assert_readable(drawn)


def test_a_support_and_the_methods():
    assert_readable(a_support().plot())
    assert_readable(replace(a_support(float("nan")), values=np.full(8, np.nan)).plot())
    assert_readable(
        draw_methods({"LOFT principal r=64": (72_576, 0.51), "PEFT LoRA r=8": (331_776, 0.5)}, 0.43, "recall@1")
    )


def test_what_moved_most_is_named_in_order():
    adapter = an_adapter(LLAMA)
    grid = Grid.of(LLAMA)
    first = max(range(len(adapter)), key=lambda index: adapter[index].largest_angle)
    found = [text for text, _ in texts(adapter.plot())]
    assert grid.label(first) in found and f"{adapter[first].largest_angle:.3g}" in found


def test_a_grid_of_two_towers_keeps_them_apart():
    grid = Grid.of(TOWERS)
    assert len(grid.kinds) == 2 and grid.depths == [0, 1, 2, 3]
    assert grid.kinds == ["encoder.layers.q_proj", "decoder.layers.q_proj"]
    assert Grid.of(MINILM).kinds == ["attention.self.query", "output.dense"]


def test_files_are_written_whole_and_only_as_png_or_svg(tmp_path, monkeypatch):
    support = a_support()
    support.plot(tmp_path / "a.png")
    support.plot(tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (tmp_path / "a.svg").read_text()
    with pytest.raises(ValueError, match=r"\.png or \.svg, not 'a\.pdf'"):
        support.plot(tmp_path / "a.pdf")
    figure = support.plot()
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finish(figure, tmp_path / "b.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]


def test_a_notebook_shows_the_picture_in_the_pages_colours():
    names = ["<script>alert(1)</script>.q_proj"]
    for page in (a_support()._repr_html_(), a_report(names)._repr_html_(), an_adapter(names)._repr_html_()):
        assert "<svg" in page and "currentColor" in page and "<script>" not in page


def test_without_matplotlib_a_notebook_has_the_text_and_plot_says_what_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = a_report(["q_proj"])._repr_html_()
    assert "<svg" not in page and "mean energy" in page
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"\.\[plot\]\""):
        a_support().plot()
