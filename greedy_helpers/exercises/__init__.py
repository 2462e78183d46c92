"""Checkers for the notebooks' exercises. Each takes your function, tries it, and raises with a hint if it is not right.

Three levels each: the shape, the values against an independent reference, and an edge case. One file per notebook.
"""

from .common import NotYet
from .nb01 import check_fused_layout, check_pieces, check_remove_channels
from .nb03 import check_group_divergence, check_js_rows, check_with_living_twin

__all__ = [
    "NotYet",
    "check_fused_layout",
    "check_group_divergence",
    "check_js_rows",
    "check_pieces",
    "check_remove_channels",
    "check_with_living_twin",
]
