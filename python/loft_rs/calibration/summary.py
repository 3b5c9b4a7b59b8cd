"""What a `CalibrationReport` says: a summary with advice, layers by kind and depth, the table of
all.

    kind    a layer's name behind its block's number: attention.self.query of
            encoder.layer.3.attention.self.query
    depth   the block's number, 3 there; the blocks are shown in up to three groups

A mean agreement of .9 and more is called good, below a half poor. That is a way of speaking, of the
support alone: what it is worth in the score of the trained model was not measured. Every line fits
in 100 columns. `report` is a `CalibrationReport`, whose file imports this one.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from .._grid import kind_and_depth
from .._words import count
from ..plots import Map, Spectra, draw_layers, energy_map
from ..support.methods import CALIBRATED_SUPPORTS

__all__ = ["figure", "rows_of", "short", "summary", "table"]

WIDTH = 100
GOOD, POOR = 0.9, 0.5
# Halves of batches that are alike rarely have as much: 7, 3 and 0 % of them at 2, 4 and 8 batches
# (bench/CALIBRATION.md).
DOMINATED = 0.9
WORST = 3

_CAPTURED = {
    "skewgrad": "the part of the squared Skew(W0^T G) that a support holds",
    "gradsvd": "the part of the squared gradient that a support holds",
    "activation": "the part of the squared inputs that a support holds",
    "pilot": "the part of the pilot's squared change that a support holds",
    "principal": "the part of the squared weight that a support holds",
}


def summary(report: Any) -> str:
    """The head, the advice and one line for each kind of layer."""
    rows = rows_of(report)
    lines = [*_head(report), *_wrapped(_energies(rows)), *_wrapped(_advice(report)), *_wrapped(_start(report)), ""]
    lines += [*_grouped(rows), *_wrapped(_legend(report))]
    if report.sides:
        sides = [row["side"] for row in rows if row["layer"] in report.sides]
        lines += _wrapped(
            f"sides that were chosen: {sides.count('input')} input, {sides.count('output')} output (report.table())"
        )
    lines += _wrapped(_ruled(report))
    return "\n".join([*lines, "report.table() shows every layer, report.rows() gives them as dicts"])


def table(report: Any) -> str:
    """A line for every layer."""
    evidence, sides, rows = bool(report.evidence), bool(report.sides), rows_of(report)
    columns = [("rank", 4, "d"), ("energy", 6, ".4f"), ("+-", 6, ".4f")]
    columns += [("side", 6, "s"), ("on input", 8, ".2e"), ("on output", 9, ".2e")] * sides
    columns += [("agreement", 9, ".3f"), ("reproducible", 12, ".3f"), ("for .9", 6, ".0f")] * evidence
    names = _fitted([row["layer"] for row in rows], WIDTH - sum(width + 1 for _, width, _ in columns))
    room = max(map(len, ("layer", *names)))
    lines = [f"{'layer':<{room}}" + "".join(f" {name:>{width}}" for name, width, _ in columns)]
    for row, shown in zip(rows, names, strict=True):
        cells = "".join(f" {format(row[name], form):>{width}}" for name, width, form in columns)
        lines.append(f"{shown:<{room}}{cells}")
    lines += _wrapped(_legend(report))
    if evidence:
        lines += _wrapped("reproducible: the part of the captured energy that other batches would show too")
    if sides:
        lines += _wrapped("on input, on output: ||P^T S P||^2, of which the side has the larger")
    return "\n".join(lines)


def figure(report: Any) -> Any:
    """Maps of what is known of the layers, and their falling values."""
    rows = rows_of(report)
    energies = [row["energy"] for row in rows]
    maps = [energy_map(energies, framed=True)]
    maps += [Map(key, [row[key] for row in rows], low=0.0, high=1.0) for key in ("agreement", "reproducible")]
    if len({row["rank"] for row in rows}) > 1:
        maps.append(Map("rank", [row["rank"] for row in rows]))
    curves = [_falling(each.values) for each in report.supports.values()]
    title = "each support's values / its largest"
    spectra = Spectra(title, "direction", curves, "least captured energy", energies, least=True)
    return draw_layers([row["layer"] for row in rows], maps, spectra, short(report)[len("CalibrationReport(") : -1])


def _falling(values: np.ndarray) -> np.ndarray:
    """Over the largest; empty where no matrix was given."""
    known = np.sort(values[np.isfinite(values)])[::-1]
    return known / known[0] if known.size and known[0] > 0 else known[:0]


def rows_of(report: Any) -> list[dict[str, Any]]:
    """A dict for every layer, with equal keys; nan where nothing is known."""
    rows = []
    for name, support in report.supports.items():
        evidence, sides = report.evidence.get(name), report.sides.get(name, {})
        row = {"layer": name, "rank": support.rank, "side": support.side}
        row |= {"energy": support.energy, "+-": support.energy_stderr}
        row |= {f"on {side}": sides.get(side, math.nan) for side in ("input", "output")}
        row["agreement"] = evidence.agreement if evidence else math.nan
        row["reproducible"] = evidence.reproducible if evidence else math.nan
        row["for .9"] = evidence.batches_needed(GOOD) if evidence else math.nan
        rows.append(row)
    return rows


def short(report: Any) -> str:
    """One line."""
    energies = [row["energy"] for row in rows_of(report)]
    agreement = f", agreement {_mean_agreement(report):.2f}" if report.evidence else ""
    found = f"energy {_mean(energies):.3f} ({_least(energies):.3f} to {-_least([-e for e in energies]):.3f})"
    passes = count(report.passes, "pass") + (f" over {count(report.batches, 'batch')}" if report.batches else "")
    return f"CalibrationReport({report.method}, {count(len(energies), 'layer')}, {found}{agreement}, {passes})"


def _head(report: Any) -> list[str]:
    pilot = f" of {count(report.pilot.steps, 'step')}" if report.pilot else ""
    batches = f" over {count(report.batches, 'batch')}" if report.batches is not None else ""
    head = f", head warmed up for {count(report.head_steps, 'step')}" if report.head_steps else ""
    first = (
        f"{report.method}{pilot}, {report.order} order: {count(len(report.supports), 'layer')}, "
        f"{count(report.passes, 'pass')}{batches}{head}, {report.seconds:.1f} s"
    )
    return [*_wrapped(first), *_wrapped(f"memory: {report.memory}" if report.memory is not None else "")]


def _energies(rows: Sequence[Mapping[str, Any]]) -> str:
    known = sorted((row for row in rows if not math.isnan(row["energy"])), key=lambda row: row["energy"])
    if not known:
        return "mean energy nan: nobody measured it"
    worst = ", ".join(f"{row['layer']} {row['energy']:.3f}" for row in known[:WORST])
    return f"mean energy {_mean([row['energy'] for row in known]):.3f}; least in {worst}"


def _advice(report: Any) -> str:
    """How much of the supports is the task's, and whether more batches would change that."""
    if not report.evidence:
        if report.method in CALIBRATED_SUPPORTS:
            return "More batches would help: not known, a pilot is not compared with other batches"
        return "More batches would help: no, the batches only order this support"
    mean = _mean_agreement(report)
    if math.isnan(mean):
        return "Agreement nan: too few batches to tell. More batches would help: yes, give at least 4 (max_batches)"
    if mean >= GOOD:
        return f"Agreement {mean:.2f}, good: other batches give nearly the same support. More batches would help: no"
    needed = float(np.median([each.batches_needed(GOOD) for each in report.evidence.values()]))
    how = f"at least {needed:.0f} for {GOOD}" if math.isfinite(needed) else "but no number follows from these"
    word = "poor: other batches give another support" if mean < POOR else "fair: other batches give a part of it"
    return f"Agreement {mean:.2f}, {word}. More batches would help: yes, {how} (max_batches; half the layers need more)"


