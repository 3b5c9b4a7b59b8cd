"""The Python of a Markdown page: its blocks, its hidden set-up, and their run in one namespace.

<!-- setup: causal_lm -->             names of `pages.SETUPS`, whose values the page's blocks find
```python                             runs, after the blocks before it
```python title="not run: needs TRL"  is compiled only; the reason is what a reader sees
```text title="output"                what the block before it prints, numbers aside; a line ... is any lines
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

__all__ = ["Block", "blocks", "run", "setups"]

_PARSER = MarkdownIt("commonmark")
_NOT_RUN = re.compile(r'^title="not run: (?P<reason>[^"]{3,})"$')
_OUTPUT = 'title="output"'


@dataclass(frozen=True)
class Block:
    """One fenced block of Python. line: of its first line of code, from 1. reason: why it is not
    run; None where it is.
    """

    line: int
    code: str
    reason: str | None
    output: str | None


def setups(page: Path) -> list[str]:
    """The names in the page's set-up comments."""
    comments = re.findall(r"^<!-- setup: ([\w ]+) -->$", page.read_text(encoding="utf-8"), re.M)
    return [name for comment in comments for name in comment.split()]


def blocks(page: Path) -> list[Block]:
    """The page's blocks of Python. ValueError for one that would be left out unseen."""
    text = page.read_text(encoding="utf-8")
    fences = [token for token in _PARSER.parse(text) if token.type == "fence"]
    found = []
    for number, fence in enumerate(fences):
        language, _, info = fence.info.strip().partition(" ")
        if language.lower() not in ("python", "py", "python3", "pycon"):
            continue
        line = fence.map[0] + 2
        marked = _NOT_RUN.match(info)
        if language != "python" or (info and not marked):
            raise ValueError(
                f'{page.name}:{line - 1}: "{fence.info}": write ```python, or ```python title="not run: REASON"'
            )
        after = fences[number + 1] if number + 1 < len(fences) else None
        output = after.content if after and after.info.strip() == f"text {_OUTPUT}" else None
        found.append(Block(line, fence.content, marked and marked["reason"], output))
    if len(found) != len(re.findall(r"^\s*(?:```|~~~)\s*py", text, re.M)):
        raise ValueError(f"{page.name}: a fence of Python is not read as one, for its indentation")
    return found


def run(page: Path, namespace: dict[str, Any]) -> None:
    """Run the page's blocks one after the other, and compare what they print with what the page
    shows.
    """
    for block in blocks(page):
        # Empty lines before it: a traceback names the line of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True)
        if block.reason is not None:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block.output is not None:
            where = f"{page.name}:{block.line}"
            assert re.fullmatch(_pattern(block.output), _masked(printed.getvalue())), (
                f"{where} prints\n{printed.getvalue()}"
            )


def _masked(text: str) -> str:
    """Words line by line, numbers as #: these differ with machines and versions."""
    number = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
    return "".join(" ".join(number.sub("#", line).split()) + "\n" for line in text.strip().splitlines())


def _pattern(shown: str) -> str:
    """What a page shows as a pattern for `_masked` text; a line of three dots stands for any
    lines.
    """
    return re.escape(_masked(shown)).replace(re.escape("...\n"), "(?:.*\n)*")
