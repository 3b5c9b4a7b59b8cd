"""The documents: every block of Python runs, every link leads somewhere, every quoted message is in
the source.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import blocks, run, setups
from page_setups import DEFAULTS, SETUPS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="needs the checkout's docs")


def _name(page):
    return page.name


@pytest.mark.filterwarnings("ignore:the LoRA has rank")  # as a page at the usual rank would show
@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    assert blocks(page) or page.name != "README.md"
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for name in setups(page) or DEFAULTS.get(page.name, []):
        namespace |= SETUPS[name]()
    run(page, namespace)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[\w./#%?=&~:@-]*)?", target), target
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in _anchors(there), f"{page.name}: {target}"


def _anchors(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_the_readme_can_be_taken_in():
    text = re.sub(r"```.*?```|^    [^\n]*$|<!--.*?-->", "", PAGES[0].read_text(encoding="utf-8"), flags=re.S | re.M)
    assert len(text.split()) <= 900
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if not part.lstrip().startswith("|")]
    assert max(len(part.split()) for part in paragraphs) <= 90
    assert len(re.findall(r"(?<![\w.])\d*\.\d+(?![\w.]*\.)", re.sub(r"\d{4}\.\d{5}", "", text))) < 40


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert sorted(re.findall(r": ([\w-]+\.md)$", nav, re.M)) == sorted(page.name for page in PAGES[1:])


def test_messages_of_the_faq_are_in_the_source():
    strings = [
        node.value
        for file in (ROOT / "python" / "loft_rs").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    source = "\n".join(strings)
    messages = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), re.M)
    assert len(messages) > 15
    for message in messages:
        for part in filter(None, (part.strip() for part in message.split("..."))):
            assert part in source, message


def test_a_fence_that_would_not_run_is_refused(tmp_path):
    page = tmp_path / "page.md"
    for fence in ("```python notest", "```py", '```python title="not run"', "    ```python"):
        page.write_text(f"text\n\n{fence}\nx = 1\n```\n")
        with pytest.raises(ValueError, match="page.md"):
            blocks(page)
    page.write_text('```python title="not run: needs a GPU"\nx = 1\n```\n')
    assert [block.reason for block in blocks(page)] == ["needs a GPU"]


def test_output_that_differs_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('```python\nprint("loss", 0.25)\n```\n\n```text title="output"\nloss 0.31\n```\n')
    run(page, {})
    page.write_text('```python\nprint("loss", 0.25)\n```\n\n```text title="output"\naccuracy 0.31\n```\n')
    with pytest.raises(AssertionError, match="loss 0.25"):
        run(page, {})
    page.write_text('```python\nprint("one\\ntwo\\nthree")\n```\n\n```text title="output"\n...\nthree\n```\n')
    run(page, {})


@pytest.mark.parametrize("name", ["causal_lm.py", "plain_pytorch.py", "numpy_only.py"])
def test_an_example_runs(name, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "differ by" in done.stdout or "equal bits: True" in done.stdout
    assert not re.search(r"differ by \d\.\de-0[1-4]", done.stdout), done.stdout


def test_the_notebook_and_the_trainer_example_compile():
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and all(cell["outputs"] or cell["execution_count"] for cell in cells)
    for source in ["".join(cell["source"]) for cell in cells]:
        compile(source, "quickstart.ipynb", "exec")
    compile((ROOT / "examples" / "trainer.py").read_text(encoding="utf-8"), "trainer.py", "exec")
