"""The site's sources: contents follow the notebooks that exist, pages point to what exists."""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "site"


def script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build():
    return script(SITE / "build.py")


def files(node):
    """All files of a table of contents."""
    if isinstance(node, dict):
        return [value for key, value in node.items() if key in ("file", "root")] + files(list(node.values()))
    return [name for part in node for name in files(part)] if isinstance(node, list) else []


def test_contents_follow_the_notebooks_that_exist(build):
    made = build.contents([Path("notebooks/00_a.ipynb"), Path("notebooks/08_later.ipynb")], ["prune"])
    assert made["parts"][0]["chapters"] == [
        {"file": "notebooks/00_a"},
        {"file": "notebooks/08_later"},
    ]
    assert build.notebooks() == sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    assert {path.stem for path in (ROOT / "greedy_helpers").glob("[a-z]*.py")} < set(build.modules())
    assert {"exercises", "plots", "widgets", "distributed"} <= set(build.nested_modules()) < set(build.modules())
    assert "automodule:: greedy_helpers.large.resume\n" in build.reference("resume")
    assert "automodule:: greedy_helpers.course.exercises\n" in build.reference("exercises")


def test_all_sources_of_the_book_are_there(build, tmp_path):
    build.assemble(tmp_path)
    book = yaml.safe_load((tmp_path / "_toc.yml").read_text())
    assert len(files(book)) > 25
    for name in files(book):
        assert len(list(tmp_path.glob(f"{name}.*"))) == 1, name
    config = yaml.safe_load((tmp_path / "_config.yml").read_text())
    assert config["execute"]["execute_notebooks"] == "off"
    assert ("repository" in config) == ("[project.urls]" in (ROOT / "pyproject.toml").read_text())
    assert "<!-- timings -->" not in (tmp_path / "instructors.md").read_text()
    committed = {path.name for path in (ROOT / "notebooks" / "exercises").glob("*.ipynb")}
    assert {path.name for path in (tmp_path / "exercise_editions").iterdir()} == committed


def test_pages_fold_set_up_and_solutions_and_leave_the_notebooks_alone(build):
    svg = "https://colab.research.google.com/assets/colab-badge.svg"
    cells = [
        {
            "cell_type": "markdown",
            "metadata": {},
            "source": [f"[![a]({svg})](https://c)\n", "\n", "# T\n", "[e](exercises/00_a.ipynb)"],
        },
        {"cell_type": "code", "metadata": {"tags": ["setup"]}},
        {"cell_type": "code", "metadata": {"tags": ["solution"], "jupyter": {"source_hidden": True}}},
        {"cell_type": "markdown", "metadata": {}},
    ]
    page = build.page_of({"cells": cells})
    assert page["cells"][0]["source"] == "# T\n[e](../exercises.md)"
    assert [cell["metadata"]["tags"] for cell in page["cells"]] == [
        [],
        ["setup", "hide-cell"],
        ["solution", "hide-input"],
        [],
    ]


def test_pages_describe_pictures_where_myst_nb_looks_for_it(build):
    cells = [{"cell_type": "code", "metadata": {"alt": "A line that falls."}, "source": "1"}]
    (cell,) = build.page_of({"cells": cells})["cells"]
    assert cell["metadata"] == {"mystnb": {"image": {"alt": "A line that falls."}}, "tags": []}


