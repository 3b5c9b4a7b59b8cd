"""Pictures of adapters, calibrations and supports. Needs matplotlib, the extra `plot`.

Every picture is 7 inches wide, so at 100 dots an inch it has the width of a README. Modules are
laid out by kind (rows) and depth (columns). What is drawn is given as plain arrays (`Map`,
`Spectra`), so that the classes that are drawn may import this file.
"""

from __future__ import annotations

import io
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._files import check_writable, whole_file
from ._grid import Grid
from ._words import how_to_install

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Map",
    "Spectra",
    "as_page",
    "as_svg",
    "check_path",
    "draw_layers",
    "draw_methods",
    "draw_support",
    "energy_map",
    "finish",
]

WIDTH = 7.0  # inches
DPI = 200
MOST = 6  # modules that are named
ROOM = 28  # characters of a module's label
INK = "#1b1c1d"  # of all text and lines; `as_svg` makes it the page's own colour
FAINT = "#8c8f93"
BLUE, RED = "#4477aa", "#cc6677"
SMALL, HEAD, TITLE = 7, 8.5, 9  # points


@dataclass(frozen=True)
class Map:
    """One heat map: a value for every module, NaN where it is unknown.

    low, high: of the colours; None: of the values. framed: the modules that are named have a frame.
    """

    title: str
    values: Sequence[float]
    low: float | None = None
    high: float | None = None
    framed: bool = False


def energy_map(values: Sequence[float], *, framed: bool = False) -> Map:
    """Captured energies, coloured from the tenth below the least up to 1."""
    known = [value for value in values if np.isfinite(value)]
    return Map("captured energy", values, min(0.9, np.floor(10 * min(known)) / 10) if known else 0.0, 1.0, framed)


@dataclass(frozen=True)
class Spectra:
    """A falling curve for every module, and the values of which the largest (least) are named."""

    title: str
    along: str
    curves: Sequence[np.ndarray]
    ranked_title: str
    ranked: Sequence[float]
    least: bool = False

    def named(self) -> list[int]:
        """The modules to name, the first one first."""
        known = [index for index, value in enumerate(self.ranked) if np.isfinite(value)]
        return sorted(known, key=lambda index: self.ranked[index], reverse=not self.least)[:MOST]


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


def draw_layers(names: Sequence[str], maps: Sequence[Map], spectra: Spectra, title: str) -> Figure:
    """Heat maps beside each other, and below them the spectra and the modules that are named.

    A map without one known value is left out, and so are spectra without a curve.
    """
    grid = Grid.of(names)
    maps = [each for each in maps if np.isfinite(each.values).any()]
    curved = any(np.isfinite(curve).any() for curve in spectra.curves)
    across = len(maps) if len(maps) <= 3 else 2
    down = -(-len(maps) // across) if maps else 0
    heights = [down * (0.85 + _row_height(grid) * max(3, len(grid.kinds)))] * bool(maps) + [2.3] * curved
    figure = _figure(max(1.0, sum(heights)) + 0.35)
    _entitle(figure, title)
    if not heights:
        return figure
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    named = spectra.named() if curved else []
    if maps:
        axes = parts[0].subplots(down, across, sharey=True, squeeze=False).ravel()
        for place, (axis, each) in enumerate(zip(axes, maps, strict=False)):
            _heat_map(axis, grid, each, named if len(names) > 1 else [], first=place % across == 0)
        for axis in axes[len(maps) :]:
            axis.set_visible(False)
    if len(named) > 1:
        left, right = parts[-1].subplots(1, 2, width_ratios=(1.15, 1))
        _curves(left, spectra, named)
        _bars(right, [_label(grid, index) for index in named], spectra, named)
    elif curved:
        _curves(parts[-1].subplots(), spectra, named)
    return figure


def _row_height(grid: Grid) -> float:
    """Inches; of many rows as little as their labels need."""
    return max(0.13, min(0.24, 9.6 / len(grid.kinds)))


def _tail(kind: str) -> str:
    """The end of a kind that is too long, which tells more than its beginning."""
    return kind if len(kind) <= ROOM else "…" + kind[1 - ROOM :]


def _label(grid: Grid, index: int) -> str:
    """A module's depth and kind, as in `3 mlp.up_proj`."""
    row, column = grid.places[index]
    depth = grid.depths[column]
    return _tail(grid.kinds[row]) if depth is None else f"{depth} {_tail(grid.kinds[row])}"


def _entitle(figure: Figure, title: str) -> None:
    """The title, and the room around all parts."""
    if title:
        lines = textwrap.fill(title, 100, break_on_hyphens=False)
        figure.suptitle(lines, fontsize=TITLE, color=INK, parse_math=False)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06, wspace=0.05, hspace=0.05)


