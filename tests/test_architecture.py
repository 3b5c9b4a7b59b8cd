"""The shape of the house: imports run one way, read from the files themselves."""

import ast
from pathlib import Path

import loft_rs

ROOT = Path(loft_rs.__file__).parent


def imports() -> dict[str, set[str]]:
    """Every module of the package -> the modules of the package that it names in an import, also in a function or for types alone."""
    files = {}
    for path in ROOT.rglob("*.py"):
        parts = ("loft_rs", *path.relative_to(ROOT).with_suffix("").parts)
        files[".".join(parts).removesuffix(".__init__")] = path
    found = {}
    for name, path in files.items():
        if path.name == "__init__.py":
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


def test_imports_run_one_way():
    assert circles(imports()) == []


def test_the_layer_knows_no_peft_and_its_files_import_downwards():
    order = ["base_layer", "kinds", "adapter", "values", "forward_pass", "merging", "placement", "linear"]
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
