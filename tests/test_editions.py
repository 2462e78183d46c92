"""Exercise editions and badges: current, without answers; and the addresses and versions that several files repeat."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import greedy_helpers
from greedy_helpers.course import exercises

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"


@pytest.fixture(scope="module")
def editions():
    sys.path.insert(0, str(NOTEBOOKS))
    try:
        yield importlib.import_module("editions")
    finally:
        sys.path.remove(str(NOTEBOOKS))


@pytest.fixture(scope="module")
def badges(editions):
    return importlib.import_module("badges")


@pytest.fixture(scope="module")
def pairs(editions):
    """(notebook with solutions, committed edition) of every notebook that has exercises."""
    read = [(path, editions.TARGET / path.name) for path in editions.sources()]
    return [tuple(nbformat.read(path, as_version=4) for path in pair) for pair in read]


def task_cell(number=1):
    return new_markdown_cell(f"**{number} · Double** *(easy, 2 minutes)*. Write `double(x)`.")


def solution_cell(source):
    return new_code_cell(source, metadata={"tags": ["solution"], "jupyter": {"source_hidden": True}})


def test_the_committed_editions_are_current(editions):
    wanted = editions.editions()
    found = {path: path.read_text(encoding="utf-8") for path in editions.TARGET.glob("*")}
    stale = [path.name for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path)]
    assert not stale, "run `make exercises`"
    assert len(wanted) >= 8


def test_nothing_but_the_solutions_is_missing(pairs):
    for notebook, found in pairs:
        nbformat.validate(found)
        cells = [cell for cell in found.cells if cell.id != "exercise-edition"]
        assert [cell.id for cell in cells] == [cell.id for cell in notebook.cells]
        for old, new in zip(notebook.cells, cells, strict=True):
            assert set(new.metadata) <= {"tags"}, "no folding"
            if old.cell_type == "code":
                assert new.outputs == []
                assert new.execution_count is None
                answered = "solution" in old.metadata.get("tags", [])
                assert (new.source != old.source) == answered, "set-up and checkers stay letter for letter"
        assert not [cell for cell in cells if "solution" in cell.metadata.get("tags", [])]


def test_no_line_of_an_answer_is_left(pairs):
    checked = 0
    for notebook, found in pairs:
        stubs = {cell.id: cell.source for cell in found.cells}
        for cell in notebook.cells:
            if "solution" in cell.metadata.get("tags", []):
                left = {line.strip() for line in stubs[cell.id].splitlines()}
                for node in ast.walk(ast.parse(cell.source)):
                    if isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef | ast.Import | ast.Expr):
                        assert not {line.strip() for line in ast.unparse(node).splitlines()} & left
                        checked += 1
                assert "folded" not in "".join(c.source for c in found.cells if c.cell_type == "markdown")
    assert checked > 50


def test_a_stub_makes_its_checker_raise_and_say_why(pairs):
    """Every stub is run, and handed to the checkers that the notebook calls on it."""
    called, named = set(), set()
    for notebook, found in pairs:
        named |= set(re.findall(r"exercises\.(check_\w+)", "\n".join(cell.source for cell in notebook.cells)))
        names = {"torch": torch}
        for cell in found.cells:
            if "exercise" in cell.metadata.get("tags", []):
                exec(cell.source, names)
            elif cell.cell_type == "code" and "exercises.check_" in cell.source:
                for node in ast.walk(ast.parse(cell.source)):
                    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                    if is_call and node.func.attr.startswith("check_"):
                        (answer,) = node.args
                        with pytest.raises(
                            (exercises.NotYet, NotImplementedError), match=r"exercise \d|expected|found"
                        ):
                            getattr(exercises, node.func.attr)(names[answer.id])
                        called.add(node.func.attr)
    assert called == named
    assert len(called) > 30


def test_links_lead_somewhere_from_where_the_edition_lies(editions):
    text = "[a](02_b.ipynb) [b](03_c.ipynb#part) ![c](images/d.png) [e](https://x.y/z.html) `W[i](x)` [f](#part)"
    task = new_markdown_cell(f"**1 · Links**. {text}")
    made = editions.edition(new_notebook(cells=[task, solution_cell("y = 1")]), "02_b.ipynb", {"02_b.ipynb"})
    assert made.cells[0].source.endswith(
        "[a](02_b.ipynb) [b](../03_c.ipynb#part) ![c](../images/d.png) [e](https://x.y/z.html) `W[i](x)` [f](#part)"
    )
    for folder in (NOTEBOOKS, editions.TARGET):
        for path in folder.glob("*.ipynb"):
            for cell in nbformat.read(path, as_version=4).cells:
                for _, target in editions._LINK.findall(cell.source if cell.cell_type == "markdown" else ""):
                    assert (folder / target).is_file(), f"{path.name}: {target}"


def test_stubs_keep_signatures_docstrings_and_imports(editions):
    solution = '''import math

def double(x: float, *, twice: bool = False) -> float:
    """Two of them."""
    # add, do not multiply
    def add(y):
        return y + y
    return add(add(x)) if twice else add(x)

names = {"double": double}'''
    made = editions.stub(solution, "1 · Double")
    assert made.startswith(
        'import math\n\n\ndef double(x: float, *, twice: bool=False) -> float:\n    """Two of them."""\n'
    )
    for answer in ("add", "return", "{"):
        assert answer not in made
    names = {}
    exec(made, names)
    assert names["names"] is ...
    with pytest.raises(NotImplementedError, match="exercise 1: write the body of double"):
        names["double"](2.0)


def test_what_cannot_become_a_stub_is_refused(editions):
    with pytest.raises(ValueError, match="expected functions, assignments to names and imports, found `for i in x:`"):
        editions.stub("for i in x:\n    print(i)", "1 · Double")
    with pytest.raises(ValueError, match=r"expected \*\*1 · Name\*\*"):
        editions.edition(new_notebook(cells=[new_markdown_cell("# x"), solution_cell("y = 1")]), "02_b.ipynb")


def test_an_edition_does_not_depend_on_outputs(editions):
    notebook = new_notebook(cells=[task_cell(), solution_cell("y = 1"), new_code_cell("y", execution_count=7)])
    before = nbformat.writes(editions.edition(notebook, "02_b.ipynb"))
    notebook.cells[2].outputs = [new_output("stream", text="1\n")]
    notebook.cells[2].execution_count = 8
    notebook.metadata["widgets"] = {"state": {}}
    assert nbformat.writes(editions.edition(notebook, "02_b.ipynb")) == before


def test_pytest_does_not_collect_unsolved_notebooks():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "notebooks"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "notebooks/01_structure.ipynb::" in listed
    assert "notebooks/exercises" not in listed


@pytest.fixture
def clone(tmp_path):
    """A folder with what names the repository's address or may name it."""
    (tmp_path / "notebooks").mkdir()
    for name in [
        "pyproject.toml",
        "CITATION.cff",
        *(f"notebooks/{path.name}" for path in NOTEBOOKS.glob("[0-9]*.ipynb")),
    ]:
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


