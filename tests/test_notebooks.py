"""What is committed is what a reader sees: executed in order, small, one set-up cell, no widget state.

nbval executes the notebooks; this file looks at how they were saved.
"""

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
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert f'REPOSITORY = "{urls["Repository"]}"' in first
    assert "\n    %pip install --quiet git+{REPOSITORY}\n" in first, "on Colab the cell has to install the package"
    assert "torch" not in first.replace("its own torch", "")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_at_most_two_code_cells_in_a_row(path):
    kinds = "".join("c" if cell.cell_type == "code" else "m" for cell in read(path).cells)
    assert "ccc" not in kinds, kinds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_checks_what_it_claims(path):
    checking = [cell for cell in code_cells(read(path)) if "assert" in cell.source]
    assert len(checking) >= 3


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