def _heat_map(axis: Axes, grid: Grid, drawn: Map, named: Sequence[int], *, first: bool) -> None:
    """One map with its bar of colours below. Between the modules is the page's own ground."""
    from matplotlib import colormaps
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    colours = colormaps["viridis"].with_extremes(bad=(0.55, 0.56, 0.58, 0.35))
    gap = min(0.04, 0.004 * len(grid.depths))
    tiles = [Rectangle((column + gap, row + 0.03), 1 - 2 * gap, 0.94) for row, column in grid.places]
    shown = PatchCollection(tiles, cmap=colours, linewidth=0, snap=False)
    shown.set_array(np.ma.masked_invalid(drawn.values))
    shown.set_clim(drawn.low, drawn.high)
    axis.add_collection(shown)
    axis.set_xlim(0, len(grid.depths))
    axis.set_ylim(len(grid.kinds), 0)
    axis.set_facecolor("none")
    axis.set_title(drawn.title, fontsize=HEAD, color=INK)
    _name_places(axis, grid)
    axis.tick_params(labelsize=SMALL, length=0, labelleft=first, colors=INK)
    for row, column in (grid.places[index] for index in named if drawn.framed):
        axis.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=RED, linewidth=1.4, clip_on=False))
    for spine in axis.spines.values():
        spine.set_visible(False)
    bar = axis.figure.colorbar(shown, ax=axis, orientation="horizontal", aspect=30, pad=0.03, fraction=0.06)
    bar.ax.tick_params(labelsize=SMALL, length=2, colors=INK)
    bar.ax.locator_params(nbins=5)
    bar.outline.set_visible(False)


def _name_places(axis: Axes, grid: Grid) -> None:
    """Every row's kind, and up to ten depths; - of modules that have none beside ones that do."""
    axis.set_yticks([row + 0.5 for row in range(len(grid.kinds))], [_tail(k) for k in grid.kinds], parse_math=False)
    if grid.depths == [None]:
        axis.set_xticks([])
        return
    last, without = len(grid.depths) - 1, grid.depths[-1] is None
    step = -(-len(grid.depths) // 10)
    places = [place for place in range(0, last + 1, step) if not without or last - place >= step] + [last] * without
    axis.set_xticks(
        [place + 0.5 for place in places], ["-" if grid.depths[p] is None else str(grid.depths[p]) for p in places]
    )
    axis.set_xlabel("depth (-: none)" if without else "depth", fontsize=SMALL, color=INK, labelpad=1)


def _plain(axis: Axes, title: str, along: str = "") -> None:
    axis.set_title(title, fontsize=HEAD, color=INK)
    axis.set_xlabel(along, fontsize=SMALL, color=INK, labelpad=1)
    axis.tick_params(which="both", labelsize=SMALL, length=2, colors=INK)
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
            marker="o" if len(curve) == 1 else "",
            markersize=3,
            zorder=3 if strong else 2,
        )
    _plain(axis, spectra.title, spectra.along)
    axis.set_ylim(0, None)
    axis.set_xlim(1, max(2, *(len(curve) for curve in spectra.curves)))
    axis.locator_params(axis="x", integer=True, nbins=6)


def _bars(axis: Axes, labels: Sequence[str], spectra: Spectra, named: Sequence[int]) -> None:
    """The named modules and their values."""
    values = [spectra.ranked[index] for index in named]
    axis.barh(range(len(named)), values, color=RED, height=0.6)
    axis.set_yticks(range(len(named)), labels, parse_math=False)
    axis.set_ylim(max(3, len(named)) - 0.4, -0.6)
    top = max([*values, 0]) or 1
    axis.set_xlim(0, 1.25 * top)
    for row, value in enumerate(values):
        axis.text(value + 0.02 * top, row, f"{value:#.3g}", va="center", fontsize=SMALL, color=INK)
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
    _values(left, np.sort(values[np.isfinite(values)])[::-1], energy)
    weight = np.square(basis.astype(np.float64)).sum(1)
    right.vlines(np.arange(len(weight)), 0, weight, color=BLUE, linewidth=max(0.4, min(3, 200 / len(weight))))
    _plain(right, "how much of each coordinate lies in P", "coordinate")
    right.set_ylim(0, max(1e-6, 1.08 * weight.max()))
    right.set_xlim(-0.5, len(weight) - 0.5)
    right.locator_params(axis="x", integer=True, nbins=6)
    _entitle(figure, title)
    return figure


