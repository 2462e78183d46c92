"""Recovery without retraining: refit a layer to the dense model's outputs by ridge least squares (sec. 3.3)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .moments import Moments
from .structure import set_weight, weight_of


@dataclass(frozen=True)
class Solution:
    """A ridge solution and how well its data determined it.

    Attributes:
        weight, bias: float64 [d_y, d_x] and [d_y] (None for a layer without a bias).
        lam: the absolute damping, `damp` times the mean diagonal of X'X.
        tokens, features: rows of X, and columns of X that are not always zero.
        rank: of X'X: at most the smaller of the two; counted from eigenvalues where they were computed.
        condition: estimated condition number of X'X + lam I (largest over smallest eigenvalue).
        method: `"cholesky"`, or `"eigen"` where rounding left no positive pivots.
    """

    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)
    lam: float
    tokens: int
    features: int
    rank: int
    condition: float
    method: str


def normal_equations(
    moments: Moments, weight: Tensor, bias: Tensor | None = None, damp: float = 1e-2
) -> tuple[Tensor, Tensor, float]:
    """(H, R, lam) with H = X'X + lam I and R = X'(Y - X W0'): the ridge solution is W0 + (H^-1 R)'. Float64.

    Without targets in `moments` they are the layer's own outputs, so R = 0. With a bias the moments are centred.
    """
    w0 = weight.to(moments.xx)
    xx, xy = moments.xx, moments.xy
    if bias is not None:
        xx = xx - torch.outer(moments.x, moments.x) / moments.n
        xy = None if xy is None else xy - torch.outer(moments.x, moments.y) / moments.n
    lam = (damp * xx.diagonal().mean()).item()
    rest = torch.zeros_like(w0.T) if xy is None else xy - xx @ w0.T
    return xx + lam * torch.eye(len(xx)).to(xx), rest, lam


def solve(moments: Moments, weight: Tensor, bias: Tensor | None = None, damp: float = 1e-2) -> Solution:
    """The weight [d_y, d_x] and bias [d_y] nearest to the targets, from the moments alone.

    Minimises ||Y - X W' - b||^2 + lam ||W - W0||^2 with W0 the current `weight` and lam = `damp` times the mean
    diagonal of X'X. The paper states no damping (Algorithm 1), but its 16 x 128 tokens are fewer than LLaMA's 4,096
    features, so X'X is singular without one; pulling toward the current weight, not toward zero, makes no data mean
    no change. With a bias the moments are centred and the bias solves exactly, undamped.

    At W0 the penalty is zero, so the error on the calibration tokens can only go down.

    The factorisation is Cholesky's. Where rounding leaves it without positive pivots (equal features, no damping) the
    eigenvectors are taken instead, and directions that the data do not determine keep the current weight.

    Raises:
        ValueError: damp < 0, or damp = 0 with fewer tokens than features.
        FloatingPointError: the solution holds NaN or Inf.
    """
    d_x = moments.xx.shape[0]
    if damp < 0:
        raise ValueError(f"{moments.name}: expected damp >= 0, found {damp}")
    if moments.n < d_x + (bias is not None):
        numbers = f"{moments.name}: {moments.n} calibration tokens for {d_x} input features"
        if damp == 0:
            raise ValueError(f"{numbers}; expected at least as many tokens as features, or damp > 0")
        warnings.warn(f"{numbers}: the refit is determined by the damping ({damp}) as much as by data", stacklevel=3)
    h, rest, lam = normal_equations(moments, weight, bias, damp)
    features = int((moments.xx.diagonal() > 0).sum())
    rank, condition, method = min(features, moments.n - (bias is not None)), 1.0, "cholesky"
    step = torch.zeros_like(rest)
    if features:  # an input that is always zero teaches nothing
        factor, failed = torch.linalg.cholesky_ex(h)
        # Whether a singular matrix fails to factor is a matter of rounding; a vanishing pivot shows it anyway.
        if failed or factor.diagonal().min() ** 2 <= torch.finfo(h.dtype).eps * d_x * h.diagonal().max():
            method = "eigen"
            step, rank, condition = _solve_by_eigenvectors(h, rest, lam)
        else:
            step, condition = torch.cholesky_solve(rest, factor), _condition(h, factor)
    new = weight.to(h) + step.T
    if not new.isfinite().all():
        raise FloatingPointError(f"{moments.name}: the least-squares solution holds NaN or Inf (damp={damp})")
    new_bias = None if bias is None else (moments.y - new @ moments.x) / moments.n
    return Solution(new, new_bias, lam, moments.n, features, rank, condition, method)


def _solve_by_eigenvectors(h: Tensor, rest: Tensor, lam: float) -> tuple[Tensor, int, float]:
    """H^+ R over the directions that stand out from rounding, their number, and the condition number over them."""
    values, vectors = torch.linalg.eigh(h)
    known = values > torch.finfo(h.dtype).eps * len(h) * values[-1]
    values, vectors = values[known], vectors[:, known]
    rank = int((values - lam > torch.finfo(h.dtype).eps * len(h) * values[-1]).sum())
    return vectors @ ((vectors.T @ rest) / values[:, None]), rank, (values[-1] / values[0]).item()


def _condition(h: Tensor, factor: Tensor, iterations: int = 8) -> float:
    """Power iterations on H and, through its factor, on H^-1: a lower bound, usually within a few percent."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(h), 1, generator=generator, dtype=torch.float64).to(h)
    sizes = []
    for apply in (lambda v: h @ v, lambda v: torch.cholesky_solve(v, factor)):
        v = start / start.norm()
        for _ in range(iterations):
            v = apply(v)
            size = v.norm()
            v = v / size
        sizes.append(size.item())
    return max(1.0, sizes[0] * sizes[1])


def least_squares(
    moments: Moments, weight: Tensor, bias: Tensor | None = None, damp: float = 1e-2
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of :func:`solve`, where nothing else about the solution matters. Float64.

    Raises:
        ValueError, FloatingPointError: as there.
    """
    found = solve(moments, weight, bias, damp)
    return found.weight, found.bias


def refit(linears: Sequence[nn.Module], moments: Moments, damp: float = 1e-2) -> Solution:
    """Refit linears that read the same input X to the targets Y, in place, with one factorisation.

    `moments` pairs X [tokens, d_in] with the linears' targets side by side, Y [tokens, sum of d_out].

    Raises:
        ValueError, FloatingPointError: see :func:`solve`; the linears are then untouched.
    """
    biases = [linear.bias for linear in linears]
    weight = torch.cat([weight_of(linear) for linear in linears])
    found = solve(moments, weight, None if biases[0] is None else torch.cat(biases), damp)
    sizes = [weight_of(linear).shape[0] for linear in linears]
    new_biases = [None] * len(sizes) if found.bias is None else found.bias.split(sizes)
    for linear, w, b in zip(linears, found.weight.split(sizes), new_biases, strict=True):
        set_weight(linear, w, b)
    return found


@torch.no_grad()
def add_to_bias(linear: nn.Module, shift: Tensor) -> None:
    """Add `shift` [d_out] to a layer's bias; a layer without one gets one (`nn.Linear` of Llama, Mistral, Qwen).

    FLAP's remedy (An et al., section 3.4): the mean of what was removed becomes a constant.
    """
    weight = weight_of(linear)
    if linear.bias is None:
        linear.bias = nn.Parameter(shift.to(weight), requires_grad=linear.weight.requires_grad)
    else:
        set_weight(linear, weight, linear.bias.to(shift) + shift)