def _start(report: Any) -> str:
    if report.start is None:
        return ""
    made = _mean(report.start.made.values())
    return f"Training starts at {report.start.scale:g} times the nearest rotation, which makes {made:.2f} of the pilot's change"


def _legend(report: Any) -> str:
    said = f"energy: {_CAPTURED.get(report.method, 'the part of the squared objective that a support holds')}, 1 being all; "
    said += "+-: its standard error in a layer, 0 where it is exact"
    if report.evidence:
        said += "; agreement: of the support with that of as many other batches; for .9: batches that an agreement of .9 takes, at least"
    return said


def _ruled(report: Any) -> str:
    ruled = sum(each.dominance > DOMINATED for each in report.evidence.values())
    if not ruled:
        return ""
    return (
        f"in {count(ruled, 'layer')} one half of the batches has over {DOMINATED} of the squared objective: few batches are nearly all "
        "of it, and these figures do not tell of other data"
    )


# -- groups --------------------------------------------------------------------------------


def thirds(depths: Iterable[int]) -> list[list[int]]:
    """The depths in up to three groups of neighbours."""
    found = np.array(sorted(set(depths)), dtype=int)
    return [group.tolist() for group in np.array_split(found, 3) if len(group)] if len(found) > 2 else []


def _grouped(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each kind of layer: its mean energy, over all blocks and in each third of them."""
    kinds: dict[str, list[tuple[int | None, Mapping[str, Any]]]] = {}
    for row in rows:
        kind, depth = kind_and_depth(row["layer"])
        kinds.setdefault(kind, []).append((depth, row))
    groups = thirds(d for members in kinds.values() for d, _ in members if d is not None)
    titles = [f"at {g[0]}-{g[-1]}" if len(g) > 1 else f"at {g[0]}" for g in groups]
    judged = any(not math.isnan(row["agreement"]) for row in rows)
    rest = 7 + 8 + 8 + 8 + 10 * len(groups) + 11 * judged
    room = min(max(map(len, (*kinds, "kind"))), WIDTH - rest)
    head = f"{'kind':<{room}} {'layers':>6} {'rank':>7} {'energy':>7} {'+-':>7}"
    lines = [head + "".join(f" {title:>9}" for title in titles) + f" {'agreement':>10}" * judged]
    for kind, members in kinds.items():
        ranks = sorted({row["rank"] for _, row in members})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        line = f"{_tail(kind, room):<{room}} {len(members):>6} {rank:>7} {_mean_of(members, 'energy'):>7.3f}"
        line += f" {_mean_of(members, '+-'):>7.4f}"
        for group in groups:
            line += f" {_mean_of([each for each in members if each[0] in group], 'energy'):>9.3f}"
        lines.append(line + f" {_mean_of(members, 'agreement'):>10.3f}" * judged)
    return lines


def _mean_of(members: Iterable[tuple[int | None, Mapping[str, Any]]], column: str) -> float:
    return _mean([row[column] for _, row in members])


def _mean(values: Iterable[float]) -> float:
    """Of what is known; nan where nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _least(values: Iterable[float]) -> float:
    return min((value for value in values if not math.isnan(value)), default=math.nan)


def _mean_agreement(report: Any) -> float:
    return _mean(each.agreement for each in report.evidence.values())


def _fitted(names: Sequence[str], room: int) -> list[str]:
    """Names of layers in this room: what all begin with goes first, then the middle."""
    if max(map(len, names), default=0) > room:
        parts = [name.split(".") for name in names]
        shared = len(
            list(takewhile(lambda same: len(set(same)) == 1, zip(*(each[:-1] for each in parts), strict=False)))
        )
        names = ["…" * bool(shared) + ".".join(each[shared:]) for each in parts]
    start = room // 3
    return [n if len(n) <= room else f"{n[:start]}…{n[start + 1 - room :]}" for n in names]


def _tail(name: str, room: int) -> str:
    """The end of a name that is too long, which tells more than its beginning."""
    return name if len(name) <= room else "…" + name[1 - room :]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
