"""What the package promises as a whole: few names, none of them in the way of a module, and no circle of imports."""

import ast
import importlib
import json
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import greedy_helpers as gh

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "greedy_helpers"
SOURCES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p.read_text() for p in sorted(PACKAGE.rglob("*.py"))}
SOURCES = {name.removesuffix(".__init__"): text for name, text in SOURCES.items()}
FOLDERS = {".".join(p.relative_to(ROOT).parent.parts) for p in PACKAGE.rglob("__init__.py")}


def imported(name, node):
    """Modules of the package that an import names, or takes names from."""
    if isinstance(node, ast.Import):
        asked = [alias.name for alias in node.names]
    else:
        above = name.split(".")[: len(name.split(".")) - node.level + (name in FOLDERS)] if node.level else []
        base = ".".join([*above, *(node.module or "").split(".")]).strip(".")
        submodules = [f"{base}.{alias.name}" for alias in node.names]
        asked = [base] * (not all(module in SOURCES for module in submodules)) + submodules
    return {module for module in asked if module in SOURCES}


def imports_at_start(name):
    """Of a module, when it is loaded: not inside functions, and not for type checkers."""
    body, found = list(ast.parse(SOURCES[name]).body), set()
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= imported(name, node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            body += node.body + node.orelse
        elif isinstance(node, ast.Try | ast.With):
            body += node.body
    return found


def test_no_module_imports_itself_in_a_circle():
    graph = {name: imports_at_start(name) for name in SOURCES}
    assert "greedy_helpers.moments" in graph["greedy_helpers.reconstruct"]
    assert "greedy_helpers.pruning" in graph["greedy_helpers"]
    order = list(TopologicalSorter(graph).static_order())  # a CycleError names the circle
    assert set(order) == set(SOURCES)


def test_no_name_hides_a_module():
    for name in SOURCES:
        if "." in name and not name.endswith("__main__"):
            parent, _, last = name.rpartition(".")
            assert getattr(importlib.import_module(parent), last, None) in (None, importlib.import_module(name)), name
    for name in gh.__all__:
        assert f"greedy_helpers.{name}" not in SOURCES


def test_solves_of_many_systems_at_once_are_never_by_lu():
    """Batched LU is wrong for wide blocks on some processors (tests/test_numerics.py): Cholesky everywhere."""
    for name, text in SOURCES.items():
        assert not re.search(r"linalg\.(solve|solve_ex|lu\w*)\(", text), name


def words_of(path):
    """All names in a notebook's cells, a README or a module."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return set(re.findall(r"\w+", text)) if path.suffix == ".py" else set(re.findall(r"\bgh\.(\w+)", text))


def test_at_most_50_names_are_exported():
    assert len(gh.__all__) == len(set(gh.__all__)) <= 50
    assert all(hasattr(gh, name) for name in gh.__all__)


@pytest.mark.parametrize("name", gh.__all__)
def test_what_is_exported_is_used(name):
    """In a notebook, the README or the command line."""
    used = words_of(PACKAGE / "__main__.py") | words_of(ROOT / "README.md")
    assert name in used.union(*map(words_of, (ROOT / "notebooks").glob("*.ipynb")))
