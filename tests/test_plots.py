"""Pictures: no label over another, in any layout; written whole; and what a notebook shows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
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
MINILM = [
    f"encoder.layer.{i}.{kind}"
    for i in range(6)
    for kind in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                 "intermediate.dense", "output.dense")
]  # fmt: skip
TOWERS = [f"{tower}.layers.{i}.q_proj" for tower in ("encoder", "decoder") for i in range(4)]
TIED = [f"encoder.layer.{i}.attention.self.{'+'.join(['query', 'key', 'value'])}" for i in range(6)]
NAMES = {
    "llama": LLAMA,
    "minilm": MINILM,
    "towers": TOWERS,
    "tied": [*TIED, "encoder.pooler.dense"],
    "one": ["q_proj"],
    "flat": ["first", "second", "head"],
    "head": [*LLAMA[:56], "lm_head"],
    "long": ["vision_tower.projector.a_module_with_a_long_name_indeed", "language.another_that_is_just_as_long_as_it"],
}


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
    """Every visible text of the drawn figure, with its box (without the line of an annotation)."""
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
    return [(each.get_text(), Text.get_window_extent(each, canvas.get_renderer())) for each in drawn]


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
    shown = [text for text, _ in texts(report.plot())]
    assert {"captured energy", "agreement", "reproducible"} <= set(shown)
    shown = [text for text, _ in texts(a_report(MINILM, evidence=False).plot())]
    assert not {"rank", "agreement", "reproducible"} & set(shown)
    drawn = an_adapter(MINILM, energy=float("nan")).plot()
    assert "captured energy" not in [text for text, _ in texts(drawn)]
    assert_readable(drawn)


def test_a_report_of_supports_whose_values_nobody_knows():
    report = a_report(MINILM)
    for name, support in report.supports.items():
        report.supports[name] = replace(support, values=np.full(8, np.nan), energy=float("nan"))
    shown = [text for text, _ in texts(report.plot())]
    assert "agreement" in shown and "captured energy" not in shown and "least captured energy" not in shown
    assert_readable(report.plot())


def test_a_support_and_the_methods():
    assert_readable(a_support().plot())
    assert_readable(replace(a_support(), values=np.ones(1), basis=np.eye(2, 1, dtype=np.float32)).plot())
    assert_readable(replace(a_support(float("nan")), values=np.full(8, np.nan)).plot())
    assert_readable(
        draw_methods({"LOFT principal r=64": (72_576, 0.51), "PEFT LoRA r=8": (331_776, 0.5)}, 0.43, "recall@1")
    )
    near = {
        "LOFT pilot r=64": (72_576, 0.511),
        "LOFT principal r=64": (72_576, 0.51),
        "PEFT LoRA r=8": (331_776, 0.508),
    }
    assert_readable(draw_methods(near | {"LOFT random r=64": (72_576, 0.431)}, 0.43, "recall@1"))


def bars(figure):
    """The labels of the last chart, from above."""
    return [label.get_text() for label in figure.subfigs[-1].axes[-1].get_yticklabels()]


def test_what_moved_most_and_what_captured_least_is_named_in_order():
    adapter, report = an_adapter(LLAMA), a_report(LLAMA)

    def labels(names):
        return [" ".join(name.removeprefix("base_model.model.model.layers.").split(".", 1)) for name in names]

    moved = sorted(adapter, key=lambda each: -each.largest_angle)[:6]
    assert bars(adapter.plot()) == labels(each.name for each in moved)
    assert f"{moved[0].largest_angle:#.3g}" in [text for text, _ in texts(adapter.plot())]
    least = sorted(LLAMA, key=lambda name: report.supports[name].energy)[:6]
    assert bars(report.plot()) == labels(least)


def test_a_long_label_keeps_its_depth_and_its_end():
    names = [f"layer.{i}.{part}_attention.query_and_key_and_value" for i in range(3) for part in ("self", "cross")]
    shown = bars(an_adapter(names).plot())
    assert len(shown) == 6
    assert set(shown) == {f"{i} …ion.query_and_key_and_value" for i in range(3)}


def test_a_grid_of_two_towers_keeps_them_apart():
    grid = Grid.of(TOWERS)
    assert len(grid.kinds) == 2 and grid.depths == [0, 1, 2, 3]
    assert grid.kinds == ["encoder.layers.q_proj", "decoder.layers.q_proj"]
    assert Grid.of(MINILM).kinds == [name.removeprefix("encoder.layer.0.") for name in MINILM[:6]]


def test_files_are_written_whole_and_only_as_png_or_svg(tmp_path, monkeypatch):
    support = a_support()
    support.plot(tmp_path / "a.png")
    support.plot(tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (tmp_path / "a.svg").read_text()
    for drawn in (support, a_report(["q_proj"]), an_adapter(["q_proj"])):
        with pytest.raises(ValueError, match=r"path must end in \.png or \.svg, not 'a\.pdf'"):
            drawn.plot(tmp_path / "a.pdf")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        finish(lambda: pytest.fail("drawn before the path was checked"), tmp_path / "no" / "a.png")
    figure = support.plot()
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finish(lambda: figure, tmp_path / "b.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]


class Balanced(HTMLParser):
    """The tags of a page, of which each is closed in its turn."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)


def test_a_notebook_shows_the_picture_in_the_pages_colours():
    names = ["a.0.<script>alert(1)</script>.q_proj", "a.1.</svg><b>&-->.k_proj", "a.2.$x_{1}$", "a.3.$\\frac{$"]
    for page in (a_support()._repr_html_(), a_report(names)._repr_html_(), an_adapter(names)._repr_html_()):
        assert "currentColor" in page and "<script>" not in page and "<style" not in page
        assert "fill: #ffffff" not in page  # no ground of its own
        read = Balanced()
        read.feed(page)
        assert read.open == [] and read.seen[0] == "svg" and "b" not in read.seen and "script" not in read.seen
    for folded in (a_report(names)._repr_html_(), an_adapter(names)._repr_html_()):
        assert "<details>" in folded and "a.0.&lt;script&gt;" in folded
    assert "energy     0.5000" in a_support()._repr_html_()


def test_matplotlib_is_imported_for_a_picture_alone():
    code = "import sys, loft_rs, loft_rs.plots, loft_rs.support, loft_rs.inspection; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_a_notebook_has_the_text_and_plot_says_what_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = a_report(["q_proj"])._repr_html_()
    assert "<svg" not in page and "mean energy" in page
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"\.\[plot\]\""):
        a_support().plot()
