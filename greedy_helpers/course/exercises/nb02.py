"""Checkers of notebook 02, what to approximate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import expect, same


def _is_float(found: object, shape: tuple[int, ...], what: str) -> Tensor:
    expect(isinstance(found, Tensor), f"{what}: expected a torch tensor, found {type(found).__name__}")
    expect(found.is_floating_point(), f"{what}: expected floating-point numbers, found {found.dtype}")
    expect(tuple(found.shape) == shape, f"{what}: expected shape {list(shape)}, found {list(found.shape)}")
    return found.detach().double()


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-7)


def _numbers(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def check_gated_magnitude(gated_magnitude: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Notebook 02: `gated_magnitude(gate, up, down)` -> [n], ||W - W_-u||^2 of every channel of a gated FFN."""
    generator = torch.Generator().manual_seed(0)
    for n, d in ((7, 3), (4, 4), (1, 5)):
        weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, d), (n, d), (d, n))]
        before = [weight.clone() for weight in weights]
        asked = f"gated_magnitude of {n} channels in {d} dimensions"
        found = _is_float(gated_magnitude(*weights), (n,), asked)
        expect(
            same(weights, before),
            f"{asked}: your function changed its arguments; work on copies",
        )
        gate, up, down = weights
        right = []
        for u in range(n):  # brute force: what is lost when unit u goes
            rest = [gate.clone(), up.clone(), down.clone()]
            rest[0][u], rest[1][u], rest[2][:, u] = 0, 0, 0
            right.append(sum((w - r).square().sum() for w, r in zip(weights, rest, strict=True)))
        right = torch.stack(right)
        expect(not _close(found, right.sqrt()), f"{asked}: these are norms; the distance is asked for squared")
        rows = up.square().sum(1) + gate.square().sum(1)
        expect(not _close(found, rows), f"{asked}: level 2 is missing. A channel also owns its column of `down`")
        expect(
            not _close(found, down.square().sum(0)),
            f"{asked}: level 1 is missing. A channel also owns its rows of `gate` and `up`",
        )
        if n == d:
            expect(
                not _close(found, rows + down.square().sum(1)),
                f"{asked}: you took rows of `down`. Its rows are outputs; channel j is its column j",
            )
        expect(_close(found, right), f"{asked}: expected {_numbers(right)}, found {_numbers(found)}")
    return "correct: two rows and a column, squared"


