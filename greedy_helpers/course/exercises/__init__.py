"""Checkers for the notebooks' exercises. Each takes your function, tries it, and raises with a hint if it is not right.

Three levels each: the shape, the values against an independent reference, and an edge case. Sorted by notebook.
"""

# ruff: noqa: F403 - every check_ of these files is exported, below

from .common import NotYet
from .nb00_to_03 import *
from .nb04_to_06 import *
from .nb07_to_09 import *
from .nb10 import *
from .nb11 import *
from .nb12 import *

__all__ = ["NotYet", *sorted(name for name in globals() if name.startswith("check_"))]
