"""Pairs for the demo: (qualified name in words, first paragraph of its docstring), or a user's own
(query, passage) file.

The installed standard library, NumPy and PyTorch are read by importing them, so objects written in
C count too. The name itself is masked in the paragraph, which leaves the meaning to learn. One pair
per object: aliases, repeated paragraphs and repeated names are dropped, and the split is by object
with a fixed seed, so nothing held out was trained on under another name.
"""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import pkgutil
import random
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .._words import count

MASK = "this"
HELD_OUT = 800
MIN_WORDS = 5
MIN_PAIRS = 64
SUFFIXES = (".csv", ".tsv", ".jsonl")
COLUMNS = ("query", "passage")

# Importing these opens a window, prints, or changes the process; the rest of the standard library
# imports quietly.
LOUD = {
    "antigravity",
    "this",
    "idlelib",
    "turtle",
    "turtledemo",
    "test",
    "lib2to3",
    "tkinter",
    "pip",
    "ensurepip",
    "venv",
    "rlcompleter",
    "posix",
    "nt",
}
HOMES = {"posix": "os", "nt": "os"}  # where C objects say they live -> where people import them from
PACKAGES = {
    "numpy": ("", "fft", "linalg", "ma", "polynomial", "random", "strings", "testing"),
    "torch": (
        "", "nn", "nn.functional", "nn.init", "nn.utils", "nn.utils.rnn", "nn.utils.parametrize", "nn.utils.prune",
        "optim", "optim.lr_scheduler", "linalg", "fft", "special", "distributions", "autograd", "autograd.functional",
        "autograd.profiler", "cuda", "distributed", "func", "futures", "fx", "hub", "jit", "masked", "multiprocessing",
        "overrides", "package", "profiler", "quasirandom", "random", "serialization", "signal.windows", "sparse",
        "storage", "testing", "utils.benchmark", "utils.checkpoint", "utils.cpp_extension", "utils.data",
        "utils.dlpack", "nn.attention", "nn.parallel", "onnx", "library",
    ),
}  # fmt: skip


class Pair(NamedTuple):
    """A query and the passage that answers it."""

    query: str
    passage: str


class Split(NamedTuple):
    """Pairs to train on and pairs to be measured on; no object is in both."""

    train: list[Pair]
    held_out: list[Pair]


def words(name: str) -> str:
    """`torch.nn.BatchNorm2d.reset_running_stats` -> `torch nn Batch Norm2d reset running stats`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", re.sub(r"[._]+", " ", name))
    return " ".join(spaced.split())


def first_paragraph(doc: str, name: str) -> str | None:
    """The first paragraph of prose, `name` masked; None if there is too little of it. Signature
    lines are skipped.
    """
    for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        if re.match(r"\s*(\.\. |>>>|[-=~]{3,}|:\w+|\d+\. \w+\()", block):
            continue
        lines = [line.strip() for line in block.strip().splitlines()]
        while (
            lines
            and re.match(r"[\w.]+\s*\(.*\)?", lines[0])
            and re.match(rf"([\w.]*\.)?{re.escape(name)}\s*\(", lines[0])
        ):
            lines.pop(0)
        text = re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(lines)).replace("`", "")
        if len(text.split()) < MIN_WORDS or "\\" in text:  # a backslash: LaTeX, not prose
            continue
        masked = _mask(text, name)
        return masked if len(masked.split()) >= MIN_WORDS else None
    return None


def _mask(text: str, name: str) -> str:
    spellings = {name, words(name), name.strip("_")}
    dotted = "|".join(sorted(map(re.escape, spellings), key=len, reverse=True))
    return " ".join(re.sub(rf"(?<!\w)(?:[\w]+\.)*(?:{dotted})(?!\w)(?:\(\))?", MASK, text, flags=re.IGNORECASE).split())


def _modules() -> Iterator[types.ModuleType]:
    """Public modules in a fixed order; one that this machine cannot import is passed over."""
    names = [name for name in sorted(sys.stdlib_module_names) if not name.startswith("_") and name not in LOUD]
    names += [f"{package}.{part}".rstrip(".") for package, parts in PACKAGES.items() for part in parts]
    for name in names:
        module = _import(name)
        if module is None:
            continue
        yield module
        if "." not in name and name not in PACKAGES:
            for info in sorted(pkgutil.iter_modules(getattr(module, "__path__", ())), key=lambda each: each.name):
                inner = (
                    None
                    if info.name.startswith("_") or info.name in LOUD | {"tests"}
                    else _import(f"{name}.{info.name}")
                )
                if inner is not None:
                    yield inner


def _import(name: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit):
        return None


def _members(owner: object) -> Iterator[tuple[str, object]]:
    listed = getattr(owner, "__all__", None) if isinstance(owner, types.ModuleType) else None
    for name in sorted(set(listed) if listed is not None else vars(owner)):
        if isinstance(name, str) and not name.startswith("_"):
            # An own attribute of a class as it lies there: getattr would run properties.
            member = vars(owner).get(name) if isinstance(owner, type) else getattr(owner, name, None)
            yield name, getattr(member, "__func__", member)


def _documented() -> Iterator[tuple[str, object]]:
    """(qualified name, object) for the functions, classes and own methods that the modules call
    public.
    """
    # Imported in full before any is read: importing a submodule can replace its parent's attribute
    # of that name.
    for module in list(_modules()):
        package = module.__name__.split(".")[0]
        for name, item in _members(module):
            home = getattr(item, "__module__", None) or package
            if (
                not callable(item)
                or not isinstance(home, str)
                or HOMES.get(home, home.split(".")[0].lstrip("_")) != package
            ):
                continue
            qualified = f"{module.__name__}.{name}"
            yield qualified, item
            if isinstance(item, type):
                yield from (
                    (f"{qualified}.{inner}", each)
                    for inner, each in _members(item)
                    if callable(each) or isinstance(each, property)
                )


def installed_pairs() -> list[Pair]:
    """Every usable pair of this installation, in a fixed order."""
    pairs: list[Pair] = []
    seen_objects: set[int] = set()
    keep_alive: list[object] = []
    seen_text: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for qualified, item in _documented():
            doc = getattr(item, "__doc__", None)
            if id(item) in seen_objects or not isinstance(doc, str):
                continue
            seen_objects.add(id(item))
            keep_alive.append(item)
            paragraph = first_paragraph(doc, qualified.rsplit(".", 1)[-1])
            query = words(qualified)
            if paragraph is None or not seen_text.isdisjoint((paragraph.lower(), query.lower())):
                continue
            seen_text.update((paragraph.lower(), query.lower()))
            pairs.append(Pair(query, paragraph))
    return pairs


def read_pairs(path: str | Path) -> list[Pair]:
    """Pairs from a .csv or .tsv with `query` and `passage` in its header, or a .jsonl of objects
    with those keys.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: a file that ends in {', '.join(SUFFIXES)} is expected")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            records = (
                _json_records(path, lines)
                if suffix == ".jsonl"
                else _table_records(path, lines, "\t" if suffix == ".tsv" else ",")
            )
            pairs = list(dict.fromkeys(_pair(path, line, record) for line, record in records))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {_undecodable_line(path)}: not UTF-8 text ({error.reason})") from None
    if len(pairs) < MIN_PAIRS:
        pairs_of = count(len(pairs), "distinct pair")
        raise ValueError(f"{path}: {pairs_of}, at least {MIN_PAIRS} are needed to train and to measure")
    return pairs


