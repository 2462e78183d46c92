"""What all checkers use: call the reader's function, compare its answer, and name the mistake that it looks like."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class NotYet(AssertionError):
    """The answer is not right yet; the message says what was expected, what was found, and where to look."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise NotYet(message)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return _equal(vars(one), vars(other)) if hasattr(one, "__dict__") else one == other


def call(what: str, function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`, which has to leave its arguments as they are."""
    before = copy.deepcopy(arguments)
    found = function(*arguments)
    expect(_equal(before, arguments), f"{what}: your function changed its arguments; work on copies")
    return found


def like(what: str, found: Any, right: Any) -> Any:
    """`found`, refused if it has another type, dtype or shape than `right`. A `right` of shape [] takes any number."""

    def expected(condition: bool, kind: str) -> None:
        expect(condition, f"{what}: expected {kind}, found {type(found).__name__}")

    if isinstance(right, Tensor) and right.ndim == 0:
        try:
            found = torch.as_tensor(found, dtype=torch.float64).detach()
        except (TypeError, ValueError, RuntimeError):
            expected(False, "a number")
        expect(found.numel() == 1, f"{what}: expected one number, found shape {list(found.shape)}")
        return found.reshape(())
    if isinstance(right, Tensor):
        expected(isinstance(found, Tensor), "a torch tensor")
        floating = found.is_floating_point() and right.is_floating_point()
        expect(floating or found.dtype == right.dtype, f"{what}: expected dtype {right.dtype}, found {found.dtype}")
        expect(found.shape == right.shape, f"{what}: expected shape {list(right.shape)}, found {list(found.shape)}")
        return found.detach()
    if isinstance(right, list):
        expected(isinstance(found, list | tuple), "a list")
        return list(found)
    matches = isinstance(found, type(right)) and isinstance(found, bool) == isinstance(right, bool)
    kinds = {float: "a float (of a tensor: .item())", int: "a whole number (int)", bool: "True or False"}
    expected(matches, kinds.get(type(right), type(right).__name__))
    return found


def _close(one: Any, other: Any, rtol: float, atol: float) -> bool:
    if not isinstance(one, Tensor | float):
        return one == other
    one, other = (torch.as_tensor(value).double() for value in (one, other))
    return one.shape == other.shape and torch.allclose(one, other, rtol, atol)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor) and value.ndim > 1:
        return f"\n{value}\n"
    if isinstance(value, Tensor) and value.ndim == 1:
        return f"[{', '.join(_shown(number) for number in value.tolist())}]"
    return f"{value:.6g}" if isinstance(value, Tensor | float) else str(value)


def compare(what: str, found: Any, right: Any, *hints: tuple | str, rtol: float = 1e-5, atol: float = 1e-8) -> Any:
    """`found` if it is like `right` and close to it. Otherwise the first hint that fits joins the message.

    Args:
        hints: (wrong value or test of `found`, sentence), or a sentence alone, which always fits.

    Raises:
        NotYet: another type, dtype, shape or value.
    """
    found = like(what, found, right)
    if _close(found, right, rtol, atol):
        return found
    message = f"{what}: expected {_shown(right)}, found {_shown(found)}"
    for hint in hints:
        wrong, sentence = hint if isinstance(hint, tuple) else (found, hint)
        if wrong(found) if callable(wrong) else wrong is found or _close(found, wrong, max(rtol, 1e-3), atol):
            raise NotYet(f"{message}. {sentence}")
    raise NotYet(message)


@dataclass
class Answer:
    """What a function returned for one of the checker's questions."""

    what: str
    found: Any

    def must_be(self, right: Any, *hints: tuple | str, **tolerances: float) -> Any:
        return compare(self.what, self.found, right, *hints, **tolerances)


def ask(what: str, function: Callable, *arguments: Any) -> Answer:
    return Answer(what, call(what, function, *arguments))


def parts(what: str, found: Any, names: str) -> tuple:
    """The parts of an answer that should be a tuple of as many as `names` has."""
    fits = isinstance(found, tuple | list) and len(found) == len(names.split(", "))
    expect(fits, f"{what}: expected ({names}), found {type(found).__name__}")
    return tuple(found)


def refuses(what: str, function: Callable, *arguments: Any) -> None:
    """The function has to raise a ValueError with a message."""
    try:
        found = function(*arguments)
    except ValueError as error:
        return expect(bool(str(error)), f"{what}: the ValueError has to say what was expected and what was found")
    raise NotYet(f"{what}: expected a ValueError, found {found!r}")


def is_linear(name: str, layer: nn.Linear, d_in: int, d_out: int) -> None:
    """The layer has to be of that size: its weight, its bias if it has one, and what it says of itself."""
    compare(f"{name}.weight, its shape", list(layer.weight.shape), [d_out, d_in])
    if layer.bias is not None:
        hint = "The channels that go take their biases along; the last layer's bias belongs to its outputs and stays"
        compare(f"{name}.bias, its length", len(layer.bias), d_out, hint)
    hint = "A new nn.Linear has them by itself; if you replace the weight, set them too"
    compare(f"{name}, its in_features and out_features", [layer.in_features, layer.out_features], [d_in, d_out], hint)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal random numbers, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def ridge(x: Tensor, y: Tensor, toward: Tensor, lam: float) -> Tensor:
    """min ||Y - X W'||^2 + lam ||W - toward||^2 by plain least squares with sqrt(lam) I stacked below X: [d_y, d_x]."""
    above = torch.cat([x, math.sqrt(lam) * torch.eye(x.shape[1]).to(x)])
    return torch.linalg.lstsq(above, torch.cat([y, math.sqrt(lam) * toward.T])).solution.T
