"""The shape of the house, read from the files themselves: imports run one way, and nothing is too
large.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

import loft_rs

ROOT = Path(loft_rs.__file__).parent
CHECKOUT = Path(__file__).resolve().parents[1]

# A module imports from floors below its own and from its own folder, never from a neighbour on its
# floor.
FLOORS = (
    ("_*",),  # what all share, the compiled core among it
    ("linalg", "plots"),
    ("support", "transform", "factor", "inspection"),
    ("layer",),
    ("sketch", "tuner", "nn"),
    ("calibration", "convert", "export", "advice"),
    ("refreshing",),
    ("callbacks", "demo"),
    ("cli",),
)

MODULE_LINES, FUNCTION_LINES, TOP_LEVEL_MODULES, PROSE_COLUMNS = 400, 60, 16, 100


def imports() -> dict[str, set[str]]:
    """Every module of the package -> the modules of the package that it names in an import, also in
    a function or for types alone.
    """
    files = {"loft_rs._core": ROOT / "_core.pyi"}
    for path in ROOT.rglob("*.py"):
        parts = ("loft_rs", *path.relative_to(ROOT).with_suffix("").parts)
        files[".".join(parts).removesuffix(".__init__")] = path
    found = {}
    for name, path in files.items():
        if path.name in ("__init__.py", "_core.pyi"):
            continue
        package, named = name.split(".")[:-1], set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
                for alias in node.names:
                    whole = ".".join([*base, alias.name])
                    named.add(whole if whole in files else ".".join(base))
        found[name] = {each for each in named if each in files and each != name}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one module (Tarjan)."""
    index, low, stack, parts = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = []
            while not part or part[-1] != node:
                part.append(stack.pop())
            if len(part) > 1:
                parts.append(sorted(part))

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(parts)


def floor(module: str) -> tuple[str, int]:
    """(the folder or module right below the package, the floor that it is on)."""
    part = module.split(".")[1]
    floors = [i for i, names in enumerate(FLOORS) if ("_*" if part.startswith("_") else part) in names]
    assert len(floors) == 1, f"{part} must be on one floor: name it in FLOORS"
    return part, floors[0]


def functions() -> dict[str, int]:
    """Every function of the package, by file and name -> its lines without its docstring."""
    found = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                said = first.end_lineno - first.lineno + 1 if ast.get_docstring(node, clean=False) is not None else 0
                key = f"{path.relative_to(ROOT).as_posix()} {node.name}"
                found[key] = max(found.get(key, 0), node.end_lineno - node.lineno + 1 - said)
    return found


def test_imports_run_one_way():
    assert circles(imports()) == []


def test_folders_import_downwards():
    for name, used in imports().items():
        part, height = floor(name)
        for other in used - {"loft_rs"}:
            below, its = floor(other)
            shared = part.startswith("_") and below.startswith("_")
            assert part == below or shared or its < height, f"{name} imports {other}"
        assert "loft_rs" not in used or part == "demo", f"{name} imports public names, as the demo alone may"


def test_no_module_is_too_long():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.rglob("*.py")}
    assert {str(path): count for path, count in lines.items() if count > MODULE_LINES} == {}
    assert len([path for path in ROOT.glob("*.py") if path.name != "__init__.py"]) <= TOP_LEVEL_MODULES


def test_no_function_is_too_long():
    long = {name for name, lines in functions().items() if lines > FUNCTION_LINES and "kernels.py " not in name}
    assert long == set()


def test_the_layer_knows_no_peft_and_its_files_import_downwards():
    order = ["base_layer", "containers", "kinds", "adapter", "values", "forward_pass", "merging", "placement", "linear"]
    graph = imports()
    for name in order:
        path = ROOT / "layer" / f"{name}.py"
        assert "peft" not in {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        used = {each.rpartition(".")[2] for each in graph[f"loft_rs.layer.{name}"] if ".layer." in each}
        assert used <= set(order[: order.index(name)]), name
        assert not any(".tuner" in each or ".nn" in each for each in graph[f"loft_rs.layer.{name}"])


def test_an_activation_passes_three_files():
    graph = imports()
    assert "loft_rs.layer.placement" in graph["loft_rs.tuner.layer"]
    assert {"loft_rs.factor.add_low_rank", "loft_rs.factor.low_rank"} <= graph["loft_rs.layer.placement"]
    for each in ("loft_rs.factor.add_low_rank", "loft_rs.factor.low_rank"):  # where it ends: nothing there calls back
        assert not any(".layer" in used or ".tuner" in used for used in graph[each])


def test_contributing_names_files_that_are_there():
    text = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:[\w.-]+/)*(?:[\w-]+\.(?:py|pyi|rs|md|sh)|(?<=/)))`", text)
    assert len(named) > 40
    assert [path for path in named if not (CHECKOUT / path).exists() and not (ROOT / path).exists()] == []
    assert len(text.splitlines()) <= 130 and max(map(len, text.splitlines())) <= 100


def prose(path: Path) -> list[tuple[int, str]]:
    """The lines of docstrings and of comments that stand alone, but for tables and formulas."""
    text = path.read_text(encoding="utf-8")
    lines, numbers = text.splitlines(), set()
    for node in ast.walk(ast.parse(text)):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            numbers |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    numbers |= {t.start[0] for t in tokens if t.type == tokenize.COMMENT and lines[t.start[0] - 1].lstrip()[0] == "#"}
    held = [(number, lines[number - 1]) for number in sorted(numbers)]
    return [(n, line) for n, line in held if not line.lstrip().startswith("|") and "  " not in line.strip()]


@pytest.mark.skipif(not (CHECKOUT / "bench").is_dir(), reason="needs the checkout")
def test_a_line_of_prose_has_at_most_100_characters():
    files = [
        *ROOT.rglob("*.py"),
        *(p for name in ("bench", "tests", "examples") for p in (CHECKOUT / name).rglob("*.py")),
    ]
    long = [f"{path}:{number}" for path in files for number, line in prose(path) if len(line) > PROSE_COLUMNS]
    assert long == []