def test_the_reference_is_built_without_the_libraries_that_the_package_imports():
    """All of them, sorted; one that is missing in the list fails the build."""
    found = set()
    for path in (ROOT / "greedy_helpers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    found -= set(sys.stdlib_module_names) | {"greedy_helpers"}
    config = yaml.safe_load((SITE / "_config.yml").read_text())
    assert config["sphinx"]["config"]["autodoc_mock_imports"] == sorted(found)


def test_every_notebook_has_its_lecture_page(build):
    assert [path.stem for path in build.lectures()] == [path.name[:2] for path in build.notebooks()]
    for path in build.lectures():
        text = path.read_text(encoding="utf-8")
        assert re.match(rf"# {path.stem} · ", text)
        assert len(text.split()) <= 400, "one printed page"


@pytest.mark.parametrize("page", ["errata", "instructors"])
def test_sections_that_pages_point_to_exist(page):
    """`Notebook 05, sections 2, 4 and 6` and `05, sections ...` in tables."""
    text = re.sub(r"\s+", " ", (SITE / f"{page}.md").read_text(encoding="utf-8"))
    pointers = re.findall(r"\b(\d\d), sections? ((?:\d+(?:, | and | to )?)+)", text)
    assert len(pointers) > 10
    for number, sections in pointers:
        (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
        cells = nbformat.read(path, as_version=4).cells
        markdown = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        for section in re.findall(r"\d+", sections):
            assert f"\n## {section} · " in f"\n{markdown}", f"{page}.md: notebook {number} has no section {section}"


def test_glossary_defines_each_term_once_in_order():
    lines = (SITE / "glossary.md").read_text(encoding="utf-8").split(":::{glossary}\n")[1].splitlines()
    terms = [line for line in lines if line and not line.startswith((" ", ":"))]
    assert len(terms) == len(set(terms)) >= 30
    assert terms == sorted(terms, key=str.lower)


def test_names_of_the_package_in_the_notation_exist():
    import greedy_helpers as gh

    names = re.findall(r"`gh\.(\w+)", (SITE / "notation.md").read_text(encoding="utf-8"))
    assert len(names) > 12
    for name in names:
        assert hasattr(gh, name), name


def messages(path):
    """Every string of a Python file, pieces that stand side by side joined; `…` for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_troubleshooting_quotes_what_the_package_prints():
    text = (SITE / "troubleshooting.md").read_text(encoding="utf-8")
    sections = text.split("\n## ")[1:]
    assert len(sections) == 12
    printed = [message for path in (ROOT / "greedy_helpers").rglob("*.py") for message in messages(path)]
    for section in sections:
        title = section.splitlines()[0]
        quoted = re.findall(r"^Message: `(.+)`$", section, re.MULTILINE)
        assert bool(quoted) != ("No message." in section), title
        assert re.search(r"\*\*Reason\.\*\*.+\*\*Way out\.\*\*", section, re.DOTALL), title
        for message in quoted:
            pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")), re.DOTALL)
            assert any(pattern.search(one) for one in printed), f"{title}: nothing prints {message!r}"
    import greedy_helpers as gh

    for name in re.findall(r"`gh\.(\w+)", text):
        assert hasattr(gh, name), name


def test_docstrings_become_valid_markup():
    plain_text = script(SITE / "_ext" / "docstrings.py").plain_text
    assert plain_text(["|w g| of `a | b` and H^-1_ or :func:`x`"]) == [r"\|w g\| of ``a | b`` and H^-1\_ or :func:`x`"]
    table = plain_text(["Text", "| a | b |", "|---|---|", "more"])
    assert table == ["Text", "", ".. code-block:: text", "", "   | a | b |", "   |---|---|", "", "more"]


def test_a_link_that_leads_nowhere_fails_the_build(build, tmp_path, monkeypatch):
    """Sphinx warns of it, and jupyter-book is asked to fail then."""
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(build, "BUILD", tmp_path / "site")
    monkeypatch.setattr(build.subprocess, "run", run)
    assert build.main() == 1
    assert "--warningiserror" in commands[0]


def test_all_links_are_of_the_kind_that_sphinx_checks(build, tmp_path):
    """It reads Markdown's links, not HTML's."""
    build.assemble(tmp_path)
    sources = [*tmp_path.rglob("*.md"), *(tmp_path / "notebooks").glob("*.ipynb")]
    assert len(sources) > 25
    for path in sources:
        tags = re.findall(r"<(?:a|img|iframe|link|script)\s[^>]*", path.read_text(encoding="utf-8"))
        assert not [tag for tag in tags if "data:" not in tag], path
