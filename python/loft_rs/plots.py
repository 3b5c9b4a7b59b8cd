"""Pictures of adapters, calibrations and supports. Needs matplotlib, the extra `plot`.

Every picture is 7 inches wide, so at 100 dots an inch it has the width of a README. Modules are laid
out by kind (rows) and depth (columns). What is drawn is given as plain arrays (`Spectra`), so that
the classes that are drawn may import this file.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._files import whole_file
from ._grid import Grid
from ._words import how_to_install

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Map", "Spectra", "as_page", "as_svg", "draw_layers", "draw_methods", "draw_support", "finish"]

WIDTH = 7.0  # inches
DPI = 200
MOST = 6  # modules that are named
INK = "#1b1c1d"  # of all text and lines; `as_svg` makes it the page's own colour
FAINT = "#8c8f93"
BLUE, RED = "#4477aa", "#cc6677"


@dataclass(frozen=True)
class Map:
    """One heat map: a value for every module. low, high: of the colours; None: of the values. framed: whether the named modules have
    a frame in it."""

    title: str
    values: Sequence[float]
    colours: str = "viridis"
    low: float | None = None
    high: float | None = None
    framed: bool = False


@dataclass(frozen=True)
class Spectra:
    """A falling curve for every module, and the value that says which modules are named."""

    title: str
    curves: Sequence[np.ndarray]
    ranked_title: str
    ranked: Sequence[float]
    logarithmic: bool = False


def _figure(height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise ModuleNotFoundError(
            f"loft_rs draws with matplotlib: {how_to_install('plot')}", name="matplotlib"
        ) from error

    class Picture(Figure):
        """A figure that a notebook shows, also where pyplot was never imported."""

        def _repr_png_(self) -> bytes:
            held = io.BytesIO()
            self.savefig(held, format="png", dpi=DPI // 2)
            return held.getvalue()

    return Picture(figsize=(WIDTH, height), layout="constrained", facecolor="white")


def draw_layers(
    names: Sequence[str], maps: Sequence[Map], spectra: Spectra | None, title: str, note: str = ""
) -> Figure:
    """Heat maps beside each other, and below them the spectra and what has the largest value.

    maps without one known value are left out, and spectra without a curve.
    """
    grid = Grid.of(names)
    maps = [each for each in maps if np.isfinite(each.values).any()]
    if spectra is not None and not any(np.isfinite(curve).any() for curve in spectra.curves):
        spectra = None
    upper = 0.9 + 0.24 * max(3, len(grid.kinds))
    lower = 2.3 if spectra is not None else 0.0
    figure = _figure(upper + lower + 0.35)
    heights = [upper] * bool(maps) + [lower] * (spectra is not None)
    parts = figure.subfigures(max(1, len(heights)), 1, height_ratios=heights or None, squeeze=False)[:, 0]
    named = _largest(spectra.ranked) if spectra is not None else []
    if maps:
        axes = np.atleast_1d(parts[0].subplots(1, len(maps), sharey=True))
        for place, (axis, each) in enumerate(zip(axes, maps, strict=True)):
            _heat_map(axis, grid, each, named if each.framed else [], first=place == 0)
    if spectra is not None:
        left, right = parts[-1].subplots(1, 2, width_ratios=(1.15, 1))
        _curves(left, spectra, named)
        _bars(right, [grid.label(index) for index in named], spectra, named)
    figure.suptitle(textwrap.fill(title, 90), fontsize=10, color=INK)
    if note:
        figure.supxlabel(note, fontsize=7.5, color=INK)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06, wspace=0.05, hspace=0.05)
    return figure


def _largest(values: Sequence[float], count: int = MOST) -> list[int]:
    known = [index for index, value in enumerate(values) if np.isfinite(value)]
    return sorted(known, key=lambda index: -values[index])[:count]


def _heat_map(axis: Axes, grid: Grid, drawn: Map, outlined: Sequence[int], *, first: bool) -> None:
    """One map with its bar of colours below; the outlined modules have a frame."""
    from matplotlib.patches import Rectangle

    laid = grid.array(drawn.values)
    image = axis.pcolormesh(
        np.ma.masked_invalid(laid),
        cmap=drawn.colours,
        vmin=drawn.low,
        vmax=drawn.high,
        edgecolors="white",
        linewidth=0.4,
    )
    axis.set_ylim(len(grid.kinds), 0)
    axis.set_title(drawn.title, fontsize=8.5, color=INK)
    shown = range(0, len(grid.depths), max(1, -(-len(grid.depths) // 10)))
    axis.set_xticks(
        [each + 0.5 for each in shown], ["-" if (d := grid.depths[each]) is None else str(d) for each in shown]
    )
    axis.set_xlabel("depth", fontsize=7.5, color=INK, labelpad=1)
    axis.set_yticks([row + 0.5 for row in range(len(grid.kinds))], grid.kinds)
    axis.tick_params(labelsize=7, length=0, labelleft=first, colors=INK)
    for row, column in (grid.places[index] for index in outlined):
        axis.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=RED, linewidth=1.4, clip_on=False))
    for spine in axis.spines.values():
        spine.set_visible(False)
    bar = axis.figure.colorbar(image, ax=axis, orientation="horizontal", aspect=30, pad=0.03, fraction=0.06)
    bar.ax.tick_params(labelsize=7, length=2, colors=INK)
    bar.ax.locator_params(nbins=5)
    bar.outline.set_visible(False)


def _plain(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=8.5, color=INK)
    axis.tick_params(labelsize=7, length=2, colors=INK)
    axis.set_facecolor("none")
    for side, spine in axis.spines.items():
        spine.set_color(FAINT)
        spine.set_visible(side in ("left", "bottom"))
    axis.grid(axis="both", color=FAINT, alpha=0.25, linewidth=0.5)
    axis.set_axisbelow(True)


def _curves(axis: Axes, spectra: Spectra, named: Sequence[int]) -> None:
    """Every module's curve faint, the named ones in colour."""
    for index, curve in enumerate(spectra.curves):
        strong = index in named
        axis.plot(
            np.arange(1, len(curve) + 1),
            curve,
            color=RED if strong else BLUE,
            alpha=0.9 if strong else max(0.12, min(0.6, 12 / len(spectra.curves))),
            linewidth=1.1 if strong else 0.8,
            zorder=3 if strong else 2,
        )
    _plain(axis, spectra.title)
    axis.set_yscale("log" if spectra.logarithmic else "linear")
    if not spectra.logarithmic:
        axis.set_ylim(0, None)
    axis.set_xlim(1, None)
    axis.locator_params(axis="x", integer=True, nbins=6)


