"""What is committed is what a reader sees: executed in order, small, one set-up cell, no widget state.

nbval executes the notebooks; this file looks at how they were saved.
"""

import ast
import importlib.util
import re
import tomllib
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def complaints(notebook) -> list[str]:
    """What is wrong with the way a notebook was saved; empty if nothing is."""
    found, cells = [], code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"not executed top to bottom: counts {counts}")
    if "widgets" in notebook.metadata:
        found.append("widget state")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append(f"kernelspec {notebook.metadata.get('kernelspec')}")
    for number, cell in enumerate(cells, 1):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        if len(lines) > 40:
            found.append(f"cell {number} has {len(lines)} lines")
        if any(output.output_type == "error" for output in cell.outputs):
            found.append(f"cell {number} failed")
        if any(output.get("name") == "stderr" for output in cell.outputs):
            found.append(f"cell {number} wrote to stderr")
    return found


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_as_executed(path):
    assert complaints(read(path)) == []
    assert path.stat().st_size < 2_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_set_up_cell_is_the_same_everywhere_and_names_the_repository(path):
    first = code_cells(read(path))[0].source
    assert first == code_cells(read(NOTEBOOKS[0]))[0].source
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    assert f'REPOSITORY = "{urls.get("Repository", "")}"' in first
    assert "\n    %pip install --quiet git+{REPOSITORY}\n" in first, "on Colab the cell has to install the package"
    assert "torch" not in first.replace("keeps the torch that is there", "")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_at_most_two_code_cells_in_a_row(path):
    kinds = "".join("c" if cell.cell_type == "code" else "m" for cell in read(path).cells)
    assert "ccc" not in kinds, kinds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_checks_what_it_claims(path):
    checking = [cell for cell in code_cells(read(path)) if "assert" in cell.source]
    assert len(checking) >= 3


TASK = re.compile(r"\*\*(\d+) · [^*]+\*\* \*\((?:optional, )?(?:easy|medium|hard), \d+ minutes(, no checker)?\)\*")
QUIZ = re.compile(r"\*\*\d · [^*]+\*\*\n\n<details><summary>Answer</summary>\n\n.+?</details>", re.DOTALL)
HELP = re.compile(r"<details><summary>(.+?)</summary>")


def missing(notebook) -> list[str]:
    """What every notebook of the course has and this one has not; empty if it has everything."""
    found, cells = [], notebook.cells
    first = re.sub(r"\A\[!.*\n+", "", cells[0].source)
    for what, pattern in {
        "title": r"\A# \d\d · \S",
        "promise": r"\*\*Promise\.\*\* \S",
        "objectives": r"\| \*\*You will be able to\*\* \| \S",
        "needs: minutes, memory, GPU": r"\| \*\*Needs\*\* \|.*\bminutes?\b.*\bGB\b.*\bGPU\b",
        "sections of the paper": r"\| \*\*Paper\*\* \|.*(section|appendix)",
        "core path or optional": r"\| \*\*Path\*\* \| (Core|Optional)\b",
        "a link to the exercise edition": r"\]\(exercises/\d\d_\w+\.ipynb\)",
    }.items():
        if not re.search(pattern, first):
            found.append(what)
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    questions = [part for part in re.split(r"(?=\*\*Question)", text)[1:] if "<details>" in part[:1500]]
    if "**Predict" not in text or not questions:
        found.append("a prediction before and a question with a folded answer after a result")
    tasks = 0
    for place, cell in enumerate(cells):
        pieces = re.split(r"(?=\*\*\d+ · [^*?]+\*\*)", cell.source)[1:] if cell.cell_type == "markdown" else []
        for piece in pieces:
            task, help_ = TASK.match(piece), HELP.findall(piece)
            if task is None:
                found.append(f"difficulty and minutes in {piece[:40]!r}")
                continue
            tasks += 1
            if task[2]:
                continue
            if help_[:1] != ["Hint"] or len(help_) < 2:
                found.append(f"a hint, then help with a mistake, in task {task[1]}: found {help_}")
            answer, *checker = cells[place + 1 : place + 3] or [{}]
            solved = answer.get("metadata", {}).get("tags") == ["solution"]
            if not solved or not checker or "exercises.check_" not in checker[0].source:
                found.append(f"a solution and a checker behind task {task[1]}")
    if not 3 <= tasks <= 7:
        found.append(f"three to seven exercises: found {tasks}")
    last = cells[-1].source
    for part in ("## Takeaways", "**Further reading.**"):
        if part not in last:
            found.append(part)
    ends = [text.rfind(f"\n## {name}") for name in ("Scoreboard", "Quiz", "Takeaways")]
    if -1 in ends or ends != sorted(ends):
        found.append("scoreboard, quiz and takeaways at the end, in this order")
    if not 2 <= len(QUIZ.findall(text[ends[1] : ends[2]])) <= 5:
        found.append("two to five quiz questions, each with a folded answer")
    if not any("scoreboard.draw(" in cell.source for cell in code_cells(notebook)):
        found.append("the scoreboard's figure")
    for place, cell in enumerate(cells):
        pictures = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        description = cell.metadata.get("alt", "")
        if bool(pictures) != bool(description) or 0 < len(description) < 60:
            found.append(f"one description per picture: cell {cell.id} has {len(pictures)}, alt {description!r}")
        if len(pictures) > 1:
            found.append(f"cell {place} has {len(pictures)} pictures and one description")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_has_what_every_notebook_of_the_course_has(path):
    assert missing(read(path)) == []


