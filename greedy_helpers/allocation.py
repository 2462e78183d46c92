"""How many units each module loses, and which: uniform ratios."""

from __future__ import annotations

import torch
from torch import Tensor


def check_ratio(ratio: float) -> float:
    """The share of units to remove, in [0, 1).

    Raises:
        ValueError: outside [0, 1) or not a number.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise ValueError(f"expected a ratio in [0, 1), the share of units to remove, found {ratio!r}")
    return float(ratio)


def keep_top(scores: Tensor, ratio: float) -> Tensor:
    """The units to keep: sorted long [n_keep]. Removes the floor(ratio * n) lowest, so never more than asked.

    Equal scores: the earlier unit stays.

    Raises:
        ValueError: ratio outside [0, 1).
        FloatingPointError: a score is NaN.
    """
    check_ratio(ratio)
    if scores.isnan().any():
        raise FloatingPointError(f"expected a number for every unit, found {int(scores.isnan().sum())} NaN scores")
    n_keep = len(scores) - int(ratio * len(scores) + 1e-9)  # 0.3 * 10 is 2.999...96 in floating point
    order = torch.argsort(scores.cpu(), descending=True, stable=True)
    return torch.sort(order[:n_keep]).values
