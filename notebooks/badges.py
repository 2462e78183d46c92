"""Where this repository lies on GitHub: Colab badges on the notebooks, and the address in their set-up cells.

    python notebooks/badges.py --repository https://github.com/you/your-fork    # every file that names the address
    python notebooks/badges.py               # badges as the address in pyproject.toml says: none while there is none
    python notebooks/badges.py --check       # say which notebooks are not so; exit code 1 if any

Nothing else in a notebook changes, outputs included. Afterwards `make exercises` brings the exercise editions up to
date.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import nbformat

ROOT = Path(__file__).resolve().parent.parent
BRANCH = "main"
_URL = re.compile(r'\n\[project\.urls\]\nRepository = "[^"]*"\n')
_CODE = re.compile(r"^repository-code: .*\n", re.MULTILINE)
_SETUP = re.compile(r'^REPOSITORY = "[^"]*"', re.MULTILINE)
_BADGE = re.compile(r"\[!\[[^\]]*\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]\([^)]*\)\n+")


def repository(root: Path = ROOT) -> str | None:
    """The repository's address, from pyproject.toml; None while nobody has said where it lies."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository")


def badge(path: str, address: str) -> str:
    """The badge's line for the notebook at `path` in the repository at `address`.

    Raises:
        ValueError: Colab opens repositories on GitHub, and this is none.
    """
    place = urlsplit(address)
    if place.netloc != "github.com" or place.path.strip("/").count("/") != 1:
        raise ValueError(f"expected a repository on GitHub, https://github.com/owner/name, found {address}")
    target = f"https://colab.research.google.com/github/{place.path.strip('/')}/blob/{BRANCH}/{path}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({target})\n\n"


def has_badge(source: str) -> bool:
    return _BADGE.match(source) is not None


def with_badge(source: str, path: str, address: str) -> str:
    """The first cell's text with exactly one badge, on top."""
    return badge(path, address) + without_badge(source)


def without_badge(source: str) -> str:
    return _BADGE.sub("", source, count=1) if has_badge(source) else source


def changed(path: Path, address: str | None, root: Path = ROOT) -> str | None:
    """The new text of the notebook's file, for the repository at `address` or none; or None if it is as it should be.

    Raises:
        ValueError: the notebook does not begin with a markdown cell.
    """
    old = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(old, as_version=4)
    first = notebook.cells[0]
    if first.cell_type != "markdown":
        raise ValueError(f"{path}: expected a markdown cell on top, found a {first.cell_type} cell")
    place = path.resolve().relative_to(root).as_posix()
    first.source = with_badge(first.source, place, address) if address else without_badge(first.source)
    for cell in notebook.cells:
        if "setup" in cell.metadata.get("tags", []):
            cell.source = _SETUP.sub(f'REPOSITORY = "{address or ""}"', cell.source)
    new = nbformat.writes(notebook, version=4) + "\n"
    return new if new != old else None


def move(address: str, root: Path = ROOT) -> None:
    """Write the repository's address into pyproject.toml and CITATION.cff.

    Raises:
        ValueError: see :func:`badge`; nothing has been written then.
    """
    badge("notebooks", address)
    address = address.rstrip("/")
    for name, known, line in (
        ("pyproject.toml", _URL, f'\n[project.urls]\nRepository = "{address}"\n'),
        ("CITATION.cff", _CODE, f"repository-code: {address}\n"),
    ):
        path = root / name
        path.write_text(known.sub("", path.read_text(encoding="utf-8")) + line, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--repository", metavar="ADDRESS", help="the repository lies at this address on GitHub")
    args = parser.parse_args()
    if args.repository:
        try:
            move(args.repository)
        except ValueError as error:
            parser.error(str(error))
    stale = False
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        text = changed(path, repository())
        if text is None:
            continue
        stale = True
        print(
            f"{path.name}: {'not current' if args.check else 'changed'}", file=sys.stderr if args.check else sys.stdout
        )
        if not args.check:
            path.write_text(text, encoding="utf-8")
    return int(args.check and stale)


if __name__ == "__main__":
    sys.exit(main())
