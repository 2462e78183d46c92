"""What a notebook consists of: its sections, which of them are optional, how long they take.

python notebooks/parts.py       # words and minutes of every notebook, and of the core path
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
RECORDED = FOLDER.parent / "data" / "results" / "notebooks.json"  # by `make notebooks`
# Our assumption on a reader: words of prose, and lines of code, in a minute.
WORDS, LINES = 150, 20
_TASK = re.compile(r"\*\*\d+ · [^*]+\*\* \*\((optional, )?[^)]*?(\d+) minutes")


def text(cell: dict) -> str:
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def sections(notebook: dict) -> list[tuple[str, list[dict]]]:
    """(heading, cells): a new section at every cell that holds a heading of level 2, named by its last such heading."""
    found = [("", [])]
    for cell in notebook["cells"]:
        headings = re.findall(r"^## (.+)$", text(cell), re.MULTILINE) if cell["cell_type"] == "markdown" else []
        if headings:
            found.append((headings[-1], []))
        found[-1][1].append(cell)
    return found


def is_optional(heading: str) -> bool:
    return heading.endswith("(optional)")


def on_core_path(notebook: dict) -> bool:
    return "| **Path** | Core" in text(notebook["cells"][0])


def words(cells: Iterable[dict]) -> int:
    return sum(len(text(cell).split()) for cell in cells if cell["cell_type"] == "markdown")


def core_cells(notebook: dict) -> list[dict]:
    return [cell for heading, cells in sections(notebook) if not is_optional(heading) for cell in cells]


def minutes(notebook: dict, seconds: float = 0.0) -> dict[str, float]:
    """`reading` of the sections that are not optional, `running` of the whole notebook, `exercises` not optional.

    Reading ends where a task begins; the minutes that the task names begin.
    """
    cells, tasks, lines, at_work = [], [], 0, False
    for cell in core_cells(notebook):
        found = _TASK.findall(text(cell)) if cell["cell_type"] == "markdown" else []
        tasks += found
        at_work = bool(found) or (at_work and "## " not in text(cell))
        if not at_work:
            cells.append(cell)
            if cell["cell_type"] == "code" and "setup" not in cell["metadata"].get("tags", []):
                lines += text(cell).count("\n") + 1
    return {
        "reading": words(cells) / WORDS + lines / LINES,
        "running": seconds / 60,
        "exercises": sum(int(length) for optional, length in tasks if not optional),
    }


def table(paths: Iterable[Path]) -> str:
    """Markdown: words (of the core sections, of all) and minutes per notebook, and the sum over the core path."""
    rows = ["| notebook | path | words | reading | running | exercises |", "|---|---|---:|---:|---:|---:|"]
    measured = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.is_file() else {}
    total = dict.fromkeys(("reading", "running", "exercises"), 0.0)
    for path in paths:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        title = next(line.lstrip("# ") for line in text(notebook["cells"][0]).splitlines() if line.startswith("#"))
        spent, core = minutes(notebook, measured.get(path.stem, {}).get("seconds", 0)), on_core_path(notebook)
        counts = [words(core_cells(notebook)), words(notebook["cells"])]
        shown = " of ".join(f"{count:,}" for count in dict.fromkeys(counts))
        numbers = " | ".join(f"{value:.0f}" for value in spent.values())
        rows.append(f"| [{title}](notebooks/{path.name}) | {'core' if core else 'optional'} | {shown} | {numbers} |")
        if core:
            total = {key: total[key] + value for key, value in spent.items()}
    sums = " | ".join(f"**{value:.0f}**" for value in total.values())
    rows.append(f"| **the core path: {sum(total.values()) / 60:.1f} hours** | | | {sums} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.stdout.write(table(sorted(FOLDER.glob("[0-9]*.ipynb"))) + "\n")