def test_badges_come_change_and_go_without_a_trace(badges, clone):
    for copy in (clone / "notebooks").glob("*.ipynb"):
        old = copy.read_text(encoding="utf-8")
        bare = badges.changed(copy, None, clone) or old
        assert "colab-badge" not in bare
        for address in ("https://github.com/one/first", "https://github.com/two/second"):
            copy.write_text(badges.changed(copy, address, clone), encoding="utf-8")
            assert badges.changed(copy, address, clone) is None, "idempotent"
            cells = nbformat.read(copy, as_version=4).cells
            place = address.removeprefix("https://github.com/")
            target = f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{copy.name}"
            assert cells[0].source.splitlines()[0].endswith(f"colab-badge.svg)]({target})")
            assert cells[0].source.count("colab-badge") == 1
            (setup,) = [cell.source for cell in cells if "setup" in cell.metadata.get("tags", [])]
            assert f'\nREPOSITORY = "{address}"\n' in setup
        assert badges.changed(copy, None, clone) == bare
    with pytest.raises(ValueError, match="expected a repository on GitHub"):
        badges.badge("notebooks/a.ipynb", "https://gitlab.com/owner/name")


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("[0-9]*.ipynb")), ids=lambda path: path.stem)
def test_committed_badges_are_current(badges, path):
    assert badges.changed(path, badges.repository()) is None, "run `python notebooks/badges.py`, then `make exercises`"


def test_one_command_names_the_repository_everywhere(badges, clone):
    before = {path: path.read_text(encoding="utf-8") for path in clone.rglob("*.*")}
    with pytest.raises(ValueError, match="expected a repository on GitHub"):
        badges.move("https://gitlab.com/owner/name", clone)
    assert all(path.read_text(encoding="utf-8") == text for path, text in before.items())
    for address in ("https://github.com/one/fork", "https://github.com/two/fork/"):
        badges.move(address, clone)
        assert badges.repository(clone) == address.rstrip("/")
        citation = yaml.safe_load((clone / "CITATION.cff").read_text())
        assert citation["repository-code"] == address.rstrip("/")
        assert citation["title"]
    project = tomllib.loads((clone / "pyproject.toml").read_text())
    assert project == tomllib.loads(before[clone / "pyproject.toml"]) | {
        "project": project["project"] | {"urls": {"Repository": "https://github.com/two/fork"}}
    }


def test_the_badge_of_an_edition_opens_the_edition(editions, badges):
    task = task_cell()
    task.source = badges.with_badge(task.source, "notebooks/02_b.ipynb", "https://github.com/one/first")
    made = editions.edition(new_notebook(cells=[task, solution_cell("y = 1")]), "02_b.ipynb")
    assert made.cells[0].source.splitlines()[0].endswith("/notebooks/exercises/02_b.ipynb)")
    assert made.cells[0].source.count("colab-badge") == 1


def test_addresses_and_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    repository, version = project.get("urls", {}).get("Repository"), project["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys(), "required by the format"
    assert citation["cff-version"] == "1.2.0"
    assert citation.get("repository-code") == repository
    assert str(citation["version"]) == version == greedy_helpers.__version__
    assert citation["preferred-citation"]["authors"][0]["family-names"] == "Li"
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## [{version}] - {citation['date-released']}\n" in changelog


def test_colab_keeps_its_own_packages():
    """No requirement asks for more than Colab has; `make colab-test` asks pip itself."""
    from colab_check import COLAB, set_up_requirement, unmet

    assert unmet(COLAB) == []
    assert unmet(COLAB | {"transformers": "4.57.0", "torch": "2.5.1+cu121"}) == ["torch>=2.6", "transformers>=5.0"]
    assert set_up_requirement() == str(ROOT)