def test_that_check_has_teeth():
    bare = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A title")])
    assert len(missing(bare)) == 14


@pytest.fixture(scope="module")
def parts():
    spec = importlib.util.spec_from_file_location("parts", ROOT / "notebooks" / "parts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names_in(cells) -> tuple[set[str], set[str]]:
    """Names that code cells bind at the top level, and all that they read."""
    bound, read = set(), set()
    for cell in cells:
        tree = ast.parse(re.sub(r"^\s*%.*$", "pass", cell.source, flags=re.MULTILINE))
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                read.add(node.id)
        for node in tree.body:
            targets = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            if not targets:
                targets = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
            bound |= set(targets)
    return bound, read


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_optional_sections_can_be_skipped(parts, path):
    """No cell of a core section reads a name that only an optional section binds."""
    here, needed = set(), {}
    for heading, cells in parts.sections(read(path)):
        code = [cell for cell in cells if cell.cell_type == "code" and "setup" not in cell.metadata.get("tags", [])]
        bound, used = names_in(code)
        if parts.is_optional(heading):
            needed |= {name: heading for name in bound - here}
        else:
            here |= bound
            missing_here = {name: needed[name] for name in used & needed.keys() - here}
            assert not missing_here, f"{heading!r} needs what an optional section defines: {missing_here}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_notebook_is_too_long(parts, path):
    """3,300 words; where optional sections are marked, that many without them, and 4,300 with them."""
    notebook = read(path)
    assert parts.words(parts.core_cells(notebook)) <= 3300
    assert parts.words(notebook.cells) <= 4300


def test_minutes_are_of_the_core(parts):
    head = "# 01 · A\n\n| **Path** | Core: section 1 |"
    tasks = "## 3 · Exercises\n\n**1 · One** *(easy, 5 minutes)*. x\n\n**2 · Two** *(optional, hard, 15 minutes)*. y"
    texts = [head, "## 1 · B\n\n" + "word " * 287, "## 2 · C (optional)\n\n" + "word " * 900, tasks]
    cells = [nbformat.v4.new_markdown_cell(text) for text in texts]
    cells.insert(2, nbformat.v4.new_code_cell("\n".join("x" * 15)))
    notebook = nbformat.v4.new_notebook(cells=cells)
    assert parts.on_core_path(notebook)
    assert parts.minutes(notebook, 90) == {"reading": pytest.approx(2.75, abs=0.05), "running": 1.5, "exercises": 5}
    cells[0].source = cells[0].source.replace("Core", "Optional")
    assert not parts.on_core_path(notebook)


@pytest.mark.parametrize("page", ["README.md", "site/intro.md"])
def test_pages_name_the_core_path(parts, page):
    (listed,) = re.findall(r"The core path is ([\d, and]+)[.,:]", (ROOT / page).read_text().replace("\n", " "))
    assert re.findall(r"\d\d", listed) == [path.name[:2] for path in NOTEBOOKS if parts.on_core_path(read(path))]


def cell(count, source="1", outputs=()):
    return nbformat.v4.new_code_cell(source, execution_count=count, outputs=list(outputs))


@pytest.mark.parametrize(
    ("cells", "metadata", "complaint"),
    [
        ([cell(1), cell(3)], {}, "counts"),
        ([cell(None)], {}, "counts"),
        ([cell(2), cell(1)], {}, "counts"),
        ([cell(1)], {"widgets": {"state": {}}}, "widget state"),
        ([cell(1)], {"kernelspec": {"name": "conda-env-py311", "display_name": "x"}}, "kernelspec"),
        ([cell(1, "\n".join(["x = 1"] * 41))], {}, "41 lines"),
        ([cell(1, outputs=[nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])])], {}, "failed"),
        ([cell(1, outputs=[nbformat.v4.new_output("stream", name="stderr", text="warning")])], {}, "stderr"),
    ],
)
def test_the_checks_have_teeth(cells, metadata, complaint):
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}} | metadata
    found = complaints(nbformat.v4.new_notebook(cells=cells, metadata=metadata))
    assert len(found) == 1
    assert complaint in found[0]
