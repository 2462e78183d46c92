"""Execute notebooks top to bottom: in place for committing, or as an HTML report to read.

    python notebooks/run.py notebooks/00_quickstart.ipynb --html reports
    python notebooks/run.py notebooks/*.ipynb --in-place

What the cells tagged `summary` print is repeated on the terminal.
"""

from __future__ import annotations

import argparse
import base64
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

# What a reader's front end may write into a notebook and a repository should not carry.
_METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, counts 1..n, and no metadata but the kernelspec."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        if "solution" in cell.metadata.get("tags", []):
            cell.metadata["jupyter"] = {"source_hidden": True}  # folded until the reader opens it
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata = _METADATA | {"language_info": {"name": "python"}}
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, kernel_name="python3", timeout=900, record_timing=False, resources=resources)
    client.extra_arguments = ["--log-level=40"]  # errors only: the kernel's notes on its sockets are not for readers
    client.execute()
    notebook.metadata = _METADATA | {"language_info": {"name": "python"}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_chatter(output)]
    return notebook


def is_chatter(output: nbformat.NotebookNode) -> bool:
    """Progress bars and library messages: a reader of the committed notebook needs neither."""
    return output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def figures(notebook: nbformat.NotebookNode, tag: str) -> list[bytes]:
    """PNG pictures in the outputs of the cells with that tag."""
    return [
        base64.b64decode(output["data"]["image/png"])
        for cell in notebook.cells
        if tag in cell.metadata.get("tags", [])
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--in-place", action="store_true", help="write the outputs into the notebook")
    parser.add_argument("--html", type=Path, metavar="FOLDER", help="write an HTML report into this folder")
    args = parser.parse_args()
    for path in args.notebooks:
        if not path.is_file():
            parser.error(f"expected a notebook at {path}, found nothing there")
        started = time.monotonic()
        print(f"executing {path} ...", flush=True)
        try:
            notebook = execute(path)
        except CellExecutionError as error:
            print(error, file=sys.stderr)
            return 1
        for cell in notebook.cells:
            if "summary" in cell.metadata.get("tags", []):
                print("".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream"))
        if args.in_place:
            nbformat.write(notebook, path)
            for number, png in enumerate(figures(notebook, "readme-figure")):
                target = path.parent / "images" / f"{path.stem}{number or ''}.png"
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(png)
        if args.html is not None:
            args.html.mkdir(parents=True, exist_ok=True)
            target = args.html / f"{path.stem}.html"
            target.write_text(HTMLExporter().from_notebook_node(notebook)[0])
            print(f"report: {target.resolve()}")
        print(f"{path}: {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
