"""What all checkers use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NotYet(AssertionError):
    """The answer is not right yet; the message says what was expected, what was found, and where to look."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise NotYet(message)


def is_index(found: object, shape: tuple[int, ...], what: str) -> Tensor:
    expect(isinstance(found, Tensor), f"{what}: expected a torch tensor, found {type(found).__name__}")
    expect(found.dtype == torch.long, f"{what}: expected dtype torch.long, found {found.dtype}")
    expect(tuple(found.shape) == shape, f"{what}: expected shape {list(shape)}, found {list(found.shape)}")
    return found


def is_tensor(found: object, shape: tuple[int, ...], what: str) -> Tensor:
    expect(isinstance(found, Tensor), f"{what}: expected a torch tensor, found {type(found).__name__}")
    expect(tuple(found.shape) == shape, f"{what}: expected shape {list(shape)}, found {list(found.shape)}")
    return found


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