def _values(axis: Axes, known: np.ndarray, energy: float) -> None:
    """Falling values over the largest, and the energy so far with its last value beside it."""
    if not known.size or known[0] <= 0:
        _plain(axis, "values", "direction")
        axis.set(xticks=[], yticks=[])
        axis.text(0.5, 0.5, "unknown: no matrix was given", ha="center", fontsize=SMALL, color=INK)
        return
    from matplotlib.ticker import MaxNLocator

    places = np.arange(1, len(known) + 1)
    axis.bar(places, known / known[0], color=BLUE, width=0.8)
    drawn = bool(np.isfinite(energy))
    _plain(axis, "values / largest" + ", and captured energy so far (line)" * drawn, "direction")
    axis.set_ylim(0, 1.05)
    room = max(0.6, 0.12 * len(known)) if drawn else 0.5
    axis.set_xlim(0.5, len(known) + room + 0.5 * drawn)
    if drawn:
        squares = np.cumsum(np.square(known / known[0]))
        axis.plot(places, energy * squares / squares[-1], color=RED, linewidth=1.4, marker="o", markersize=2)
        last = (len(known) + 0.5, energy)
        axis.annotate(f"{energy:.2f}", last, (2, 0), textcoords="offset points", va="center", fontsize=SMALL, color=INK)
    ticks = MaxNLocator(6, integer=True).tick_values(1, len(known))
    axis.set_xticks([tick for tick in ticks if 1 <= tick <= len(known)])


def draw_methods(points: Mapping[str, tuple[float, float]], base: float, score: str) -> Figure:
    """Score against trained parameters, a point a method: label -> (parameters, score)."""
    figure = _figure(2.9)
    axis = figure.subplots()
    sizes = [size for size, _ in points.values()]
    scores = [base, *(value for _, value in points.values())]
    margin = 0.22 * max(max(scores) - min(scores), 1e-3)
    left, right = min(sizes) / 4, max(sizes) * 4
    axis.set(xscale="log", xlim=(left, right), ylim=(min(scores) - margin, max(scores) + margin))
    _plain(axis, f"{score} against trained parameters", "trained parameters")
    axis.axhline(base, color=FAINT, linewidth=1, linestyle="--")
    ordered = sorted(
        [("untrained", left, base), *((n, s, v) for n, (s, v) in points.items())], key=lambda each: each[2]
    )
    heights = _apart([value for *_, value in ordered], 0.08 * (max(scores) - min(scores) + 2 * margin))
    for (label, size, value), height in zip(ordered, heights, strict=True):
        point, leftwards = label != "untrained", size > (left * right) ** 0.5
        beside = 1.03 if not point else 1 / 1.15 if leftwards else 1.15
        if point:
            loft = label.startswith("LOFT")
            axis.plot(size, value, "o" if loft else "s", color=BLUE if loft else RED, markersize=7)
        axis.annotate(
            f"{label}: {value:.3f}",
            (size, value),
            (size * beside, height if point else value),
            ha="right" if leftwards else "left",
            va="center" if point else "bottom",
            fontsize=7.5,
            color=INK,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.7} if point else None,
        )
    return figure


def _apart(values: Sequence[float], least: float) -> list[float]:
    """Ascending values moved to be at least this far from each other; groups keep their middle."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and _centred(groups[-1], least)[0] - _centred(groups[-2], least)[-1] < least:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [place for group in groups for place in _centred(group, least)]


def _centred(group: Sequence[float], step: float) -> list[float]:
    middle = sum(group) / len(group)
    return [middle + (place - (len(group) - 1) / 2) * step for place in range(len(group))]


def check_path(path: str | os.PathLike) -> str:
    """What `path` ends in. ValueError where it is neither .png nor .svg, or cannot be written."""
    ending = Path(path).suffix.lower().removeprefix(".")
    if ending not in ("png", "svg"):
        raise ValueError(f"path must end in .png or .svg, not {Path(path).name!r}")
    check_writable(path)
    return ending


def finish(draw: Callable[[], Figure], path: str | os.PathLike | None) -> Any:
    """The figure, also written whole where a path is given. The path is checked before any work."""
    ending = None if path is None else check_path(path)
    figure = draw()
    if path is not None:
        with whole_file(path) as part:
            figure.savefig(part, format=ending, dpi=DPI)
    return figure


def as_svg(figure: Figure) -> str:
    """The picture as an <svg> element: no ground, ink in the page's colour, never wider than it."""
    from matplotlib import rc_context

    held = io.StringIO()
    with rc_context({"svg.fonttype": "path"}):
        figure.savefig(held, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = held.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # A style sheet would be the whole page's: its rules go to this element, and its parts inherit.
    rules = "stroke-linejoin: round; stroke-linecap: butt"
    text = re.sub(r"<style\b.*?</style>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # hundredths of a point do
    return text.replace("<svg ", f'<svg style="max-width: 100%; height: auto; {rules}" ', 1)


def as_page(text: str, plot: Callable[[], Figure], more: str = "") -> str:
    """What a notebook shows: the picture where matplotlib is there, the text, and more, folded."""
    shown = f"<pre>{escape(text)}</pre>"
    if more:
        shown += f"<details><summary>every module</summary><pre>{escape(more)}</pre></details>"
    try:
        return as_svg(plot()) + shown
    except ModuleNotFoundError:
        return shown
