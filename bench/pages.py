"""The pages' numbers, from the benches' rows: fills the blocks between `<!-- begin:NAME -->` and
`<!-- end:NAME -->`.

    python bench/pages.py             writes the blocks, and bench/quality/TABLES.md
    python bench/pages.py --check     writes nothing; exit status 1 and the names of the blocks that differ

The blocks are in `bench/blocks`, the rows in `bench/results` and `bench/quality/runs`. A page is
written whole or not at all.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
sys.path[:0] = [str(BENCH), str(BENCH / "quality")]  # also where this file is imported

from blocks import advice, calibration, quality, recovered, solvers, steps  # noqa: E402

from loft_rs._files import whole_file  # noqa: E402

BLOCKS: dict[str, Callable[[], str]] = {}
for module in (steps, solvers, calibration, recovered, quality, advice):
    if twice := BLOCKS.keys() & module.BLOCKS:
        raise ValueError(f"two blocks are called {', '.join(sorted(twice))}")
    BLOCKS |= module.BLOCKS

MARKED = re.compile(r"^<!-- begin:(?P<name>[\w-]+) -->\n(?P<text>.*?)<!-- end:(?P=name) -->$", re.S | re.M)
MARK = re.compile(r"^<!-- (?:begin|end):", re.M)


def pages() -> list[Path]:
    """The pages that may hold blocks."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(BENCH.glob("*.md"))]
    return [*found, BENCH / "quality" / "FINDINGS.md"]


def filled(text: str, page: str) -> tuple[str, list[str]]:
    """The page with its blocks as they should be, and the names of those that were not."""
    changed: list[str] = []

    def write(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"{page}: no block is called {name!r}; there are {', '.join(sorted(BLOCKS))}")
        made = f"<!-- begin:{name} -->\n{BLOCKS[name]()}\n<!-- end:{name} -->"
        if made != match.group():
            changed.append(name)
        return made

    if len(MARK.findall(text)) != 2 * len(MARKED.findall(text)):
        raise ValueError(f"{page}: a block is opened and not closed, or the other way round")
    return MARKED.sub(write, text), changed


def outdated() -> Iterator[tuple[Path, str, list[str]]]:
    """(page, its text as it should be, what differs) for every page that is not as its rows say."""
    for path in pages():
        text, changed = filled(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
        if changed:
            yield path, text, changed
    whole = BENCH / "quality" / "TABLES.md"
    if (text := quality.whole_page()) != whole.read_text(encoding="utf-8"):
        yield whole, text, ["the whole page"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a block differs")
    check = parser.parse_args().check
    found = list(outdated())
    for path, text, changed in found:
        print(f"{path.relative_to(ROOT)}: {', '.join(changed)} {'differ' if check else 'written'}")
        if not check:
            with whole_file(path) as part:
                part.write_text(text, encoding="utf-8")
    if check and found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
