"""The demo's report as one HTML file with its picture inside, readable in light and dark."""

from __future__ import annotations

from html import escape
from pathlib import Path

from .._words import how_to_install
from .report import CHECKS, COLUMNS, Row, cells

__all__ = ["write"]

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem;
       background: #ffffff; color: #1b1c1d; }
@media (prefers-color-scheme: dark) { body { background: #16181b; color: #e6e6e6; } }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
div.wide { overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #8886; }
th:first-child, td:first-child { text-align: left; }
pre { white-space: pre-wrap; background: #8882; padding: .8rem; border-radius: .3rem; font-size: 14px; }
svg { width: 100%; height: auto; }
"""


def write(path: Path, rows: list[Row], facts: dict, told: list[str]) -> None:
    """told: the tables' text, twice, then the verdict, the examples and the next steps."""
    verdict, examples, following = told[2:]
    pairs = facts["pairs"]
    parts = [
        "<h1>loft-rs demo</h1>",
        f"<p>{escape(str(facts['model']))}, {pairs['train']} pairs to train on and {pairs['held_out']} held out from "
        f"{escape(str(facts['data']))}; {facts['steps']} steps, {facts['seconds']:.0f} s.</p>",
        _table(rows, COLUMNS),
        f"<pre>{escape(verdict)}</pre>",
        _picture(rows),
        "<h2>Before and after</h2>",
        f"<pre>{escape(examples)}</pre>",
        "<h2>What is exact</h2>",
        "<p>Largest differences of the last hidden state on one batch, and of T from an orthogonal matrix.</p>",
        _table([row for row in rows if row.reload_difference is not None], CHECKS),
        "<h2>What to do next</h2>",
        f"<pre>{escape(following)}</pre>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>loft-rs demo</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    path.write_text(
        f"<!doctype html><html lang='en'><head>{head}</head><body>\n{body}\n</body></html>\n", encoding="utf-8"
    )


def _table(rows: list[Row], columns: dict[str, tuple[str, str]]) -> str:
    def line(values: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values) + "</tr>"

    lines = [line(list(columns), "th"), *(line(cells(row, columns), "td") for row in rows)]
    return "<div class='wide'><table>" + "".join(lines) + "</table></div>"


def _picture(rows: list[Row]) -> str:
    """Recall against trained numbers; without matplotlib a line that says how to have it."""
    from ..plots import as_svg, draw_methods

    points = {row.method: (float(row.trained), row.recall_at_1) for row in rows if row.trained}
    try:
        return as_svg(draw_methods(points, rows[0].recall_at_1, "recall@1"))
    except ModuleNotFoundError:
        return f"<p>No picture: matplotlib is not installed. {escape(how_to_install('plot'))}</p>"
