"""The docstrings are plain text with `code`, |x| for absolute values and an occasional table: make them RST."""

from __future__ import annotations

import re
from typing import Any

_CODE = re.compile(r"((?::\w+:)?``?[^`]+``?)")  # `x`, ``x``, :func:`x`


def plain_text(lines: list[str]) -> list[str]:
    """`code` as ``code``, tables as they are written; no substitutions or links by accident."""
    found: list[str] = []
    in_table = False
    for line in lines:
        if line.lstrip().startswith("| ") or line.lstrip().startswith("|-"):
            if not in_table:
                found += ["", ".. code-block:: text", ""]
            found.append("   " + line.strip())
            in_table = True
            continue
        if in_table:
            found.append("")
            in_table = False
        pieces = _CODE.split(line)
        pieces[1::2] = [f"``{piece.strip('`')}``" if piece[0] == "`" else piece for piece in pieces[1::2]]
        pieces[::2] = [re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", piece.replace("|", r"\|")) for piece in pieces[::2]]
        found.append("".join(pieces))
    return found


def _process(app, what, name, obj, options, lines: list[str]) -> None:
    lines[:] = plain_text(lines)


def setup(app) -> dict:
    from sphinx.ext.autodoc.mock import _MockObject

    # Libraries are mocked, and `float | Tensor` at module level asks the mock for a union.
    _MockObject.__or__ = _MockObject.__ror__ = lambda self, other: Any
    app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon splits `x: y` at a colon
    return {"parallel_read_safe": True}