def check_unit_energy(unit_energy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Notebook 02: `unit_energy(z, B, index)` -> [units], mean over tokens of ||B_u z_u||^2."""
    generator = torch.Generator().manual_seed(0)
    for units, width, shuffled in ((3, 2, False), (2, 4, True), (5, 1, False)):
        z = torch.randn(40, units * width, generator=generator, dtype=torch.float64)
        z = z + z.mean(1, keepdim=True) * 2  # correlated channels, as a head's are
        b = torch.randn(3, units * width, generator=generator, dtype=torch.float64)
        index = torch.arange(units * width)
        if shuffled:
            index = index[torch.randperm(units * width, generator=generator)]
        index = index.view(units, width)
        before = z.clone(), b.clone()
        asked = f"{units} units of {width} channel{'s' * (width > 1)}"
        found = _is_float(unit_energy(z, b, index), (units,), asked)
        expect(
            same((z, b), before),
            f"{asked}: your function changed its arguments; work on copies",
        )
        right = torch.zeros(units, dtype=torch.float64)
        for u in range(units):  # brute force: the output with and without the unit
            silent = z.clone()
            silent[:, index[u]] = 0
            right[u] = (z @ b.T - silent @ b.T).square().sum(1).mean()
        expect(
            not _close(found, right * len(z)),
            f"{asked}: that is the sum over tokens; the *mean* over tokens is asked for",
        )
        expect(not _close(found, right / 3), f"{asked}: sum over the output's dimensions, average over tokens only")
        apart = (z.square().mean(0) * b.square().sum(0))[index].sum(1)
        expect(
            width == 1 or not _close(found, apart),
            f"{asked}: you added up the channels' energies. The channels of a head speak at the same time: add up "
            "what they say first, then square",
        )
        if shuffled:
            consecutive = torch.arange(units * width).view(units, width)
            wrong = torch.stack([(z[:, i] @ b[:, i].T).square().sum(1).mean() for i in consecutive])
            expect(not _close(found, wrong), f"{asked}: channels of a unit need not be neighbours; use `index`")
        expect(_close(found, right), f"{asked}: expected {_numbers(right)}, found {_numbers(found)}")
    return "correct: single channels and heads, in any order"


def check_first_order(first_order: Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]) -> str:
    """Notebook 02: `first_order(loss, A, B)` -> [n], sum over a channel's weights of |w dL/dw| (element1)."""
    generator = torch.Generator().manual_seed(0)
    for n, d, tokens in ((5, 3, 12), (3, 4, 1)):
        x = torch.randn(tokens, d, generator=generator, dtype=torch.float64)
        target = torch.randint(0, d, (tokens,), generator=generator)

        def loss(a: Tensor, b: Tensor, x: Tensor = x, target: Tensor = target) -> Tensor:
            return F.cross_entropy(F.gelu(x @ a.T) @ b.T, target)

        a = torch.randn(n, d, generator=generator, dtype=torch.float64)
        b = torch.randn(d, n, generator=generator, dtype=torch.float64)
        before = a.clone(), b.clone()
        asked = f"{n} channels"
        found = _is_float(first_order(loss, a, b), (n,), asked)
        expect(
            same((a, b), before),
            f"{asked}: your function changed the weights; work on copies",
        )
        expect(
            not (a.requires_grad or b.requires_grad) and a.grad is None and b.grad is None,
            f"{asked}: the caller's tensors now ask for gradients. Differentiate copies: "
            "`A.detach().clone().requires_grad_()`",
        )
        parts_a, parts_b = torch.zeros_like(a), torch.zeros_like(b)  # w dL/dw by central differences, no autograd
        for weight, parts in ((a, parts_a), (b, parts_b)):
            for place in range(weight.numel()):
                pair = []
                for step in (1e-5, -1e-5):
                    moved = weight.clone()
                    moved.view(-1)[place] += step
                    pair.append(loss(moved, b) if weight is a else loss(a, moved))
                parts.view(-1)[place] = weight.view(-1)[place] * (pair[0] - pair[1]) / 2e-5
        right = parts_a.abs().sum(1) + parts_b.abs().sum(0)
        expect(
            not _close(found, parts_a.sum(1).abs() + parts_b.sum(0).abs()),
            f"{asked}: the absolute value comes before the sum (that is LLM-Pruner's 'vector', element1 is asked for)",
        )
        expect(not _close(found, parts_b.abs().sum(0)), f"{asked}: level 1 is missing; a channel also owns row j of A")
        expect(
            not _close(found, parts_a.abs().sum(1)), f"{asked}: level 2 is missing; a channel also owns column j of B"
        )
        expect(
            torch.allclose(found, right, rtol=1e-3, atol=1e-7),
            f"{asked}: expected {_numbers(right)}, found {_numbers(found)}",
        )
    return "correct: the derivative of the loss, weight by weight"


_PURPOSES = {
    "L2 magnitude": ("function", "its formula contains weights and nothing else"),
    "second moment": ("output", "Sigma = E[x x'] and B say how large a unit's part of the module's output is"),
    "Wanda-sp": ("output", "|weight| times the size of what arrives there: no loss anywhere, but activations"),
    "FLAP": ("output", "the variance of an activation times its column's energy: what the module's output would lose"),
    "LLM-Pruner": ("objective", "g is the gradient of the language-modelling loss"),
    "Optimal Brain Damage": ("objective", "h is a second derivative of the loss"),
    "OSSCAR": (
        "output",
        "there is a Hessian in it, but of which function? H = X'X belongs to the squared error of one layer's output, "
        "and no backward pass is needed for it",
    ),
    "random": ("none", "it looks at nothing, so it keeps nothing in particular"),
}


def check_purposes(purposes: Mapping[str, str]) -> str:
    """Notebook 02: criterion -> `"function"`, `"output"`, `"objective"` or `"none"`."""
    expect(isinstance(purposes, Mapping), f"expected a dictionary, found {type(purposes).__name__}")
    missing = [name for name in _PURPOSES if name not in purposes]
    expect(not missing, f"not answered yet: {', '.join(missing)}")
    for name, answer in purposes.items():
        expect(name in _PURPOSES, f"{name!r} was not asked; the names are {', '.join(_PURPOSES)}")
        right, reason = _PURPOSES[name]
        expect(
            answer in ("function", "output", "objective", "none"),
            f"{name}: expected 'function', 'output', 'objective' or 'none', found {answer!r}",
        )
        expect(answer == right, f"{name}: not {answer!r}. Look again: {reason}")
    return "correct: look at what a formula needs, not at its name"


def check_fool_magnitude(fool_magnitude: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> str:
    """Notebook 02: `fool_magnitude(gate, up, down, order)` -> scales c [n] that make L2 rank in that order."""
    generator = torch.Generator().manual_seed(0)
    for n, d in ((6, 4), (9, 2), (1, 3)):
        gate, up = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
        down = torch.randn(d, n, generator=generator, dtype=torch.float64)
        order = torch.randperm(n, generator=generator)
        before = up.clone(), down.clone(), order.clone()
        asked = f"{n} channels in the order {order.tolist()}"
        c = _is_float(fool_magnitude(gate, up, down, order), (n,), asked)
        expect(
            same((up, down, order), before),
            f"{asked}: your function changed its arguments; only return the scales",
        )
        expect(bool((c > 0).all() and c.isfinite().all()), f"{asked}: expected positive, finite scales, found {c}")
        x = torch.randn(8, d, generator=generator, dtype=torch.float64)
        outputs = [
            (F.silu(x @ gate.T) * (x @ u.T)) @ w.T for u, w in ((up, down), (up * c[:, None], down / c))
        ]  # true for any c; shown to whoever wonders
        expect(torch.allclose(*outputs, rtol=1e-6, atol=1e-9), f"{asked}: scales so extreme that rounding shows")
        size = gate.square().sum(1) + (up * c[:, None]).square().sum(1) + (down / c).square().sum(0)
        expect(
            size.argsort().tolist() == order.tolist(),
            f"{asked}: after your scales, L2 ranks them {size.argsort().tolist()} (smallest first). Norms: "
            f"{_numbers(size)}. No scale makes a channel smaller than ||g||^2 + 2 ||u|| ||d||, but every channel can "
            "be made as large as you like: choose targets above everybody's minimum",
        )
        sizes = size[order]
        expect(
            n == 1 or bool((sizes[1:] > sizes[:-1] * (1 + 1e-6)).all()),
            f"{asked}: some channels have equal norms; leave a gap between neighbours",
        )
    return "correct: the same function, and magnitude obeys you"
