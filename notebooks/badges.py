"""Colab badges: a line on top of each notebook's first cell that opens it in Colab.

    python notebooks/badges.py               # insert or update them in all notebooks
    python notebooks/badges.py --check       # say which lack one or have an old one; exit code 1 if any
    python notebooks/badges.py --remove
    python notebooks/badges.py --repository https://github.com/you/your-fork    # move there: every file that names it

The address is the repository's in pyproject.toml. Nothing but the badge's line changes, outputs included. Afterwards
`make exercises` brings the exercise editions up to date.
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
_BADGE = re.compile(r"\[!\[[^\]]*\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]\([^)]*\)\n+")


def repository(root: Path = ROOT) -> str:
    """The repository's address, from pyproject.toml: the one place that names it."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


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


def changed(path: Path, remove: bool = False, address: str | None = None, root: Path = ROOT) -> str | None:
    """The new text of the notebook's file, or None if it is as it should be.

    Raises:
        ValueError: the notebook does not begin with a markdown cell.
    """
    old = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(old, as_version=4)
    first = notebook.cells[0]
    if first.cell_type != "markdown":
        raise ValueError(f"{path}: expected a markdown cell on top, found a {first.cell_type} cell")
    place = path.resolve().relative_to(root).as_posix()
    wanted = without_badge(first.source) if remove else with_badge(first.source, place, address or repository())
    if first.source == wanted:
        return None
    first.source = wanted
    return nbformat.writes(notebook, version=4) + "\n"


def move(address: str, root: Path = ROOT) -> list[Path]:
    """Replace the repository's address in pyproject.toml and in every file that repeats it; the files changed.

    Raises:
        ValueError: see :func:`badge`; nothing has been written then.
    """
    badge("notebooks", address)
    old = repository(root)
    names = ("pyproject.toml", "CITATION.cff", "CHANGELOG.md", "README.md")
    places = [*(root / name for name in names), *sorted((root / "notebooks").glob("[0-9]*.ipynb"))]
    found = [path for path in places if path.is_file() and old in path.read_text(encoding="utf-8")]
    for path in found:
        path.write_text(path.read_text(encoding="utf-8").replace(old, address.rstrip("/")), encoding="utf-8")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--remove", action="store_true")
    parser.add_argument("--repository", metavar="ADDRESS", help="move to this address on GitHub first")
    args = parser.parse_args()
    if args.repository:
        try:
            for path in move(args.repository):
                print(f"{path.relative_to(ROOT)}: names {args.repository}")
        except ValueError as error:
            parser.error(str(error))
    stale = False
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        text = changed(path, args.remove)
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