def _undecodable_line(path: Path) -> int:
    """The first line that is not UTF-8."""
    raw = path.read_bytes()
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return raw.count(b"\n", 0, error.start) + 1
    return 1


def _table_records(path: Path, lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        if not reader.fieldnames:
            raise ValueError(f"{path}: the file is empty; a header with query and passage is needed")
        missing = [column for column in COLUMNS if column not in reader.fieldnames]
        if missing:
            found = ", ".join(reader.fieldnames)
            raise ValueError(
                f"{path}, line 1: no column {missing[0]!r} in the header (found: {found}); query and passage are needed"
            )
        for record in reader:
            if None in record:
                raise ValueError(f"{path}, line {reader.line_num}: more fields than the header has columns")
            yield reader.line_num, record
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.reader.line_num}: {error}") from None


def _json_records(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, column {error.colno}: not JSON ({error.msg})") from None
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}, line {number}: an object with 'query' and 'passage' is expected, not {type(record).__name__}"
            )
        yield number, record


def _pair(path: Path, line: int, record: dict) -> Pair:
    for column in COLUMNS:
        value = record.get(column)
        if not isinstance(value, str) or not value.strip():
            problem = (
                "missing"
                if value is None
                else "empty"
                if isinstance(value, str)
                else f"{type(value).__name__}, not text"
            )
            raise ValueError(f"{path}, line {line}, column {column!r}: {problem}")
    return Pair(" ".join(record["query"].split()), " ".join(record["passage"].split()))


def split_pairs(pairs: list[Pair], seed: int, held_out: int = HELD_OUT) -> Split:
    """A seeded split by object; pairs that share a query or a passage stay together. Small files
    hold back a fifth.
    """
    groups: dict[int, list[Pair]] = {}
    for pair, group in zip(pairs, _groups(pairs), strict=True):
        groups.setdefault(group, []).append(pair)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted = min(held_out, len(pairs) // 5)
    held: list[Pair] = []
    train: list[Pair] = []
    for together in order:
        (held if len(held) < wanted and len(together) == 1 else train).extend(together)
    if not held:
        raise ValueError(
            "every pair shares its query or its passage with another, so none can be held out to be measured on"
        )
    return Split(train, held)


def _groups(pairs: list[Pair]) -> list[int]:
    """Connected components of pairs that share a query or a passage (union-find over first
    owners).
    """
    parent = list(range(len(pairs)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    owner: dict[tuple[str, str], int] = {}
    for index, pair in enumerate(pairs):
        for key in (("query", pair.query.lower()), ("passage", pair.passage.lower())):
            parent[root(index)] = root(owner.setdefault(key, index))
    return [root(index) for index in range(len(pairs))]