def _bars(axis: Axes, labels: Sequence[str], spectra: Spectra, named: Sequence[int]) -> None:
    """The named modules and their values."""
    values = [spectra.ranked[index] for index in named]
    axis.barh(range(len(named)), values, color=RED, height=0.6)
    axis.set_yticks(range(len(named)), labels)
    axis.set_ylim(MOST - 0.4, -0.6)
    top = max([*values, 0]) or 1
    axis.set_xlim(0, 1.25 * top)
    for row, value in enumerate(values):
        axis.text(value + 0.02 * top, row, f"{value:.3g}", va="center", fontsize=7, color=INK)
    _plain(axis, spectra.ranked_title)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.locator_params(axis="x", nbins=4)


def draw_support(values: np.ndarray, energy: float, basis: np.ndarray, title: str) -> Figure:
    """A support: its values with the energy that the first k directions capture, and where P lies.

    values: (r,), in any order; NaN where none is known. basis: P (n x r).
    """
    figure = _figure(2.6)
    left, right = figure.subplots(1, 2)
    known = np.sort(values[np.isfinite(values)])[::-1]
    if known.size and known[0] > 0:
        places = np.arange(1, len(known) + 1)
        left.bar(places, known / known[0], color=BLUE, width=0.8)
        _plain(left, "values (bars), captured energy so far (line)")
        left.set_ylim(0, 1.05)
        if np.isfinite(energy):
            squares = np.cumsum(np.square(known / known[0]))
            left.plot(places, energy * squares / squares[-1], color=RED, linewidth=1.4)
            left.annotate(
                f"{energy:.2f}",
                (places[-1], energy),
                (0, 3),
                textcoords="offset points",
                ha="right",
                fontsize=7,
                color=INK,
            )
        left.locator_params(axis="x", integer=True, nbins=6)
    else:
        _plain(left, "values")
        left.text(0.5, 0.5, "unknown: no matrix was given", ha="center", fontsize=7.5, color=INK)
    left.set_xlabel("direction", fontsize=7.5, color=INK, labelpad=1)
    weight = np.square(basis.astype(np.float64)).sum(1)
    right.vlines(np.arange(len(weight)), 0, weight, color=BLUE, linewidth=max(0.4, min(3, 200 / len(weight))))
    _plain(right, "how much of each coordinate lies in the support")
    right.set_ylim(0, max(1e-6, 1.08 * weight.max()))
    right.set_xlim(-0.5, len(weight) - 0.5)
    right.locator_params(axis="x", integer=True, nbins=6)
    right.set_xlabel("coordinate", fontsize=7.5, color=INK, labelpad=1)
    figure.suptitle(textwrap.fill(title, 90), fontsize=10, color=INK)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06, wspace=0.06)
    return figure


