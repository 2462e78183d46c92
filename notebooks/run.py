"""Execute notebooks top to bottom: in place for committing, or as an HTML report to read.

    python notebooks/run.py notebooks/00_quickstart.ipynb --html reports
    python notebooks/run.py notebooks/*.ipynb --in-place --record data/results/notebooks.json

What the cells tagged `summary` print is repeated on the terminal.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

# All that a committed cell carries beside its text; `alt` is the description of the cell's picture.
_KEPT = ("alt", "tags")
# What a reader's front end may write into a notebook and a repository should not carry.
_METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def execute(path: Path) -> tuple[nbformat.NotebookNode, float]:
    """The notebook with fresh outputs, counts 1..n, and no metadata but the kernelspec; its kernel's peak memory in GB.

    The memory is that of the notebook's own process, 0 where the system does not tell (it does on Linux).
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key in _KEPT}
        if "solution" in cell.metadata.get("tags", []):
            cell.metadata["jupyter"] = {"source_hidden": True}  # folded until the reader opens it
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata = _METADATA | {"language_info": {"name": "python"}}
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, kernel_name="python3", timeout=900, record_timing=False, resources=resources)
    client.extra_arguments = ["--log-level=40"]  # errors only: the kernel's notes on its sockets are not for readers
    peak = [0.0]
    client.on_cell_complete = lambda **_: peak.append(_peak_memory(client.km.provisioner.pid))
    client.execute()
    notebook.metadata = _METADATA | {"language_info": {"name": "python"}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = committed(cell.outputs, cell.id)
    return notebook, max(peak)


def _peak_memory(process: int) -> float:
    """Largest resident memory of a process so far, in GB."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 1e6 if found else 0.0


def report(notebook: nbformat.NotebookNode) -> str:
    """The notebook as an HTML page, every picture with its cell's description for readers who cannot see it."""
    descriptions = [cell.metadata.get("alt", "") for cell, _ in pictures(notebook)]
    # nbconvert has a slot for it and no way to fill it: its template does not ask the cell.
    missing = '<img alt="No description has been provided for this image"'
    page = HTMLExporter().from_notebook_node(notebook)[0]
    if page.count(missing) != len(descriptions):
        return page
    for description in descriptions:  # in the order of the pictures
        page = page.replace(missing, f'<img alt="{html.escape(description)}"', 1)
    return page


def committed(outputs: list[nbformat.NotebookNode], cell_id: str = "cell") -> list[nbformat.NotebookNode]:
    """Without progress bars and library messages, and of an interactive picture only its still form.

    What differs between two runs and means nothing is evened out: where a stream was cut in two, addresses of objects,
    and the random names that pandas gives to styled tables.
    """
    widget, kept, names = "application/vnd.jupyter.widget-view+json", [], {}
    for output in outputs:
        data = output.get("data", {})
        if "image/png" in data:
            data.pop(widget, None)
        if output.get("name") == "stderr" or widget in data:
            continue
        if kept and output.output_type == "stream" and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
            continue
        if "text/plain" in data:
            data["text/plain"] = re.sub(r"^(<[\w.]+(?: object)?) at 0x[0-9a-f]+>$", r"\1>", data["text/plain"])
        if "text/html" in data:
            for name in re.findall(r'<table id="T_([0-9a-f]{5})"', data["text/html"]):
                names.setdefault(name, f"{cell_id}-{len(names)}")
                data["text/html"] = data["text/html"].replace(f"T_{name}", f"T_{names[name]}")
        kept.append(output)
    return kept


def record(file: Path, stem: str, seconds: float, memory: float) -> None:
    """Add to a JSON file what a notebook needed here: seconds, and the peak memory of its process in GB."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    known[stem] = {
        "seconds": round(seconds),
        "memory, GB": round(memory, 1),
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, {threads} threads",
        "model": os.environ.get("GREEDY_MODEL", "llama-mini"),
    }
    file.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")


def pictures(notebook: nbformat.NotebookNode) -> list[tuple[nbformat.NotebookNode, str]]:
    """Every PNG picture in base64, with its cell, from top to bottom."""
    return [
        (cell, output["data"]["image/png"])
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


def figures(notebook: nbformat.NotebookNode, tag: str) -> list[bytes]:
    """PNG pictures in the outputs of the cells with that tag."""
    return [base64.b64decode(png) for cell, png in pictures(notebook) if tag in cell.metadata.get("tags", [])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--in-place", action="store_true", help="write the outputs into the notebook")
    parser.add_argument("--record", type=Path, metavar="FILE", help="note time and memory in this JSON file")
    parser.add_argument("--html", type=Path, metavar="FOLDER", help="write an HTML report into this folder")
    args = parser.parse_args()
    for path in args.notebooks:
        if not path.is_file():
            parser.error(f"expected a notebook at {path}, found nothing there")
        started = time.monotonic()
        print(f"executing {path} ...", flush=True)
        try:
            notebook, peak = execute(path)
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
            target.write_text(report(notebook), encoding="utf-8")
            print(f"report: {target.resolve()}")
        seconds = time.monotonic() - started
        if args.record is not None:
            record(args.record, path.stem, seconds, peak)
        print(f"{path}: {seconds:.0f} s" + (f", {peak:.1f} GB" if peak else ""), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
