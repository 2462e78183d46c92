"""Exercise editions: the notebooks with the solutions taken out, in notebooks/exercises/.

    python notebooks/editions.py            # write them all (`make exercises`)
    python notebooks/editions.py --check    # say which are not current; exit code 1 if any

Cells tagged `solution` become stubs: functions keep their signature and raise NotImplementedError, other names are set
to `...`. Everything else stays, checkers included, without outputs and counts. Same notebook in, same bytes out.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Collection
from pathlib import Path

import nbformat
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
TARGET = FOLDER / "exercises"
_METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
# Relative links to files; `a[i](x)` in code is none.
_LINK = re.compile(r'(\]\(|(?:src|href)=")([\w./-]+\.(?:ipynb|md|py|json|toml|png|svg|html))(?=[)"#])')
_TASK = re.compile(r"\*\*(\d+ · [^*]+)\*\*")
# The line on top that leads here.
_LEADS_HERE = re.compile(r"^\*\*Work in the \[exercise edition\].*\n+", re.MULTILINE)
# What the notebook says to a reader of the solutions, and what it says here.
_WORDING = {"he solution is the folded cell below the task": "he stub below each task is for your answer"}


def sources() -> list[Path]:
    """The notebooks that have solutions to take out."""
    notebooks = sorted(FOLDER.glob("[0-9]*.ipynb"))
    return [path for path in notebooks if any(map(is_solution, nbformat.read(path, as_version=4).cells))]


def is_solution(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and "solution" in cell.metadata.get("tags", [])


def stub(solution: str, task: str) -> str:
    """The solution's source with nothing of the answer left.

    Functions keep their `def` lines and docstring; assigned names become `...`; imports stay, since an answer may need
    them. `task` is what the comment and the error call the exercise, e.g. "1 · Magnitude of a gated channel".

    Raises:
        ValueError: a statement of another kind; it would have to be kept or dropped, and only its author knows.
    """
    pieces, number = [], task.split(" ")[0]
    for node in ast.parse(solution).body:
        if isinstance(node, ast.FunctionDef):
            node.body = node.body[:1] if ast.get_docstring(node) else []
            message = f"exercise {number}: write the body of {node.name}, run this cell, then the checker"
            pieces.append(
                f"{ast.unparse(node)}\n"
                f"    # {task}: your code goes here, in place of the next line.\n"
                f'    raise NotImplementedError("{message}")'
            )
        elif isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets):
            names = " = ".join(target.id for target in node.targets)
            pieces.append(f"{names} = ...  # {task}: your answer goes here, in place of the dots")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            pieces.append(ast.unparse(node))
        else:
            found = ast.unparse(node).splitlines()[0]
            raise ValueError(f"exercise {task}: expected functions, assignments to names and imports, found `{found}`")
    return "\n\n\n".join(pieces)


def edition(notebook: NotebookNode, name: str, others: Collection[str] = ()) -> NotebookNode:
    """The notebook without solutions, outputs, counts and folding.

    `name` is its file name, for the note on top; links to the notebooks in `others` lead to their editions.

    Raises:
        ValueError: a solution without a task (`**1 · Name**`) in the text in front of it, or one that has no stub.
    """

    def from_below(match: re.Match) -> str:
        before, path = match.groups()
        return before + (path if path in others else f"../{path}")

    cells, task = [], None
    for old in notebook.cells:
        cell = nbformat.from_dict({"cell_type": old.cell_type, "id": old.id, "metadata": {}, "source": old.source})
        if old.metadata.get("tags"):
            cell.metadata["tags"] = list(old.metadata["tags"])
        if old.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        else:
            task = (_TASK.findall(old.source) or [task])[-1]
            cell.source = _LINK.sub(from_below, _LEADS_HERE.sub("", cell.source))
            for here, there in _WORDING.items():
                cell.source = cell.source.replace(here, there)
            cell.source = cell.source.replace(f"/notebooks/{name})", f"/notebooks/{TARGET.name}/{name})")  # the badge
        if is_solution(old):
            if task is None:
                raise ValueError(f"{name}: expected **1 · Name** in front of the solution in cell {old.id}, found none")
            cell.metadata["tags"] = ["exercise"]
            cell.source = stub(old.source, task)
        cells.append(cell)
    note = (
        f"> **Exercise edition** of [{name}](../{name}), which has the solutions and all outputs. "
        "Work in a copy: `make exercises` writes this file anew."
    )
    cells.insert(1, nbformat.v4.new_markdown_cell(note, id="exercise-edition"))
    return nbformat.from_dict({"cells": cells, "metadata": _METADATA, "nbformat": 4, "nbformat_minor": 5})


def editions() -> dict[Path, str]:
    """Path -> text of every edition as it should be."""
    paths = sources()
    names = {path.name for path in paths}
    found = {path.name: edition(nbformat.read(path, as_version=4), path.name, names) for path in paths}
    for notebook in found.values():
        nbformat.validate(notebook)
    return {TARGET / name: nbformat.writes(notebook, version=4) + "\n" for name, notebook in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if an edition is not current")
    args = parser.parse_args()
    wanted = editions()
    found = {path: path.read_text(encoding="utf-8") for path in TARGET.glob("*.ipynb")}
    stale = sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
    if args.check:
        for path in stale:
            print(f"not current: {path.relative_to(FOLDER.parent)}; `make exercises` writes it", file=sys.stderr)
        return 1 if stale else 0
    TARGET.mkdir(exist_ok=True)
    for path in stale:
        if path in wanted:
            path.write_text(wanted[path], encoding="utf-8")
        else:  # its notebook is gone, or has no solutions any more
            path.unlink()
        print(f"{'wrote' if path in wanted else 'removed'} {path.relative_to(FOLDER.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