def draw_methods(points: Mapping[str, tuple[float, float]], base: float, score: str) -> Figure:
    """Score against trained parameters, a point a method: label -> (parameters, score)."""
    figure = _figure(2.9)
    axis = figure.subplots()
    _plain(axis, f"{score} against trained parameters")
    axis.axhline(base, color=FAINT, linewidth=1, linestyle="--")
    axis.annotate(
        "untrained",
        (1, base),
        (-2, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize=7.5,
        color=INK,
    )
    ordered = sorted(points.items(), key=lambda item: item[1])
    for place, (label, (size, value)) in enumerate(ordered):
        loft = label.startswith("LOFT")
        axis.plot(size, value, "o" if loft else "s", color=BLUE if loft else RED, markersize=7)
        below = any(
            abs(np.log(size / s)) < 1.2 and abs(value - v) < 0.08 * _spread(points, base)
            for _, (s, v) in ordered[:place]
        )
        axis.annotate(
            f"{label}: {value:.3f}",
            (size, value),
            (0, -13 if below else 8),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            color=INK,
        )
    axis.set_xscale("log")
    sizes = [size for size, _ in points.values()]
    axis.set_xlim(min(sizes) / 4, max(sizes) * 4)
    values = [base, *(value for _, value in points.values())]
    margin = 0.22 * _spread(points, base)
    axis.set_ylim(min(values) - margin, max(values) + margin)
    axis.set_xlabel("trained parameters", fontsize=7.5, color=INK, labelpad=1)
    return figure


def _spread(points: Mapping[str, tuple[float, float]], base: float) -> float:
    values = [base, *(value for _, value in points.values())]
    return max(max(values) - min(values), 1e-3)


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write the picture to `path` (.png or .svg), whole or not at all."""
    ending = Path(path).suffix.lower().removeprefix(".")
    if ending not in ("png", "svg"):
        raise ValueError(f"path must end in .png or .svg, not {Path(path).name!r}")
    with whole_file(path) as part:
        figure.savefig(part, format=ending, dpi=DPI)


def as_svg(figure: Figure) -> str:
    """The picture as an <svg> element for a page: no ground of its own, ink in the page's colour."""
    from matplotlib import rc_context

    held = io.StringIO()
    with rc_context({"svg.fonttype": "path"}):
        figure.savefig(held, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = held.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def as_page(text: str, plot: Callable[[], Figure]) -> str:
    """What a notebook shows: the text, and the picture where matplotlib is there."""
    shown = f"<pre>{escape(text)}</pre>"
    try:
        return as_svg(plot()) + shown
    except ModuleNotFoundError:
        return shown


def finish(figure: Figure, path: str | os.PathLike | None) -> Any:
    """The figure, saved too where a path is given."""
    if path is not None:
        save(figure, path)
    return figure
