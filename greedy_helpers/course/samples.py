"""How much text a notebook takes."""

from __future__ import annotations

import os

from ..data import EMBEDDED


def n_windows(model_name: str, embedded: int, larger: int) -> int:
    """Windows of text: `embedded` for the models of six million parameters that come along, `larger` for any other.

    The environment variable GREEDY_WINDOWS is an upper limit, for a quick look whether a notebook runs.
    """
    wanted = embedded if model_name in EMBEDDED else larger
    return min(wanted, int(os.environ.get("GREEDY_WINDOWS", wanted)))
